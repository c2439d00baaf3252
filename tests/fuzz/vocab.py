"""Random calls of the vocabulary ops against float64, with bounds derived from each call's own numbers.

Bounds go forward with the computation: a product of d terms in float32 is within (d + 2) eps / 2 of the sum of their magnitudes, in any
order, and every later step adds its roundings to what its arguments are off by. Nothing is assumed of the order of a sum.
"""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _losses import LOST, Loss, U, loss_of, products, within

import fastattn as fa
from fastattn import testing
from fastattn.runtime import native as _native
from fastattn.runtime import tuning as _config

OPS = (
    "linear_cross_entropy",
    "stablemax_cross_entropy",
    "vq_cross_entropy",
    "vq_logits",
    "vq_argmax",
    "vq_sample",
    "nearest_codes",
)
DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("contiguous", "transposed", "spaced", "expanded")
# Of h, and of weight or codebook. The last ones are beyond float16, which takes the first instead.
SCALES = (
    (1.0, 1.0),
    (1.0, 0.1),
    (100.0, 1.0),
    (0.0, 1.0),
    (-0.0, 1.0),
    (1e4, 1e4),
    (1e30, 1e-30),
    (1e-40, 1.0),
    (1e30, 1e4),
)
SPECIAL = (math.nan, math.inf, -math.inf, 1e30)
IGNORED = -100


def draw(rng: random.Random) -> dict:
    """A call of one op, told whole: sizes, options, and a seed of its tensors."""
    op = rng.choice(OPS)
    classes = rng.choice((1, 2, 3, 7, 8, 9, 31, 64, 65, rng.randint(1, 400)))
    lead = rng.choice(([], [0], [1], [2, 3], [rng.randint(1, 40)], [rng.randint(1, 40)], [3, 0]))
    return {
        "op": op,
        "backend": rng.choice(("cpu", "cpu", "reference")),
        "isa": rng.randint(0, 3),  # of those this machine has
        "threads": rng.choice((1, 2)),
        "chunk_bytes": rng.choice(
            (1 << 20, 1 << 20, 256)
        ),  # a MiB of the chunks, so that small ones are several
        "seed": rng.randrange(1 << 30),
        "dtype": rng.choice(DTYPES),
        "lead": lead,
        "width": rng.choice((1, 2, 5, 8, 16, 33, rng.randint(1, 70))),
        "classes": classes,
        "codes": rng.choice((1, 2, rng.randint(1, 40))),
        "pattern": rng.choice(("any", "one", "rising")),
        "index": rng.choice(("int32", "int64")),
        "layouts": [rng.choice(LAYOUTS), rng.choice(LAYOUTS)],
        "scales": list(rng.choice(SCALES[:3] if rng.random() < 0.7 else SCALES)),
        "special": rng.choice(SPECIAL) if rng.random() < 0.1 else None,  # in one element of h
        "bias": rng.choice((None, None, "float32", "own")),
        "left_out": rng.random() < 0.2,  # some biases are -inf
        "temperature": rng.choice((None, None, "number", "tensor")),
        "heat": rng.choice((0.7, 1.0, 1e-3, 30.0)),
        "transform": rng.choice((None, None, "stablemax")),
        "softcap": rng.choice((None, None, None, 2.0, 30.0, 1e6)),
        "z_loss": rng.choice((0.0, 0.0, 0.01)),
        "shadow": rng.random() < 0.3,
        "ignored": rng.choice((0.0, 0.3, 1.0)),
        "reduction": rng.choice(("none", "sum", "mean")),
        "wanted": [rng.random() < 0.7 for _ in range(5)],  # leaves whose gradients are asked for
        "ties": rng.random() < 0.3,  # some rows of weight or codebook are equal
        "product": rng.choice(("library", "native")),  # of linear_cross_entropy on the CPU in bfloat16
    }


def check(case: dict) -> None:
    """AssertionError where a result is beyond its bound."""
    with settings(case):
        CHECKS[case["op"]](case)


@contextlib.contextmanager
def settings(case: dict):
    from fastattn.ops.codes import cpu as codes_cpu
    from fastattn.ops.cross_entropy import chunked, cpu_products

    threads, modules = torch.get_num_threads(), (cpu_products, codes_cpu, chunked)
    product = {("linear_cross_entropy", "cpu"): {"product": "native" if _native_product(case) else "library"}}
    before = [module._MIB for module in modules]
    isas = testing.isas()
    try:
        torch.set_num_threads(case["threads"])
        for module in modules:
            module._MIB = case["chunk_bytes"]
        with (
            _native.use_cpu_isa(isas[case["isa"] % len(isas)]),
            fa.set_backend(case["backend"]),
            _config.override(product),
        ):
            yield
    finally:
        torch.set_num_threads(threads)
        for module, mib in zip(modules, before, strict=True):
            module._MIB = mib


def _native_product(case: dict) -> bool:
    dense = case["op"] == "linear_cross_entropy" and case["backend"] == "cpu"
    return dense and case["dtype"] == "bfloat16" and case.get("product") == "native"


# --- tensors ---------------------------------------------------------------------------------------------------------


def _generator(case: dict) -> torch.Generator:
    return torch.Generator().manual_seed(case["seed"])


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """t with other strides, NaN between its elements where there is room."""
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "spaced":
        storage = torch.full([2 * n + 1 for n in t.shape], math.nan, dtype=t.dtype)
        view = storage[tuple(slice(1, 1 + 2 * n, 2) for n in t.shape)]
        view.copy_(t)
        return view
    if layout == "expanded" and t.dim() > 1 and t.shape[0]:
        return t[:1].expand(t.shape)
    return t.clone()


@dataclass
class Problem:
    h: torch.Tensor  # (*lead, d)
    rows: torch.Tensor  # (V, d) or (K, d)
    bias: torch.Tensor | None  # (V,)
    codes: torch.Tensor
    target: torch.Tensor
    temperature: torch.Tensor | None
    shadow: torch.Tensor | None


def _problem(case: dict, *, quantised: bool) -> Problem:
    g, dtype = _generator(case), _dtype(case["dtype"])
    width, tokens, lead = case["width"], case["classes"], case["lead"]
    codes = case["codes"] if quantised else tokens
    scales = SCALES[0] if case["dtype"] == "float16" and max(case["scales"]) > 100 else case["scales"]

    def normal(*shape):
        return torch.randn(shape, generator=g)

    h, rows = normal(*lead, width) * scales[0], normal(codes, width) * scales[1]
    if case["ties"] and codes > 1:
        rows[torch.randint(codes, (codes // 2,), generator=g)] = rows[codes - 1].clone()
    special = case["special"]
    if special is not None and h.numel():
        h.view(-1)[int(torch.randint(h.numel(), (), generator=g))] = special
    bias = temperature = None
    if case["bias"] is not None:
        bias = normal(tokens)
        if case["left_out"]:
            bias[torch.rand(tokens, generator=g) < 0.3] = -math.inf
        bias = bias if case["bias"] == "float32" else bias.to(dtype)
    if case["temperature"] == "tensor":
        temperature = (torch.rand(lead, generator=g) + 0.5) * case["heat"]
    target = torch.randint(tokens, tuple(lead), generator=g).to(_dtype(case["index"]))
    target[torch.rand(lead, generator=g) < case["ignored"]] = IGNORED
    of_token = torch.randint(codes, (tokens,), generator=g)
    if case["pattern"] == "one":
        of_token = torch.full((tokens,), codes - 1)
    elif case["pattern"] == "rising":
        of_token = torch.arange(tokens) % codes
    return Problem(
        _laid_out(h.to(dtype), case["layouts"][0]),
        _laid_out(rows.to(dtype), case["layouts"][1]),
        bias,
        of_token.to(_dtype(case["index"])),
        target,
        temperature,
        torch.zeros(tokens, width).to(dtype) if case["shadow"] and quantised else None,
    )


# --- gradients -------------------------------------------------------------------------------------------------------


def _backward_rounding(case: dict, dz: torch.Tensor) -> torch.Tensor | float:
    """What the gradients of the logits lose where they are rounded to 16 bits before the products, as on a GPU."""
    if case["dtype"] == "float32" or (case["backend"] in ("cpu", "reference") and not _native_product(case)):
        return 0.0
    info = torch.finfo(_dtype(case["dtype"]))
    return info.eps / 2 * (dz.abs() + info.smallest_normal)


def _given(case: dict, leaves: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, wanted in zip(leaves, case["wanted"], strict=False) if wanted]


def _gradients(
    found: torch.Tensor, leaves: dict, wanted: list[str], grad: torch.Tensor
) -> dict[str, torch.Tensor]:
    if not wanted:
        assert not found.requires_grad
        return {}
    return dict(
        zip(wanted, torch.autograd.grad(found, [leaves[n] for n in wanted], grad.to(found)), strict=True)
    )


def _reduced(case: dict, loss, off, counted) -> tuple[torch.Tensor, torch.Tensor]:
    if case["reduction"] == "none":
        return loss.reshape(case["lead"]), off.reshape(case["lead"])
    scale = 1 / max(1, int(counted.sum())) if case["reduction"] == "mean" else 1.0
    return loss.sum() * scale, (off.sum() + len(loss) * U * loss.abs().sum()) * scale


def _incoming(case: dict, counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the result, and that of each row's loss."""
    grad = torch.rand(case["lead"], generator=_generator(case)) - 0.3
    if case["reduction"] == "none":
        return grad, grad.reshape(-1).double() * counted
    scale = 1 / max(1, int(counted.sum())) if case["reduction"] == "mean" else 1.0
    return torch.tensor(1.7), torch.full(counted.shape, 1.7, dtype=torch.float64) * scale * counted


def _leaves(case: dict, **tensors: torch.Tensor | None) -> tuple[dict, list[str]]:
    leaves = {name: t.detach() for name, t in tensors.items() if t is not None}
    wanted = _given(case, leaves)
    for name in wanted:
        leaves[name].requires_grad_()
    return leaves, wanted


# --- checks of each op -----------------------------------------------------------------------------------------------


def _check_dense(case: dict) -> None:
    q = _problem(case, quantised=False)
    leaves, wanted = _leaves(case, h=q.h, weight=q.rows, bias=q.bias, temperature=q.temperature)
    number = case["heat"] if case["temperature"] == "number" else None
    found = fa.linear_cross_entropy(
        leaves["h"],
        leaves["weight"],
        q.target,
        bias=leaves.get("bias"),
        temperature=leaves.get("temperature", number),
        transform=case["transform"],
        softcap=case["softcap"],
        z_loss=case["z_loss"],
        reduction=case["reduction"],
    )
    target = q.target.reshape(-1).long()
    counted = target != IGNORED
    h, w = q.h.reshape(-1, case["width"]).double(), q.rows.double()
    tau = torch.full((len(target), 1), number or 1.0).double() if q.temperature is None else None
    tau = q.temperature.reshape(-1, 1).double() if tau is None else tau
    tau = tau.float().double()
    grad, incoming = _incoming(case, counted)
    gradients = _gradients(found, leaves, wanted, grad)
    if case["special"] is not None:
        return _check_special(case, found, gradients, counted)
    h, kept, up = h[counted], target[counted], incoming[counted][:, None]
    z, z_off = products(h, w)
    if q.bias is not None:
        z = z + q.bias.double()
        z_off = z_off + torch.where(z.isfinite(), U * z.abs(), 0.0)
    t = loss_of(
        z,
        z_off,
        kept,
        tau[counted],
        stablemax=case["transform"] == "stablemax",
        softcap=case["softcap"],
        z_loss=case["z_loss"],
    )
    _compare_loss(case, found, t, counted)
    dz, off = t.dz * up, (t.dz_off + _backward_rounding(case, t.dz)) * up.abs()
    summed = (z.shape[1] + 4) * U * dz.abs() + off
    rows = torch.zeros(len(target), case["width"]).double()
    expected = {
        "h": (dz @ w, summed @ w.abs()),
        "weight": (dz.T @ h, ((len(h) + 4) * U * dz.abs() + off).T @ h.abs()),
        "bias": (dz.sum(0), ((len(h) + 4) * U * dz.abs() + off).sum(0)),
        "temperature": (t.dtemperature * up[:, 0], t.dtemperature_off * up[:, 0].abs()),
    }
    expected["h"] = tuple(rows.index_copy(0, counted.nonzero()[:, 0], x) for x in expected["h"])
    expected["temperature"] = tuple(
        rows[:, 0].index_copy(0, counted.nonzero()[:, 0], x) for x in expected["temperature"]
    )
    for name, gradient in gradients.items():
        true, off = (x.reshape(gradient.shape) for x in expected[name])
        within(f"gradient of {name}", gradient, true, off + LOST * 1e3)


def _compare_loss(case: dict, found, t: Loss, counted) -> None:
    loss, off = (
        torch.zeros(len(counted)).double().index_copy(0, counted.nonzero()[:, 0], x)
        for x in (t.loss, t.loss_off)
    )
    within("loss", found, *_reduced(case, loss, off, counted))


def _largest_gradient(case: dict, q: Problem, ordinary: torch.Tensor) -> float:
    """What no element of an ordinary row's gradient of h passes. A logit's is its probability less the target's, over the
    temperature, and with z_loss 2 z_loss lse as much again; the magnitudes of the first sum to 2 at most."""

    def largest(x) -> float:
        x = x.double().abs()
        return float(x[x.isfinite()].max()) if bool(x.isfinite().any()) else 0.0

    tau = 1.0 if case["temperature"] is None else 0.5 * case["heat"]
    h, rows = largest(q.h.reshape(-1, case["width"])[ordinary]), largest(q.rows)
    bias = 0.0 if q.bias is None else largest(q.bias)
    lse = (case["width"] * h * rows + bias) / tau + math.log(max(case["classes"], 1))
    return 0.7 * (2 + 2 * case["z_loss"] * lse) / tau * rows  # grad is below 0.7


def _check_special(case: dict, found, gradients, counted) -> None:
    """One element of h is not finite, or too large: another row's loss and gradient stay finite, an ignored one's too."""
    q = _problem(case, quantised="vq" in case["op"])
    h = q.h.reshape(-1, case["width"])
    ordinary = (h.float().abs() < 1e20).all(1)
    harmless = ordinary | ~counted
    bare = case["bias"] is None or not case["left_out"]
    small = max(case["scales"]) <= 100 and _largest_gradient(case, q, ordinary) < torch.finfo(q.h.dtype).max
    if case["reduction"] == "none" and bare and small:
        rows = found.detach().reshape(-1)
        assert bool(rows[harmless].isfinite().all()), f"an ordinary row's loss is {rows[harmless]}"
        wrong = ~harmless & (h.isnan().any(1))
        assert bool(rows[wrong].isnan().all()), f"the loss of a row of NaN is {rows[wrong]}"
    if "h" in gradients and bare and small:
        rows = gradients["h"].reshape(h.shape)
        assert bool(rows[harmless].isfinite().all()), f"an ordinary row's gradient is {rows[harmless]}"
        assert not bool(rows[~counted].any()), "an ignored row has a gradient"


def _check_stablemax(case: dict) -> None:
    q = _problem({**case, "width": case["classes"]}, quantised=True)
    leaves, wanted = _leaves(case, logits=q.h)
    found = fa.stablemax_cross_entropy(leaves["logits"], q.target, reduction=case["reduction"])
    target = q.target.reshape(-1).long()
    counted = target != IGNORED
    grad, incoming = _incoming(case, counted)
    gradients = _gradients(found, leaves, wanted, grad)
    x = q.h.reshape(-1, case["classes"]).double()[counted]
    if not bool(x.isfinite().all()):
        return
    up = incoming[counted][:, None]
    t = loss_of(x, torch.zeros_like(x), target[counted], torch.ones(len(x), 1).double(), stablemax=True)
    _compare_loss(case, found, t, counted)
    rows = torch.zeros(len(target), case["classes"]).double()
    for gradient in gradients.values():
        true, off = (
            rows.index_copy(0, counted.nonzero()[:, 0], y * s)
            for y, s in ((t.dz, up), (t.dz_off + 4 * U * t.dz.abs(), up.abs()))
        )
        within("gradient of logits", gradient.reshape(true.shape), true, off + LOST)


def _by_code(codes: torch.Tensor, count: int, x: torch.Tensor) -> torch.Tensor:
    """(V, ...) summed over each code's tokens."""
    return torch.zeros(count, *x.shape[1:]).double().index_add(0, codes, x)


def _check_codes_loss(case: dict) -> None:
    q = _problem(case, quantised=True)
    leaves, wanted = _leaves(case, h=q.h, codebook=q.rows, bias=q.bias, shadow=q.shadow)
    found = fa.vq_cross_entropy(
        leaves["h"],
        leaves["codebook"],
        q.codes,
        q.target,
        bias=leaves.get("bias"),
        shadow=leaves.get("shadow"),
        reduction=case["reduction"],
    )
    target, codes, count = q.target.reshape(-1).long(), q.codes.long(), case["codes"]
    counted = target != IGNORED
    grad, incoming = _incoming(case, counted)
    gradients = _gradients(found, leaves, wanted, grad)
    if case["special"] is not None:
        return _check_special(case, found, gradients, counted)
    h, book = q.h.reshape(-1, case["width"]).double()[counted], q.rows.double()
    up = incoming[counted][:, None]
    z, z_off = (x[:, codes] for x in products(h, book))
    if q.bias is not None:
        z = z + q.bias.double()
        z_off = z_off + torch.where(z.isfinite(), U * z.abs(), 0.0)
    t = loss_of(z, z_off, target[counted], torch.ones(len(h), 1).double(), terms=count + case["classes"])
    _compare_loss(case, found, t, counted)
    # sums over a code's tokens come before a token's part is taken of them, which softens nothing
    one = F.one_hot(target[counted], case["classes"]).double()
    dz, size = t.dz * up, (t.dz.abs() + 2 * one) * up.abs()
    off = (t.dz_off + _backward_rounding(case, t.dz)) * up.abs() + 16 * U * size
    of_code = {name: _by_code(codes, count, x.T).T for name, x in (("dz", dz), ("size", size), ("off", off))}
    summed = (count + case["classes"] + 4) * U * of_code["size"] + of_code["off"]
    bias = torch.zeros(case["classes"]).double() if q.bias is None else q.bias.double()
    most = torch.full((count,), -math.inf).double().scatter_reduce(0, codes, bias, "amax")
    share = torch.where(bias == -math.inf, 0.0, (bias - most[codes]).exp())
    share = torch.where(share == 0, 0.0, share / _by_code(codes, count, share)[codes])
    terms = len(h) + count + case["classes"] + 20
    rows_off = terms * U * size + off + (of_code["off"] + terms * U * of_code["size"])[:, codes] * share
    rows = torch.zeros(len(target), case["width"]).double()
    expected = {
        "h": tuple(
            rows.index_copy(0, counted.nonzero()[:, 0], x)
            for x in (of_code["dz"] @ book, summed @ book.abs())
        ),
        "codebook": (of_code["dz"].T @ h, (terms * U * of_code["size"] + of_code["off"]).T @ h.abs()),
        "bias": (dz.sum(0), rows_off.sum(0)),
        "shadow": (dz.T @ h, rows_off.T @ h.abs()),
    }
    for name, gradient in gradients.items():
        true, off = (x.reshape(gradient.shape) for x in expected[name])
        within(f"gradient of {name}", gradient, true, off + LOST * 1e3)


def _check_logits(case: dict) -> None:
    q = _problem(case, quantised=True)
    leaves, wanted = _leaves(case, h=q.h, codebook=q.rows, bias=q.bias)
    found = fa.vq_logits(leaves["h"], leaves["codebook"], q.codes, bias=leaves.get("bias"))
    h, book, codes = q.h.reshape(-1, case["width"]).double(), q.rows.double(), q.codes.long()
    grad = (torch.rand(found.shape, generator=_generator(case)) - 0.3).to(found.dtype)
    gradients = _gradients(found, leaves, wanted, grad)
    if case["special"] is not None:
        rows = found.detach().reshape(len(h), case["classes"])
        ordinary = (q.h.reshape(-1, case["width"]).float().abs() < 1e20).all(1)
        assert not bool(rows[ordinary].isnan().any())
        return
    z, z_off = (x[:, codes] for x in products(h, book))
    if q.bias is not None:
        z = z + q.bias.double()
        z_off = z_off + torch.where(z.isfinite(), U * z.abs(), 0.0)
    within("logits", found.reshape(z.shape), z, z_off)
    g = grad.reshape(z.shape).double()
    g_off = (case["classes"] + 4) * U * g.abs()
    of_code, of_code_off = (_by_code(codes, case["codes"], x.T).T for x in (g, g_off))
    of_code_off = of_code_off + _backward_rounding(case, of_code)
    expected = {
        "h": (of_code @ book, (of_code_off + (case["codes"] + 4) * U * of_code.abs()) @ book.abs()),
        "codebook": (of_code.T @ h, (of_code_off + (len(h) + 4) * U * of_code.abs()).T @ h.abs()),
        "bias": (g.sum(0), (len(h) + 4) * U * g.abs().sum(0)),
    }
    for name, gradient in gradients.items():
        true, off = (x.reshape(gradient.shape) for x in expected[name])
        within(f"gradient of {name}", gradient, true, off + LOST * 1e3)


def _check_chosen(found: torch.Tensor, scores: torch.Tensor, off: torch.Tensor, same: torch.Tensor) -> None:
    """The largest score, up to what float64 is off by; the first of those that are the same in every bit."""
    count = scores.shape[1]
    assert found.dtype == torch.int64 and bool(((found >= 0) & (found < count)).all()), (
        f"chose {found} of {count}"
    )
    ordinary = ~scores.isnan().any(1)
    best = torch.where(ordinary[:, None], scores, 0.0).amax(1)
    chosen = scores.gather(1, found[:, None])[:, 0]
    close = (chosen >= best - off) | (chosen == best) | ~ordinary
    assert bool(close.all()), f"chose scores {chosen[~close]} where {best[~close]} was the largest"
    twins = same[found]  # (N, count): tokens with the same vector and bias
    first = twins.int().argmax(1)
    first = torch.where(ordinary & (best > -math.inf), first, found)
    assert torch.equal(first, found), f"chose {found}, not the first of equals {first}"


def _check_argmax(case: dict) -> None:
    q = _problem(case, quantised=True)
    found = fa.vq_argmax(q.h, q.rows, q.codes, bias=q.bias)
    assert found.shape == q.h.shape[:-1] and not found.requires_grad
    h, book, codes = q.h.reshape(-1, case["width"]).double(), q.rows.double(), q.codes.long()
    bias = torch.zeros(case["classes"]).double() if q.bias is None else q.bias.double()
    scores = (h @ book.T)[:, codes] + bias
    off = (
        ((h.abs() @ book.abs().T).amax(1) + bias[bias.isfinite()].abs().sum())
        * 2.0**-50
        * (case["width"] + 2)
    )
    vectors = (book[:, None] == book[None]).all(2)[codes][:, codes]
    _check_chosen(found.reshape(-1), scores, off, vectors & (bias[:, None] == bias[None]))


def _check_nearest(case: dict) -> None:
    q = _problem(case, quantised=True)
    found = fa.nearest_codes(q.h, q.rows)
    assert found.shape == q.h.shape[:-1] and not found.requires_grad
    x, book = q.h.reshape(-1, case["width"]).double(), q.rows.double()
    squares = book.square().sum(1) / 2
    off = ((x.abs() @ book.abs().T).amax(1) + squares.amax()) * 2.0**-50 * (case["width"] + 2)
    _check_chosen(found.reshape(-1), x @ book.T - squares, off, (book[:, None] == book[None]).all(2))


def _check_sample(case: dict) -> None:
    q = _problem(case, quantised=True)
    temperature = case["heat"] if case["temperature"] else 1.0
    generator = torch.Generator().manual_seed(case["seed"])
    found = fa.vq_sample(q.h, q.rows, q.codes, bias=q.bias, temperature=temperature, generator=generator)
    assert found.shape == q.h.shape[:-1] and not found.requires_grad
    found = found.reshape(-1)
    count, codes = case["classes"], q.codes.long()
    assert bool(((found >= 0) & (found < count)).all()), f"drew {found} of {count}"
    generator = torch.Generator().manual_seed(case["seed"])
    uniform = torch.rand(len(found), 2, dtype=torch.float64, generator=generator)
    h, book = q.h.reshape(-1, case["width"]).double(), q.rows.double()
    bias = torch.zeros(count).double() if q.bias is None else q.bias.double()
    if not bool((bias > -math.inf).any()):
        return
    scores, scores_off = (x[:, codes] for x in products(h, book))
    logits = scores + bias
    known = ~(logits.isnan() | (logits == math.inf)).any(1) & (logits > -math.inf).any(1)
    assert bool((bias[found[known]] > -math.inf).all()), "drew a token whose bias is -inf"
    top = logits.amax(1, keepdim=True)
    below = (logits - top) / temperature
    off = (scores_off + U * (logits.abs() + scores.abs())).masked_fill(logits == -math.inf, 0.0)
    off = 2 * off.amax(1, keepdim=True) / temperature + 8 * U * below.abs().masked_fill(
        logits == -math.inf, 0.0
    )
    weights = below.exp()
    lost = (weights * (off.clamp(max=600).expm1() + 32 * U)).sum(1) / weights.sum(1)
    lost = lost + (count + 8) * U
    of_code = _by_code(codes, case["codes"], weights.T).T
    code = codes[found]
    _check_drawn("code", code, of_code, uniform[:, 0], lost, known)
    most = torch.where(codes[None] == code[:, None], bias[None], -math.inf).amax(1, keepdim=True)
    within = torch.where(codes[None] == code[:, None], torch.exp((bias[None] - most) / temperature), 0.0)
    reach = (bias.masked_fill(bias == -math.inf, 0.0).abs().amax() / temperature + count + 8) * 4 * U
    _check_drawn("token", found, within, uniform[:, 1], reach, known)


def _check_drawn(name: str, found, weights, uniform, off, known) -> None:
    """The uniform lies in the chosen one's part of the cumulative weights."""
    cumulative = weights.cumsum(1) / weights.sum(1, keepdim=True)
    upper = cumulative.gather(1, found[:, None])[:, 0]
    lower = upper - (weights / weights.sum(1, keepdim=True)).gather(1, found[:, None])[:, 0]
    good = (
        (uniform >= lower - 2 * off - 1e-12) & (uniform <= upper + 2 * off + 1e-12) | ~known | upper.isnan()
    )
    assert bool(good.all()), (
        f"{name} {found[~good]} has [{lower[~good]}, {upper[~good]}) for uniforms {uniform[~good]}"
    )


CHECKS = {
    "linear_cross_entropy": _check_dense,
    "stablemax_cross_entropy": _check_stablemax,
    "vq_cross_entropy": _check_codes_loss,
    "vq_logits": _check_logits,
    "vq_argmax": _check_argmax,
    "vq_sample": _check_sample,
    "nearest_codes": _check_nearest,
}
