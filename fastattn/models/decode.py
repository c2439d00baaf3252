"""HRM-Text's decode step as one op, where a backend serves it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._registry import needs_grad, requested, serves
from ..nn.blocks import Attention, PreNormBlock, PreNormStack, SwiGLU, projections
from ..nn.cache import KeyValueCache
from ..nn.recurrence import HierarchicalRecurrence
from ..ops.attention import attention
from ..ops.decode import decode_step
from ..ops.matvec import is_plain

if TYPE_CHECKING:
    from .hrm_text import HrmText


def step(model: "HrmText", zH: Tensor, zL: Tensor, cache: KeyValueCache) -> Tensor | None:
    """The final zH (B, 1, D) of one token a row, or None where the layers have to be called one by one: no fast backend
    serves the call, the rows differ in length, gradients are recorded, a trace is made or a part of the model was changed."""
    recurrence, config = model.recurrence, model.config
    if zH.shape[1] != 1 or cache.ragged or torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled(zH.device.type) or not _plain(recurrence, HierarchicalRecurrence):
        return None
    weights = []
    for stack in (recurrence.L_stack, recurrence.H_stack):
        found = _weights(stack)
        if found is None:
            return None
        weights += found
    if needs_grad((zH, weights)):
        return None
    tensors = zH[:, 0], zL[:, 0], weights, cache.keys, cache.values
    cycles = recurrence.H_cycles, recurrence.L_cycles
    options = config.rope_theta, config.rms_norm_eps
    if not serves("decode_step", *tensors, cache.longest, *cycles, *options, requested("decode_step", None)):
        return None
    zH = decode_step(
        *tensors, cache.longest, h_cycles=cycles[0], l_cycles=cycles[1], theta=options[0], eps=options[1]
    )
    return zH[:, None]


def _plain(module: nn.Module, kind: type) -> bool:
    """Whether calling the module runs what its class says, and nobody listens; an instance's own forward is a wrapper."""
    listened = module._forward_hooks or module._forward_pre_hooks
    return type(module) is kind and not listened and "forward" not in module.__dict__


def _weights(stack: nn.Module) -> list[Tensor] | None:
    """The weights of the stack's layers as decode_step takes them; None where it is not the plain stack."""
    if not _plain(stack, PreNormStack):
        return None
    weights = []
    for layer in stack.layers:
        attn, mlp = layer.attn, layer.mlp
        if not (_plain(layer, PreNormBlock) and _plain(attn, Attention) and _plain(mlp, SwiGLU)):
            return None
        if attn.attend is not attention:
            return None
        for projection in projections(attn, mlp):
            if not is_plain(projection):
                return None
            weights.append(projection.weight)
    return weights
