"""Block lists: which key blocks a block of queries attends, and what chooses them."""

from .builders import (
    coverage,
    diagonal,
    first,
    flexprefill,
    local,
    moba,
    nsa,
    pooled_topk,
    tree_topk,
    vertical_slash,
)
from .lists import Blocks

__all__ = [
    "Blocks",
    "coverage",
    "diagonal",
    "first",
    "flexprefill",
    "local",
    "moba",
    "nsa",
    "pooled_topk",
    "tree_topk",
    "vertical_slash",
]
