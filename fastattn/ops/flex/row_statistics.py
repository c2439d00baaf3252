"""The mean, the maximum and the number of what a row of scores attends, which a Score's weights may depend on."""

from collections.abc import Callable

import torch

from ... import masks
from ...runtime import checks as _checks
from ...runtime.registry import call, needs_grad
from .plain import mapped


def row_statistics(
    before: Callable | None,
    names: tuple[str, ...],
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    mask: masks.MaskArgs,
    backend: str,
) -> dict[str, torch.Tensor]:
    """The statistics `names` of each row's x = before(s, b, h, q, k), (B, Hq, Lq), float32; of a row that attends nothing 0, and
    the count 1.

    mean and max are differentiable in q, k and what `before` captures. Each is a pass of a kernel over the keys.
    """
    wide, rows = _checks.statistics_dtype(q), q.shape[:3]
    count = masks.row_counts(q.shape[2], k.shape[2], q.device, mask).to(wide).expand(rows)
    found = {"count": count.clamp(min=1)}
    call_of = (before or _same, count, q, k, scale, mask, backend)
    if "mean" in names:
        found["mean"] = _mean(*call_of)
    if "max" in names:
        found["max"] = _maximum(*call_of)
    return {name: found[name] for name in names}


def _mean(
    before: Callable,
    count: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    mask: masks.MaskArgs,
    backend: str,
) -> torch.Tensor:
    """The weights are x, and every value 1."""
    from .by_function import weighted  # it imports this module

    ones = k.new_ones(()).expand(*k.shape[:3], 1)
    total = weighted(before, q, k, ones, False, scale, mask, backend)
    return total[..., 0] / count.clamp(min=1)


def _maximum(
    before: Callable,
    count: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    mask: masks.MaskArgs,
    backend: str,
) -> torch.Tensor:
    """By the kernel, with the gradient of x at the key that it found: the first of equal ones."""
    from .by_function import prepared

    traced, plan, tables, indices = prepared(before, q, k, mask, gradients=False)
    with torch.no_grad():
        members = (q, k, tables, indices, plan.program, scale, plan.mask, backend)
        most, key = call("row_maximum", *members)
    most = most.masked_fill(count == 0, 0.0)
    if not needs_grad([q, k, *traced.graph.tensors]) or not key.numel() or not k.shape[2]:
        return most
    some = (key >= 0) & most.isfinite()
    at = key.clamp(0, k.shape[2] - 1)
    heads = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
    batch = torch.arange(q.shape[0], device=q.device)
    own = k[batch[:, None, None], heads[:, None], at]  # (B, Hq, Lq, D), the key of each row
    s = scale * (q * own).sum(-1)
    places = [torch.arange(n, dtype=torch.int32, device=q.device) for n in (*s.shape, 1)]

    def at_key(s: torch.Tensor, key: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
        return before(s, *places[:3], key)

    x = mapped(at_key, (s[..., None], at[..., None].to(torch.int32)), places)[..., 0].to(most.dtype)
    # the kernel's number, and this one's gradient
    return torch.where(some, most + (x - x.detach()), most)


def _same(s: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
    return s
