"""Hugging Face transformers models on fastattn's attention: `attn_implementation="fastattn"`.

The mask function is transformers' own for "sdpa", so every mask a model can express arrives: as a bool
tensor, or as None for what needs none (then `is_causal` says whether it is causal). A bool tensor that is a
causal, sliding-window, PrefixLM or padding mask is recognised, element for element, and served by the
kernels' integer tests in place of the tensor; any other is used as it is.
"""

from typing import Any

import torch

from .. import masks
from ..masks import Mask
from ..ops.attention import attention
from ..ops.sdpa import scaled_dot_product_attention

NAME = "fastattn"
# arguments of attention functions that change the result and that fastattn does not serve
_REFUSED = {
    "softcap": "a soft cap on scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "head_mask": "a head mask",
    "cache": "a paged cache",
}


def register() -> None:
    """Make "fastattn" an attention implementation of transformers models.

    Afterwards `AutoModelForCausalLM.from_pretrained(..., attn_implementation="fastattn")` and
    `model.set_attn_implementation("fastattn")` work. May be called again. Raises ImportError without transformers.
    """
    interface, mask_interface, sdpa_mask = require("integrations.transformers.register")
    interface.register(NAME, attention_forward)
    mask_interface.register(NAME, sdpa_mask)


def require(what: str) -> tuple[Any, Any, Any]:
    """(AttentionInterface, AttentionMaskInterface, sdpa_mask) of transformers, or an ImportError naming `what` needs them."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            f"fastattn.{what}: needs transformers 5.9 or later; pip install 'fastattn[hf]'"
        ) from error
    return AttentionInterface, AttentionMaskInterface, sdpa_mask


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: query (B, Hq, Lq, D), key and value (B, Hkv, Lk, D) -> ((B, Lq, Hq, D), None).

    attention_mask: None, bool (True = attend) or additive, each broadcastable to (B, Hq, Lq, Lk).
    Raises NotImplementedError for dropout, a soft cap, attention sinks, a paged cache and output_attentions.
    """
    refuse(dropout, kwargs)
    if attention_mask is None:
        # what torch's function does with is_causal: the first query aligned with the first key, so that an
        # empty preallocated cache is read up to the queries only; one query attends everything
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        causal = bool(causal) and query.shape[2] > 1
        out = scaled_dot_product_attention(
            query, key, value, position_bias, is_causal=causal, scale=scaling, enable_gqa=True
        )
    elif attention_mask.dtype == torch.bool:
        mask, keys = recognise(attention_mask, key.shape[2])
        bias = position_bias if position_bias is None else position_bias[..., :keys]
        out = attention(query, key[:, :, :keys], value[:, :, :keys], scale=scaling, bias=bias, mask=mask)
    else:
        bias = attention_mask if position_bias is None else attention_mask + position_bias
        out = attention(query, key, value, scale=scaling, bias=bias)
    return out.transpose(1, 2).contiguous(), None


def refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise NotImplementedError for arguments that change the result and are not served."""
    if dropout:
        raise NotImplementedError(
            f"fastattn: attention dropout is {dropout}, only 0 is served; set attention_dropout (attn_pdrop) to 0 "
            "in the model's config, or use attn_implementation='sdpa'"
        )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "fastattn: output_attentions is not served, the weights are never formed; use attn_implementation='eager'"
        )
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"fastattn: {what} ({name}) is not served; use attn_implementation='eager'"
            )


def recognise(allowed: torch.Tensor, lk: int) -> tuple[Mask | None, int]:
    """(Mask, keys): attention under bool `allowed`, broadcastable to (B, H, Lq, lk), is attention under Mask
    over the first `keys` keys. Remembered on the tensor for as long as it is unchanged."""
    if allowed.dim() != 4:
        raise ValueError(
            f"fastattn: attention_mask must have 4 dimensions (B, H, Lq, Lk), given {tuple(allowed.shape)}"
        )
    if torch.compiler.is_compiling():
        return Mask(dense=allowed), lk
    version = None if allowed.is_inference() else allowed._version
    remembered = getattr(allowed, "_fastattn_mask", None)
    if version is not None and remembered is not None and remembered[0] == (version, lk):
        return remembered[1]
    found = _structure(allowed, lk) or (Mask(dense=allowed), lk)
    if version is not None:
        allowed._fastattn_mask = ((version, lk), found)
    return found


def _structure(allowed: torch.Tensor, lk: int) -> tuple[Mask | None, int] | None:
    """What `allowed` means, if it is one of Mask's integer tests: proposed from its rows' ends, then
    compared."""
    batch, heads, lq, width = allowed.shape
    if heads != 1 or width != lk or lq == 0 or lk == 0 or batch == 0:
        return None
    rows = allowed[:, 0]  # (B, Lq, Lk)
    key = torch.arange(1, lk + 1, device=rows.device, dtype=torch.int32)
    ends = (rows * key).amax(-1)  # (B, Lq), 0 for a row without keys
    key_lengths = ends.amax(-1)  # (B,)
    keys = int(key_lengths.max())
    if keys < lq or keys == 0:
        return None  # the diagonal of causal masks would start before the first query
    options: dict[str, Any] = {}
    if not bool((ends == key_lengths[:, None]).all()):
        start = keys - lq + 1  # keys that the first query attends under a plain causal mask
        options["causal"] = True
        prefix = torch.where(ends[:, 0] > start, ends[:, 0], 0)
        if bool(prefix.any()):
            options["prefix_lengths"] = prefix
        first = int(rows[0, -1].to(torch.int32).argmax())
        if first > 0 and int(ends[0, -1]) == keys:
            options["window"] = (keys - 1 - first, None)
    if bool((key_lengths < keys).any()):
        options["key_lengths"] = key_lengths
    mask = Mask(**options) if options else None
    if mask is None:
        same = rows[..., :keys].all()
    else:
        shape = torch.empty(batch, 1, 1, 0, device=rows.device)
        arguments = mask.schema_args(
            "attention", shape.expand(-1, -1, lq, -1), shape.expand(-1, -1, keys, -1)
        )
        same = (masks.dense_allowed(lq, keys, rows.device, *arguments) == allowed[..., :keys]).all()
    return (mask, keys) if bool(same) else None
