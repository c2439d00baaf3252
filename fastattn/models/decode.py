"""HRM-Text's decode step as one op, where a backend serves it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..nn.blocks import Attention, PreNormBlock, PreNormStack, SwiGLU
from ..nn.cache import KeyValueCache
from ..nn.plain import is_untouched, plain_weight
from ..nn.recurrence import HierarchicalRecurrence
from ..ops.attention import attention
from ..ops.hrm_step import decode_step
from ..runtime.registry import needs_grad, requested, serves

if TYPE_CHECKING:
    from .hrm_text import HrmText


def step(model: "HrmText", zH: Tensor, zL: Tensor, cache: KeyValueCache) -> Tensor | None:
    """The final zH (B, 1, D) of one token a row, or None where the layers have to be called one by one: no fast backend
    serves the call, gradients are recorded, a trace is made or a part of the model was touched."""
    recurrence, config = model.recurrence, model.config
    if zH.shape[1] != 1 or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled(zH.device.type) or not is_untouched(recurrence, HierarchicalRecurrence):
        return None
    attends = cache.keys.shape[3], cache.keys.shape[5], config.rope_theta
    weights: list[Tensor] = []
    for stack in recurrence.stacks:
        of_stack = _weights(stack, attends, config.rms_norm_eps, zH.dtype)
        if of_stack is None:
            return None
        weights += of_stack
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


def _weights(
    stack: nn.Module, attends: tuple[int, int, float], eps: float, dtype: torch.dtype
) -> list[Tensor] | None:
    """The weights of the stack's layers as decode_step takes them; None where it is not the plain stack.

    Read anew for every token: a part may be replaced, wrapped or hooked at any time, and nothing would say so.
    """
    if not is_untouched(stack, PreNormStack) or stack.eps != eps:
        return None
    weights: list[Tensor] = []
    for layer in stack.layers:
        if not is_untouched(layer, PreNormBlock) or layer.eps != eps:
            return None
        attn, mlp = layer._modules["attn"], layer._modules["mlp"]
        if not (is_untouched(attn, Attention) and is_untouched(mlp, SwiGLU) and attn.gate):
            return None
        if attn.attend is not attention or (attn.num_heads, attn.head_dim, attn.rope_theta) != attends:
            return None
        of_attn, of_mlp = attn._modules, mlp._modules
        for projection in (
            of_attn["gqkv_proj"],
            of_attn["o_proj"],
            of_mlp["gate_up_proj"],
            of_mlp["down_proj"],
        ):
            weight = plain_weight(projection, dtype)
            if weight is None:
                return None
            weights.append(weight)
    return weights
