"""Hugging Face transformers models on fastattn's attention: `attn_implementation="fastattn"`.

Every mask that a model can express is served. Models that transformers runs on "sdpa" get its masks: a bool tensor, or
None where attention needs no mask (`is_causal` then says whether it is causal). Other models, which may have attention
layers of their own or leave `is_causal` unset, get the additive masks of "eager". A tensor that equals a causal,
sliding-window, PrefixLM or padding mask, element for element, is replaced by the kernels' integer tests. Any other tensor
is used as it is.
"""

import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import masks
from ..masks import Mask
from ..ops.attention import attention
from ..ops.sdpa import autocast
from ..runtime import checks
from ..runtime.registry import requested
from . import _class_tables
from ._accelerated import Accelerated, accelerate

__all__ = ["Accelerated", "accelerate", "attention_forward", "register"]

NAME = "fastattn"
# arguments of attention functions that change the result and that fastattn does not serve
_REFUSED = {
    "head_mask": "a head mask",
    "cache": "a paged cache",
    "block_table": "a paged cache",
    "read_index": "a paged cache",
}
_sdpa_families: dict[Any, bool] = {}

_KEPT = 4  # masks whose structure is remembered: a model has one for each kind of layer
_LARGEST_KEPT = 1 << 26  # elements
_known: tuple[tuple, ...] = ()  # (keys, contents, structure), the latest first
_known_on_device: tuple[
    tuple, ...
] = ()  # (weak reference, version, keys, allowed, structure), the latest first


def register() -> None:
    """Make "fastattn" an attention implementation of transformers models.

    Afterwards `AutoModelForCausalLM.from_pretrained(..., attn_implementation="fastattn")` and
    `model.set_attn_implementation("fastattn")` work. May be called again. Raises ImportError without transformers.
    """
    register_as(NAME, attention_forward, "integrations.transformers.register")
    _class_tables.extend(NAME)


def register_as(name: str, forward: Callable, what: str) -> None:
    """Make `forward` the attention of `name`, under our masks; an ImportError names `what` needs transformers."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask, sdpa_mask
    except ImportError as error:
        raise ImportError(
            f"fastattn.{what}: needs transformers 5.9 or later; pip install 'fastattn[hf]'"
        ) from error

    def mask(
        *args: Any,
        q_length: int,
        kv_length: int,
        config: Any = None,
        allow_is_causal_skip: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        lengths = {"q_length": q_length, "kv_length": kv_length}
        if config is None or not _sdpa_family(type(config)):
            return eager_mask(*args, **lengths, **kwargs)
        # None means a square causal mask: attention then refuses a model that drops queries afterwards
        skip = allow_is_causal_skip and (q_length == 1 or q_length == kv_length)
        return sdpa_mask(*args, **lengths, allow_is_causal_skip=skip, **kwargs)

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, mask)


def _sdpa_family(config: Any) -> bool:
    """Whether transformers runs the models of this config class on "sdpa", with its masks and `is_causal`.

    Raises NotImplementedError for models whose attention cannot be replaced.
    """
    if config not in _sdpa_families:
        if not has_interface(config):
            raise NotImplementedError(
                f"fastattn: {config.model_type} models compute attention themselves, not through transformers' "
                "AttentionInterface; use attn_implementation='eager'"
            )
        models = [m for m in _model_classes() if m.config_class is config]
        _sdpa_families[config] = bool(models) and all(m._supports_sdpa for m in models)
    return _sdpa_families[config]


def has_interface(config: Any) -> bool:
    """Whether models of this config class call transformers' AttentionInterface, or have our class in a table of their own."""
    models = [m for m in _model_classes() if m.config_class is config]
    return not models or any(m._can_set_attn_implementation() or _class_tables.extended(m) for m in models)


def _model_classes() -> Iterator[Any]:
    from transformers import PreTrainedModel

    unvisited = [PreTrainedModel]
    while unvisited:
        subclasses = unvisited.pop().__subclasses__()
        unvisited += subclasses
        yield from subclasses


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
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: query (B, Hq, Lq, D), key and value (B, Hkv, Lk, D) -> ((B, Lq, Hq, D), None).

    attention_mask: None, bool (True = attend) or additive, each broadcastable to (B, Hq, Lq, Lk).
    cu_seq_lens_q, cu_seq_lens_k: token offsets (documents + 1,) of documents packed in a batch of one, as transformers'
        DataCollatorWithFlattening gives them; documents do not attend each other, whatever the mask says.
    dropout, softcap: as `fastattn.attention` has them; dropout draws from torch's generator of the device.
    s_aux: attention sinks, one a head (Hq,). sinks: one for each query of a head, (B, Hq, Lq, 1).
    indices: (B, Lq, K), the keys that each query attends, as sparse models choose them; a negative one is none. It is a mask: all
        scores are computed.
    block_indices: blocks of keys, for layers whose `indexer` makes a mask of them.
    One query of each sequence in float32 on a CPU, with nothing but its keys, is torch's function, which is faster there.
    Raises NotImplementedError for blocks of other layers, a paged cache, a head mask, output_attentions, packed documents with a cache, and
    causal attention without a mask where queries and keys differ in number.
    """
    refuse(kwargs)
    query, key, value = autocast(query, key, value)
    others = (position_bias, cu_seq_lens_q, cu_seq_lens_k, softcap, s_aux, sinks, indices, block_indices)
    if (
        attention_mask is None
        and dropout == 0.0
        and all(t is None for t in others)
        and _is_faster_by_torch(query, key)
    ):
        grouped = query.shape[1] != key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous(), None
    if indices is not None:
        attention_mask = _chosen(module, attention_mask, is_causal, query, key, indices)
    if block_indices is not None:
        positions = kwargs.get("position_ids")
        attention_mask = _chosen_blocks(module, attention_mask, query, key, block_indices, positions)
    bias, mask, keys, causal = position_bias, None, key.shape[2], False
    documents = _documents(query, key, cu_seq_lens_q, cu_seq_lens_k)
    if documents:
        mask, bias = _packed_mask(module, attention_mask, is_causal, keys, documents, bias)
    elif attention_mask is None:
        causal = query.shape[2] > 1 and _is_causal(module, is_causal)
        if causal and query.shape[2] != keys:
            raise NotImplementedError(
                f"fastattn: causal attention of {query.shape[2]} queries and {keys} keys came without a mask, which "
                "does not say where the queries are; use attn_implementation='eager'"
            )
    elif (recognised := recognise(attention_mask, keys)) is not None:
        mask, keys = recognised
    else:
        bias = attention_mask if bias is None else attention_mask + bias
    dtype = query.dtype
    if bias is not None:
        bias = bias if bias.shape[-1] == 1 else bias[..., :keys]
        if bias.dtype != dtype:
            wide = torch.promote_types(dtype, bias.dtype)
            query, key, value, bias = (t.to(wide) for t in (query, key, value, bias))
    if keys != key.shape[2]:
        key, value = key[:, :, :keys], value[:, :, :keys]
    out = _attend(
        query,
        key,
        value,
        sinks if sinks is not None else s_aux,
        scale=scaling,
        bias=bias,
        mask=Mask(causal=True) if causal else mask,
        softcap=softcap,
        dropout_p=dropout,
    )
    return out.transpose(1, 2).contiguous().to(dtype), None


def _is_faster_by_torch(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether torch's function does one query of each sequence in less time: in float32 on a CPU (257 keys of 8 heads: 43 us against
    62, where a token of a small model takes 10 ms)."""
    return (
        query.shape[2] == 1
        and key.shape[2] > 0
        and query.dtype == key.dtype == torch.float32
        and query.device.type == "cpu"
        and not requested("attention", None)
        and not torch.compiler.is_compiling()
    )


def _chosen(
    module: torch.nn.Module,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    query: torch.Tensor,
    key: torch.Tensor,
    indices: torch.Tensor,
) -> torch.Tensor:
    """The mask of attention to the keys that indices (B, Lq, K) name, among those that the mask allows."""
    batch, _, lq, _ = query.shape
    lk = key.shape[2]
    if indices.dim() != 3 or indices.shape[:2] != (batch, lq):
        raise NotImplementedError(
            f"fastattn: sparse attention by indices (indices) is served for (B, Lq, K), here ({batch}, {lq}, K), given "
            f"{tuple(indices.shape)}; use attn_implementation='eager'"
        )
    columns = indices.long().masked_fill(indices < 0, lk)
    chosen = columns.new_zeros(batch, lq, lk + 1, dtype=torch.bool).scatter_(-1, columns, True)[
        :, None, :, :lk
    ]
    if attention_mask is None:
        if lq > 1 and _is_causal(module, is_causal):
            if lq != lk:
                raise NotImplementedError(
                    f"fastattn: causal attention of {lq} queries and {lk} keys came without a mask; use "
                    "attn_implementation='eager'"
                )
            chosen = chosen.tril()
        return chosen
    if attention_mask.dtype == torch.bool:
        return attention_mask & chosen
    return attention_mask.masked_fill(~chosen, torch.finfo(attention_mask.dtype).min)


def _chosen_blocks(
    module: Any,
    attention_mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    indices: torch.Tensor,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    """The mask that the layer's own indexer makes of blocks of keys, for its eager attention."""
    build = getattr(getattr(module, "indexer", None), "build_block_mask", None)
    if build is None:
        raise NotImplementedError(
            "fastattn: sparse attention by blocks (block_indices) is served for layers whose indexer has build_block_mask, "
            f"not {type(module).__name__}; use attn_implementation='eager'"
        )
    if positions is None:
        positions = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)
    positions = torch.atleast_2d(positions).expand(query.shape[0], -1)
    return build(indices, attention_mask, key.shape[2], query.dtype, query.device, positions)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    """attention with sinks of a head, or of each query: for these the weights that are left to the keys by the log-sum-exp."""
    if sink is None or sink.numel() == q.shape[1]:
        if sink is not None:
            sink = sink.reshape(-1)
            sink = sink if sink.dtype in (q.dtype, torch.float32) else sink.to(checks.statistics_dtype(q))
        return attention(q, k, v, sink=sink, **options)
    out, lse = attention(q, k, v, return_lse=True, **options)
    share = torch.nn.functional.logsigmoid(lse[..., None] - sink.to(lse.dtype)).exp()
    return (out.to(lse.dtype) * share).to(out.dtype)


def _documents(
    query: torch.Tensor, key: torch.Tensor, offsets_q: torch.Tensor | None, offsets_k: torch.Tensor | None
) -> dict[str, Any]:
    """Mask's keywords for documents packed in a batch of one; none for a batch that is not packed."""
    if offsets_q is None and offsets_k is None:
        return {}
    if offsets_q is None or offsets_k is None:
        raise ValueError("fastattn: cu_seq_lens_q and cu_seq_lens_k must be given together")
    if query.shape[0] != 1:
        raise NotImplementedError(f"fastattn: cu_seq_lens_q needs a batch of one, given {query.shape[0]}")
    if query.shape[2] != key.shape[2]:
        raise NotImplementedError(
            f"fastattn: cu_seq_lens_q is served for as many queries as keys, given {query.shape[2]} and "
            f"{key.shape[2]}: packed documents have no cache"
        )
    return {"cu_seqlens_q": offsets_q, "cu_seqlens_k": offsets_k}


def _packed_mask(
    module: torch.nn.Module,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    keys: int,
    documents: dict[str, Any],
    bias: torch.Tensor | None,
) -> tuple[Mask, torch.Tensor | None]:
    """(Mask, bias) of packed documents: within each, what the model's own mask or `is_causal` says."""
    if attention_mask is None:
        return Mask(causal=_is_causal(module, is_causal), **documents), bias
    recognised = recognise(attention_mask, keys)
    if recognised is None:
        return Mask(**documents), attention_mask if bias is None else attention_mask + bias
    mask, _ = recognised
    dense = mask.dense if mask is not None else None
    if dense is None:
        # lengths and prefixes count positions in the row, which are not those in a document
        dense = _allowed(attention_mask)
    return Mask(dense=dense, **documents), bias


def _is_causal(module: torch.nn.Module, is_causal: bool | None) -> bool:
    """Whether attention without a mask is causal: never in eager attention, and as `is_causal` says in "sdpa"."""
    config = getattr(module, "config", None)
    if config is not None and not _sdpa_family(type(config)):
        return False
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def is_cache(value: Any) -> bool:
    """Whether an argument of a model is its key-value cache, whatever its name. A paged cache, which has no length of its
    own, is none."""
    return callable(getattr(value, "get_seq_length", None))


def cache_name() -> str:
    """What the installed transformers calls a model's cache, as an argument and in the output: `cache`, and in older
    versions `past_key_values`."""
    from transformers import LlamaForCausalLM

    parameters = inspect.signature(LlamaForCausalLM.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def refuse(kwargs: dict[str, Any]) -> None:
    """Raise NotImplementedError for arguments that change the result and are not served."""
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "fastattn: output_attentions is not served, the weights are never formed; use attn_implementation='eager'"
        )
    for name, what in _REFUSED.items():
        # a model's own cache is already in the keys and values
        if kwargs.get(name) is not None and not is_cache(kwargs[name]):
            raise NotImplementedError(
                f"fastattn: {what} ({name}) is not served; use attn_implementation='eager'"
            )


def recognise(mask: torch.Tensor, lk: int) -> tuple[Mask | None, int] | None:
    """(Mask, keys): attention under `mask`, broadcastable to (B, H, Lq, lk), equals attention under Mask over the first `keys`
    keys. None where an additive mask holds other numbers than 0 and the lowest.

    The layers of a model bring one mask many times. Its meaning is worked out once, and kept with a copy of its contents.
    """
    if mask.dtype == torch.bool and mask.dim() != 4:
        raise ValueError(
            f"fastattn: attention_mask must have 4 dimensions (B, H, Lq, Lk), given {tuple(mask.shape)}"
        )
    if not checks.has_contents(mask):
        return (Mask(dense=mask), lk) if mask.dtype == torch.bool else None
    if mask.device.type != "cpu":
        return _recognise_on_device(mask, lk)
    allowed = _allowed(mask)
    if allowed is None:
        return None
    return _known_structure(allowed, lk) or (Mask(dense=allowed), lk)


def _known_structure(allowed: torch.Tensor, lk: int) -> tuple[Mask | None, int] | None:
    """`_structure` of `allowed`, from the latest masks where one has the same contents."""
    global _known
    for length, contents, structure in _known:
        # by contents: numpy and compiled code write to memory without torch's count
        if length == lk and contents.equal(allowed):
            return structure
    structure = _structure(allowed, lk)
    if allowed.numel() <= _LARGEST_KEPT:
        _known = ((lk, allowed.clone(), structure), *_known[: _KEPT - 1])
    return structure


def _recognise_on_device(mask: torch.Tensor, lk: int) -> tuple[Mask | None, int] | None:
    """`recognise` on a GPU, where reading a mask waits for the device: each version of a tensor is read once."""
    global _known_on_device
    version = None if mask.is_inference() else mask._version
    known = (e for e in _known_on_device if e[0]() is mask and e[1:3] == (version, lk))
    entry = next(known, None)
    if entry is None:
        allowed = _allowed(mask)
        structure = None if allowed is None else _structure(allowed, lk)
        # a bool mask is its own: an entry keeps no mask alive
        entry = (weakref.ref(mask), version, lk, None if allowed is mask else allowed, structure)
        if version is not None:
            _known_on_device = (entry, *_known_on_device[: _KEPT - 1])
    *_, allowed, structure = entry
    if mask.dtype == torch.bool:
        allowed = mask
    if allowed is None:
        return None
    return structure or (Mask(dense=allowed), lk)


def _allowed(mask: torch.Tensor) -> torch.Tensor | None:
    """`mask` as bool; None for an additive mask with other numbers than 0 and the lowest. Rows that attend nothing are padding."""
    if mask.dtype == torch.bool:
        return mask
    if mask.dim() != 4 or mask.requires_grad or not mask.is_floating_point():
        return None
    allowed = mask == 0
    return allowed if bool((allowed | (mask <= torch.finfo(mask.dtype).min)).all()) else None


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
        arguments = mask.args("attention", shape.expand(-1, -1, lq, -1), shape.expand(-1, -1, keys, -1))
        same = (masks.dense_allowed(lq, keys, rows.device, arguments) == allowed[..., :keys]).all()
    return (mask, keys) if bool(same) else None
