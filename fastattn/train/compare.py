"""What fastattn changes about a training step: the same step by plain torch, by torch with its own attention, and by the kernels."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ..masks import Mask, default_scale, dense_allowed
from ..models import hrm_text
from ..nn import blocks

if TYPE_CHECKING:
    from .text import Trainer

EAGER, SDPA, KERNELS = "plain torch", "plain torch with SDPA", "fastattn"


def step_times(trainer: Trainer, rounds: int = 4) -> dict[str, float]:
    """Seconds of one training step of HRM-Text by each of the three, medians of `rounds` in turns, tried on copies of a run.

    Plain torch: the model's parts as people write them, under torch's autograd, with attention as two products and a softmax or
    by scaled_dot_product_attention, its mask as a tensor.
    """
    ways = {EAGER: lambda: plain(eager), SDPA: lambda: plain(sdpa), KERNELS: contextlib.nullcontext}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.random.fork_rng(devices=[]):
        trials = {}
        for name, way in ways.items():
            trials[name] = trainer._copy()
            with way():
                trials[name].step()  # warms up
        for _ in range(rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                with way():
                    trials[name].step()
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextlib.contextmanager
def plain(attend: Callable[..., Tensor]) -> Iterator[None]:
    """HRM-Text's blocks and loss by plain torch inside the block. Process-wide."""
    dense, angles = _Last(_dense), _Last(_cos_sin)  # a model makes these once a step

    def attention(
        self, projected: Tensor, routing: blocks.Routing, cache: Any
    ) -> tuple[Tensor | None, Tensor]:
        B, L, _ = projected.shape
        *gate, q, k, v = projected.view(B, L, -1, self.num_heads, self.head_dim).unbind(2)
        cos, sin = angles(routing.positions, self.head_dim, self.rope_theta)
        q, k = (_rotated(t.transpose(1, 2), cos, sin) for t in (q, k))
        v = v.transpose(1, 2)
        allowed = None if routing.mask is None else dense(routing.mask, q, k)
        return (gate[0] if gate else None), attend(q, k, v, allowed).transpose(1, 2)

    with (
        mock.patch.object(blocks.Attention, "_attended", attention),
        mock.patch.multiple(blocks, _fuses=_never, rms_norm=_rms_norm, swiglu=_swiglu, gated=_gated),
        mock.patch.object(hrm_text, "linear_cross_entropy", _linear_cross_entropy),
    ):
        yield


def eager(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * default_scale(q.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


class _Last:
    """A function with its last result, for the same first argument."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.key, self.result = function, None, None

    def __call__(self, key: Any, *arguments: Any) -> Any:
        if key is not self.key:
            self.key, self.result = key, self.function(key, *arguments)
        return self.result


def _dense(mask: Mask, q: Tensor, k: Tensor) -> Tensor:
    return dense_allowed(q.shape[2], k.shape[2], q.device, mask.args("attention", q, k))


def _cos_sin(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = positions.float()[..., None] * frequencies
    angle = torch.cat([angle, angle], -1)
    angle = angle[:, None] if positions.dim() == 2 else angle  # over heads
    return angle.cos(), angle.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


def _never(*_: Any) -> bool:
    return False


def _rms_norm(x: Tensor, *, residual: Tensor | None = None, eps: float) -> Any:
    total = x if residual is None else x + residual
    normed = F.rms_norm(total, (total.shape[-1],), eps=eps)
    return normed if residual is None else (normed, total)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    return torch.sigmoid(gate) * x


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int) -> Tensor:
    logits = F.linear(hidden, weight).flatten(0, -2)
    return F.cross_entropy(logits, target.flatten(), ignore_index=ignore_index)
