"""linear_scan on the CPU: outputs allocated, parameters filled, one kernel call."""

from enum import IntEnum

import torch

from ...runtime import native
from .. import documents

_SLICE = native.defaults("linear_scan_backward")["slice"]
_LANES = 16  # fewest channels of a thread
_SEGMENT = 512  # fewest tokens of a segment of time


class _Sums(IntEnum):
    """The dim over which the gradient of a shared factor is summed; the values of the kernel's grad_a_kind."""

    NOTHING = 0
    CHANNELS = 1
    TOKENS = 2


def refusal(a, b, *_) -> str | None:
    """Why the CPU kernel cannot serve this call, or None."""
    if b.dtype in native.FAST_DTYPES or b.dtype is torch.complex64:
        return None
    return f"it serves float32, bfloat16, float16 and complex64, not {str(b.dtype).removeprefix('torch.')}"


def refusal_backward(grad_out, a, *_) -> str | None:
    return refusal(a, grad_out)


def _sums(a: torch.Tensor, shape: torch.Size) -> _Sums:
    tokens, channels = ((1, 1) + tuple(a.shape))[-2:]
    if tokens == 1 and shape[-2] > 1:
        return _Sums.TOKENS
    return _Sums.CHANNELS if channels == 1 and shape[-1] > 1 else _Sums.NOTHING


def _factors(a: torch.Tensor, sums: _Sums, log_a: bool) -> tuple[torch.Tensor, bool]:
    """(the kernel's factors, whether they are logarithms). The exponential of few factors, and of complex ones, is taken here."""
    native_log = log_a and sums is _Sums.NOTHING and not a.is_complex()
    if log_a and not native_log:
        wide = a if a.is_complex() else a.float()
        return wide.exp(), False
    return a, log_a


def _rows(t: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """t (..., L, D) as (A, B, L, D), broadcast by strides of 0. For complex numbers the view of their real parts."""
    t = native.plain(t.expand(shape))
    if len(shape) > 4:
        t = t.reshape(-1, *shape[-2:])
    return t.real if t.is_complex() else t


def _state(t: torch.Tensor | None, channels: int) -> torch.Tensor | None:
    """initial as contiguous rows (S, D) of float32; for complex numbers the view of their real parts."""
    if t is None:
        return None
    rows = native.plain(t).reshape(-1, channels).contiguous()
    return rows.real if t.is_complex() else rows.float()


def _real(t: torch.Tensor) -> torch.Tensor:
    return t.real if t.is_complex() else t


def _options(shape: torch.Size, cu_seqlens, reverse: bool, pairs: bool, log_a: bool) -> dict:
    """The fields besides tensors. With fewer rows of lanes than threads, time is cut into segments. This costs a second pass, so it is
    done from three threads on."""
    threads, segments = native.threads(), 1
    tasks = shape[:-2].numel() * -(-shape[-1] // _LANES)
    if cu_seqlens is None and threads > 2 and tasks < threads:
        segments = max(1, min(shape[-2] // _SEGMENT, -(-threads // tasks)))
    return {
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.long().contiguous(),
        "pairs": int(pairs),
        "reverse": int(reverse),
        "log_a": int(log_a),
        "segments": segments,
        "threads": threads,
    }


def _clear_rest(cu_seqlens, *results: torch.Tensor) -> None:
    documents.clear_rest(cu_seqlens, *(t if t.dim() == 3 else t[None] for t in results))


def linear_scan(a, b, initial, cu_seqlens, reverse, log_a):
    out = torch.empty_like(b, memory_format=torch.contiguous_format)
    if out.numel():
        factors, log_a = _factors(a, _sums(a, b.shape), log_a)
        native.run(
            "linear_scan_forward",
            a=_rows(factors, b.shape),
            b=_rows(b, b.shape),
            initial=_state(initial, b.shape[-1]),
            out=_rows(out, b.shape),
            **_options(b.shape, cu_seqlens, reverse, b.is_complex(), log_a),
        )
    _clear_rest(cu_seqlens, out)
    return out


def linear_scan_backward(grad_out, a, initial, out, cu_seqlens, reverse, log_a, wanted):
    shape, absent = out.shape, out.new_empty(0)
    needs_initial = bool(wanted & 2) and initial is not None
    grad_b = torch.empty_like(out, memory_format=torch.contiguous_format)
    if not out.numel():
        grad_a = torch.zeros_like(a, memory_format=torch.contiguous_format) if wanted & 1 else absent
        if not needs_initial:
            return grad_a, grad_b, absent
        return grad_a, grad_b, torch.zeros_like(initial, memory_format=torch.contiguous_format)
    sums = _sums(a, shape)
    factors, native_log = _factors(a, sums, log_a)
    if factors.shape != shape and not factors.is_complex():
        factors = factors.float()  # its gradient is a sum
    options = _options(shape, cu_seqlens, reverse, out.is_complex(), native_log)
    wide = torch.complex64 if out.is_complex() else torch.float32
    grad_initial = None
    if needs_initial:
        grad_initial = out.new_empty(initial.numel() // shape[-1], shape[-1], dtype=wide)
    grad_a = (
        _gradient_buffer(factors, sums, shape, cu_seqlens, options["segments"], wide) if wanted & 1 else None
    )
    native.run(
        "linear_scan_backward",
        a=_rows(factors, shape),
        initial=_state(initial, shape[-1]),
        out=_rows(out.contiguous(), shape),
        grad_out=_rows(grad_out, shape),
        grad_b=_rows(grad_b, shape),
        grad_a=None if grad_a is None else _real(grad_a),
        grad_initial=None if grad_initial is None else _real(grad_initial),
        grad_a_kind=int(sums),
        **options,
    )
    _clear_rest(cu_seqlens, grad_b)
    if grad_initial is not None:
        grad_initial = grad_initial.to(initial.dtype).view(initial.shape)
    if grad_a is None:
        return absent, grad_b, absent if grad_initial is None else grad_initial
    if sums is _Sums.CHANNELS:
        grad_a = grad_a.sum(0).view(*shape[:-1], 1)
    elif sums is _Sums.TOKENS:
        grad_a = grad_a.sum(1) if cu_seqlens is None else grad_a.sum((0, 1))
        grad_a = grad_a.view(*shape[:-2], 1, shape[-1])
    else:
        grad_a = grad_a.view(shape)
    if grad_a.shape != a.shape:
        grad_a = grad_a.sum_to_size(a.shape)
    if log_a and not native_log:
        grad_a = grad_a * factors.conj()
    grad_a = grad_a.to(a.dtype).contiguous()
    return grad_a, grad_b, absent if grad_initial is None else grad_initial


def _gradient_buffer(
    factors: torch.Tensor, sums: _Sums, shape: torch.Size, cu_seqlens, segments: int, wide: torch.dtype
) -> torch.Tensor:
    """The buffer for a's gradient. With documents it starts as zeros, for tokens after the last one."""
    batches, (length, channels) = shape[:-2].numel(), shape[-2:]
    if sums is _Sums.TOKENS:
        sequences = documents.count(batches, cu_seqlens)
        return factors.new_empty(sequences, segments, channels, dtype=wide)
    new = factors.new_empty if cu_seqlens is None else factors.new_zeros
    if sums is _Sums.CHANNELS:
        return new(-(-channels // _SLICE), batches, length, dtype=wide)
    if len(shape) > 4:
        return new(batches, length, channels)
    return new(shape)
