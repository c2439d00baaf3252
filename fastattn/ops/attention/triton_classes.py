"""Classes of a dense mask's tiles, so that kernels skip the empty ones; kept while the same tensor is unchanged.

A stream has its own, which no other has to wait for. A graph being captured forms them anew and keeps none: a replay then follows
the mask's contents.
"""

import weakref

import torch
import torch.nn.functional as F
import triton

from ... import _triton

_known: dict[
    int, tuple[weakref.ref, int, dict]
] = {}  # by id of a root tensor: itself, its version, its views' classes


def tile_classes(problem, block_m: int, block_n: int) -> torch.Tensor | None:
    """(B, H, query tiles, key tiles) uint8, 0 where a tile has nothing to attend; None without a dense mask.

    Packed documents start anywhere in a tile, so there every tile is tested by element.
    """
    dense = problem.dense_mask
    if dense is None or problem.packed:
        return None
    stream = _triton.stream(dense.device)
    if dense.is_inference() or dense.device.type == "meta" or stream is None:
        found = _classes(dense, problem, block_m, block_n)
    else:
        views = _views(dense)
        key = (
            dense.shape,
            dense.stride(),
            dense.storage_offset(),
            block_m,
            block_n,
            problem.length_q,
            problem.length_k,
            stream,
        )
        if key not in views:
            views[key] = _classes(dense, problem, block_m, block_n)
        found = views[key]
    return found.expand(problem.batch, problem.heads, -1, -1)


def _views(dense: torch.Tensor) -> dict:
    """What is known of the tensor that `dense` is a view of, as long as it lives unchanged."""
    root = dense._base if dense._is_view() else dense
    place = id(root)
    held, version, views = _known.get(place, (None, -1, {}))
    if held is None or held() is not root or version != root._version:
        views = {}
        _known[place] = (weakref.ref(root, lambda _: _known.pop(place, None)), root._version, views)
    return views


def _classes(dense: torch.Tensor, problem, block_m: int, block_n: int) -> torch.Tensor:
    batch, heads = dense.shape[:2]
    rows, columns = triton.cdiv(problem.length_q, block_m), triton.cdiv(problem.length_k, block_n)
    full = dense.expand(batch, heads, problem.length_q, problem.length_k)
    full = F.pad(full, (0, columns * block_n - problem.length_k, 0, rows * block_m - problem.length_q))
    return full.view(batch, heads, rows, block_m, columns, block_n).any(5).any(3).to(torch.uint8)
