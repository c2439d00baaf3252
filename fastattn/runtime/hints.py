"""Advice for calls that use argument names or tensor layouts of other attention libraries."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

import torch

_MASK = "mask=fastattn.Mask({})".format

# Argument names of SDPA, flash-attn, FlexAttention and xformers, with what to write here instead.
_INSTEAD = {
    "alibi_slopes": "bias=, a tensor broadcastable to (batch, heads, queries, keys)",
    "attention_mask": _MASK("dense=attention_mask.bool()") + ", or key_lengths for padding at the end",
    "attn_bias": "bias=, a tensor broadcastable to (batch, heads, queries, keys)",
    "attn_mask": _MASK("dense=attn_mask") + " for a bool one, bias= for one that is added",
    "block_mask": _MASK("dense=..."),
    "causal": _MASK("causal=True"),
    "cu_seqlens_k": _MASK("cu_seqlens_q=..., cu_seqlens_k=..."),
    "cu_seqlens_q": _MASK("cu_seqlens_q=..., cu_seqlens_k=..."),
    "deterministic": "nothing: gradients are the same in every run",
    "dropout": "dropout_p=",
    "enable_gqa": "nothing: where k has fewer heads than q, they are shared",
    "is_causal": _MASK("causal=True"),
    "key_padding_mask": _MASK("key_lengths=...") + ", an int tensor (batch,)",
    "logits_soft_cap": "softcap=",
    "p": "dropout_p=",
    "return_attn_probs": "return_lse=True for the log-sum-exps; weights are not kept",
    "sinks": "sink=",
    "sm_scale": "scale=",
    "softmax_scale": "scale=",
    "window_size": _MASK("window=(left, right)"),
}


def refuse(op: str, function: Callable[..., Any], positional: tuple, keywords: Mapping[str, Any]) -> NoReturn:
    """Raises TypeError for arguments that `function` does not take, and says what to write instead."""
    known = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if positional:
        what = type(positional[0]).__name__
        write = "mask=" if what == "Mask" else "its name, such as mask="
        raise TypeError(f"fastattn.{op}: takes q, k and v by position, given a {what} as well; write {write}")
    name = next(iter(keywords))
    instead = _INSTEAD.get(name, "")
    near = get_close_matches(name, known, n=1)
    if instead.startswith("nothing") or instead.partition("=")[0] in known:
        advice = f"write {instead}"
    else:
        advice = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
    raise TypeError(f"fastattn.{op}: no argument {name!r}; {advice}")


def did_you_mean(given: str, known: Iterable[str], how: str = "{}") -> str:
    """ "; did you mean X?" if X is the known name nearest to `given`, formatted by `how`; "" if none is near."""
    near = get_close_matches(given, list(known), n=1)
    return f"; did you mean {how.format(near[0])}?" if near else ""


MANY_HEADS = 256  # no model has so many


def check_layout(op: str, q: torch.Tensor, k: torch.Tensor) -> None:
    """Warns, once a line of calling code, if q and k look like flash-attn's (batch, length, heads, head dim)."""
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    if queries == keys and 1 < keys < 128:
        warnings.warn(
            f"fastattn.{op}: q has {heads} heads and {queries} queries. Tensors are (batch, heads, length, head dim) here, "
            "flash-attn's are (batch, length, heads, head dim): if these are, give q.transpose(1, 2) and so on",
            stacklevel=4,
        )
