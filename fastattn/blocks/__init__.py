"""Block lists: which key blocks a block of queries attends, and what chooses them."""

from .lists import Blocks

__all__ = ["Blocks"]
