"""Random calls of grouped, gated and re-weighted attention, Sinkhorn and group signatures."""

from __future__ import annotations

import itertools
import math
import random

import _nearby
import attention
import torch

import fastattn as fa
from fastattn import testing
from fastattn.runtime.native import use_cpu_isa

OPS = ("grouped", "grouped", "gated", "reweighted", "sinkhorn", "signatures")


def draw(rng: random.Random) -> dict:
    case = attention.draw(rng)
    for option in ("softcap", "sink", "dropout_p"):  # of attention alone
        case.pop(option, None)
    for name in ("score", "bias", "bias_dims", "bias_kind", "nan_padding"):
        case.pop(name, None)
    case["op"] = rng.choice(OPS)
    case["dtype"] = rng.choice(tuple(_nearby.DTYPES))
    mask = case.get("mask", {})
    if case["op"] == "gated":
        case["q_length"] = case["k_length"]
        if "cu_seqlens_k" in mask:
            mask["cu_seqlens_q"] = mask["cu_seqlens_k"]
    case["near"] = rng.choice((0, 1, 5, 128))
    case["groups"] = rng.choice((1, 2, 4, 16, 63))
    case["top_k"] = rng.randint(1, min(case["groups"], 3))
    case["power"] = rng.choice((None, 1.0, 2.0, 3.0, 2.5, 15.0))
    case["gate"] = rng.choice(("multiply", "log"))
    case["temperature"] = rng.choice((0.1, 1.0, 0.03))
    case["iterations"] = rng.randint(1, 8)
    case["causal"] = rng.random() < 0.5
    case["q_size"] = min(max(case["q_size"], 0.01), 5.0)
    if rng.random() < 0.5:
        case["grads"] = [*case["grads"], "sharpness"]
    return case


def check(case: dict) -> None:
    {
        "grouped": _grouped,
        "gated": _gated,
        "reweighted": _reweighted,
        "sinkhorn": _sinkhorn,
        "signatures": _signatures,
    }[case["op"]](case)


def _mask(case: dict, dense: torch.Tensor | None) -> fa.Mask | None:
    options = {
        name: value if name in ("causal", "window") else torch.tensor(value, dtype=torch.int32)
        for name, value in case.get("mask", {}).items()
        if name not in ("dense_dims", "density")
    }
    return fa.Mask(**options, dense=dense) if options or dense is not None else None


def _floors(case: dict, q, k, v, q_factor: float, k_factor: float) -> list[float]:
    """A score's gradient is its weight times the difference of two sums g.v, which cancel where one key has all the weight."""
    difference = 2 * 3.0 * case["value_dim"] * testing.max_finite(v)  # |g| is rarely above 3
    return [difference * q_factor, difference * k_factor * case["q_length"] * case["group"], 0.0, 0.0]


def _run(case: dict, op, inputs: list, names: str, terms: int, floors=(), result_floor=0.0) -> None:
    wanted = [i for i, name in enumerate(names.split()) if name in case["grads"]]
    _nearby.check(
        op, inputs, wanted, _nearby.DTYPES[case["dtype"]], seed=case["seed"], isa=case["isa"], threads=case["threads"],
        terms=terms, floors=floors, result_floor=result_floor,
    )  # fmt: skip


def _distance(case: dict) -> torch.Tensor:
    """How far a key lies before a query, within their document: (Lq, Lk)."""
    mask, lq, lk = case.get("mask", {}), case["q_length"], case["k_length"]
    result = torch.zeros(lq, lk, dtype=torch.int64)
    cuts_q, cuts_k = mask.get("cu_seqlens_q", [0, lq]), mask.get("cu_seqlens_k", [0, lk])
    for (a, b), (c, d) in zip(itertools.pairwise(cuts_q), itertools.pairwise(cuts_k), strict=True):
        i = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        result[a:b, c:d] = i - torch.arange(d - c)
    return result


def _grouped(case: dict) -> None:
    """Softmax attention under a dense mask of the rule: `attention`'s evaluation and bounds."""
    case = {**case, "score": "softmax", "mask": {**case.get("mask", {}), "causal": True}}
    q, k, v, _, dense = attention._inputs(case)
    generator = torch.Generator().manual_seed(case["seed"])
    groups, key_groups = (
        (
            torch.rand(case["batch"], n, case["groups"], generator=generator) < case["top_k"] / case["groups"]
        ).long()
        @ (1 << torch.arange(case["groups"]))
        for n in (case["q_length"], case["k_length"])
    )
    leaves = {n: t.detach().requires_grad_(n in case["grads"]) for n, t in zip("qkv", (q, k, v), strict=True)}
    names, before = fa.cpu_isas(), torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        with use_cpu_isa(names[case["isa"] % len(names)]), testing.nan_filled_outputs():
            out, lse = fa.grouped_attention(
                *leaves.values(), groups, key_groups=key_groups, window=case["near"], scale=case.get("scale"),
                mask=_mask(case, dense), return_lse=True,
            )  # fmt: skip
            wanted = [n for n in leaves if n in case["grads"]]
            grad = attention._gradient(case, 5, out)
            grad_lse = attention._gradient(case, 6, lse) if case["lse_grad"] else None
            found = {"out": out.detach(), "lse": lse.detach()}
            if wanted:
                results = [(out, grad), (lse, grad_lse)][: 2 if case["lse_grad"] else 1]
                pulled = torch.autograd.grad(
                    [r for r, _ in results], [leaves[n] for n in wanted], [g for _, g in results]
                )
                found.update({"d" + n: g for n, g in zip(wanted, pulled, strict=True)})
    finally:
        torch.set_num_threads(before)
    near = _distance(case).abs() <= case["near"]
    rule = (((groups[:, :, None] & key_groups[:, None]) != 0) | near)[:, None]
    dense = rule if dense is None else rule & dense
    for name, truth, bound in attention._expected(case, q, k, v, None, dense, grad, grad_lse, wanted):
        if name in found:
            attention._compare(name, found[name], truth, bound)


def _gated(case: dict) -> None:
    q, k, v, _, dense = attention._inputs({**case, "score": "softmax"})
    generator = torch.Generator().manual_seed(case["seed"])
    assignment = torch.rand(case["batch"], case["q_length"], case["groups"], generator=generator).softmax(-1)
    mask = _mask(case, dense)

    sharpness = torch.tensor(3.0)

    def op(q, k, v, assignment, sharpness):
        return fa.gated_attention(
            q,
            k,
            v,
            assignment,
            window=case["near"],
            sharpness=sharpness,
            gate=case["gate"],
            scale=case.get("scale"),
            mask=mask,
        )

    scale = abs(case.get("scale", case["head_dim"] ** -0.5))
    floors = _floors(case, q, k, v, scale * testing.max_finite(k), scale * testing.max_finite(q))
    floors[3:] = _gate_floors(case, q, k, v, assignment, dense, float(sharpness))
    inputs, names = [q, k, v, assignment, sharpness], "q k v bias sharpness"
    _run(case, op, inputs, names, max(case["k_length"], case["head_dim"]), floors)


def _gate_floors(case: dict, q, k, v, assignment, dense, sharpness: float) -> list[torch.Tensor]:
    """Sizes of the terms that cancel in the gradients of the assignment and of the sharpness.

    A score's gradient is w_ij * (m_ij - sum_k w_ik m_ik) with m = g.v, where both parts may be equal, and the scale takes no part
    in it: sizes are those of the two parts. A gate is a function of c = sharpness * a_i.a_j, by which a score has the slope s * gate *
    (1 - gate), or 1 - gate where its logarithm is added; c has a_j for a_i, a_i for a_j, and a_i.a_j for the sharpness.
    """
    allowed, _ = attention._allowed(case, dense)
    q, k, v, a = (t.detach().double() for t in (q, k, v, assignment))
    k, v = (t.repeat_interleave(case["group"], 1) for t in (k, v))
    far = (_distance(case).abs() > case["near"]).double()
    agreement = a @ a.mT
    gate = torch.sigmoid(sharpness * agreement)[:, None]
    scores = case.get("scale", case["head_dim"] ** -0.5) * (q @ k.mT)
    if case["gate"] == "log":
        slope, scores = 1 - gate, scores + far * gate.log()
    else:
        slope, scores = scores.abs() * gate * (1 - gate), scores * (1 + far * (gate - 1))
    weight = scores.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(nan=0.0)
    size = 3.0 * v.abs().sum(-1)[:, :, None]  # |g| is rarely above 3
    pairs = (weight * (size + (weight * size).sum(-1, keepdim=True)) * slope * far).sum(1)
    return [sharpness * (pairs + pairs.mT) @ a.abs(), (pairs * agreement.abs()).sum()]


def _reweighted(case: dict) -> None:
    q, k, v, _, dense = attention._inputs({**case, "score": "softmax"})
    mask = _mask(case, dense)

    def op(q, k, v):
        return fa.softplus_attention(q, k, v, power=case["power"], mask=mask)

    # scores are c times a cosine, whose gradient is a unit vector over the length
    c = math.log(max(case["head_dim"], 2)) * math.log(max(case["k_length"], 2)) * (case["power"] or 1.0)
    shortest = [float(t.double().norm(dim=-1).amin()) if t.numel() else 1.0 for t in (q, k)]
    factors = [c * (case["power"] or 1.0) / max(n, 1e-6) for n in shortest]
    _run(
        case,
        op,
        [q, k, v],
        "q k v",
        max(case["k_length"], case["head_dim"]),
        _floors(case, q, k, v, *factors),
    )


def _sinkhorn(case: dict) -> None:
    mask, length = case.get("mask", {}), case["k_length"]
    scores = testing.random_tensor(
        case["batch"], length, case["groups"], dtype=_nearby.DTYPES[case["dtype"]], seed=case["seed"], layout=case["layout"]
        if case["layout"] != "columns" else "odd",
    )  # fmt: skip
    options = {"temperature": case["temperature"], "iterations": case["iterations"], "causal": case["causal"]}
    if "cu_seqlens_k" in mask:
        options["cu_seqlens"] = torch.tensor(mask["cu_seqlens_k"], dtype=torch.int32)
    if "key_lengths" in mask:
        options["lengths"] = torch.tensor(mask["key_lengths"], dtype=torch.int32)
    if "prefix_lengths" in mask and case["causal"]:
        options["prefix_lengths"] = torch.tensor(mask["prefix_lengths"], dtype=torch.int32)
    # exp(X + u + v) of sums that cancel: off by the rounding of their largest
    largest = 3 * testing.max_finite(scores) / case["temperature"]
    floors = [largest * 3 * case["iterations"] / case["temperature"]]
    _run(
        case,
        lambda scores: fa.sinkhorn(scores, **options),
        [scores],
        "q",
        length + case["groups"],
        floors,
        largest,
    )


def _signatures(case: dict) -> None:
    assignment = testing.random_tensor(
        case["batch"],
        case["k_length"],
        case["groups"],
        dtype=_nearby.DTYPES[case["dtype"]],
        seed=case["seed"],
    )
    found = fa.focus_groups(assignment, top_k=case["top_k"])
    order = assignment.double().argsort(dim=-1, descending=True, stable=True)[..., : case["top_k"]]
    expected = (1 << order).sum(-1)
    assert torch.equal(found, expected), f"signatures differ at {(found != expected).nonzero()[:1].tolist()}"
