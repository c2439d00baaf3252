"""Random score functions through flex_attention's kernels, their values and derivatives on single scores.

A mask leaves each query one key, so that a row's log-sum-exp is its score and, with a gradient of the log-sum-exp alone, dq is the
score's derivative times k, and a table's gradient the derivative in its elements. Each is compared with the graph in float64 within a
bound that follows from its operations: an operation has the roundings of float32 and what its operands may be off by. Where a comparison
of floats may go either way, nothing is said. Large attentions of published functions are in tests/ops/test_flex_attention.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from _functions import ROWS, build, condition, number
from _steps import U

import fastattn as fa
from fastattn import testing
from fastattn.ops.flex import prepare
from fastattn.ops.flex.derivative import derive
from fastattn.ops.flex.evaluate import TORCH
from fastattn.ops.flex.graph import Graph
from fastattn.runtime.native import use_cpu_isa

BATCH, HEADS = 2, 2
# what the vector functions are off by, in U, half a unit in the last place: 4 such units, where tests/native/math_checks.h has 3 at most
ULPS = {
    "exp": 8,
    "log": 8,
    "log1p": 8,
    "expm1": 8,
    "tanh": 8,
    "sigmoid": 8,
    "erf": 8,
    "sin": 4,
    "cos": 4,
    "pow": 8,
}


def draw(rng: random.Random) -> dict:
    # of two deep operands each kernels take depth 6 at most, of one and shallow others 12
    deep = rng.random() < 0.3
    depth = rng.randint(7, 12) if deep else rng.choice((1, 2, 3, 3, 4, 5, 6))
    return {
        "tree": number(rng, depth, 1) if deep else number(rng, depth),
        "mask": condition(rng, 3) if rng.random() < 0.5 else None,
        "queries": rng.choice((1, 2, 3, 8, 31, 40, 64, 65, 130)),
        "keys": rng.choice((1, 2, 7, 40, 64, 129, 200)),
        "size": rng.choice((1.0, 1.0, 0.1, 10.0)),
        "seed": rng.randrange(1 << 30),
        "threads": rng.choice((1, 2)),
        "isa": rng.randrange(4),
    }


@dataclass
class Value:
    """value in float64, int64 or bool; off: what float32 may be off by, infinite where it may be anything."""

    value: torch.Tensor
    off: torch.Tensor


def _exact(value: torch.Tensor) -> Value:
    return Value(value, torch.zeros_like(value, dtype=torch.float64))


def _rounded(value: torch.Tensor, off: torch.Tensor, units: float = 1.0) -> Value:
    return Value(value, off + units * U * (value.abs() + off) + 2.0**-149)


def _float(op: str, args: list[Value], value: torch.Tensor) -> Value:
    """An operation of floats, by how far its result moves where operands do."""
    x, y = args[0], args[-1]
    a, b = x.value.abs(), y.value.abs()
    match op:
        case "add" | "sub":
            return _rounded(value, x.off + y.off)
        case "mul":
            return _rounded(value, a * y.off + b * x.off + x.off * y.off)
        case "div":
            least = (b - y.off).clamp(min=0)
            return _rounded(value, (x.off + value.abs() * y.off) / least)
        case "neg" | "abs":
            return Value(value, x.off)
        case "min" | "max":
            return Value(value, torch.maximum(x.off, y.off))
        case "sqrt":
            low = (x.value - x.off).clamp(min=0).sqrt()
            return _rounded(value, torch.where(x.off == 0, 0.0, (x.value + x.off).sqrt() - low), 2)
        case "exp":
            return _rounded(value, value * torch.expm1(x.off), ULPS[op])
        case "expm1":
            return _rounded(value, torch.exp(x.value) * torch.expm1(x.off), ULPS[op])
        case "log" | "log1p":
            least = (x.value + (op == "log1p") - x.off).clamp(min=0)
            return _rounded(value, torch.where(x.off == 0, 0.0, x.off / least), ULPS[op])
        case "tanh" | "sin" | "cos":
            return _rounded(value, torch.minimum(x.off, torch.tensor(2.0)), ULPS[op])
        case "sigmoid":
            return _rounded(value, x.off / 4, ULPS[op])
        case "erf":
            return _rounded(value, 1.13 * x.off, ULPS[op])
        case "floor" | "sign":
            near = (x.value - x.value.round()).abs() if op == "floor" else a
            return Value(value, torch.where((near <= x.off) & (x.off > 0), torch.inf, 0.0))
        case "pow":
            return Value(value, torch.full_like(value, torch.inf))
    raise AssertionError(op)


def values(graph: Graph, outs: list[int], inputs: dict[str, Value]) -> list[Value]:
    found: dict[int, Value] = {}
    for place in graph.reach(outs):
        node = graph.nodes[place]
        args = [found[a] for a in node.args]
        if node.op == "constant":
            exact = torch.tensor(
                node.value, dtype={"f": torch.float64, "i": torch.int64, "b": torch.bool}[node.type]
            )
            off = (exact.float().double() - exact).abs() if node.type == "f" else torch.zeros(())
            found[place] = Value(exact, off.double())
        elif node.op == "input":
            found[place] = inputs[node.value]
        elif node.op == "load":
            tensor = graph.tensors[node.value]
            tensor = tensor.detach().double() if tensor.is_floating_point() else tensor
            found[place] = _exact(tensor[tuple(a.value for a in args)] if args else tensor)
        elif node.op == "select":
            condition, x, y = args
            off = torch.where(condition.value, x.off, y.off)
            found[place] = Value(
                torch.where(condition.value, x.value, y.value), torch.where(condition.off > 0, torch.inf, off)
            )
        elif node.op == "i2f":
            found[place] = _rounded(
                args[0].value.double(), torch.zeros(()), 1.0 if args[0].value.abs().max() > 1 << 24 else 0.0
            )
        else:
            value = TORCH[node.op](*(a.value for a in args))
            if node.type == "f":
                found[place] = _float(node.op, args, value)
            else:
                unsure = sum(a.off for a in args)
                if node.op in ("lt", "le", "eq", "ne") and graph.nodes[node.args[0]].type == "f":
                    unsure = torch.where((args[0].value - args[1].value).abs() <= unsure, unsure, 0.0)
                found[place] = Value(
                    value, unsure.expand(value.shape) if isinstance(unsure, torch.Tensor) else unsure
                )
    return [found[n] for n in outs]


def check(case: dict, backend: str = "cpu") -> None:
    queries, keys = case["queries"], case["keys"]
    generator = torch.Generator().manual_seed(case["seed"])
    table = testing.random_tensor(ROWS, seed=case["seed"]).requires_grad_()
    chosen = torch.randint(0, keys, (HEADS, queries), generator=generator)
    q = testing.random_tensor(
        BATCH, HEADS, queries, 1, seed=case["seed"] + 1, scale=case["size"]
    ).requires_grad_()
    k = testing.random_tensor(BATCH, HEADS, keys, 1, seed=case["seed"] + 2).requires_grad_()
    v = testing.random_tensor(BATCH, HEADS, keys, 1, seed=case["seed"] + 3)

    def score_mod(s, b, h, q_idx, kv_idx):
        return build(case["tree"], {"s": s, "b": b, "h": h, "q": q_idx, "k": kv_idx}, table)

    def one_key(b, h, q_idx, kv_idx):
        its_own = chosen[h, q_idx] == kv_idx
        if case["mask"] is None:
            return its_own
        return its_own & build(case["mask"], {"b": b, "h": h, "q": q_idx, "k": kv_idx}, table)

    sizes = prepare.Sizes(BATCH, HEADS, queries, keys)
    names, before = fa.cpu_isas(), torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        with use_cpu_isa(names[case["isa"] % len(names)]), testing.nan_filled_outputs():
            call = prepare.traced(score_mod, one_key, sizes)
            prepare.check_numbers(call)
            out, lse = fa.flex_attention(
                q, k, v, score_mod, one_key, scale=1.0, return_lse=True, backend=backend
            )
            weights = testing.random_tensor(*lse.shape, seed=case["seed"] + 4)
            finite = lse.isfinite()
            grads = [None, None]
            if lse.requires_grad:
                loss = (lse * weights).masked_fill(~finite, 0.0).sum()
                grads = torch.autograd.grad(loss, (q, table), allow_unused=True)
    except NotImplementedError as refused:  # an integer of more than 32 bits, a function too large
        if "32 bits" in str(refused) or "the kernels take" in str(refused):
            return
        raise
    finally:
        torch.set_num_threads(before)
    _compare(call, q, k, v, table, chosen, out, lse, weights, finite, grads)


def _compare(call, q, k, v, table, chosen, out, lse, weights, finite, grads) -> None:
    graph = call.graph
    b, h, i = (
        torch.arange(n).view(s) for n, s in zip(lse.shape, ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True)
    )
    own = chosen[h, i]
    key = k.detach().double()[b, h, own, 0]
    s = q.detach().double()[..., 0] * key
    inputs = {
        "b": _exact(b),
        "h": _exact(h),
        "q": _exact(i),
        "k": _exact(own),
        "s": _rounded(s, torch.zeros(()), 2),
    }
    loads = tuple(graph.where(lambda n: n.op == "load" and n.type == "f", [call.score]))
    slope, derivatives = derive(graph, call.score, loads)
    score, allowed, of_s, *of_loads = values(
        graph, [call.score, call.mask, slope, *derivatives.values()], inputs
    )
    shape = lse.shape
    attends = allowed.value.expand(shape)
    value, off = score.value.expand(shape), score.off.expand(shape)
    # what is infinite in float64 or may be so in float32 says nothing; a row's maximum and the logarithm of a sum of 1 are rounded
    known = attends & (value.abs() + off < 1e30) & value.isfinite()
    _within("lse", lse.detach().double(), value, off + 4 * U * value.abs() + 2.0**-140, known)
    assert torch.equal(lse[~attends], torch.full_like(lse[~attends], -torch.inf)), (
        "a row that attends nothing has lse -inf"
    )
    picked = v.double()[b, h, own, 0].expand(shape)
    _within("out", out[..., 0].detach().double(), picked, 4 * U * picked.abs() + 2.0**-140, known)
    if grads[0] is None:
        return
    pulled = weights.double().masked_fill(~finite, 0.0)
    slope_value, slope_off = of_s.value.expand(shape), of_s.off.expand(shape)
    expected = pulled * slope_value * key
    bound = (pulled * key).abs() * (slope_off + 6 * U * (slope_value.abs() + slope_off)) + 2.0**-140
    # a weight is e^(score - lse) by its exponential, off by what both are: exact but for their roundings
    weight = 8 * U * (1 + value.abs().clamp(max=1e30))
    bound = torch.where(pulled == 0, 2.0**-140, bound + expected.abs() * weight)
    expected = torch.where(pulled == 0, 0.0, expected)
    sure = known & bound.isfinite() & expected.isfinite()
    _within("dq", grads[0][..., 0].double(), expected.masked_fill(~attends, 0.0), bound, sure | ~attends)
    if grads[1] is None or not derivatives:
        return
    total, most = torch.zeros(ROWS, dtype=torch.float64), torch.zeros(ROWS, dtype=torch.float64)
    for load, of_load in zip(derivatives, of_loads, strict=True):
        (index,) = values(graph, list(graph.nodes[load].args), inputs)
        each, each_off = of_load.value.expand(shape), of_load.off.expand(shape)
        part = torch.where(attends, pulled * each, 0.0)
        size = torch.where(
            attends,
            pulled.abs() * (each_off + each.abs() * (weight + (8 + lse.numel()) * U)) + 2.0**-140,
            0.0,
        )
        part = torch.where(pulled == 0, 0.0, part)
        size = torch.where(pulled == 0, 0.0, size)
        size = torch.where(~attends | (known & size.isfinite()), size, torch.inf)
        places = index.value.expand(shape).reshape(-1)
        total.index_add_(0, places, part.reshape(-1))
        most.index_add_(0, places, size.reshape(-1))
    _within("gradient of the table", grads[1].double(), total, most, most.isfinite() & total.isfinite())


def _within(
    name: str, actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor, where: torch.Tensor
) -> None:
    error = (actual - expected).abs()
    wrong = where & ~(error <= bound)
    if wrong.any():
        at = int(torch.where(wrong, error / bound, -1.0).nan_to_num(torch.inf).argmax())
        place = [int(x) for x in torch.unravel_index(torch.tensor(at), error.shape)]
        raise AssertionError(
            f"{name}: {actual.reshape(-1)[at]:.9g} at {place}, {expected.reshape(-1)[at]:.9g} is right, "
            f"beyond their bound {bound.expand(error.shape).reshape(-1)[at]:.3g}"
        )
