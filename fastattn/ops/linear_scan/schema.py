"""The declarations of torch.ops.fastattn.linear_scan and linear_scan_backward, which does not read b."""

from typing import NamedTuple

import torch

from ...runtime.backends import cpu_backend, reference_backend
from ...runtime.declare import Autograd, bits, declare, gradient_like, save
from ...runtime.registry import dispatch
from . import checks, cpu, reference


class Call(NamedTuple):
    a: torch.Tensor  # broadcasts to b
    b: torch.Tensor  # (..., L, D)
    initial: torch.Tensor | None  # (..., D), or (documents, D)
    cu_seqlens: torch.Tensor | None  # (documents + 1,)
    reverse: bool
    log_a: bool


class BackwardCall(NamedTuple):
    grad_out: torch.Tensor
    a: torch.Tensor
    initial: torch.Tensor | None
    out: torch.Tensor
    cu_seqlens: torch.Tensor | None
    reverse: bool
    log_a: bool
    wanted: int  # bits 1 and 2: compute the gradients of a and of initial


def _setup(ctx, inputs, output):
    a, _, initial, cu_seqlens, ctx.reverse, ctx.log_a, ctx.backend = inputs
    save(ctx, a, initial, output, cu_seqlens)


def _backward(ctx, grad_out):
    a, initial, out, cu_seqlens = ctx.saved_tensors
    needs_a, needs_b, needs_initial = (ctx.needs_input_grad[i] for i in range(3))
    options = (ctx.reverse, ctx.log_a, bits([needs_a, needs_initial]), ctx.backend)
    grads = dispatch("linear_scan_backward", grad_out, a, initial, out, cu_seqlens, *options)
    wanted = (needs_a, needs_b, needs_initial and initial is not None)
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), *(None,) * 4


def _backward_fake(grad_out, a, initial, out, cu_seqlens, reverse, log_a, wanted):
    needs_a, needs_initial = bool(wanted & 1), bool(wanted & 2)
    return (
        gradient_like(a, out, needs_a),
        gradient_like(out, out),
        gradient_like(initial, out, needs_initial),
    )


declare(
    "linear_scan",
    Call,
    fake=lambda a, b, *_: gradient_like(b, b),
    check=checks.check_linear_scan,
    check_contents=checks.check_contents,
    backends=(
        cpu_backend(cpu.linear_scan, cpu.refusal),
        reference_backend(reference.linear_scan),
    ),
    gradients=Autograd(_setup, _backward),
)
declare(
    "linear_scan_backward",
    BackwardCall,
    outputs=("grad_a", "grad_b", "grad_initial"),
    fake=_backward_fake,
    check=checks.check_linear_scan_backward,
    check_contents=checks.check_backward_contents,
    backends=(
        cpu_backend(cpu.linear_scan_backward, cpu.refusal_backward),
        reference_backend(reference.linear_scan_backward),
    ),
)
