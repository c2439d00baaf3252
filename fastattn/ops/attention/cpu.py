"""Tiled attention on the CPU: outputs allocated, parameters filled, one kernel call."""

import math
from collections.abc import Mapping

import torch

from ...blocks.lists import transpose
from ...masks import NO_MASK_ARGS, MaskArgs
from ...runtime import native
from ...runtime import tuning as _tuning
from . import tuning  # noqa: F401  declares what `_tuning.lookup` serves
from .checks import WANTS_BIAS, WANTS_SINK
from .cpu_bias import BiasGradient
from .scores import BY_CODE, has_residual

_LARGEST_HEAD_DIM = native.limits.head_dim
_LEAST_CAP, _MOST_CAP = 1e-30, 1e30  # quotients by it stay within float32
_LEAST_CLASSED_ROWS = 32  # with fewer queries, classifying a mask's tiles takes as long as it could save


def unserved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why no CPU kernel of any attention op can serve q, k and v, or None."""
    if q.dtype not in native.FAST_DTYPES:
        return native.unserved_dtype(q)
    for label, size in (("head dim", q.shape[3]), ("head dim of v", v.shape[3])):
        if not 1 <= size <= _LARGEST_HEAD_DIM:
            return f"it serves head dims from 1 to {_LARGEST_HEAD_DIM}, not a {label} of {size}"
    if max(q.shape[2], k.shape[2]) > native.limits.length:
        return f"it serves lengths up to {native.limits.length}"
    return None


def unserved_blocks(mask: MaskArgs) -> str | None:
    """Why the kernels that do serve block lists cannot serve a mask's, or None."""
    if mask.list_offsets is None:
        return None
    if mask.list_k < native.limits.list_keys or mask.list_k % 2:
        return f"it serves lists of blocks of {native.limits.list_keys} keys or more, an even number, not of {mask.list_k}"
    return None if mask.cu_seqlens_q is None else "it does not serve lists of packed documents"


def lookup(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **structural) -> _tuning.Choice:
    """The configuration of the kernel of any attention op; `structural`: the further fields of its key."""
    return _lookup(name, q.dtype, q.shape, k.shape, v.shape, *structural.items())


@_tuning.remembered
def _lookup(name, dtype, q_shape, k_shape, v_shape, *structural) -> _tuning.Choice:
    return _tuning.lookup(
        name,
        "cpu",
        structural={
            "dtype": str(dtype).removeprefix("torch."),
            **dict(structural),
            "head_dim": q_shape[3],
            "value_dim": v_shape[3],
        },
        sizes={
            "batch": q_shape[0],
            "heads": q_shape[1],
            "kv_heads": k_shape[1],
            "q_length": q_shape[2],
            "k_length": k_shape[2],
        },
        device="cpu",
    )


def refusal(q, k, v, bias, sink, score, scale, bias_value, softcap, dropped, rng, mask) -> str | None:
    """Why the CPU kernel cannot serve this call, or None."""
    if softcap is not None and not _LEAST_CAP <= softcap <= _MOST_CAP:
        return f"it serves soft caps from {_LEAST_CAP} to {_MOST_CAP}, not {softcap}"
    if bias_value is not None and not math.isfinite(bias_value):
        return f"it serves finite numbers as bias, not {bias_value}"
    if (reason := unserved_blocks(mask)) is not None:
        return reason
    return unserved(q, k, v)


def refusal_backward(
    grad_out, grad_lse, q, k, v, bias, sink, out, lse, state, residual, *options
) -> str | None:
    return refusal(q, k, v, bias, sink, *options[:-1])


def configure(q, k, v, bias, sink, score, *_) -> _tuning.Choice:
    return lookup("attention", q, k, v, score=BY_CODE[score].name)


def configure_backward(
    grad_out, grad_lse, q, k, v, bias, sink, out, lse, state, residual, score, *_
) -> _tuning.Choice:
    return lookup("attention_backward", q, k, v, score=BY_CODE[score].name)


def plane(t: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """t broadcast to (B, H, Lq, Lk) by strides of 0, its last dim contiguous."""
    if t is None:
        return None
    if t.shape[3] != shape[3] or (t.stride(3) != 1 and shape[3] > 1):
        t = t.expand(*t.shape[:3], shape[3]).contiguous()
    return t.expand(shape)


def tile_classes(mask: torch.Tensor, config: Mapping[str, int]) -> torch.Tensor:
    """u8 (B or 1, H or 1, tiles, tiles) of a (B or 1, H or 1, Lq, Lk) mask or bias: 0 empty, 1 full, 2 mixed.

    Computed in every call, not cached: writes to a mask by a compiler, by numpy or through `.data` cannot be noticed.
    """
    block_q, block_k = config["block_q"], config["block_k"]
    tiles = (-(-mask.shape[2] // block_q), -(-mask.shape[3] // block_k))
    classes = torch.empty(*mask.shape[:2], *tiles, dtype=torch.uint8)
    native.run(
        "classify_tiles",
        mask=mask,
        classes=classes,
        block_q=block_q,
        block_k=block_k,
        threads=native.threads(),
    )
    return classes


def _contiguous(indices: torch.Tensor | None) -> torch.Tensor | None:
    return None if indices is None else indices.contiguous()


def mask_fields(q: torch.Tensor, k: torch.Tensor, mask: MaskArgs) -> dict:
    """The mask as fields of a kernel's parameters; None or missing where it equals the struct's default."""
    if mask is NO_MASK_ARGS:
        return {}
    return {
        "causal": int(mask.causal) or None,
        "window_left": None if mask.window_left < 0 else mask.window_left,
        "window_right": None if mask.window_right < 0 else mask.window_right,
        "prefix_lengths": _contiguous(mask.prefix_lengths),
        "cu_seqlens_q": _contiguous(mask.cu_seqlens_q),
        "cu_seqlens_k": _contiguous(mask.cu_seqlens_k),
        "key_lengths": _contiguous(mask.key_lengths),
        "dense": plane(mask.dense, (*q.shape[:3], k.shape[2])),
    } | _list_fields(q, k, mask)


def _listed(q: torch.Tensor, k: torch.Tensor, mask: MaskArgs) -> bool:
    """Whether a mask has block lists, and there are pairs that they could list."""
    return mask.list_offsets is not None and q.shape[2] > 0 and k.shape[2] > 0


def _list_fields(q: torch.Tensor, k: torch.Tensor, mask: MaskArgs) -> dict:
    if not _listed(q, k, mask):
        return {}
    return {
        "list_offsets": mask.list_offsets.contiguous(),
        "list_keys": mask.list_keys.contiguous(),
        "list_q": mask.list_q,
        "list_k": mask.list_k,
        "list_heads": mask.list_heads,
    }


def transposed_lists(q: torch.Tensor, k: torch.Tensor, mask: MaskArgs) -> dict:
    """A backward's fields of a mask's block lists: the query blocks of each key block."""
    if not _listed(q, k, mask):
        return {}
    nq, nk = -(-q.shape[2] // mask.list_q), -(-k.shape[2] // mask.list_k)
    planes = (mask.list_offsets.shape[0] - 1) // nq
    starts, queries = transpose(mask.list_offsets, mask.list_keys, planes, nq, nk)
    return {"list_starts": starts, "list_queries": queries}


def _call(
    name: str,
    config: _tuning.Choice,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    sink: torch.Tensor | None,
    score: int,
    scale: float,
    bias_value: float | None,
    softcap: float | None,
    dropped: int,
    rng: torch.Tensor | None,
    mask: MaskArgs,
    **tensors,
) -> None:
    fields = mask_fields(q, k, mask)
    own_default = BY_CODE[score].log_n_bias and bias_value is None and bias is None
    if bias is not None and bias.dim() == 2:
        fields["distances"] = bias.float().contiguous().expand(q.shape[1], -1) if bias.numel() else None
        bias = None
    bias = plane(bias, (*q.shape[:3], k.shape[2]))
    by_element = bias if mask.dense is None else fields["dense"]
    few_rows = q.shape[2] < _LEAST_CLASSED_ROWS
    # packed documents start their tiles anew, and lists theirs at blocks, so that these are not the mask's tiles
    whole = mask.cu_seqlens_q is None and mask.list_offsets is None
    if by_element is not None and whole and by_element.numel() and not few_rows:
        unexpanded = by_element[tuple(slice(1 if by_element.stride(dim) == 0 else None) for dim in (0, 1))]
        classes = tile_classes(unexpanded, config.values)
        fields["tile_class"] = classes.expand(*q.shape[:2], *classes.shape[2:])
    native.run(
        name,
        q=native.rows(q),
        k=native.rows(k),
        v=native.rows(v),
        bias=bias,
        sink=None if sink is None else sink.float(),
        softcap=softcap,
        dropped=dropped or None,
        rng=rng.contiguous() if dropped else None,
        score=score or None,
        scale=scale,
        bias_value=bias_value or None,
        default_bias=int(own_default) or None,
        threads=native.threads(),
        **fields,
        **config.values,
        **tensors,
    )


def attention(*members):
    return attention_leading(4, *members)


def outputs(reads: int, q: torch.Tensor, v: torch.Tensor, score: int) -> tuple[list[torch.Tensor], dict]:
    """([out, lse, state, residual] or the first `reads` of them, {field: the output that a kernel fills})."""
    if v.shape[3] == q.shape[3]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        out = q.new_empty(*q.shape[:3], v.shape[3])
    results, filled = [out], {"out": out}
    for name, row_shape in (("lse", ()), ("state", (2,)))[: min(reads, 3) - 1]:
        if BY_CODE[score].normalised:
            filled[name] = q.new_empty((*q.shape[:3], *row_shape), dtype=torch.float32)
            results.append(filled[name])
        else:
            results.append(q.new_empty(0, dtype=torch.float32))
    if reads == 4:
        kept = has_residual(q.dtype, score)
        results.append(torch.empty_like(out) if kept else q.new_empty(0))
        if kept:
            filled["residual"] = results[3]
    return results, filled


def attention_leading(reads, q, k, v, bias, sink, score, *options):
    """(out, lse, state, residual), or the first `reads` of them."""
    results, filled = outputs(reads, q, v, score)
    if results[0].numel():
        config = configure(q, k, v, bias, sink, score)
        _call("attention_forward", config, q, k, v, bias, sink, score, *options, **filled)
    return tuple(results)


def gradient_fields(grad_out, grad_lse, q, k, v, out, lse, state, residual, decode_rows: int) -> dict:
    """A backward's fields for a normalised score: the forward's results, the incoming gradients, and the gradients to fill.

    decode_rows: the forward's. Its decoding kernel rounds products in another way than its tiles do.
    """
    grads = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return {
        **dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True)),
        "out": native.rows(out),
        "residual": native.rows(residual) if residual.numel() else None,
        "lse": lse,
        "state": state.contiguous(),
        "decode_rows": decode_rows,
        "grad_out": native.rows(grad_out),
        "grad_lse": grad_lse,
    }


def attention_backward(grad_out, grad_lse, q, k, v, bias, sink, out, lse, state, residual, score, *remaining):
    *options, wanted = remaining
    decode_rows = configure(q, k, v, bias, sink, score).values["decode_rows"]
    fields = gradient_fields(grad_out, grad_lse, q, k, v, out, lse, state, residual, decode_rows)
    if not BY_CODE[score].normalised:
        fields |= {"lse": None, "state": None, "grad_lse": None}
    sink_rows = q.new_empty(q.shape[:3], dtype=torch.float32) if wanted & WANTS_SINK else None
    config = lookup("attention_backward", q, k, v, score=BY_CODE[score].name)
    bias_sums = BiasGradient(q, k, bias, config.values) if wanted & WANTS_BIAS else None
    fields |= transposed_lists(q, k, options[-1])
    fields |= {"grad_sink": sink_rows} | ({} if bias_sums is None else bias_sums.fields)
    _call("attention_backward", config, q, k, v, bias, sink, score, *options, **fields)
    grad_bias = q.new_empty(0) if bias_sums is None else bias_sums.gradient()
    grad_sink = q.new_empty(0) if sink_rows is None else sink_rows.double().sum((0, 2)).to(sink.dtype)
    return fields["grad_q"], fields["grad_k"], fields["grad_v"], grad_bias, grad_sink
