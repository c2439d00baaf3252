"""The declarations of torch.ops.fastattn.{rms_norm, swiglu, gated, rotary, rotary_append} and their backwards."""

from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch

from ...runtime.backends import Lazy, cpu_backend, reference_backend, triton_backend
from ...runtime.checks import statistics_dtype
from ...runtime.declare import Autograd, Gradients, declare, gradient_like, pull, save
from ...runtime.registry import dispatch
from ...runtime.schema import Written
from . import checks, cpu, reference

if TYPE_CHECKING:
    from . import triton
else:
    triton = Lazy(f"{__package__}.triton")


def _on_cpu(run, leading=None):
    return cpu_backend(run, cpu.refusal, cpu.configure, leading)


def _on_triton(run):
    return triton_backend(run, triton.refusal, triton.configure)


# --- rms_norm: x and the residual share one gradient ------------------------------------------------------------------


class RmsNormCall(NamedTuple):
    x: torch.Tensor  # (..., D)
    residual: torch.Tensor | None  # shaped as x
    weight: torch.Tensor | None  # (D,)
    eps: float
    weight_offset: float


class RmsNormBackwardCall(NamedTuple):
    grad_normed: torch.Tensor
    grad_total: torch.Tensor | None
    total: torch.Tensor  # x + residual, or x
    weight: torch.Tensor | None
    rstd: torch.Tensor
    eps: float
    weight_offset: float


def _rms_norm_fake(x, residual, weight, eps, weight_offset):
    total, statistics = x.new_empty(0), statistics_dtype(x)
    if residual is not None:
        total = gradient_like(x, x).to(torch.promote_types(x.dtype, residual.dtype))
        statistics = statistics_dtype(total)
    return gradient_like(x, x), total, x.new_empty(x.shape[:-1], dtype=statistics)


def _rms_norm_setup(ctx, inputs, output):
    x, residual, weight, ctx.eps, ctx.weight_offset, ctx.backend = inputs
    _, total, rstd = output
    ctx.has_residual = residual is not None
    ctx.dtypes = (x.dtype, residual.dtype if ctx.has_residual else x.dtype)
    ctx.mark_non_differentiable(rstd)
    save(ctx, total if ctx.has_residual else x, weight, rstd)
    ctx.set_materialize_grads(False)


def _rms_norm_backward(ctx, grad_normed, grad_total, grad_rstd):
    total, weight, rstd = ctx.saved_tensors
    if not ctx.has_residual:
        grad_total = None
    grad, grad_weight = grad_total, None
    if grad_normed is not None:
        options = (ctx.eps, ctx.weight_offset, ctx.backend)
        grad, grad_weight = dispatch(
            "rms_norm_backward", grad_normed, grad_total, total, weight, rstd, *options
        )
    if grad is None:
        return (None,) * 6
    grad_x, grad_residual = (grad.to(dtype) for dtype in ctx.dtypes)
    grad_weight = None if weight is None or grad_normed is None else grad_weight
    return grad_x, grad_residual if ctx.has_residual else None, grad_weight, None, None, None


def _rms_norm_backward_reference(grad_normed, grad_total, total, weight, rstd, eps, weight_offset):
    options = (eps, weight_offset, grad_normed.dtype)
    grad, grad_weight = pull(reference.rms_norm_of_sum, (grad_normed,), (total, weight, *options), (0, 1))
    absent = total.new_empty(0) if grad_weight is None else grad_weight
    return grad if grad_total is None else grad + grad_total, absent


declare(
    "rms_norm",
    RmsNormCall,
    outputs=("normed", "total", "rstd"),
    fake=_rms_norm_fake,
    check=checks.check_rms_norm,
    backends=(
        cpu_backend(cpu.rms_norm, cpu.refusal_norm, cpu.configure, cpu.rms_norm_leading),
        _on_triton(triton.rms_norm),
        reference_backend(reference.rms_norm),
    ),
    gradients=Autograd(_rms_norm_setup, _rms_norm_backward),
)
declare(
    "rms_norm_backward",
    RmsNormBackwardCall,
    outputs=("grad", "grad_weight"),
    fake=lambda grad_normed, grad_total, total, weight, *_: (
        gradient_like(total, total),
        gradient_like(weight, total),
    ),
    check=checks.check_rms_norm_backward,
    backends=(
        cpu_backend(cpu.rms_norm_backward, cpu.refusal_norm_backward, cpu.configure),
        _on_triton(triton.rms_norm_backward),
        reference_backend(_rms_norm_backward_reference),
    ),
)


# --- swiglu, gated -----------------------------------------------------------------------------------------------------


class SwigluCall(NamedTuple):
    gate_up: torch.Tensor  # (..., 2I)


declare(
    "swiglu",
    SwigluCall,
    fake=lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
    check=checks.check_swiglu,
    backends=(_on_cpu(cpu.swiglu), _on_triton(triton.swiglu), reference_backend(reference.swiglu)),
    gradients=Gradients(
        of=("gate_up",),
        check=checks.check_swiglu_backward,
        backends=(_on_cpu(cpu.swiglu_backward), _on_triton(triton.swiglu_backward)),
    ),
)


class GatedCall(NamedTuple):
    x: torch.Tensor  # (..., D)
    gate: torch.Tensor  # as x


declare(
    "gated",
    GatedCall,
    fake=lambda x, gate: gradient_like(x, x),
    check=checks.check_gated,
    backends=(_on_cpu(cpu.gated), _on_triton(triton.gated), reference_backend(reference.gated)),
    gradients=Gradients(
        of=("x", "gate"),
        check=checks.check_gated_backward,
        backends=(_on_cpu(cpu.gated_backward), _on_triton(triton.gated_backward)),
    ),
)


# --- rotary: its backward is the rotation by the opposite angle -----------------------------------------------------


class RotaryCall(NamedTuple):
    q: torch.Tensor  # (B, Hq, L, D)
    k: torch.Tensor  # (B, Hkv, L, D)
    positions: torch.Tensor  # (L,) or (B, L)
    theta: float
    interleaved: bool
    inverse: bool


def _rotary_setup(ctx, inputs, output):
    _, _, positions, ctx.theta, ctx.interleaved, ctx.inverse, ctx.backend = inputs
    save(ctx, positions)


def _rotary_backward(ctx, grad_q, grad_k):
    (positions,) = ctx.saved_tensors
    options = (ctx.theta, ctx.interleaved, not ctx.inverse, ctx.backend)
    return *dispatch("rotary", grad_q, grad_k, positions, *options), *(None,) * 5


declare(
    "rotary",
    RotaryCall,
    outputs=("q", "k"),
    fake=lambda q, k, *_: (gradient_like(q, q), gradient_like(k, k)),
    check=checks.check_rotary,
    backends=(_on_cpu(cpu.rotary), _on_triton(triton.rotary), reference_backend(reference.rotary)),
    gradients=Autograd(_rotary_setup, _rotary_backward, twice=True),
)


class RotaryTablesCall(NamedTuple):
    q: torch.Tensor  # (B, Hq, L, D)
    k: torch.Tensor  # (B, Hkv, L, D)
    cos: torch.Tensor  # (B or 1, L, D or D/2)
    sin: torch.Tensor  # as cos
    interleaved: bool
    inverse: bool


def _rotary_tables_setup(ctx, inputs, output):
    _, _, cos, sin, ctx.interleaved, ctx.inverse, ctx.backend = inputs
    save(ctx, cos, sin)


def _rotary_tables_backward(ctx, grad_q, grad_k):
    options = (ctx.interleaved, not ctx.inverse, ctx.backend)
    return *dispatch("rotary_tables", grad_q, grad_k, *ctx.saved_tensors, *options), *(None,) * 5


declare(
    "rotary_tables",
    RotaryTablesCall,
    outputs=("q", "k"),
    fake=lambda q, k, *_: (gradient_like(q, q), gradient_like(k, k)),
    check=checks.check_rotary_tables,
    backends=(
        cpu_backend(cpu.rotary_tables, cpu.refusal_tables, cpu.configure),
        _on_triton(triton.rotary_tables),
        reference_backend(reference.rotary_tables),
    ),
    gradients=Autograd(_rotary_tables_setup, _rotary_tables_backward, twice=True),
)


# --- rotary_append: without gradients, since it writes to a cache ----------------------------------------------------


class RotaryAppendCall(NamedTuple):
    q: torch.Tensor  # (B, Hq, L, D)
    k: torch.Tensor  # (B, Hkv, L, D)
    v: torch.Tensor  # (B, Hkv, L, Dv)
    positions: torch.Tensor  # (L,) or (B, L)
    slots: torch.Tensor  # (B, L)
    keys: Annotated[torch.Tensor, Written("a")]  # (B, Hkv, capacity, D)
    values: Annotated[torch.Tensor, Written("b")]  # (B, Hkv, capacity, Dv)
    theta: float


declare(
    "rotary_append",
    RotaryAppendCall,
    fake=lambda q, *_: gradient_like(q, q),
    check=checks.check_rotary_append,
    check_contents=checks.check_rotary_append_contents,
    backends=(
        triton_backend(triton.rotary_append, triton.refusal_append),
        reference_backend(reference.rotary_append),
    ),
)
