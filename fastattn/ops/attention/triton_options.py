"""Options of attention's scores and weights in a tile: the soft cap, and dropout's random numbers."""

from typing import NamedTuple

import triton
import triton.language as tl

from ...runtime.triton import LOG2E

_LOG2E = tl.constexpr(LOG2E)


class Cap(NamedTuple):
    """A soft cap: the score is size * tanh(product * inner)."""

    inner: tl.tensor
    size: tl.tensor


class Drop(NamedTuple):
    """Dropout's arguments of a kernel."""

    rng: tl.tensor  # int64 (2,), seed and offset
    dropped: tl.tensor  # this many of 65536 weights, as a float
    scale: tl.tensor  # factor of the kept weights


class Drawn(NamedTuple):
    """Dropout's random numbers for rows (M,) in one pass over their keys."""

    seed: tl.tensor
    offset: tl.tensor
    dropped: tl.tensor
    scale: tl.tensor
    plane: tl.tensor  # (M,) batch * heads + head
    row: tl.tensor  # (M,)
    key: tl.tensor  # the first key of the sequence


@triton.jit
def tanh_parts(products, cap):
    """(tanh(y), 1 - tanh(y)^2) of y = products * cap.inner, both computed without cancellation."""
    y = products * cap.inner
    z = y * y
    small = -0.3333329856 + z * (
        0.1333195865 + z * (-0.0537866801 + z * (0.02080537379 + z * -0.005905856844))
    )
    small = y + y * z * small
    e = tl.exp2(tl.abs(y) * (-2.0 * _LOG2E))
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(y < 0, -large, large)
    near = tl.abs(y) < 0.6
    slope = tl.where(near, 1.0 - small * small, 4.0 * e / ((1.0 + e) * (1.0 + e)))
    return tl.where(near, small, large), slope


@triton.jit
def cap_slope(products, cap):
    """The derivative of the soft cap, by which the gradient of a capped score is multiplied."""
    _, slope = tanh_parts(products, cap)
    return slope


@triton.jit
def drawn_rows(drop, plane, row, key):
    """Dropout's random numbers for rows (M,) of a sequence whose first key is `key`; None without dropout."""
    drawn = drop
    if drop is not None:
        seed, at = tl.load(drop.rng), tl.load(drop.rng + 1)
        seed = seed ^ ((at >> 32) << 32)
        drawn = Drawn(
            seed, (at & 0xFFFFFFFF).to(tl.uint32), drop.dropped, drop.scale, row * 0 + plane, row, key
        )
    return drawn


@triton.jit
def kept_pairs(drawn, first, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """(M, COLUMNS) bool: the weights of keys from `first` on that dropout keeps, as `reference.kept` defines them.

    ALIGNED: drawn.key + first is a multiple of 8, so that one draw serves eight keys.
    """
    if ALIGNED:
        groups = (drawn.key + first) // 8 + tl.arange(0, COLUMNS // 8)
    else:
        keys = drawn.key + first + tl.arange(0, COLUMNS)
        groups = keys // 8
    zero = (drawn.row[:, None] * 0 + groups[None, :] * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        drawn.seed, zero + groups[None, :].to(tl.uint32), zero + drawn.row[:, None].to(tl.uint32),
        zero + drawn.plane[:, None].to(tl.uint32), zero + drawn.offset,
    )  # fmt: skip
    if ALIGNED:
        # key 8g + t has the half t // 4 of word t % 4
        even = tl.join(tl.join(w0 & 0xFFFF, w0 >> 16), tl.join(w2 & 0xFFFF, w2 >> 16))
        odd = tl.join(tl.join(w1 & 0xFFFF, w1 >> 16), tl.join(w3 & 0xFFFF, w3 >> 16))
        number = tl.reshape(tl.join(even, odd), (w0.shape[0], COLUMNS))
    else:
        t = (keys % 8)[None, :]
        word = tl.where(t % 4 == 0, w0, tl.where(t % 4 == 1, w1, tl.where(t % 4 == 2, w2, w3)))
        number = tl.where(t < 4, word & 0xFFFF, word >> 16)
    return number.to(tl.float32) >= drawn.dropped
