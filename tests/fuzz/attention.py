"""Random calls of `attention` against a float64 evaluation written from the documentation, within bounds derived here.

Kernels compute in float32 and, for 16-bit inputs, may round weights and score gradients to the inputs' dtype. With u = 2^-24 (half
an ulp of float32) and h half an ulp of the inputs' dtype (0 for float32), to first order and in the worst case:

    |score error|       ds = u * ((D + 8) * scale * sum_d |q_d k_d| + 8 * (|score| + |bias| + |row maximum|))
    relative weight     dw_ij = expm1(ds_ij) + sum_k w_ik * expm1(ds_ik) + (n + 16) * u + h    (no sum for sigmoid)
    output              sum_j w_ij * |v_j| * (dw_ij + n * u)
    score gradient      slope_ij * ((dw_ij + 16 u + h) * (|dP_ij| + |delta_i|) + error of dP + error of delta)
    dP = g.v            (Dv + 1) * u * sum |g v|
    delta = g.out       sum |g| * (error of out + h * |out|) + (Dv + 1) * u * sum |g out|

and sums of score gradients times q, k add their own terms likewise. A stored result is rounded once more. Where a bound says
nothing (a relative error of 1 and more), softmax weights still lie between 0 and 1.

Below the normal numbers: weights under 2^-123 may be anything under it, before they are divided by their row's sum. Softmax's and
sigmoid's are divided by 1 and more. Softplus' sum may be less, down to the 1e-20 from which on the kernels give a row the weights of
softmax: so a softplus weight may lose 2^-123 over the sum, 1e-17 at most, and its slope the same.

A product of n pairs of bf16 by AVX512-BF16 loses n * 2^-126 * (2 + the larger factor) at most (src/cpu/tile.h). It counts in dP; in
the output, which is divided by the row's sum; and in dq, dk (times the scale) and dv. In a score it is nothing beside (n + 16) * u.
There the forward's exponential is the short one, off by 2.6e-6, which its row's sum and lse have too; and softplus' output is divided by
the sum of its rounded weights (docs/avx512.md), which is off by h: h * |out| more.

Options. A soft cap has a derivative of at most 1, so a score keeps the product's error, and adds 8 roundings of itself; its slope
1 - tanh(y)^2 has one of 2 tanh(y) times the error of y, relatively, and 16 roundings, of which the exponential's argument has 4 |y|. A sink
divides a row's weights once more, by a number that has the error of the row's sum, and the backward finds them from log(sum), a float32
of its size. Dropout multiplies kept weights and their dP by a number rounded once.
"""

from __future__ import annotations

import itertools
import math
import random

import torch
import torch.nn.functional as F

import fastattn as fa
from fastattn import testing
from fastattn.ops.attention import reference
from fastattn.runtime.native import use_cpu_isa

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNIT = 2.0**-24
TINY = 2.0**-123
FLUSHED = 2.0**-126
SHORT = 2.6e-6 + 2 * UNIT  # exp2_bounded for weights that become bf16, as tests/native/math_checks.h has it
LIMIT_SUM = 1e-20  # kLimitSum of src/cpu/attention_decode.h
SHIFTED = ("softmax", "softplus")


def draw(rng: random.Random) -> dict:
    """A call as plain numbers."""
    pick, chance = rng.choice, rng.random
    longest = 150 if chance() < 0.1 else 40
    packed = chance() < 0.25
    case: dict = {
        "dtype": pick(("float32", "float32", "bfloat16", "float16")),
        "score": pick(("softmax", "softmax", "sigmoid", "softplus")),
        "batch": 1 if packed else rng.randint(1, 3),
        "kv_heads": rng.randint(1, 3),
        "group": pick((1, 1, 2, 3, 5)),
        "q_length": pick((1, 1, 2, rng.randint(0, longest), rng.randint(0, longest))),
        "k_length": rng.randint(0, longest),
        "head_dim": pick((1, 2, 5, 8, 16, 17, 32, 64, 80, 128)),
        "value_dim": pick((1, 3, 8, 16, 33, 64, 128)),
        "layout": pick((*testing.LAYOUTS, "columns")),
        "q_size": pick((1.0, 1.0, 1.0, 0.01, 5.0, 30.0, 1e-20)),
        "v_size": pick((1.0, 1.0, 100.0, 1e-3)),
        "seed": rng.randrange(1 << 30),
        "threads": pick((1, 2)),
        "isa": rng.randrange(4),
        "grads": [name for name in ("q", "k", "v", "bias") if chance() < 0.6],
        "lse_grad": chance() < 0.5,
    }
    if chance() < 0.3:
        case["scale"] = pick((0.0, 1.0, -0.3, 0.05, 3.0, -1e-3))
    if chance() < 0.2:
        case["bias"] = pick((0.0, -2.5, 10.0, -40.0, 300.0))
    elif chance() < 0.3:
        case["bias_dims"] = [chance() < 0.5 for _ in range(4)]
        case["bias_kind"] = pick(("normal", "normal", "blocked", "lowest", "large"))
    mask = _draw_mask(rng, case, longest, packed)
    if mask:
        case["mask"] = mask
    if "key_lengths" in mask and not packed and chance() < 0.5:
        case["nan_padding"] = True
    if chance() < 0.2:
        case["softcap"] = pick((0.05, 1.0, 5.0, 50.0, 1e4))
    if case["score"] == "softmax" and chance() < 0.2:
        case["sink"] = pick((0.0, 1.0, -20.0, 30.0, 90.0))
    if chance() < 0.15:
        case["dropout_p"] = pick((0.001, 0.1, 0.5, 0.9, 1.0))
    return case


def _draw_mask(rng: random.Random, case: dict, longest: int, packed: bool) -> dict:
    chance, mask = rng.random, {}
    if packed:
        documents = rng.randint(1, 5)
        lengths = [rng.randint(0, longest // documents) for _ in range(documents)]
        mask["cu_seqlens_k"] = [0, *itertools.accumulate(lengths)]
        if chance() < 0.3:
            lengths = [rng.randint(0, longest // documents) for _ in range(documents)]
        mask["cu_seqlens_q"] = [0, *itertools.accumulate(lengths)]
        beyond = rng.choice((0, 0, 3))
        case["q_length"], case["k_length"] = (
            mask["cu_seqlens_q"][-1] + beyond,
            mask["cu_seqlens_k"][-1] + beyond,
        )
        spans = [b - a for a, b in itertools.pairwise(mask["cu_seqlens_k"])]
    else:
        spans = [case["k_length"]] * case["batch"]
    if chance() < 0.35:
        mask["causal"] = True
    if chance() < 0.25:
        mask["window"] = [rng.choice((None, rng.randint(0, longest))) for _ in range(2)]
    if chance() < 0.15:
        mask["prefix_lengths"] = [rng.randint(0, n) for n in spans]
    if chance() < 0.25:
        mask["key_lengths"] = [rng.randint(0, n) for n in spans]
    if chance() < 0.25:
        mask["dense_dims"] = [chance() < 0.5, chance() < 0.5]
        mask["density"] = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    return mask


def check(case: dict) -> None:
    """Runs the call; AssertionError where a result or a gradient is beyond its bound."""
    inputs = _inputs(case)
    q, k, v, bias, dense = inputs
    names = fa.cpu_isas()
    threads = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        with use_cpu_isa(names[case["isa"] % len(names)]):
            found = _run(case, q, k, v, bias, dense)
    finally:
        torch.set_num_threads(threads)
    for name, truth, bound in _expected(case, q, k, v, bias, dense, *found[1:]):
        _compare(name, found[0][name], truth, bound)


def _tensor(case: dict, index: int, shape: tuple, size: float) -> torch.Tensor:
    layout, seed = case["layout"], case["seed"] * 8 + index
    dtype = DTYPES[case["dtype"]]
    if layout == "columns":  # a strided last dim
        wide = testing.random_tensor(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=seed, scale=size)
        return wide[..., ::2]
    return testing.random_tensor(*shape, dtype=dtype, seed=seed, scale=size, layout=layout)


def _inputs(case: dict) -> tuple:
    batch, kv, lq, lk = case["batch"], case["kv_heads"], case["q_length"], case["k_length"]
    heads = kv * case["group"]
    q = _tensor(case, 0, (batch, heads, lq, case["head_dim"]), case["q_size"])
    k = _tensor(case, 1, (batch, kv, lk, case["head_dim"]), 1.0)
    v = _tensor(case, 2, (batch, kv, lk, case["value_dim"]), case["v_size"])
    mask = case.get("mask", {})
    if case.get("nan_padding"):
        for b, length in enumerate(mask["key_lengths"]):
            k[b, :, length:], v[b, :, length:] = math.nan, math.nan
    generator = torch.Generator().manual_seed(case["seed"])
    bias = case.get("bias")
    full = (batch, heads, lq, lk)
    if "bias_dims" in case:
        shape = [n if whole else 1 for n, whole in zip(full, case["bias_dims"], strict=True)]
        bias = torch.randn(shape, generator=generator)
        blocked = torch.rand(shape, generator=generator) < 0.3
        kind = case["bias_kind"]
        if kind == "blocked":
            bias = bias.masked_fill(blocked, -math.inf)
        elif kind == "lowest":
            bias = bias.masked_fill(blocked, -1e4 if case["dtype"] == "float16" else -1e9)
        elif kind == "large":
            bias = bias * 50
        bias = bias.to(DTYPES[case["dtype"]])
    dense = None
    if "density" in mask:
        shape = [n if whole else 1 for n, whole in zip(full[:2], mask["dense_dims"], strict=True)]
        dense = torch.rand(*shape, lq, lk, generator=generator) < mask["density"]
    return q, k, v, bias, dense


def _run(case: dict, q, k, v, bias, dense) -> tuple:
    """({name: result}, grad_out, grad_lse, names that have gradients)."""
    options = {}
    for name, value in case.get("mask", {}).items():
        if name in ("causal", "window"):
            options[name] = value
        elif name not in ("dense_dims", "density"):
            options[name] = torch.tensor(value, dtype=torch.int32)
    mask = fa.Mask(**options, dense=dense) if options or dense is not None else None
    leaves = {"q": q, "k": k, "v": v}
    if isinstance(bias, torch.Tensor):
        leaves["bias"] = bias
    if "sink" in case:
        leaves["sink"] = _sink(case)
    leaves = {
        name: t.detach().requires_grad_(name == "sink" or name in case["grads"]) for name, t in leaves.items()
    }
    normalised = case["score"] in SHIFTED
    with testing.nan_filled_outputs():
        result = fa.attention(
            leaves["q"], leaves["k"], leaves["v"], score=case["score"], scale=case.get("scale"),
            bias=leaves.get("bias", bias), mask=mask, return_lse=normalised, softcap=case.get("softcap"), sink=leaves.get("sink"),
            dropout_p=case.get("dropout_p", 0.0), rng=torch.tensor([case["seed"], 7]),
        )  # fmt: skip
        out, lse = result if normalised else (result, None)
        found = {"out": out.detach()}
        outputs, grads = [out], [_gradient(case, 5, out)]
        if normalised:
            found["lse"] = lse.detach()
            if case["lse_grad"]:
                outputs.append(lse)
                grads.append(_gradient(case, 6, lse))
        wanted = [name for name, t in leaves.items() if t.requires_grad]
        if wanted:
            pulled = torch.autograd.grad(outputs, [leaves[name] for name in wanted], grads, allow_unused=True)
            for name, grad in zip(wanted, pulled, strict=True):
                found["d" + name] = torch.zeros_like(leaves[name]) if grad is None else grad
    return found, grads[0], grads[1] if len(grads) > 1 else None, wanted


def _sink(case: dict) -> torch.Tensor:
    heads = case["kv_heads"] * case["group"]
    return case["sink"] + testing.random_tensor(heads, seed=case["seed"] * 8 + 7)


def _gradient(case: dict, index: int, like: torch.Tensor) -> torch.Tensor:
    return testing.random_tensor(*like.shape, dtype=like.dtype, seed=case["seed"] * 8 + index)


def _allowed(case: dict, dense: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(bool (B, H or 1, Lq, Lk) that says which keys a query attends, keys of each row's sequence (B, 1, Lq, 1))."""
    mask, batch, lq, lk = case.get("mask", {}), case["batch"], case["q_length"], case["k_length"]
    allowed = torch.zeros(batch, 1, lq, lk, dtype=torch.bool)
    count = torch.ones(batch, 1, lq, 1, dtype=torch.float64)
    offsets_k = mask.get("cu_seqlens_k")
    if offsets_k is None:
        places = [(b, 0, lq, 0, lk) for b in range(batch)]
    else:
        places = [
            (0, *a, *b)
            for a, b in zip(
                itertools.pairwise(mask["cu_seqlens_q"]), itertools.pairwise(offsets_k), strict=True
            )
        ]
    left, right = mask.get("window", (None, None))
    for index, (b, q_begin, q_end, k_begin, k_end) in enumerate(places):
        queries, keys = q_end - q_begin, k_end - k_begin
        i = torch.arange(queries)[:, None] + keys - queries
        j = torch.arange(keys)[None]
        inside = torch.ones(queries, keys, dtype=torch.bool)
        n = keys
        if mask.get("causal") or "prefix_lengths" in mask:
            end = i + 1
            if "prefix_lengths" in mask:
                end = end.clamp(min=mask["prefix_lengths"][index])
            inside &= j < end
        if left is not None:
            inside &= j >= i - left
        if right is not None:
            inside &= j <= i + right
        if "key_lengths" in mask:
            n = mask["key_lengths"][index]
            inside &= j < n
        allowed[b, 0, q_begin:q_end, k_begin:k_end] = inside
        count[b, 0, q_begin:q_end] = max(n, 1)
    return (allowed if dense is None else allowed & dense), count


def _expected(case, q, k, v, bias, dense, grad_out, grad_lse, wanted):
    """(name, float64 value, bound) of every result."""
    dtype, score, group = DTYPES[case["dtype"]], case["score"], case["group"]
    half = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    head_dim, value_dim = case["head_dim"], case["value_dim"]
    scale = case.get("scale", head_dim**-0.5)
    allowed, count = _allowed(case, dense)
    wide = [t.detach().double().nan_to_num(nan=0.0) for t in (q, k, v)]
    q64, (k64, v64) = wide[0], (t.repeat_interleave(group, 1) for t in wide[1:])
    product = scale * (q64 @ k64.mT)
    added = torch.zeros((), dtype=torch.float64)
    if isinstance(bias, torch.Tensor):
        added = bias.detach().double()
    elif bias is not None:
        added = torch.tensor(bias, dtype=torch.float64)
    elif score == "sigmoid":
        added = -count.log()
    # of keys that a bias of -inf takes out too: sigmoid's weights of it
    tiny = TINY * allowed.expand_as(product).double()
    allowed = (allowed & (added > -math.inf)).expand_as(product)
    magnitude = abs(scale) * (q64.abs() @ k64.abs().mT)
    capped, cap_slope, cap_error = product, torch.ones(()), torch.zeros(())
    if "softcap" in case:
        cap = case["softcap"]
        y, product_error = product / cap, UNIT * ((head_dim + 8) * magnitude + 8 * product.abs())
        capped, cap_slope = cap * torch.tanh(y), 1 / torch.cosh(y.clamp(-300, 300)) ** 2
        cap_error = torch.expm1((2 * product_error / cap + (16 + 4 * y.abs()) * UNIT).clamp(max=80.0))
    s = (capped + added.clamp(min=-1e300)).masked_fill(~allowed, -math.inf)
    lk = max(case["k_length"], 1)
    top = (
        s.amax(-1, keepdim=True).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        if s.shape[-1]
        else s.new_zeros(*s.shape[:3], 1)
    )
    size = added.abs().clamp(max=1e300).expand_as(s).masked_fill(~allowed, 0.0)
    error = UNIT * ((head_dim + 8) * magnitude + 8 * (product.abs() + capped.abs() + size + top.abs()))
    error = torch.expm1(error.clamp(max=80.0)).masked_fill(~allowed, 0.0)
    if score == "softmax":
        raw = torch.exp(s - top)
        slope = raw
    elif score == "sigmoid":
        raw = torch.sigmoid(s)
        slope = raw * torch.sigmoid(-s)
    else:
        # far below 0 a softplus is the exponential: rows of such scores alone are softmax's, however far
        low = top < -30
        raw = torch.where(low, torch.exp(s - top), torch.where(s < -30, torch.exp(s), F.softplus(s)))
        raw = raw.masked_fill(~allowed, 0.0)
        slope = torch.where(low, raw, torch.sigmoid(s))
    slope = slope.masked_fill(~allowed, 0.0)
    normalised = score in SHIFTED
    if normalised:
        total = raw.sum(-1, keepdim=True)
        safe = total.masked_fill(total == 0, 1.0)
        weight, slope = raw / safe, slope / safe
        shared = (weight * error).sum(-1, keepdim=True)
        shift = top if score == "softmax" else torch.where(top < -30, top, 0.0)
        lse = (total.log() + shift).squeeze(-1)
    else:
        weight, shared = raw, 0.0
    sink_weight = None
    if "sink" in case:
        sink = _sink(case).double()[None, :, None]
        both = torch.logaddexp(lse, sink)
        left = torch.exp(lse - both)[..., None].nan_to_num(nan=0.0)
        sink_weight = torch.exp(sink - both)
        weight, slope = weight * left, slope * left
        apart = (both - top.squeeze(-1)).abs().nan_to_num(posinf=0.0)[..., None]
        shared = 2 * shared + UNIT * (16 + 4 * apart)
        lse = both
    small = torch.ones(())  # what the division by a small sum makes of what was lost before it
    if score == "softplus":
        sums = lse.exp()[..., None]  # the kernel's own is within a factor of two
        small = torch.where(sums < LIMIT_SUM / 2, 1.0, 1 / sums.clamp(LIMIT_SUM / 2, 1.0))
        tiny = tiny * small
    short = SHORT if _pairs(case) else 0.0
    relative = error + shared + (lk + 16) * UNIT + half + short
    kept = torch.ones(())
    if "dropout_p" in case:
        dropped = max(round(case["dropout_p"] * 65536), 1)
        rng = torch.tensor([case["seed"], 7])
        kept = reference.kept(weight.shape, dropped, rng).double()
        kept = kept * (65536 / (65536 - dropped) if dropped < 65536 else 0.0)
        relative = relative + 2 * UNIT
    of_slopes, weight, tiny = tiny, weight * kept, tiny * kept
    out = weight @ v64
    out_error = (weight * (relative + lk * UNIT)) @ v64.abs() + tiny @ v64.abs()
    out_error = out_error + small * (_flushed(case, lk, v64) + _flushed(case, lk))
    if score == "softplus" and _pairs(case):
        out_error = out_error + half * out.abs()
    if normalised:  # weights between 0 and 1 that add up to 1
        largest = (
            (v64.abs()[:, :, None] * allowed[..., None].double()).amax(-2) if case["k_length"] else 0 * out
        )
        largest = largest * (kept.amax() if kept.numel() else 1)
        out_error = torch.minimum(out_error, 2 * largest * (1 + relative.amin() if relative.numel() else 1))
    yield "out", out, out_error + _rounding(out, dtype)
    if normalised:
        lse_error = (
            shared.squeeze(-1)
            + (lk + 16) * UNIT
            + 4 * UNIT * (lse.abs().nan_to_num(posinf=0.0) + top.abs().squeeze(-1))
            + short
        )
        yield "lse", lse, lse_error
    if not wanted:
        return
    g = grad_out.double()
    pulled = (g @ v64.mT) * kept
    delta = (g * out).sum(-1, keepdim=True) if normalised else torch.zeros(())
    grad_score = slope * (pulled - delta)
    if grad_lse is not None:
        # d lse / d s is the slope over the sum: of softmax the weight
        grad_score = grad_score + slope * grad_lse.double()[..., None]
    else:
        grad_lse = torch.zeros(q.shape[:3])
    pulled_error = (value_dim + 3) * UNIT * (g.abs() @ v64.abs().mT) + _flushed(case, value_dim, g, v64)
    pulled_error = pulled_error * kept
    delta_error = torch.zeros(())
    if normalised:
        # the residual keeps what rounding takes from out, to another rounding of it or a subnormal step
        limits = torch.finfo(dtype)
        lost = half**2 * out.abs() + (half > 0) * limits.smallest_normal * limits.eps
        delta_error = (g.abs() * (out_error + lost)).sum(-1, keepdim=True)
        delta_error = delta_error + (value_dim + 1) * UNIT * (g * out).abs().sum(-1, keepdim=True)
    parts = pulled.abs() + delta.abs() + grad_lse.double().abs()[..., None]
    rounded = relative + 16 * UNIT + half
    score_error = slope * (rounded * parts + pulled_error + delta_error) + of_slopes * parts
    of_bias, bias_bound = grad_score, score_error + half * grad_score.abs()
    grad_score = grad_score * cap_slope
    score_error = cap_slope * (score_error * (1 + cap_error)) + cap_error * grad_score.abs()
    if "softcap" in case:  # the cap's slope, and its product with the weight's, below the normal numbers
        score_error = score_error + TINY * of_bias.abs() + 2.0**-149 * parts
    grad_bound = score_error + half * grad_score.abs()
    batch, kv = case["batch"], case["kv_heads"]

    def keys(t: torch.Tensor) -> torch.Tensor:
        """Gradients of the query heads that share a key head, added up."""
        return t.view(batch, kv, group, *t.shape[2:]).sum(2)

    rows = max(case["q_length"] * group, 1)
    results = {
        "dq": (
            scale * grad_score @ k64,
            abs(scale)
            * ((grad_bound + lk * UNIT * grad_score.abs()) @ k64.abs() + _flushed(case, lk, grad_score, k64)),
        ),
        "dk": (
            keys(scale * grad_score.mT @ q64),
            keys(abs(scale) * (grad_bound + rows * UNIT * grad_score.abs()).mT @ q64.abs())
            + abs(scale) * _flushed(case, rows, grad_score, q64),
        ),
        "dv": (
            keys(weight.mT @ g),
            keys((weight * (relative + half + rows * UNIT) + tiny).mT @ g.abs())
            + _flushed(case, rows, weight, g),
        ),
    }
    if isinstance(bias, torch.Tensor):
        shape = bias.shape
        terms = of_bias.numel() // max(bias.numel(), 1)
        results["dbias"] = (
            of_bias.sum_to_size(shape),
            (bias_bound + terms * UNIT * of_bias.abs()).sum_to_size(shape),
        )
    if sink_weight is not None:
        incoming = grad_lse.double() - delta.squeeze(-1)
        off = sink_weight * (delta_error.squeeze(-1) + UNIT * 8 * incoming.abs())
        places = sink.abs() + lse.abs() + 16 + apart.squeeze(-1)
        off = off + (sink_weight * incoming).abs() * (
            shared.squeeze(-1) + (lk + 16) * UNIT + short + 4 * UNIT * places
        )
        results["dsink"] = ((sink_weight * incoming).sum((0, 2)), off.sum((0, 2)))
    for name in wanted:
        truth, bound = results["d" + name]
        yield "d" + name, truth, bound + _rounding(truth, torch.float32 if name == "sink" else dtype)


def _pairs(case: dict) -> bool:
    """Whether products are of pairs of bf16."""
    names = fa.cpu_isas()
    return case["dtype"] == "bfloat16" and names[case["isa"] % len(names)] == "avx512bf16"


def _flushed(case: dict, terms: int, *factors: torch.Tensor) -> float:
    """What a product of so many pairs may lose below the normal numbers; a factor of 1 and less may be left out."""
    if not _pairs(case):
        return 0.0
    return FLUSHED * terms * (2 + max([1.0, *(testing.max_finite(t) for t in factors)]))


def _rounding(truth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    limits = torch.finfo(dtype)
    # subnormal terms are off by a whole step each
    return truth.abs() * (limits.eps / 2 + 4 * UNIT) + 200 * limits.smallest_normal * limits.eps


def _compare(name: str, actual: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor) -> None:
    assert actual.shape == truth.shape, (
        f"{name} has shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    )
    largest = torch.finfo(actual.dtype).max
    beyond = truth.abs() + bound > largest  # may overflow
    error = (actual.double() - truth).abs()
    error = torch.where((actual.double() == truth) | (beyond & ~actual.isnan()), 0.0, error)
    wrong = ~(error <= bound)
    if wrong.any():
        share = torch.where(wrong, error / bound.clamp(min=1e-300), 0.0).nan_to_num(nan=math.inf)
        place = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
        raise AssertionError(
            f"{name}{list(place)} is {float(actual[place]):.9g}, expected {float(truth[place]):.9g} within "
            f"{float(bound.expand_as(truth)[place]):.3g}; {int(wrong.sum())} of {wrong.numel()} are beyond their bound"
        )
