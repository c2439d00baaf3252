"""flex_attention, and attention by a Score, in plain torch, for any function and dtype: what backend="reference" and float64 run."""

from collections.abc import Callable

import torch

from ... import masks
from ...runtime import torch_private
from ...runtime.arithmetic import widened
from ..attention.reference import expand_heads


def flex_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    score_mod: Callable | None,
    mask_mod: Callable | None,
    scale: float,
    mask: masks.MaskArgs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out (B, Hq, Lq, Dv) in q's dtype, lse, row maxima (B, Hq, Lq)), differentiable as autograd has it.

    The functions are mapped over all scores by torch.vmap, and see one at a time. A score whose mask is False has no gradient, whatever its function does.
    """
    wide_v = widened(v)
    s, places = _products(q, k, scale)
    if score_mod is not None and s.numel():
        s = mapped(score_mod, (s,), places).to(s.dtype)
    allowed = masks.dense_allowed(q.shape[2], k.shape[2], q.device, mask)
    if mask_mod is not None and s.numel():
        allowed = allowed & mapped(mask_mod, (), places)
    s = s.masked_fill(~allowed, -torch.inf)
    weight, lse, top = softmax(s)
    out = weight.to(wide_v.dtype) @ expand_heads(wide_v, q.shape[1])
    return out.to(q.dtype), lse, top


def score_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    before: Callable | None,
    weight_of: Callable[[dict[str, torch.Tensor]], Callable],
    normalised: bool,
    scale: float,
    mask: masks.MaskArgs,
) -> torch.Tensor:
    """out (B, Hq, Lq, Dv) of `fastattn.Score`, differentiable as autograd has it.

    weight_of(statistics) is a function (x, b, h, q, k) -> weight, of the means, maxima and counts (B, Hq, Lq) of what x the rows
    attend. Of equal maxima the first has the gradient. A row that attends nothing has the mean and the maximum 0, and the count 1, so that
    its logarithm and its reciprocal are numbers.
    """
    wide_v = widened(v)
    x, places = _products(q, k, scale)
    x = x if x.dtype == torch.float64 else x.float()
    if before is not None and x.numel():
        x = mapped(before, (x,), places).to(x.dtype)
    allowed = masks.dense_allowed(q.shape[2], k.shape[2], q.device, mask).expand(x.shape)
    # one whose mask is False has no gradient, whatever it is
    count = allowed.sum(-1).to(x.dtype)
    mean = x.masked_fill(~allowed, 0.0).sum(-1) / count.clamp(min=1)
    most = count.new_zeros(count.shape)
    if x.numel():
        most = x.masked_fill(~allowed, -torch.inf).max(-1).values.masked_fill(count == 0, 0.0)
    weight = weight_of({"mean": mean, "max": most, "count": count.clamp(min=1)})
    w = mapped(weight, (x,), places).to(x.dtype) if x.numel() else x
    w = w.masked_fill(~allowed, 0.0)
    if normalised:
        w, _ = summed(w)
    return (w.to(wide_v.dtype) @ expand_heads(wide_v, q.shape[1])).to(q.dtype)


def _products(q: torch.Tensor, k: torch.Tensor, scale: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(scaled products (B, Hq, Lq, Lk), the numbers of batch entries, heads, queries and keys)."""
    wide_q, wide_k = widened(q), widened(k)
    s = scale * (wide_q @ expand_heads(wide_k, q.shape[1]).transpose(-1, -2))
    return s, [torch.arange(n, dtype=torch.int32, device=q.device) for n in s.shape]


def summed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights (B, H, Lq, Lk) divided by their row sums, those sums); a sum whose reciprocal is no number of the dtype counts as 0, and
    the row's weights become 0."""
    total = weight.sum(-1)
    nothing = total.abs() < torch.finfo(total.dtype).tiny
    safe = total.masked_fill(nothing, 1.0)
    divided = torch.where(nothing[..., None], 0.0, weight / safe[..., None])
    return divided, total.masked_fill(nothing, 0.0)


def softmax(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights, lse and maxima (B, H, Lq)) of scores (B, H, Lq, Lk); a row of -inf has the weights 0 and lse -inf."""
    top = s.detach().amax(-1) if s.shape[3] else s.new_full(s.shape[:3], -torch.inf)
    from_top = top.masked_fill(top == -torch.inf, 0.0)
    weight = torch.exp(s - from_top[..., None])
    total = weight.sum(-1)
    nothing = total == 0
    safe = total.masked_fill(nothing, 1.0)
    return weight / safe[..., None], (safe.log() + from_top).masked_fill(nothing, -torch.inf), top


def mapped(function: Callable, of_each: tuple[torch.Tensor, ...], places: list[torch.Tensor]) -> torch.Tensor:
    """function(*of_each, b, h, q, k) of every score, (B, H, Lq, Lk)."""

    def as_tensor(*arguments: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(function(*arguments), device=places[0].device)

    mapped = as_tensor
    for axis in (3, 2, 1, 0):  # the outermost last
        own = tuple(0 if i == axis else None for i in range(4))
        mapped = torch.vmap(mapped, in_dims=(*(0 for _ in of_each), *own))
    with torch_private.indexing_by_values():
        return mapped(*of_each, *places)
