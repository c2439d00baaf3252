"""HRM-Text's decode step as one op, where a backend serves it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..nn.blocks import Attention, PreNormBlock, PreNormStack, SwiGLU
from ..nn.cache import KeyValueCache
from ..nn.recurrence import HierarchicalRecurrence
from ..ops.attention import attention
from ..ops.hrm_step import decode_step
from ..ops.matvec import is_plain, is_unchanged
from ..runtime.registry import needs_grad, requested, serves

if TYPE_CHECKING:
    from .hrm_text import HrmText

# what the op stands for
_FORWARDS = {
    kind: kind.forward
    for kind in (HierarchicalRecurrence, PreNormStack, PreNormBlock, Attention, SwiGLU, nn.Linear)
}


def step(model: "HrmText", zH: Tensor, zL: Tensor, cache: KeyValueCache) -> Tensor | None:
    """The final zH (B, 1, D) of one token a row, or None where the layers have to be called one by one: no fast backend
    serves the call, gradients are recorded, a trace is made or a part of the model was changed."""
    recurrence, config = model.recurrence, model.config
    if zH.shape[1] != 1 or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled(zH.device.type) or not is_unchanged(recurrence, HierarchicalRecurrence):
        return None
    if _has_any_global_hook() or any(kind.forward is not own for kind, own in _FORWARDS.items()):
        return None
    attends = cache.keys.shape[3], cache.keys.shape[5], config.rope_theta
    weights = []
    for stack in (recurrence.L_stack, recurrence.H_stack):
        found = _weights(stack, attends, config.rms_norm_eps)
        if found is None:
            return None
        weights += found
    if needs_grad((zH, weights)):
        return None
    tensors = zH[:, 0], zL[:, 0], weights, cache.keys, cache.values
    lengths = cache.lengths if cache.ragged else None
    cycles = recurrence.H_cycles, recurrence.L_cycles
    options = config.rope_theta, config.rms_norm_eps
    if not serves(
        "decode_step", *tensors, lengths, cache.longest, *cycles, *options, requested("decode_step", None)
    ):
        return None
    position, bound = (cache.longest, None) if lengths is None else (lengths, cache.longest)
    zH = decode_step(
        *tensors,
        position,
        bound=bound,
        h_cycles=cycles[0],
        l_cycles=cycles[1],
        theta=options[0],
        eps=options[1],
    )
    return zH[:, None]


def _weights(stack: nn.Module, attends: tuple[int, int, float], eps: float) -> list[Tensor] | None:
    """The weights of the stack's layers as decode_step takes them; None where it is not the plain stack.

    Read anew for every token: a part may be replaced, wrapped or hooked at any time, and nothing would say so.
    """
    if not is_unchanged(stack, PreNormStack) or stack.eps != eps:
        return None
    weights: list[Tensor] = []
    for layer in stack.layers:
        if not is_unchanged(layer, PreNormBlock) or layer.eps != eps:
            return None
        attn, mlp = layer._modules["attn"], layer._modules["mlp"]
        if not (is_unchanged(attn, Attention) and is_unchanged(mlp, SwiGLU) and attn.gate):
            return None
        if attn.attend is not attention or (attn.num_heads, attn.head_dim, attn.rope_theta) != attends:
            return None
        inside, beside = attn._modules, mlp._modules
        for projection in (
            inside["gqkv_proj"],
            inside["o_proj"],
            beside["gate_up_proj"],
            beside["down_proj"],
        ):
            if not is_plain(projection):
                return None
            weights.append(projection.weight)
    return weights
