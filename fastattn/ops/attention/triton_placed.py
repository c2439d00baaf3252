"""A user's function in a tile: what it reads and where its scores are.

SCORE of such a call has functions that flex_attention's printer wrote: `user_score`, `user_slope` and `user_scatter`.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Captured(NamedTuple):
    """What a user's function reads besides its arguments."""

    floats: tl.tensor  # captured floating tensors one after another, float32; one element at least
    last_float: tl.tensor  # the last one's number
    integers: tl.tensor  # captured integers, int32
    last_integer: tl.tensor
    numbers: tl.tuple  # float constants that nothing is compiled for, or None
    counts: tl.tuple  # integer ones
    gradients: tl.tensor  # of the floats, float32, which are added to; or None


class Placed(NamedTuple):
    """A user's function at rows of one pass over their keys: every number is one in the tensors, not in a packed document."""

    captured: Captured
    entry: tl.tensor
    head: tl.tensor  # one, or of each row
    row: tl.tensor  # rows along their dim; where they pass, the sequence's first one
    key: tl.tensor  # the sequence's first one


@triton.jit
def placed(captured, entry, head, row, key):
    """None where there is no function."""
    result = captured
    if captured is not None:
        result = Placed(captured, entry, head, row, key)
    return result


@triton.jit
def user_scores(products, at, rows, keys, factors, SCORE: tl.constexpr):
    """Scores in base e of a tile of products; rows and keys: their numbers along the tile's dims."""
    return SCORE.user_score(products * factors.size, at.entry, at.head, rows, keys, at.captured)
