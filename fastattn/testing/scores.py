"""A check of a user's own score function: what flex_attention and a Score make of it against what it computes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..score import Score

_SPECIAL = (0.0, 1e-12, -1e-12, 1.0, -1.0, 30.0, -30.0)


def check_score(
    score_mod: Callable | Score,
    *,
    batch: int = 2,
    heads: int = 4,
    queries: int = 16,
    keys: int = 16,
    seed: int = 0,
) -> None:
    """Check that the kernels understand a score function: its trace and its derivatives against the function itself.

    score_mod: a function of `fastattn.flex_attention`, or a `fastattn.Score`, whose weight is checked as it follows from the product,
        with statistics of rows that are random numbers, a maximum the largest of them.

    score_mod(score, b, h, q_idx, kv_idx) is called in float64 on every score of an attention of these sizes, some of which are 0,
    tiny, 1 and 30, and differentiated by autograd in the score and in the captured tensors that require a gradient. What tensors it
    captures must be large enough for these sizes.

    Raises AssertionError where the trace differs, and what flex_attention raises for a function that it refuses.

    Example:
        >>> table = torch.randn(4, 31, requires_grad=True)
        >>> fastattn.testing.check_score(lambda s, b, h, q, k: s + table[h, q - k + 15])
    """
    from ..ops.flex import prepare
    from ..ops.flex.derivative import derive
    from ..ops.flex.evaluate import evaluate
    from ..ops.flex.plain import mapped

    if isinstance(score_mod, Score):
        score_mod = score_mod.of(_statistics(batch, heads, queries, keys, seed))
    call = prepare.traced(score_mod, None, prepare.Sizes(batch, heads, queries, keys))
    prepare.check_numbers(call)
    graph = call.graph
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(batch, heads, queries, keys, dtype=torch.float64, generator=generator) * 2
    flat = s.view(-1)
    flat[: len(_SPECIAL)] = torch.tensor(_SPECIAL, dtype=torch.float64)[: flat.numel()]
    places = [torch.arange(n, dtype=torch.int32) for n in s.shape]
    shaped = [t.view([-1 if i == axis else 1 for i in range(4)]) for axis, t in enumerate(places)]
    inputs = dict(zip(("s", "b", "h", "q", "k"), (s, *shaped), strict=True))

    leaf = s.clone().requires_grad_()
    with torch.enable_grad():
        expected = mapped(score_mod, (leaf,), places)
    (value,) = evaluate(graph, [call.score], inputs)
    _close("score", value.expand(s.shape), expected.detach().double())
    wanted = [t for t in graph.tensors if t.requires_grad]
    loads = tuple(
        n
        for n in graph.where(lambda node: node.op == "load", [call.score])
        if graph.tensors[graph.nodes[n].value].requires_grad
    )
    slope, derivatives = derive(graph, call.score, loads)
    slope_value, *of_loads = evaluate(graph, [slope, *derivatives.values()], inputs)
    finite = expected.detach().isfinite()
    if not expected.requires_grad:
        _close("derivative in the score", slope_value.expand(s.shape), torch.zeros_like(s))
        return
    grads = torch.autograd.grad(expected.masked_fill(~finite, 0.0).sum(), [leaf, *wanted], allow_unused=True)
    _close("derivative in the score", slope_value.expand(s.shape).masked_fill(~finite, 0.0), grads[0])
    for number, (t, grad) in enumerate(zip(wanted, grads[1:], strict=True)):
        found = torch.zeros(t.shape, dtype=torch.float64)
        for load, of_load in zip(derivatives, of_loads, strict=True):
            node = graph.nodes[load]
            if graph.tensors[node.value] is not t:
                continue
            of_each = of_load.expand(s.shape).masked_fill(~finite, 0.0)
            index = [i.expand(s.shape) for i in evaluate(graph, list(node.args), inputs)]
            found = (
                found.index_put(tuple(index), of_each, accumulate=True) if index else found + of_each.sum()
            )
        _close(f"gradient of captured tensor {number}, of shape {tuple(t.shape)},", found, grad)


def _statistics(batch: int, heads: int, queries: int, keys: int, seed: int) -> dict[str, torch.Tensor]:
    """Of rows, (B, H, Lq) float64, with gradients but for the count."""
    generator = torch.Generator().manual_seed(seed + 1)
    mean = torch.randn(batch, heads, queries, dtype=torch.float64, generator=generator)
    count = torch.full_like(mean, max(keys, 1))
    return {"mean": mean.requires_grad_(), "max": (mean.detach() + 4).requires_grad_(), "count": count}


def _close(what: str, found: torch.Tensor, expected: torch.Tensor | None) -> None:
    """Alike to float32's roundings: what a function itself makes float32 is computed so there alone."""
    expected = torch.zeros_like(found) if expected is None else expected.detach().double()
    torch.testing.assert_close(
        found,
        expected,
        rtol=1e-5,
        atol=1e-5 * max(1.0, _largest(expected)),
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def _largest(x: torch.Tensor) -> float:
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
