"""Classes of a dense mask's tiles, so that kernels skip the empty ones: one launch in every call.

They are not cached: writes to a mask by a compiler, by a replayed graph or through `.data` cannot be noticed.
"""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime.triton import offset, pairs


@triton.jit(do_not_specialize=["heads", "rows", "columns", "length_q", "length_k"])
def _tile_classes_kernel(
    mask, classes, heads, rows, columns, length_q, length_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """One tile: 1 where any of its pairs is attended, else 0."""
    program = tl.program_id(0)
    column = program % columns
    row = program // columns % rows
    head = program // columns // rows % heads
    entry = program // columns // rows // heads
    q = row * BLOCK_M + tl.arange(0, BLOCK_M)
    k = column * BLOCK_N + tl.arange(0, BLOCK_N)
    base = mask.base + offset(entry, mask.batch) + offset(head, mask.head)
    at = base + offset(q, mask.row)[:, None] + offset(k, mask.column)[None, :]
    inside = (q < length_q)[:, None] & (k < length_k)[None, :]
    attended = tl.load(at, mask=inside, other=0).to(tl.int32)
    tl.store(classes + program, tl.max(tl.max(attended, 1), 0).to(tl.uint8))


def tile_classes(problem, block_m: int, block_n: int) -> torch.Tensor | None:
    """(B, H, query tiles, key tiles) uint8, 0 for a tile without attended pairs; None without a dense mask.

    None for packed documents too: they start anywhere in a tile, so kernels test every element.
    """
    dense = problem.dense_mask
    if dense is None or problem.packed:
        return None
    batch, heads = dense.shape[:2]
    rows, columns = triton.cdiv(problem.length_q, block_m), triton.cdiv(problem.length_k, block_n)
    classes = torch.empty(batch, heads, rows, columns, dtype=torch.uint8, device=dense.device)
    values = {
        "mask": pairs(dense.expand(batch, heads, problem.length_q, problem.length_k)),
        "classes": classes,
        "heads": heads,
        "rows": rows,
        "columns": columns,
        "length_q": problem.length_q,
        "length_k": problem.length_k,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    _triton.start(_tile_classes_kernel, (classes.numel(),), values, num_warps=4)
    return classes.expand(problem.batch, problem.heads, -1, -1)
