"""What a printed function calls: the instructions of a program that triton has no word for, on float32 and int32.

A boolean is a condition here. `printer.py` makes 0 and -1 of it where a program counts with it.
"""

import triton
import triton.language as tl


@triton.jit
def element(base, index, last):
    """An element of a table; an index out of range, which only pairs that do not count have, is that of its first or last one."""
    return tl.load(base + tl.minimum(tl.maximum(index, 0), last))


@triton.jit
def spread(x, s):
    """x of every score of a tile s."""
    return x + tl.zeros(s.shape, tl.float32)


@triton.jit
def add_elements(base, index, last, part):
    """Add parts to the elements of a table of which several may be the same."""
    index = tl.minimum(tl.maximum(index, 0), last)
    tl.atomic_add(base + index, part, mask=part != 0.0, sem="relaxed")


@triton.jit
def tanh(x):
    """Odd polynomial below 0.6, where a difference of exponentials would lose bits (as attention's soft cap)."""
    z = x * x
    near = -0.3333329856 + z * (
        0.1333195865 + z * (-0.0537866801 + z * (0.02080537379 + z * -0.005905856844))
    )
    near = x + x * z * near
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def log1p(x):
    """Its series where x is small: the next term is x^6 / 6 < 1.3e-7 |x| below 0.06. Else with what rounding took from 1 + x."""
    series = x * (1.0 + x * (-0.5 + x * (1.0 / 3.0 + x * (-0.25 + x * 0.2))))
    sum = 1.0 + x
    lost = (x - (sum - 1.0)) / sum
    lost = tl.where(tl.abs(lost) < 1.0, lost, 0.0)  # NaN where x is infinite or -1
    return tl.where(tl.abs(x) < 0.06, series, tl.log(sum) + lost)


@triton.jit
def expm1(x):
    """Its series where a difference would lose bits: the next term is x^8 / 8! < 2e-8 |x| below 0.35."""
    series = 1.0 + x * (1.0 / 6.0) * (1.0 + x * (1.0 / 7.0))
    series = 1.0 + x * (1.0 / 4.0) * (1.0 + x * (1.0 / 5.0) * series)
    series = x * (1.0 + x * 0.5 * (1.0 + x * (1.0 / 3.0) * series))
    return tl.where(tl.abs(x) < 0.35, series, tl.exp(x) - 1.0)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def power(x, y):
    """x^y as torch has it: of a negative x where y is a whole number, else NaN."""
    size = tl.exp2(y * tl.log2(tl.abs(x)))
    whole = tl.floor(y) == y
    odd = tl.floor(y * 0.5) * 2.0 != y
    signed = tl.where(whole, tl.where(odd, -size, size), float("nan"))
    result = tl.where(x < 0, signed, size)
    return tl.where((y == 0.0) | (x == 1.0), 1.0, result)


@triton.jit
def whole(x):
    """A float without its fraction as int32: NaN is 0, and what is too large the nearest that fits."""
    kept = tl.where(x == x, tl.minimum(tl.maximum(x, -2147483648.0), 2147483520.0), 0.0)
    return kept.to(tl.int32)


@triton.jit
def floordiv(x, y):
    """Rounded down, as Python's; 0 where y is 0."""
    safe = tl.where(y == 0, 1, y)
    quotient = x // safe  # towards 0
    rest = x - quotient * safe
    down = (rest != 0) & ((rest ^ safe) < 0)
    return tl.where(y == 0, 0, tl.where(down, quotient - 1, quotient))


@triton.jit
def mod(x, y):
    """With the sign of y, as Python's; 0 where y is 0."""
    safe = tl.where(y == 0, 1, y)
    rest = x - (x // safe) * safe
    wrong = (rest != 0) & ((rest ^ safe) < 0)
    return tl.where(y == 0, 0, tl.where(wrong, rest + safe, rest))
