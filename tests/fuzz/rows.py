"""Random calls of the row ops: rms_norm, swiglu, gated, rotary, and fused_linear.

Their definitions are written in `_steps.Off`, operation by operation as kernels have them, so that the bound of a result or gradient
follows from the roundings on its way. Of fused_linear there are two ways, our kernel and torch's product between row kernels; the
second rounds each piece to the inputs' dtype, and its roundings are allowed in both.

What cancels is then off by roundings of its terms. A norm's gradient is what g = grad * weight has beside x, rstd * (g - x * rstd^2 *
mean(g * x)): of one column nothing is left of g but g * eps * rstd^2, and with more columns of g along x the same. Each term has a
handful of roundings and D of the mean; no order of operations avoids the difference but for a single column.
"""

from __future__ import annotations

import random

import torch
from _steps import ONE, Off, U, given, number, within

import fastattn as fa
from fastattn import testing
from fastattn.runtime.native import use_cpu_isa

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPS = ("rms_norm", "swiglu", "gated", "rotary", "fused_linear")


def draw(rng: random.Random) -> dict:
    pick = rng.choice
    return {
        "op": pick(OPS),
        "dtype": pick(tuple(DTYPES)),
        "lead": [
            rng.randint(0, 9) if rng.random() < 0.05 else rng.randint(1, 9) for _ in range(rng.randint(1, 3))
        ],
        "columns": pick((1, 2, 3, 8, 16, 17, 32, 40, 64, 100, 257)),
        "rows": pick((1, 2, 3, 8, 16, 33, 64)),
        "heads": [rng.randint(1, 4), rng.randint(1, 4)],
        "layout": pick((*testing.LAYOUTS, "columns")),
        "size": pick((1.0, 1.0, 1e-3, 30.0, 1e-18, 1e4)),
        "options": [rng.random() < 0.5 for _ in range(4)],
        "eps": pick((1e-6, 1e-5, 1e-12, 1.0)),
        "theta": pick((10000.0, 500.0, 1e6)),
        "position": pick((0, 3, 1000)),
        "seed": rng.randrange(1 << 30),
        "threads": pick((1, 2)),
        "isa": rng.randrange(4),
        "wanted": rng.randrange(16),
    }


def _tensor(case: dict, index: int, *shape: int, size: float | None = None) -> torch.Tensor:
    dtype, seed, layout = DTYPES[case["dtype"]], case["seed"] * 8 + index, case["layout"]
    size = case["size"] if size is None else size
    if case["dtype"] == "float16":
        size = min(max(size, 1e-3), 30.0)
    if layout == "columns":
        return testing.random_tensor(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=seed, scale=size)[..., ::2]
    if layout == "swapped" and len(shape) < 3:
        layout = "contiguous"
    return testing.random_tensor(*shape, dtype=dtype, seed=seed, scale=size, layout=layout)


def check(case: dict) -> None:
    if case["op"] == "rotary":
        return _check_rotary(case)
    inputs, op, expected = {
        "rms_norm": _rms_norm,
        "swiglu": _swiglu,
        "gated": _gated,
        "fused_linear": _fused_linear,
    }[case["op"]](case)
    names, before = fa.cpu_isas(), torch.get_num_threads()
    isa = names[case["isa"] % len(names)]
    torch.set_num_threads(case["threads"])
    wanted = [i for i, t in enumerate(inputs) if t is not None and case["wanted"] >> i & 1]
    leaves = [t if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    try:
        with use_cpu_isa(isa), testing.nan_filled_outputs():
            results = testing.as_tuple(op(*leaves))
            grads = [
                testing.random_tensor(*r.shape, dtype=r.dtype, seed=case["seed"] + i)
                for i, r in enumerate(results)
            ]
            pulled = torch.autograd.grad(results, [leaves[i] for i in wanted], grads) if wanted else []
    finally:
        torch.set_num_threads(before)
    flushed = 2.0**-126 if isa == "avx512bf16" and case["dtype"] == "bfloat16" else 0.0
    expected_results, expected_gradients = expected(grads, flushed)
    for i, (actual, bound) in enumerate(zip(results, expected_results, strict=True)):
        within(f"result {i}", actual, bound)
    for i, actual in zip(wanted, pulled, strict=True):
        within(f"gradient of input {i}", actual, expected_gradients[i])


def _norm(x: Off, eps: float) -> Off:
    """The reciprocal root of a row's mean square."""
    return ((x * x).sum(-1) * _share(x) + number(eps)).reciprocal_root()


def _share(x: Off) -> Off:
    """One over the number of columns: dividing by it rounds once."""
    return given(torch.tensor(1.0 / max(x.value.shape[-1], 1), dtype=torch.float64))


def _norm_gradient(g: Off, x: Off, rstd: Off) -> Off:
    return (g - x * ((g * x).sum(-1) * _share(x) * rstd * rstd)) * rstd


def _rms_norm(case: dict) -> tuple:
    lead, columns, options = case["lead"], case["columns"], case["options"]
    x = _tensor(case, 0, *lead, columns)
    residual = _tensor(case, 1, *lead, columns) if options[0] else None
    weight = _tensor(case, 2, columns, size=1.0) if options[1] else None

    def op(x, residual, weight):
        return fa.rms_norm(x, residual=residual, weight=weight, eps=case["eps"])

    def expected(grads: list, _: float) -> tuple:
        # the norm is of the sum as it is stored
        total = given(x if residual is None else x + residual)
        rstd, w = _norm(total, case["eps"]), ONE if weight is None else given(weight)
        pulled = given(grads[0])
        into = _norm_gradient(pulled * w, total, rstd)
        if residual is not None:
            into = into + given(grads[1])
        by_weight = (pulled * total * rstd).sum(*range(len(lead)))
        by_weight = Off(by_weight.value.view(-1), by_weight.off.view(-1))
        results = (total * rstd * w, *([] if residual is None else [total]))
        return results, [into, into, by_weight]

    return [x, residual, weight], op, expected


def _swiglu_steps(gate: Off, up: Off, dtype: torch.dtype) -> Off:
    return gate * gate.sigmoid(dtype) * up


def _swiglu_gradient(pulled: Off, gate: Off, up: Off, dtype: torch.dtype) -> Off:
    """Of gate and up side by side."""
    s = gate.sigmoid(dtype)
    silu = gate * s
    return _beside(pulled * up * (s + silu * (ONE - s)), pulled * silu)


def _beside(*parts: Off) -> Off:
    return Off(torch.cat([t.value for t in parts], -1), torch.cat([t.off for t in parts], -1))


def _halves(t: Off) -> tuple[Off, Off]:
    return tuple(Off(*pair) for pair in zip(t.value.chunk(2, -1), t.off.chunk(2, -1), strict=True))


def _swiglu(case: dict) -> tuple:
    x = _tensor(case, 0, *case["lead"], 2 * case["columns"])

    def expected(grads: list, _: float) -> tuple:
        halves = _halves(given(x))
        return [_swiglu_steps(*halves, x.dtype)], [_swiglu_gradient(given(grads[0]), *halves, x.dtype)]

    return [x], fa.swiglu, expected


def _gated_gradient(pulled: Off, x: Off, gate: Off, dtype: torch.dtype) -> tuple[Off, Off]:
    s = gate.sigmoid(dtype)
    return pulled * s, pulled * x * s * (ONE - s)


def _gated(case: dict) -> tuple:
    x, gate = (_tensor(case, i, *case["lead"], case["columns"]) for i in range(2))

    def expected(grads: list, _: float) -> tuple:
        result = given(x) * given(gate).sigmoid(x.dtype)
        return [result], _gated_gradient(given(grads[0]), given(x), given(gate), x.dtype)

    return [x, gate], fa.gated, expected


def _fused_linear(case: dict) -> tuple:
    lead, contracted, out_columns = case["lead"], case["columns"], case["rows"]
    norm, gate, swiglu, residual = case["options"]
    shape = (*lead, 1, contracted) if gate and not norm else (*lead, contracted)
    x = _tensor(case, 0, *shape)
    weight = _tensor(case, 1, out_columns * (2 if swiglu else 1), contracted, size=contracted**-0.5)
    gates = _tensor(case, 2, *shape, size=1.0) if gate and not norm else None
    added = _tensor(case, 3, *lead, out_columns, size=1.0) if residual else None
    dtype = x.dtype

    def op(x, weight, gate, residual):
        return fa.fused_linear(
            x, weight, norm_eps=case["eps"] if norm else None, gate=gate, swiglu=swiglu, residual=residual
        )

    def expected(grads: list, flushed: float) -> tuple:
        rows, w = given(x.reshape(-1, contracted)), given(weight)
        operand, gate_rows, rstd = rows, None, None
        if norm:
            rstd = _norm(rows, case["eps"])
            operand = (rows * rstd).to(dtype)
        elif gates is not None:
            gate_rows = given(gates.reshape(-1, contracted))
            operand = (rows * gate_rows.sigmoid(dtype)).to(dtype)
        more = None if added is None else given(added.reshape(-1, out_columns))
        product = operand.times(_turned(w), flushed, None if swiglu else more).rounded().to(dtype)
        result = _swiglu_steps(*_halves(product), dtype).to(dtype) if swiglu else product
        if swiglu and more is not None:
            result = result + more
        pulled = given(grads[0].reshape(-1, out_columns))
        if swiglu:
            pulled = _swiglu_gradient(pulled, *_halves(product), dtype).to(dtype)
        into = pulled.times(w, flushed).to(dtype)
        by_gate = None
        if norm:
            into = _norm_gradient(into, rows, rstd)
        elif gates is not None:
            into, by_gate = _gated_gradient(into, rows, gate_rows, dtype)
        by_weight = _turned(pulled).times(operand, flushed)
        shapes = (shape, weight.shape, shape)
        gradients = [
            t and Off(t.value.view(s), t.off.view(s))
            for t, s in zip((into, by_weight, by_gate), shapes, strict=True)
        ]
        out = (*lead, out_columns)
        of_added = given(grads[0])
        return [Off(result.value.view(out), result.off.view(out))], [*gradients, of_added]

    return [x, weight, gates, added], op, expected


def _turned(t: Off) -> Off:
    return Off(t.value.mT, t.off.mT)


def _check_rotary(case: dict) -> None:
    """Angles are in float32, off by 8 * 2^-24 of themselves, and so are their cosines and sines, which have a unit in the last place
    of their own."""
    batch, length, half = case["lead"][0], case["lead"][-1], case["columns"]
    inputs = [_tensor(case, i, batch, heads, length, 2 * half) for i, heads in enumerate(case["heads"])]
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (batch, length) if case["options"][0] else (length,)
    positions = torch.randint(0, case["position"] + 1, shape, generator=generator)
    leaves = [t.detach().requires_grad_() for t in inputs]
    names = fa.cpu_isas()
    with use_cpu_isa(names[case["isa"] % len(names)]), testing.nan_filled_outputs():
        results = fa.rotary(*leaves, positions, theta=case["theta"])
        grads = [_tensor(case, 4 + i, *t.shape, size=1.0) for i, t in enumerate(results)]
        pulled = torch.autograd.grad(results, leaves, grads)
    exponent = torch.arange(half, dtype=torch.float64) / half
    angle = positions.double()[..., None] * case["theta"] ** -exponent
    angle = angle[:, None] if positions.dim() == 2 else angle
    turned = 2 * U * (4 * angle + 1)
    for sign, what, sources, found in (
        (1, "result", inputs, results),
        (-1, "gradient of input", grads, pulled),
    ):
        for i, (source, actual) in enumerate(zip(sources, found, strict=True)):
            x, y = _halves(given(source))
            cos, sin = Off(angle.cos(), turned), Off(sign * angle.sin(), turned)
            parts = x * cos - y * sin, y * cos + x * sin
            within(f"{what} {i}", actual, _beside(*parts))
