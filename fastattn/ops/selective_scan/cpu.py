"""selective_scan on the CPU: outputs allocated, parameters filled, one kernel call."""

import torch

from ...runtime import native
from .. import documents
from .checks import checkpoint_shape

_SLICE = native.defaults("selective_scan_backward")["slice"]


def refusal(u, *_) -> str | None:
    """Why the CPU kernel cannot serve this call, or None."""
    return native.unserved_dtype(u)


def refusal_backward(grad_out, grad_state, u, *_) -> str | None:
    return native.unserved_dtype(u)


def _wide(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else native.plain(t).float().contiguous()


def _call(
    kernel: str, u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus, **tensors
) -> None:
    native.run(
        kernel,
        u=native.plain(u),
        dt=native.plain(dt),
        A=_wide(A),
        B=native.plain(B),
        C=native.plain(C),
        D=_wide(D),
        z=None if z is None else native.plain(z),
        dt_bias=_wide(dt_bias),
        initial_state=_wide(initial_state),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.long().contiguous(),
        dt_softplus=int(dt_softplus),
        threads=native.threads(),
        **tensors,
    )


def _buffer(u: torch.Tensor, cu_seqlens, *shape: int) -> torch.Tensor:
    """A float32 buffer for the kernel. With documents it starts as zeros, for tokens after the last one."""
    return (u.new_empty if cu_seqlens is None else u.new_zeros)(shape, dtype=torch.float32)


def selective_scan(*members):
    return selective_scan_leading(3, *members)


def selective_scan_leading(reads, u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus):
    """(out, state, checkpoints), or the first `reads` of them."""
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    outputs = [out]
    if reads > 1:
        sequences = documents.count(u.shape[0], cu_seqlens)
        outputs.append(u.new_empty(sequences, *A.shape, dtype=torch.float32))
    if reads > 2:
        outputs.append(_buffer(u, cu_seqlens, *checkpoint_shape(u, A)))
    if any(t.numel() for t in outputs):
        tensors = dict(zip(("out", "state", "checkpoints"), outputs, strict=False))
        members = (u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus)
        _call("selective_scan_forward", *members, **tensors)
    documents.clear_rest(cu_seqlens, out)
    return tuple(outputs)


def selective_scan_backward(
    grad_out, grad_state, u, dt, A, B, C, D, z, dt_bias, initial_state, checkpoints, cu_seqlens, dt_softplus
):
    batch, length, channels = u.shape
    states, absent = A.shape[1], u.new_empty(0)
    rows = {
        name: None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for name, t in (("grad_u", u), ("grad_dt", dt), ("grad_z", z))
    }
    slices = -(-channels // _SLICE)
    grad_A = u.new_empty(batch, states, channels, dtype=torch.float32)
    grad_B, grad_C = (_buffer(u, cu_seqlens, slices, batch, length, states) for _ in range(2))
    grad_D, grad_bias = (None if t is None else grad_A.new_empty(batch, channels) for t in (D, dt_bias))
    grad_initial = (
        absent
        if initial_state is None
        else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    )
    if channels and batch:
        _call(
            "selective_scan_backward",
            *(u, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, dt_softplus),
            checkpoints=checkpoints.contiguous(),
            grad_out=native.plain(grad_out),
            grad_state=_wide(grad_state),
            grad_A=grad_A,
            grad_B=grad_B,
            grad_C=grad_C,
            grad_D=grad_D,
            grad_dt_bias=grad_bias,
            grad_initial_state=None if initial_state is None else grad_initial,
            **rows,
        )
    documents.clear_rest(cu_seqlens, *(t for t in rows.values() if t is not None))
    return (
        rows["grad_u"],
        rows["grad_dt"],
        grad_A.sum(0).mT.to(A.dtype).contiguous(),
        grad_B.sum(0).to(B.dtype),
        grad_C.sum(0).to(C.dtype),
        absent if D is None else grad_D.sum(0).to(D.dtype),
        absent if z is None else rows["grad_z"],
        absent if dt_bias is None else grad_bias.sum(0).to(dt_bias.dtype),
        grad_initial,
    )
