"""Transformer blocks of the recurrent models: pre-norm with a gate (HRM-Text) and post-norm (HRM)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..masks import Mask
from ..ops.attention import attention
from ..ops.fused_linear import fused_linear
from ..ops.rowwise import gated, rms_norm, rotary, swiglu
from ..runtime.registry import requested
from .plain import is_untouched, linear, plain_weight, replaceable


class AppendsKeys(Protocol):
    def append_rotated(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, theta: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class Routing:
    """What every attention call of one forward shares, worked out once."""

    mask: Mask | None
    positions: Tensor  # (L,) or (B, L), int64


def clipped_normal_(weight: Tensor, std: float) -> Tensor:
    """Normal draws wrapped into +-3 standard deviations by fmod; 1.01476 restores the deviation lost."""
    with torch.no_grad():
        return weight.normal_().fmod_(3.0).mul_(1.01476 * std)


FUSED_ROWS = 16  # rows from which a product takes its neighbours along; fewer are bound by reading the weight


def _fuses(x: Tensor, attention: nn.Module, mlp: nn.Module) -> bool:
    """Whether a block's products of x run with their neighbours in one op: many rows on the CPU, and a block without a touched
    part. On a GPU a norm and the addition before it are one launch, which saves as much."""
    return (
        x.device.type == "cpu"
        and requested("fused_linear", None) in ("", "cpu", "reference")
        and x.numel() >= FUSED_ROWS * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and is_untouched(attention, Attention)
        and is_untouched(mlp, SwiGLU)
        and all(
            plain_weight(projection, x.dtype) is not None
            for projection in (attention.in_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        )
    )


@replaceable
class Attention(nn.Module):
    """Multi-head softmax attention with rotary positions (none where ``rope_theta`` is None); one product makes (gate,)
    query, key and value.

    ``gate`` multiplies the result by the sigmoid of a fourth projection, elementwise over heads x head_dim.
    ``attend``, called as ``fastattn.attention(q, k, v, mask=...)``, may be another of the attention ops.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        gate: bool,
        rope_theta: float | None,
        attend: Callable[..., Tensor] = attention,
    ) -> None:
        super().__init__()
        self.attend = attend
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        width = num_heads * head_dim
        if gate:
            self.gqkv_proj = nn.Linear(hidden_size, 4 * width, bias=False)  # rows gate | query | key | value
        else:
            self.qkv_proj = nn.Linear(hidden_size, 3 * width, bias=False)
        self.gate = gate
        self.o_proj = nn.Linear(width, hidden_size, bias=False)

    def reset_parameters(self, in_std: float, out_std: float) -> None:
        clipped_normal_((self.gqkv_proj if self.gate else self.qkv_proj).weight, in_std)
        clipped_normal_(self.o_proj.weight, out_std)

    @property
    def in_proj(self) -> nn.Linear:
        return self.gqkv_proj if self.gate else self.qkv_proj

    def forward(self, x: Tensor, routing: Routing, cache: AppendsKeys | None = None) -> Tensor:
        """The attention of x (B, L, hidden)."""
        gate, out = self._attended(linear(x, self.in_proj), routing, cache)
        if gate is not None:
            out = gated(out, gate)
        return linear(out.flatten(2), self.o_proj)

    def fused(
        self, x: Tensor, routing: Routing, cache: AppendsKeys | None = None, *, norm_eps: float | None = None
    ) -> Tensor:
        """x + the attention of x, or of rms(x) with ``norm_eps``: two products that take their neighbours along."""
        projected = fused_linear(x, self.in_proj.weight, norm_eps=norm_eps)
        gate, out = self._attended(projected, routing, cache)
        if gate is None:
            return fused_linear(out.flatten(2), self.o_proj.weight, residual=x)
        return fused_linear(out, self.o_proj.weight, gate=gate, residual=x)

    def _attended(
        self, projected: Tensor, routing: Routing, cache: AppendsKeys | None
    ) -> tuple[Tensor | None, Tensor]:
        """(gate or None, attention's output), each (B, L, H, D), of the first product's result."""
        B, L, _ = projected.shape
        # one unbind: its backward writes the gradient once, four slices would each pad and add theirs
        *gate, q, k, v = projected.view(B, L, -1, self.num_heads, self.head_dim).unbind(2)  # (B, L, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, L, D)
        if self.rope_theta is None:
            if cache is not None:
                raise NotImplementedError("Attention: a cache needs rotary positions")
        elif cache is None:
            q, k = rotary(q, k, routing.positions, theta=self.rope_theta)
        else:
            q, k, v = cache.append_rotated(q, k, v, routing.positions, self.rope_theta)
        out = self.attend(q, k, v, mask=routing.mask).to(projected.dtype).transpose(1, 2)
        return gate[0] if gate else None, out


@replaceable
class SwiGLU(nn.Module):
    """``W_down(silu(g) * u)`` with ``[g | u] = W_gate_up x``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def reset_parameters(self, in_std: float, out_std: float) -> None:
        clipped_normal_(self.gate_up_proj.weight, in_std)
        clipped_normal_(self.down_proj.weight, out_std)

    def forward(self, x: Tensor) -> Tensor:
        return linear(swiglu(linear(x, self.gate_up_proj)), self.down_proj)

    def fused(self, x: Tensor, *, norm_eps: float | None = None) -> Tensor:
        """x + forward(x), or forward(rms(x)) with ``norm_eps``: two products that take their neighbours along."""
        hidden = fused_linear(x, self.gate_up_proj.weight, norm_eps=norm_eps, swiglu=True)
        return fused_linear(hidden, self.down_proj.weight, residual=x)


@replaceable
class PreNormBlock(nn.Module):
    """``x = x + attention(rms(x)); x = x + mlp(rms(x))``, the attention gated.

    ``forward`` takes and returns (rms(x), x): each residual addition is fused with the norm that reads it. ``fused`` takes and
    returns x: norms and additions are fused with the products.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        intermediate_size: int,
        *,
        rope_theta: float,
        eps: float,
        attend: Callable[..., Tensor] = attention,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.attn = Attention(
            hidden_size, num_heads, head_dim, gate=True, rope_theta=rope_theta, attend=attend
        )
        self.mlp = SwiGLU(hidden_size, intermediate_size)

    def forward(
        self, normed: Tensor, x: Tensor, routing: Routing, cache: AppendsKeys | None = None
    ) -> tuple[Tensor, Tensor]:
        # autocast's products are in its dtype, the states stay in theirs
        normed, x = rms_norm(self.attn(normed, routing, cache).to(x.dtype), residual=x, eps=self.eps)
        return rms_norm(self.mlp(normed).to(x.dtype), residual=x, eps=self.eps)

    def fused(self, x: Tensor, routing: Routing, cache: AppendsKeys | None = None) -> Tensor:
        x = self.attn.fused(x, routing, cache, norm_eps=self.eps)
        return self.mlp.fused(x, norm_eps=self.eps)


@replaceable
class PreNormStack(nn.Module):
    """HRM-Text's stack: pre-norm blocks and one parameterless norm at the exit (MagicNorm).

    ``activation_checkpointing`` recomputes each block in the backward instead of keeping its activations.
    """

    def __init__(self, layers: list[PreNormBlock], *, eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.eps = eps
        self.activation_checkpointing = False

    def forward(
        self, state: Tensor, injection: Tensor, routing: Routing, cache: list[AppendsKeys] | None = None
    ) -> Tensor:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        slots = [None] * len(self.layers) if cache is None else cache
        layer: Any

        def run(layer: Callable[..., Any], *args: Any) -> Any:
            return checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)

        if all(
            is_untouched(layer, PreNormBlock) and _fuses(state, layer.attn, layer.mlp)
            for layer in self.layers
        ):
            x = state + injection
            for layer, slot in zip(self.layers, slots, strict=True):
                x = run(layer.fused, x, routing, slot)
            return rms_norm(x, eps=self.eps)
        normed, x = rms_norm(injection, residual=state, eps=self.eps)
        for layer, slot in zip(self.layers, slots, strict=True):
            normed, x = run(layer, normed, x, routing, slot)
        return normed


class PostNormBlock(nn.Module):
    """HRM's block: ``x = rms(x + attention(x)); x = rms(x + mlp(x))``."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        intermediate_size: int,
        *,
        rope_theta: float | None,
        eps: float,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = Attention(hidden_size, num_heads, head_dim, gate=False, rope_theta=rope_theta)
        self.mlp = SwiGLU(hidden_size, intermediate_size)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        if _fuses(x, self.self_attn, self.mlp):
            x = rms_norm(self.self_attn.fused(x, routing), eps=self.eps)
            return rms_norm(self.mlp.fused(x), eps=self.eps)
        x, _ = rms_norm(self.self_attn(x, routing).to(x.dtype), residual=x, eps=self.eps)
        x, _ = rms_norm(self.mlp(x).to(x.dtype), residual=x, eps=self.eps)
        return x


class PostNormMixerBlock(nn.Module):
    """TRM's block with a SwiGLU over the positions in place of attention::

        y = rms(x^T + mlp_t(x^T));  x = y^T
        x = rms(x + mlp(x))

    The first norm is over the positions, of which there are always ``length``.
    """

    def __init__(
        self, length: int, length_inner: int, hidden_size: int, intermediate_size: int, *, eps: float
    ) -> None:
        super().__init__()
        self.eps = eps
        self.mlp_t = SwiGLU(length, length_inner)
        self.mlp = SwiGLU(hidden_size, intermediate_size)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        y = x.transpose(1, 2).contiguous()  # (B, D, length)
        y, _ = rms_norm(self.mlp_t(y).to(x.dtype), residual=y, eps=self.eps)
        x = y.transpose(1, 2).contiguous()
        x, _ = rms_norm(self.mlp(x).to(x.dtype), residual=x, eps=self.eps)
        return x


class PostNormStack(nn.Module):
    """HRM's stack: the injection is added once, then the blocks; no further norm."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation_checkpointing = False

    def forward(self, state: Tensor, injection: Tensor, routing: Routing, cache: None = None) -> Tensor:
        x = state + injection
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, routing, use_reentrant=False) if recompute else layer(x, routing)
        return x
