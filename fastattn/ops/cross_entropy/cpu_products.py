"""The products of the CPU's losses over dense logits: in float32 by torch's library, or in bfloat16 by our kernel.

Both sum in float32 and give float32 logits. They differ in the dtype in which the logits' gradient is multiplied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch

from ...runtime import native
from ..fused_linear import packed

_MIB = 1 << 20
_WIDENED = 1 << 22  # elements of weight widened to float32 at once
_TILE_ROWS = 8192
_PAIRS_TILE_ROWS = 1024  # rows that are packed once for all classes of a tile
_STRIP_ROWS = 96  # rows of logits below which a product would wait for reading weight


def blocks(weight: torch.Tensor, columns: int | None = None) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(begin, end, float32 rows of weight): all rows if weight is float32, else blocks of rows that are converted one at a time."""
    count, width = weight.shape
    if columns is None:
        columns = count if weight.dtype == torch.float32 else max(64, _WIDENED // width)
    for begin in range(0, count, columns):
        yield begin, min(count, begin + columns), weight[begin : begin + columns].float()


def product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """out = a b if `first`, else out += a b."""
    if first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def _tile(count: int, max_rows: int, classes: int, tile_mib: int) -> tuple[int, int]:
    rows = max(1, min(count, max_rows))
    columns = tile_mib * _MIB // (4 * rows) // 64 * 64
    return rows, max(64, min(classes, columns))


class Widened:
    """float32 products: h is converted to float32 as a whole, weight a block of classes at a time."""

    def __init__(self, h: torch.Tensor, weight: torch.Tensor) -> None:
        self.h = h.float()
        self._weight = weight

    def rows(self, classes: int, chunk_mib: int) -> tuple[int, int]:
        """(rows of a strip, whose logits are held at once; rows of a chunk, whose gradients of logits are). Here they are equal."""
        rows = max(1, min(self.h.shape[0], chunk_mib * _MIB // (4 * classes)))
        return rows, rows

    def tile(self, classes: int, tile_mib: int) -> tuple[int, int]:
        """Rows and classes of a tile of logits."""
        return _tile(self.h.shape[0], _TILE_ROWS, classes, tile_mib)

    def blocks(self, columns: int | None = None) -> Iterable[tuple[int, int, Any]]:
        """(begin, end, operand) of blocks of classes, for the strips of one chunk."""
        return blocks(self._weight, columns)

    def gradients(self, logits: torch.Tensor, rows: int) -> torch.Tensor:
        """The buffer for the gradients of `rows` rows of logits: here the logits' own."""
        return logits

    def weight_gradient(self, classes: int, whole: bool) -> torch.Tensor:
        """An uninitialised buffer for weight's gradient; whole: a single product fills it."""
        return self.h.new_empty(classes, self.h.shape[1])

    def logits(self, x: torch.Tensor, begin: int, end: int, block: torch.Tensor) -> None:
        torch.mm(self.h[begin:end], block.T, out=x)

    def toward_h(self, out: torch.Tensor, g: torch.Tensor, block: torch.Tensor, first: bool) -> None:
        product(out, g, block, first)

    def toward_weight(self, out: torch.Tensor, g: torch.Tensor, begin: int, end: int, first: bool) -> None:
        product(out, g.T, self.h[begin:end], first)


class _Packed:
    """A block of weight's classes, packed for each of the two products on first use."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    @cached_property
    def forward(self) -> torch.Tensor:
        return packed.pack(self._weight)

    @cached_property
    def backward(self) -> torch.Tensor:
        return packed.pack(self._weight, transposed=True)


class Pairs:
    """bfloat16 products: the gradient of logits is rounded to bfloat16 once, as in eager code."""

    def __init__(self, h: torch.Tensor, weight: torch.Tensor) -> None:
        self.h = native.rows(h)
        self._weight = native.rows(weight)

    def rows(self, classes: int, chunk_mib: int) -> tuple[int, int]:
        # an eighth of the chunk is for logits, which stay in cache until they become gradients; the rest is for the gradients
        count, chunk = self.h.shape[0], chunk_mib * _MIB
        strip = max(1, min(count, max(_STRIP_ROWS, chunk // (8 * 4 * classes))))
        return strip, max(strip, min(count, (chunk - 4 * strip * classes) // (2 * classes)))

    def tile(self, classes: int, tile_mib: int) -> tuple[int, int]:
        return _tile(self.h.shape[0], _PAIRS_TILE_ROWS, classes, tile_mib)

    def blocks(self, columns: int | None = None) -> Iterable[tuple[int, int, Any]]:
        count = self._weight.shape[0]
        if columns is None:
            return [(0, count, _Packed(self._weight))]  # packed once for all strips
        return (
            (begin, min(count, begin + columns), _Packed(self._weight[begin : begin + columns]))
            for begin in range(0, count, columns)
        )

    def gradients(self, logits: torch.Tensor, rows: int) -> torch.Tensor:
        return self.h.new_empty(rows, *logits.shape[1:])

    def weight_gradient(self, classes: int, whole: bool) -> torch.Tensor:
        # the sum of several products is kept in float32: in bfloat16 it would be rounded after each
        dtype = self.h.dtype if whole else torch.float32
        return self.h.new_empty(classes, self.h.shape[1], dtype=dtype)

    def logits(self, x: torch.Tensor, begin: int, end: int, block: _Packed) -> None:
        packed.product(x, self.h[begin:end], block.forward)

    def toward_h(self, out: torch.Tensor, g: torch.Tensor, block: _Packed, first: bool) -> None:
        packed.product(out, g, block.backward, add=not first)

    def toward_weight(self, out: torch.Tensor, g: torch.Tensor, begin: int, end: int, first: bool) -> None:
        part = packed.pack(self.h[begin:end], transposed=True)
        packed.product(out, g, part, transposed=True, add=not first)
