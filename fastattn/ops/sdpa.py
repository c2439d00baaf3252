"""torch.nn.functional.scaled_dot_product_attention, computed by fastattn's kernels."""

from typing import Any

import torch

from ..masks import Mask
from ..runtime import checks
from ..runtime.registry import requested
from .attention import attention


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """softmax(scale * query key^T + mask) value, with torch's arguments and torch's meaning of each.

    `torch.nn.functional.scaled_dot_product_attention = fastattn.scaled_dot_product_attention` makes an unmodified model use
    fastattn. Inside torch.autocast it computes in autocast's dtype. Differentiable in query, key, value and a floating attn_mask.

    query: (..., Lq, D); key: (..., Lk, D); value: (..., Lk, Dv): one floating dtype and device, 2 or more
        dimensions, leading ones broadcast. Or all three jagged nested tensors (B, H, L of each sequence, D), as
        `torch.nested.nested_tensor(..., layout=torch.jagged).transpose(1, 2)` gives them, without attn_mask.
    attn_mask: broadcastable to (..., Lq, Lk). bool: True = attend. Floating, of query's dtype or float32:
        added to the scaled scores, in the wider of the two dtypes.
    dropout_p: in [0, 1]; draws from torch's generator of the device, not the numbers that torch's own function draws.
    is_causal: query i attends keys up to i, the first query aligned with the first key, whatever the
        lengths. With an attn_mask, both apply.
    scale: default 1/sqrt(D).
    enable_gqa: dim -3 of key and value may be a divisor of query's; each of their heads then serves several query heads.
    backend: the backend to use, as for every op; torch's function has no such argument.

    Returns (..., Lq, Dv). A row that attends no key is 0, as in torch. Raises ValueError, TypeError or
    NotImplementedError naming the argument.

    >>> q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 9, 16)
    >>> out = fastattn.scaled_dot_product_attention(q, k, k, attn_mask=torch.rand(7, 9) > 0.2)
    """
    op = "scaled_dot_product_attention"
    backend = requested(op, backend)
    if any(isinstance(t, torch.Tensor) and t.is_nested for t in (query, key, value)):
        return _jagged(op, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)
    for name, t in (("query", query), ("key", key), ("value", value)):
        checks.check_tensor(op, name, t)
        if t.dim() < 2:
            raise ValueError(
                f"fastattn.{op}: {name} must have 2 or more dimensions, given {checks.describe(t)}"
            )
    if attn_mask is None:
        query, key, value = autocast(query, key, value)
    else:
        query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    checks.check_floating(op, query=query, key=key, value=value)
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"fastattn.{op}: key has head dim {key.shape[-1]}, query has {query.shape[-1]}; they must agree"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"fastattn.{op}: value has length {value.shape[-2]}, key has {key.shape[-2]}; they must agree"
        )
    dtype = query.dtype
    if attn_mask is not None:
        _check_mask(op, attn_mask, query)
        if attn_mask.is_floating_point() and attn_mask.dtype != dtype:
            wide = torch.promote_types(attn_mask.dtype, dtype)
            query, key, value, attn_mask = (t.to(wide) for t in (query, key, value, attn_mask))
    lq, lk = query.shape[-2], key.shape[-2]
    q, k, v, leading = _four_dims(op, query, key, value, enable_gqa)
    bias = dense = None
    if attn_mask is not None:
        full = _mask_four_dims(op, attn_mask, (*leading, lq, lk))
        if 0 not in leading:
            dense, bias = (full, None) if full.dtype == torch.bool else (None, full)
    window = None
    if is_causal:
        # fastattn aligns the last query with the last key: keys past the last query are cut, queries past the
        # last key shift the diagonal
        if lk > lq:
            k, v, dense, bias = k[:, :, :lq], v[:, :, :lq], _first_keys(dense, lq), _first_keys(bias, lq)
        window = (None, max(lq - lk, 0))
    mask = Mask(window=window, dense=dense) if window is not None or dense is not None else None
    out = attention(q, k, v, scale=scale, bias=bias, mask=mask, dropout_p=dropout_p, backend=backend or None)
    return out.reshape(*leading, lq, value.shape[-1]).to(dtype)


def autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The floating tensors in torch.autocast's dtype where it is enabled, as torch casts the arguments of its own function."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # not on meta
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return [t.to(dtype) if t.dtype in narrow else t for t in tensors]


def _jagged(
    op: str,
    query: Any,  # torch's class of nested tensors is private
    key: Any,
    value: Any,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str,
) -> torch.Tensor:
    """Attention of jagged nested tensors (B, H, L of each sequence, D): packed documents of one batch."""
    for name, t in (("query", query), ("key", key), ("value", value)):
        checks.check_any_tensor(op, name, t)
        if t.layout is not torch.jagged or t.dim() != 4 or t._ragged_idx != 2 or t.lengths() is not None:
            raise NotImplementedError(
                f"fastattn.{op}: query, key and value must all be dense, or all jagged nested tensors of shape "
                f"(B, H, L of each sequence, D) without holes; {name} is not"
            )
    if attn_mask is not None:
        raise NotImplementedError(
            f"fastattn.{op}: attn_mask is not served with nested tensors; only is_causal is"
        )
    offsets_q, offsets_k, offsets_v = query.offsets(), key.offsets(), value.offsets()
    if offsets_k is not offsets_v and not torch.equal(offsets_k, offsets_v):
        raise ValueError(f"fastattn.{op}: key and value must have the same sequence lengths")
    if is_causal and offsets_q is not offsets_k and not torch.equal(offsets_q, offsets_k):
        raise NotImplementedError(
            f"fastattn.{op}: is_causal needs nested query and key of the same sequence lengths"
        )
    q, k, v = autocast(query.values(), key.values(), value.values())  # (H, tokens of all sequences, D)
    if not enable_gqa and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"fastattn.{op}: key has {k.shape[0]} heads, query has {q.shape[0]}; they must agree without enable_gqa"
        )
    mask = Mask(causal=is_causal, cu_seqlens_q=offsets_q, cu_seqlens_k=offsets_k)
    packed = q[None], k[None], v[None]
    out = attention(*packed, scale=scale, mask=mask, dropout_p=dropout_p, backend=backend or None)
    return torch.nested.nested_tensor_from_jagged(out[0], offsets=offsets_q, jagged_dim=2)


def _check_mask(op: str, mask: torch.Tensor, query: torch.Tensor) -> None:
    checks.check_tensor(op, "attn_mask", mask)
    checks.check_same_device(op, query=query, attn_mask=mask)
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise TypeError(
            f"fastattn.{op}: attn_mask must be bool, float32 or query's {query.dtype}, given {mask.dtype}"
        )
    if mask.dim() < 2:
        raise ValueError(
            f"fastattn.{op}: attn_mask must broadcast to (..., Lq, Lk) and have 2 or more dimensions, given"
            f" {checks.describe(mask)}"
        )


def _four_dims(
    op: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """q, k, v as (B, H, L, D), and the leading dims of the result, which B and H stand for."""
    shared = 2
    if enable_gqa:
        for name, t in (("query", query), ("key", key), ("value", value)):
            if t.dim() < 3:
                raise ValueError(
                    f"fastattn.{op}: {name} must have 3 or more dimensions with enable_gqa, given"
                    f" {checks.describe(t)}"
                )
        heads = query.shape[-3]
        for name, t in (("key", key), ("value", value)):
            if heads % t.shape[-3] if t.shape[-3] else heads:
                raise ValueError(
                    f"fastattn.{op}: {name} has {t.shape[-3]} heads, which does not divide query's {heads}"
                )
        if key.shape[-3] != value.shape[-3]:
            key = key.repeat_interleave(heads // key.shape[-3], dim=-3)
            value = value.repeat_interleave(heads // value.shape[-3], dim=-3)
        shared = 3
    batch = checks.common_shape(*(t.shape[:-shared] for t in (query, key, value)))
    if batch is None:
        raise ValueError(
            f"fastattn.{op}: the leading dims of query {tuple(query.shape)}, key {tuple(key.shape)} and value"
            f" {tuple(value.shape)} do not broadcast"
        )

    def expand(t: torch.Tensor) -> torch.Tensor:
        t = t.expand(*batch, *t.shape[-shared:])
        while t.dim() < 4:
            t = t.unsqueeze(0)
        return t.flatten(0, -4) if t.dim() > 4 else t

    leading = (*batch, query.shape[-3]) if enable_gqa else tuple(batch)
    q, k, v = expand(query), expand(key), expand(value)
    if 0 in leading:  # no elements: an empty batch of one head
        q, k, v = (t.reshape(0, 1, *t.shape[-2:]) for t in (q, k, v))
    return q, k, v, leading


def _mask_four_dims(op: str, mask: torch.Tensor, full: tuple[int, ...]) -> torch.Tensor:
    """`mask`, broadcastable to `full` = (..., Lq, Lk), with at most 4 dims, each of size 1 or full."""
    padded = (1,) * (len(full) - mask.dim()) + tuple(mask.shape)
    if mask.dim() > len(full) or not checks.broadcasts(padded, full):
        raise ValueError(
            f"fastattn.{op}: attn_mask of shape {tuple(mask.shape)} does not broadcast to (..., Lq, Lk) = {full}"
        )
    if len(full) <= 4:
        return mask
    batch = padded[:-3]
    if any(n != 1 for n in batch):
        return mask.expand(*full[:-3], *padded[-3:]).flatten(0, -4)
    return mask.reshape(padded[-3:])


def _first_keys(mask: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    return mask if mask is None or mask.shape[-1] == 1 else mask[..., :keys]
