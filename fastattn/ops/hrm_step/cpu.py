"""The decode step on the CPU: one kernel call a token."""

import torch

from ...runtime import native
from ...runtime.tuning import Choice
from ..matvec import cpu as matvec
from ..rowwise import cpu as rows

MOST_ROWS = native.limits.matvec_rows
_LARGEST_HEAD_DIM = native.limits.head_dim


def refusal(z_h, z_l, weights, k_cache, v_cache, *_) -> str | None:
    """Why the CPU kernel cannot serve these arguments, or None."""
    if z_h.dtype not in native.FAST_DTYPES:
        return native.unserved_dtype(z_h)
    if z_h.shape[0] > MOST_ROWS:
        return f"it serves up to {MOST_ROWS} rows, not {z_h.shape[0]}"
    if k_cache.shape[5] > _LARGEST_HEAD_DIM:
        return f"it serves head dims up to {_LARGEST_HEAD_DIM}, not {k_cache.shape[5]}"
    if not all(t.is_contiguous() for t in (k_cache, v_cache, *weights)):
        return "it serves contiguous weights and caches"
    return None


def configure(*_) -> Choice:
    return Choice({"isa": native.cpu_isa(), "threads": native.threads()}, "built in")


def decode_step(z_h, z_l, weights, k_cache, v_cache, positions, position, h_cycles, l_cycles, theta, eps):
    out = torch.empty_like(z_h, memory_format=torch.contiguous_format)
    batch, layers, head_dim = z_h.shape[0], k_cache.shape[1], k_cache.shape[5]
    if positions is None:
        positions = torch.full((batch,), position, dtype=torch.int32)
    else:
        positions, position = positions.to(torch.int32).contiguous(), int(positions.max())
    # the configuration of a layer's largest weight serves the others too
    product = matvec.choose(z_h.dtype, batch, weights[2].shape).values
    cos, sin, rows_of_tokens = rows.rotation_rows(positions[:, None], head_dim, theta, batch)
    native.run(
        "decode_step",
        z_h=native.rows(z_h),
        z_l=native.rows(z_l),
        out=out,
        weights=torch.tensor([w.data_ptr() for w in weights]),
        keys=k_cache.view(-1, *k_cache.shape[3:]),
        values=v_cache.view(-1, *v_cache.shape[3:]),
        positions=positions,
        lengths=positions + 1,
        cos=cos,
        sin=sin,
        rows=rows_of_tokens,
        layers=layers,
        inner=weights[3].shape[1],
        longest=position + 1,
        h_cycles=h_cycles,
        l_cycles=l_cycles,
        eps=eps,
        rows_at_once=product["rows_at_once"],
        threads=native.threads(),
    )
    return out
