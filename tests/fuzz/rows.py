"""Random calls of the row ops: rms_norm, swiglu, gated, rotary, and fused_linear."""

from __future__ import annotations

import random

import _nearby
import torch

import fastattn as fa
from fastattn import testing
from fastattn.runtime.native import use_cpu_isa

OPS = ("rms_norm", "swiglu", "gated", "rotary", "fused_linear")


def draw(rng: random.Random) -> dict:
    pick = rng.choice
    return {
        "op": pick(OPS),
        "dtype": pick(tuple(_nearby.DTYPES)),
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
    dtype, seed, layout = _nearby.DTYPES[case["dtype"]], case["seed"] * 8 + index, case["layout"]
    size = case["size"] if size is None else size
    if case["dtype"] == "float16":
        size = min(max(size, 1e-3), 30.0)
    if layout == "columns":
        return testing.random_tensor(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=seed, scale=size)[..., ::2]
    if layout == "swapped" and len(shape) < 3:
        layout = "contiguous"
    return testing.random_tensor(*shape, dtype=dtype, seed=seed, scale=size, layout=layout)


def check(case: dict) -> None:
    lead, columns, options = case["lead"], case["columns"], case["options"]
    terms, floors = columns, ()
    if case["op"] == "rms_norm":
        x = _tensor(case, 0, *lead, columns)
        residual = _tensor(case, 1, *lead, columns) if options[0] else None
        weight = _tensor(case, 2, columns, size=1.0) if options[1] else None
        inputs = [x, residual, weight]
        # the gradient is a projection, the difference of two terms of this size
        smallest = max(float(x.double().abs().mean()) if x.numel() else 1.0, 1e-30)
        floors = [3 * testing.max_finite(weight if options[1] else torch.ones(1)) / smallest] * 2

        def op(x, residual, weight):
            return fa.rms_norm(x, residual=residual, weight=weight, eps=case["eps"])

        if residual is not None and case["dtype"] != "float32":
            # the sum is rounded before it is normed: so that float64 has the same sum, nothing is lost in it
            inputs[1] = x * 0
    elif case["op"] == "swiglu":
        inputs, op = [_tensor(case, 0, *lead, 2 * columns)], fa.swiglu
        size = testing.max_finite(inputs[0])
        floors = [3 * size * (1 + size)]  # sigmoid's slope is s * (1 - s), as in torch
    elif case["op"] == "gated":
        inputs, op = [_tensor(case, 0, *lead, columns), _tensor(case, 1, *lead, columns)], fa.gated
        floors = [0.0, 3 * testing.max_finite(inputs[0])]
    elif case["op"] == "rotary":
        return _check_rotary(case)
    else:
        return _check_linear(case)
    _run(case, op, inputs, terms, floors)


def _check_rotary(case: dict) -> None:
    """Angles are in float32, off by 8 * 2^-24 of themselves: a pair (x, y) turns by as much more, an error of (|x| + |y|) times it."""
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
    limits = torch.finfo(_nearby.DTYPES[case["dtype"]])
    for sign, sources, found in ((1, inputs, results), (-1, grads, pulled)):
        for source, actual in zip(sources, found, strict=True):
            x, y = source.double().chunk(2, -1)
            cos, sin = angle.cos(), sign * angle.sin()
            truth = torch.cat([x * cos - y * sin, y * cos + x * sin], -1)
            size = (x.abs() + y.abs()) * (8 * angle + 8) * 2.0**-24
            bound = torch.cat([size, size], -1) + truth.abs() * limits.eps / 2 + limits.smallest_normal
            assert bool(
                ((actual.double() - truth).abs() <= bound).all() or (truth.abs() + bound > limits.max).any()
            )


def _check_linear(case: dict) -> None:
    lead, contracted, out_columns = case["lead"], case["columns"], case["rows"]
    norm, gate, swiglu, residual = case["options"]
    shape = (*lead, 1, contracted) if gate and not norm else (*lead, contracted)
    x = _tensor(case, 0, *shape)
    weight = _tensor(case, 1, out_columns * (2 if swiglu else 1), contracted, size=contracted**-0.5)
    gates = _tensor(case, 2, *shape, size=1.0) if gate and not norm else None
    added = _tensor(case, 3, *lead, out_columns, size=1.0) if residual else None

    def op(x, weight, gate, residual):
        return fa.fused_linear(
            x, weight, norm_eps=case["eps"] if norm else None, gate=gate, swiglu=swiglu, residual=residual
        )

    size, gate_size = testing.max_finite(x), testing.max_finite(weight) * contracted**0.5
    slopes = (
        3 * size * (1 + size * gate_size) * gate_size**2 * out_columns**0.5
    )  # as for swiglu and gated, of the products
    floors = (
        [slopes, slopes * size, 3 * size * gate_size * out_columns**0.5]
        if swiglu or gates is not None
        else []
    )
    _run(case, op, [x, weight, gates, added], contracted, floors)


def _run(case: dict, op, inputs: list, terms: int, floors=()) -> None:
    wanted = [i for i, t in enumerate(inputs) if t is not None and case["wanted"] >> i & 1]
    dtype = _nearby.DTYPES[case["dtype"]]
    _nearby.check(
        op,
        inputs,
        wanted,
        dtype,
        seed=case["seed"],
        isa=case["isa"],
        threads=case["threads"],
        terms=terms,
        floors=floors,
    )
