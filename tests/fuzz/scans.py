"""Random calls of causal_conv1d, linear_scan and selective_scan: all dtypes, views, documents, states, directions, gradients of any
inputs by the result, the state or both.

Bounds follow from the operations. What is no recurrence is written in `Product` and `Off`. A recurrence h_t = a_t h_{t-1} + b_t is
off by

    e_t = (|a_t| + off a_t) e_{t-1} + off a_t |h_{t-1}| + off b_t + u' |a_t| |h_{t-1}| + u |h_t|,

u' the rounding of a product, 3u of a complex one: two products and a sum of them in each of two parts. Where threads cut time in
segments, a segment's product of factors and its h from nothing are rounded, of the size that terms have without cancelling: the last
two of e_t are then of m_t = |a_t| m_{t-1} + |b_t|. A gradient is the same recurrence the other way; linear_scan's reads h as it is
stored.

The exponentials, the softplus and its slope are off by what tests/native/math_checks.h allows them, with units of 2^-23, and by what
their argument moves them: log(1 + e^(x + d)) is at most e^d times log(1 + e^x), and at most d larger.
"""

from __future__ import annotations

import itertools
import random
from functools import partial

import torch
from _chunks import factors
from _recurrences import (
    DTYPES,
    LAYOUTS,
    LENGTHS,
    Product,
    check_call,
    cut,
    joined,
    known,
    laid_out,
    magnitude,
    normal,
    one_thread,
    over,
    product,
    share,
    total,
)
from _steps import LEAST, ONE, Off, U, given

import fastattn as fa

UNIT = 2.0**-23
EXP2 = (2e-7 * 2**24 + 0.5) * UNIT
SOFTPLUS = ((2e-7 + 3e-7 + 1e-7) * 2**24 + 3) * UNIT
SLOPE = ((2e-7 + 3e-7) * 2**24 + 1) * UNIT
LOWEST = 2.0**-125  # below it 2^x may be 0
SIZES = (1.0, 1.0, 1.0, 1e-3, 30.0, 1e-18, 1e4)
FACTORS = ("below one", "below one", "one", "zero", "some zero", "small", "above one")
KINDS = ("full", "full", "constant", "shared", "one", "per batch", "of the last batch dim")


def draw(rng: random.Random) -> dict:
    pick = rng.choice
    op = pick(("causal_conv1d", "linear_scan", "selective_scan"))
    packed = rng.random() < 0.3
    documents = [pick((0, 1, 2, 3, 15, 16, 17, 63, 64, 65)) for _ in range(rng.randint(0, 5))]
    if rng.random() < 0.1:
        documents = [1] * rng.randint(1, 20)
    dtypes = ("float32", "float32", "bfloat16", "float16") + (
        ("complex64",) * 2 if op == "linear_scan" else ()
    )
    case = {
        "op": op,
        "dtype": pick(dtypes),
        "parameters": pick(("float32", "same")),
        "batch": 1 if packed else pick((1, 1, 2, 3, 0 if rng.random() < 0.1 else 1)),
        "length": pick(LENGTHS),
        "documents": documents if packed else None,
        "channels": pick((1, 2, 3, 7, 8, 16, 17, 40, 65, 0 if rng.random() < 0.1 else 9)),
        "state": rng.random() < 0.6,
        "sizes": [pick(SIZES) for _ in range(6)],
        "grad_size": pick(SIZES[3:]) if rng.random() < 0.3 else 1.0,
        "layouts": [pick((0, 0, *range(LAYOUTS))) for _ in range(9)],
        "grad_layout": pick((0, 0, *range(LAYOUTS))),
        "wanted": rng.randrange(512),
        "pulled": pick((1, 2, 3, 3)),
        "seed": rng.randrange(1 << 24) * 100,
        "threads": pick((1, 2, 5)),
        "isa": rng.randrange(4),
    }
    if op == "causal_conv1d":
        if rng.random() < 0.05:
            case["length"], case["channels"] = pick((256, 257, 300)), pick((1, 513, 530))
        return case | {
            "taps": pick((1, 2, 3, 4, 4, 5, 8)),
            "bias": rng.random() < 0.5,
            "silu": rng.random() < 0.5,
        }
    if op == "linear_scan":
        case["pulled"] = 1
        lead = (
            pick(([], [1]))
            if packed
            else pick(([], [1], [3], [2, 2], [1, 2, 2], [0 if rng.random() < 0.2 else 2]))
        )
        if not packed and rng.random() < 0.03:
            lead, case["length"], case["channels"] = pick(([], [2])), pick((1024, 1100)), pick((1, 8, 20))
        return case | {
            "lead": lead,
            "kind": pick(KINDS),
            "factors": pick(FACTORS),
            "reverse": rng.random() < 0.5,
            "log_a": rng.random() < 0.4,
        }
    return case | {
        "states": pick((1, 2, 4, 8, 16, 17)),
        "A": pick(("negative", "negative", "negative", "zero", "large", "positive")),
        "dt": pick((1.0, 1.0, 1e-3, 10.0, 100.0)),
        "options": [rng.random() < 0.6 for _ in range(3)],
        "dt_softplus": rng.random() < 0.7,
    }


def check(case: dict) -> None:
    checks = {
        "causal_conv1d": _check_conv,
        "linear_scan": _check_scan,
        "selective_scan": _check_selective,
    }
    with one_thread():
        checks[case["op"]](case)


# --- inputs -----------------------------------------------------------------------------------------------------------


def _length(case: dict) -> int:
    return case["length"] if case["documents"] is None else sum(case["documents"]) + case["length"] % 4


def _sequences(case: dict) -> int:
    return case["batch"] if case["documents"] is None else len(case["documents"])


def _size(case: dict, i: int) -> float:
    size = case["sizes"][i]
    return min(max(size, 1e-3), 30.0) if case["dtype"] == "float16" else size


def _finished(case: dict, tensors: dict) -> dict:
    """Laid out in memory, each its own way; absent ones left out."""
    layouts = dict(zip(tensors, case["layouts"], strict=False))
    return {n: laid_out(t, layouts[n]) for n, t in tensors.items() if t is not None}


def _wanted(case: dict, tensors: dict) -> list[str]:
    return [n for i, n in enumerate(tensors) if case["wanted"] >> i & 1]


def _offsets(case: dict) -> dict:
    if case["documents"] is None:
        return {}
    return {"cu_seqlens": torch.tensor([0, *itertools.accumulate(case["documents"])])}


def _spans(case: dict, length: int) -> list[tuple[int, int, slice]]:
    """Tokens of each sequence, or of all batches together, and which states are theirs."""
    if case["documents"] is None:
        return [(0, length, slice(None))]
    cuts = itertools.pairwise(itertools.accumulate(case["documents"], initial=0))
    return [(begin, end, slice(i, i + 1)) for i, (begin, end) in enumerate(cuts)]


def _with_rest(parts: list, like: torch.Tensor, dim: int) -> Off:
    """Tokens of documents, and zeros after the last."""
    have = sum(x.value.shape[dim] for x in parts)
    zeros = torch.zeros_like(like.narrow(dim, have, like.shape[dim] - have))
    zeros = zeros.to(torch.complex128 if zeros.is_complex() else torch.float64)
    return joined([*parts, Off(zeros, zeros.abs())], dim)


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


# --- the convolution --------------------------------------------------------------------------------------------------


def _check_conv(case: dict) -> None:
    dtype, batch, channels, taps, seed = (
        DTYPES[case["dtype"]], case["batch"], case["channels"], case["taps"], case["seed"]
    )  # fmt: skip
    own = dtype if case["parameters"] == "same" else torch.float32
    states = (_sequences(case), taps - 1, channels)
    inputs = _finished(case, {
        "x": normal(seed, batch, _length(case), channels, dtype=dtype, size=_size(case, 0)),
        "weight": normal(seed + 1, channels, taps, dtype=own, size=_size(case, 1)),
        "bias": normal(seed + 2, channels, dtype=own, size=_size(case, 2)) if case["bias"] else None,
        "initial_state": normal(seed + 3, *states, dtype=dtype, size=_size(case, 3)) if case["state"] else None,
    })  # fmt: skip
    options = {"activation": "silu" if case["silu"] else None} | _offsets(case)
    op = partial(fa.causal_conv1d, return_state=True)
    check_call(
        case,
        op,
        inputs | options,
        _wanted(case, inputs),
        lambda grads: _conv_bounds(case, inputs, states, grads),
    )


def _conv_bounds(case: dict, inputs: dict, states: tuple, grads: list) -> tuple[list, dict]:
    x, weight, taps = given(inputs["x"]), given(inputs["weight"]), case["taps"]
    channels, dtype = weight.value.shape[0], inputs["x"].dtype
    bias = given(inputs.get("bias", _zeros(channels)))
    first = given(inputs.get("initial_state", _zeros(*states)))
    parts: dict[str, list] = {n: [] for n in ("out", "state", "x", "weight", "bias", "initial_state")}
    for begin, end, own in _spans(case, x.value.shape[1]):
        count = end - begin
        whole = torch.cat([first.value[own], x.value[:, begin:end]], 1)
        # (S, tokens, D, K)
        windows = given(whole.unfold(1, taps, 1) if count else _zeros(len(whole), 0, channels, taps))
        pre = product(lambda x, w, b: (x * w).sum(-1) + b, windows, weight, bias, roundings=taps + 2)
        known(pre)
        parts["out"].append(pre * pre.sigmoid(dtype) if case["silu"] else pre)
        parts["state"].append(given(whole[:, count:]))
        pulled = given(_zeros(*pre.value.shape) if grads[0] is None else grads[0][:, begin:end])
        if case["silu"]:
            s = pre.sigmoid(torch.float32)
            pulled = pulled * (s + pre * s * (ONE - s))

        later = torch.zeros_like(whole)  # what the gradient of the state after the last token has for inputs
        if grads[1] is not None:
            later[:, count:] = grads[1][own]

        def to_inputs(g: torch.Tensor, w: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
            found = later.clone()
            for k in range(taps):
                found[:, k : k + g.shape[1]] += w[:, k] * g
            return found

        into = product(to_inputs, pulled, weight, given(later), roundings=taps + 3)
        parts["initial_state"].append(cut(into, 1, 0, taps - 1))
        parts["x"].append(cut(into, 1, taps - 1, taps - 1 + count))
        terms = pulled.value.shape[0] * count + 8
        parts["weight"].append(
            product(lambda g, x: (g[..., None] * x).sum((0, 1)), pulled, windows, roundings=terms)
        )
        parts["bias"].append(over(pulled, 0, 1))
    out, of_x = (_with_rest(parts[n], x.value, 1) for n in ("out", "x"))
    state, of_state = (joined([*parts[n], given(first.value[:0])], 0) for n in ("state", "initial_state"))
    nothing = [given(torch.zeros_like(t.value)) for t in (weight, bias)]
    of_weight, of_bias = (
        total(*parts[n]) if parts[n] else zero for n, zero in zip(("weight", "bias"), nothing, strict=True)
    )
    return [out, state], {"x": of_x, "weight": of_weight, "bias": of_bias, "initial_state": of_state}


# --- recurrences ------------------------------------------------------------------------------------------------------


def scan(a: Off, b: Off, first: Off, dim: int, *, parts: bool = False) -> Off:
    """h along a dim; parts: of time, which are put together."""
    by_product = 3 * U if a.value.is_complex() or b.value.is_complex() else U
    h, e, m = first.value, first.off, magnitude(first)
    values, offs = [], []
    tokens = (x.unbind(dim) for x in (a.value, magnitude(a), a.off, b.value, b.off))
    for a_t, wide, a_off, b_t, b_off in zip(*tokens, strict=True):
        size = m if parts else h.abs() + e
        e = wide * (e + by_product * size) + a_off * h.abs() + b_off + 2 * LEAST
        h = a_t * h + b_t
        if parts:
            m = wide * m + b_t.abs() + b_off
        e = e + U * (m if parts else h.abs() + e)
        values.append(h)
        offs.append(e)
    if not values:
        return Off(b.value, b.value.abs())
    return Off(torch.stack(values, dim), torch.stack(offs, dim))


def _flipped(x: Off, dim: int) -> Off:
    return Off(x.value.flip(dim), x.off.flip(dim))


def _shifted(x: Off, first: Off, dim: int) -> Off:
    """Of each token the one before, of the first token `first`, without the dim."""
    return joined([Off(first.value.unsqueeze(dim), first.off.unsqueeze(dim)), x], dim)


# --- the linear scan --------------------------------------------------------------------------------------------------


def _check_scan(case: dict) -> None:
    dtype, channels, seed, lead, length = (
        DTYPES[case["dtype"]], case["channels"], case["seed"], case["lead"], _length(case)
    )  # fmt: skip
    own = torch.float32 if dtype.itemsize == 2 and case["parameters"] == "float32" else dtype
    shape = (*lead, length, channels)
    of = {
        "full": shape,
        "constant": shape[-1:],
        "shared": (*shape[:-1], 1),
        "one": (),
        "per batch": (*shape[:-2], 1, 1),
        "of the last batch dim": (*shape[-3:-2], *shape[-2:]),
    }
    states = (_sequences(case), channels) if case["documents"] is not None else (*lead, channels)
    inputs = _finished(case, {
        "a": _some_factors(case, of[case["kind"]], dtype).to(own),
        "b": normal(seed + 2, *shape, dtype=dtype, size=_size(case, 0)),
        "initial": normal(seed + 3, *states, dtype=own, size=_size(case, 1)) if case["state"] else None,
    })  # fmt: skip
    options = {"reverse": case["reverse"], "log_a": case["log_a"]} | _offsets(case)
    check_call(
        case, fa.linear_scan, inputs | options, _wanted(case, inputs),
        lambda grads: _scan_bounds(case, inputs, states, grads),
    )  # fmt: skip


def _some_factors(case: dict, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    """Or their logarithms."""
    seed, kind, pair = case["seed"] + 10, case["factors"], dtype.is_complex
    size = torch.sigmoid(normal(seed, *shape))
    chosen = normal(seed + 1, *shape)
    size = {
        "one": torch.ones_like(size),
        "zero": torch.zeros_like(size),
        "small": size * 1e-4,
        "above one": 1 + size / 50,
    }.get(kind, size)
    size = torch.where(chosen > 0.7, 0.0, size) if kind == "some zero" else size
    angle = normal(seed + 2, *shape) * 3
    if case["log_a"]:
        return torch.complex(size.clamp(min=1e-30).log(), angle) if pair else size.log()
    return torch.polar(size, angle) if pair else size * chosen.sign()


def _scan_bounds(case: dict, inputs: dict, states: tuple, grads: list) -> tuple[list, dict]:
    b, reverse = given_any(inputs["b"]), case["reverse"]
    shape, dtype = b.value.shape, inputs["b"].dtype
    factor = _log_factors(inputs["a"]) if case["log_a"] else given_any(inputs["a"])
    a = Off(factor.value.expand(shape), factor.off.expand(shape))
    first = given_any(inputs.get("initial", torch.zeros(states, dtype=torch.float64)))
    # a thread of its own for 16 channels, and 512 tokens at least for each of those that are left
    cut_time = case["documents"] is None and case["threads"] > 2 and shape[-2] >= 1024
    stored = 0.0 if dtype.itemsize != 2 else torch.finfo(dtype).eps / 2
    parts: dict[str, list] = {n: [] for n in ("out", "a", "b", "initial")}
    for begin, end, own in _spans(case, shape[-2]):
        rows = [cut(x, -2, begin, end) for x in (a, b)]
        state = (
            first
            if case["documents"] is None
            else Off(first.value[own].squeeze(0), first.off[own].squeeze(0))
        )
        state = Off(*(x.expand(*shape[:-2], shape[-1]) for x in (state.value, state.off)))
        rows = [_flipped(x, -2) if reverse else x for x in rows]
        h = scan(*rows, state, -2, parts=cut_time)
        known(h)
        parts["out"].append(_flipped(h, -2) if reverse else h)
        if grads[0] is None:
            continue
        incoming = given_any(grads[0][..., begin:end, :])
        incoming = _flipped(incoming, -2) if reverse else incoming
        g, of_first = _back(rows[0], incoming, cut_time)
        known(g, of_first)
        kept = h.off + stored * magnitude(h) + (torch.finfo(dtype).smallest_normal if stored else 0.0)
        if stored:
            kept = torch.where(magnitude(h) > torch.finfo(dtype).max, torch.inf, kept)
        before = _shifted(Off(h.value, kept), state, -2)
        before = cut(before, -2, 0, end - begin)
        of_a = product(lambda g, h: g * h.conj(), g, Off(before.value, before.off), roundings=3)
        if case["log_a"]:
            of_a = product(lambda g, a: g * a.conj(), of_a, rows[0], roundings=6)
        parts["a"].append(_flipped(of_a, -2) if reverse else of_a)
        parts["b"].append(_flipped(g, -2) if reverse else g)
        parts["initial"].append(of_first)
    out = _with_rest(parts["out"], b.value, -2)
    if grads[0] is None:
        return [out], {}
    of_a, of_b = (_with_rest(parts[n], b.value, -2) for n in ("a", "b"))
    if case["documents"] is None:
        of_initial = parts["initial"][0]
    else:
        rows = [Off(*(t.reshape(1, shape[-1]) for t in (x.value, x.off))) for x in parts["initial"]]
        of_initial = joined([*rows, given(_zeros(0, shape[-1]))], 0)
    return [out], {"a": _shared(of_a, inputs["a"].shape), "b": of_b, "initial": of_initial}


def given_any(x: torch.Tensor) -> Off:
    """A number that is what it is, complex too."""
    return Off(x.detach().to(torch.complex128), _zeros(*x.shape)) if x.is_complex() else given(x)


def _log_factors(x: torch.Tensor) -> Off:
    if not x.is_complex():
        return factors(x)
    value = x.to(torch.complex128).exp()
    # torch's exponential, cosine and sine, each to a unit in the last place, and two products
    return Off(value, 8 * U * value.abs() + 2 * LEAST)


def _back(a: Off, incoming: Off, parts: bool) -> tuple[Off, Off]:
    """(g_t = incoming_t + conj(a_{t+1}) g_{t+1}, the gradient of what comes before the first token)."""
    conjugate = Off(a.value.conj(), a.off)
    zero = torch.zeros_like(incoming.value.sum(-2))
    nothing = Off(zero, zero.abs())
    if not incoming.value.shape[-2]:
        return incoming, nothing
    later = _shifted(_flipped(conjugate, -2), nothing, -2)
    g = scan(cut(later, -2, 0, a.value.shape[-2]), _flipped(incoming, -2), nothing, -2, parts=parts)
    g = _flipped(g, -2)
    ends = [Off(x.value.select(-2, 0), x.off.select(-2, 0)) for x in (conjugate, g)]
    return g, product(torch.mul, *ends, roundings=3)


def _shared(x: Product, shape: tuple) -> Product:
    """Its sum to a shape that broadcasts to x's."""
    if tuple(x.value.shape) == tuple(shape):
        return x
    terms = x.value.numel() // max(torch.Size(shape).numel(), 1) + 8
    value, off, size = (t.sum_to_size(shape) for t in (x.value, x.off, x.size))
    return Product(value, off + share(terms) * size, size)


# --- the selective scan -----------------------------------------------------------------------------------------------


def _check_selective(case: dict) -> None:
    dtype, batch, channels, states, seed, length = (
        DTYPES[case["dtype"]], case["batch"], case["channels"], case["states"], case["seed"], _length(case)
    )  # fmt: skip
    own = dtype if case["parameters"] == "same" else torch.float32
    with_d, with_z, with_bias = case["options"]
    tokens = (batch, length)
    dt = normal(seed + 1, *tokens, channels, size=case["dt"])
    A = -torch.rand(channels, states, generator=torch.Generator().manual_seed(seed)) - 0.01
    A = A * {"zero": 0.0, "large": 100.0, "positive": -0.01}.get(case["A"], 1.0)
    inputs = _finished(case, {
        "u": normal(seed + 2, *tokens, channels, dtype=dtype, size=_size(case, 0)),
        "dt": (dt if case["dt_softplus"] else dt.abs()).to(dtype),
        "A": A.to(own),
        "B": normal(seed + 3, *tokens, states, dtype=dtype, size=_size(case, 1)),
        "C": normal(seed + 4, *tokens, states, dtype=dtype, size=_size(case, 2)),
        "D": normal(seed + 5, channels, dtype=own, size=_size(case, 3)) if with_d else None,
        "z": normal(seed + 6, *tokens, channels, dtype=dtype, size=3.0) if with_z else None,
        "dt_bias": normal(seed + 7, channels, dtype=own).abs() if with_bias else None,
        "initial_state": normal(seed + 8, _sequences(case), channels, states, size=_size(case, 4)) if case["state"] else None,
    })  # fmt: skip
    options = {"dt_softplus": case["dt_softplus"]} | _offsets(case)
    op = partial(fa.selective_scan, return_state=True)
    check_call(
        case,
        op,
        inputs | options,
        _wanted(case, inputs),
        lambda grads: _selective_bounds(case, inputs, grads),
    )


def _softplus(x: Off) -> tuple[Off, Off]:
    """(log(1 + e^x), its slope)."""
    moved = x.off + 3 * U * x.value.abs()
    times = moved.clamp(max=700).expm1()
    value, slope = torch.nn.functional.softplus(x.value, threshold=100), torch.sigmoid(x.value)
    off = torch.minimum(value * times, moved)
    slope_off = torch.minimum(slope * times, moved / 4)
    return (
        Off(value, off + SOFTPLUS * (value + off) + LOWEST),
        Off(slope, slope_off + SLOPE * (slope + slope_off) + LOWEST),
    )


def _decays(d: Off, A: Off) -> Off:
    """e^(d A), by 2^(d (A log2(e))): the constant and two products are rounded."""
    x = d.value[..., None] * A.value
    moved = d.off[..., None] * A.value.abs() + 4 * U * (x.abs() + d.off[..., None] * A.value.abs())
    value = x.exp()
    off = value * moved.clamp(max=700).expm1()
    return Off(value, off + EXP2 * (value + off) + LOWEST)


def _unsqueezed(x: Off, dim: int) -> Off:
    return Off(x.value.unsqueeze(dim), x.off.unsqueeze(dim))


def _selective_bounds(case: dict, inputs: dict, grads: list) -> tuple[list, dict]:
    u = given(inputs["u"])
    channels, states = inputs["A"].shape
    first = inputs.get("initial_state", _zeros(_sequences(case), channels, states)).double()
    parts: dict[str, list] = {}
    for begin, end, own in _spans(case, u.value.shape[1]):
        tokens = {n: given(inputs[n][:, begin:end]) for n in ("u", "dt", "B", "C", "z") if n in inputs}
        of_out = _zeros(*tokens["u"].value.shape) if grads[0] is None else grads[0][:, begin:end]
        of_state = torch.zeros_like(first[own]) if grads[1] is None else grads[1][own]
        found = _selective(case, inputs, tokens, given(first[own]), given(of_out), given(of_state))
        for name, x in found.items():
            parts.setdefault(name, []).append(x)
    results = [
        _with_rest(parts.get("out", []), u.value, 1),
        joined([*parts.get("state", []), given(first[:0])], 0),
    ]
    gradients = {"initial_state": joined([*parts.get("initial_state", []), given(first[:0])], 0)}
    for name in ("u", "dt", "B", "C", "z"):
        if name in inputs:
            gradients[name] = _with_rest(parts.get(name, []), inputs[name].double(), 1)
    for name in ("A", "D", "dt_bias"):
        if name in inputs:
            zero = given(torch.zeros_like(inputs[name]))
            gradients[name] = total(*parts[name]) if name in parts else zero
    return results, gradients


def _selective(
    case: dict, inputs: dict, tokens: dict, first: Off, pulled: Off, of_state: Off
) -> dict[str, Off]:
    """Results and gradients of one sequence, or of batches."""
    dtype, A = inputs["u"].dtype, given(inputs["A"])
    u, B, C = (tokens[n] for n in ("u", "B", "C"))
    count, (channels, states) = u.value.shape[1], A.value.shape
    x = tokens["dt"] + given(inputs["dt_bias"]) if "dt_bias" in inputs else tokens["dt"]
    d, slope = _softplus(x) if case["dt_softplus"] else (x, ONE)
    given_u = d * u
    decays = _decays(d, A)
    known(decays)
    rows_B, rows_C = _unsqueezed(B, 2), _unsqueezed(C, 2)  # (S, L, 1, N)
    written = _unsqueezed(given_u, 3) * rows_B
    h = scan(decays, written, first, 1)
    known(h)
    D = given(inputs.get("D", _zeros(channels)))
    y = product(lambda h, c, d, u: (h * c).sum(-1) + d * u, h, rows_C, D, u, roundings=states + 4)
    found: dict[str, Off] = {"out": y, "state": first}
    if count:
        found["state"] = Off(h.value[:, -1], h.off[:, -1])
    if "z" in tokens:
        z = tokens["z"]
        s = z.sigmoid(dtype)
        silu = z * s
        found["out"] = y * silu
        found["z"] = pulled * y * (s + z * s * (ONE - s))
        pulled = pulled * silu
    # back
    incoming = _unsqueezed(pulled, 3) * rows_C
    ends = torch.zeros_like(incoming.value)
    if count:
        ends[:, -1] = of_state.value
        incoming = incoming + given(ends)
    later = _shifted(_flipped(decays, 1), given(torch.zeros_like(first.value)), 1)
    g = scan(cut(later, 1, 0, count), _flipped(incoming, 1), given(torch.zeros_like(first.value)), 1)
    g = _flipped(g, 1)
    through = product(torch.mul, g, decays, roundings=1)
    known(g, through)
    before = cut(_shifted(h, first, 1), 1, 0, count)
    e = product(torch.mul, through, before, roundings=1)
    terms = u.value.shape[0] * count + 8
    of_exponent = product(lambda e, a: (e * a).sum(-1), e, A, roundings=states + 6)
    of_given = product(lambda g, b: (g * b).sum(-1), g, rows_B, roundings=states + 2)
    of_step = total(of_exponent, product(torch.mul, of_given, u, roundings=1))
    of_dt = product(torch.mul, of_step, slope, roundings=1)
    by_u = total(product(torch.mul, pulled, D, roundings=1), product(torch.mul, of_given, d, roundings=1))
    row_d, row_given, row_pulled = (_unsqueezed(t, 3) for t in (d, given_u, pulled))
    return found | {
        "u": by_u,
        "dt": of_dt,
        "A": product(lambda e, d: (e * d).sum((0, 1)), e, row_d, roundings=terms),
        "B": product(lambda g, w: (g * w).sum(2), g, row_given, roundings=channels + 8),
        "C": product(lambda y, h: (y * h).sum(2), row_pulled, h, roundings=channels + 8),
        "D": product(lambda y, u: (y * u).sum((0, 1)), pulled, u, roundings=terms),
        "dt_bias": over(of_dt, 0, 1),
        "initial_state": Off(through.value[:, 0], through.off[:, 0]) if count else of_state,
    }
