"""torch's BlockMask as a mask function: its lists of blocks as a captured table of classes."""

import sys
from collections.abc import Callable
from typing import Any

import torch

from .prepare import EMPTY, FULL, MIXED


def is_block_mask(value: Any) -> bool:
    """Whether a value is torch's BlockMask, without importing what defines it."""
    module = sys.modules.get("torch.nn.attention.flex_attention")
    return module is not None and isinstance(value, module.BlockMask)


def from_block_mask(op: str, mask: Any, q: torch.Tensor, k: torch.Tensor) -> Callable:
    """mask_mod(b, h, q, k) of the same scores: those of blocks in full_kv_indices, and those of blocks in kv_indices that its own
    mask_mod allows. As in torch's compiled kernels; torch's eager code looks at mask_mod alone."""
    size_q, size_k = mask.BLOCK_SIZE
    queries, keys = mask.seq_lengths
    if (queries, keys) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"fastattn.{op}: block_mask was made for {queries} queries and {keys} keys, given {q.shape[2]} and {k.shape[2]}; "
            "make one for these lengths"
        )
    kinds = _classes(mask)
    batches, heads = kinds.shape[:2]
    for name, given, wanted in (("batch", batches, q.shape[0]), ("heads", heads, q.shape[1])):
        if given not in (1, wanted):
            raise ValueError(
                f"fastattn.{op}: block_mask has a {name} of {given}, which broadcasts to no {wanted}"
            )
    inner = mask.mask_mod
    some_mixed = bool((kinds == MIXED).any())

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        kind = kinds[
            b if batches > 1 else b * 0, h if heads > 1 else h * 0, q_idx // size_q, kv_idx // size_k
        ]
        if not some_mixed:
            return kind == FULL
        return (kind == FULL) | ((kind == MIXED) & inner(b, h, q_idx, kv_idx))

    return mask_mod


def _classes(mask: Any) -> torch.Tensor:
    """(B, H, blocks of queries, blocks of keys) int32: MIXED where kv_indices lists a block, FULL where full_kv_indices does."""
    counts, indices = mask.kv_num_blocks, mask.kv_indices
    blocks = max(indices.shape[-1], -(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1]))
    classes = torch.full((*counts.shape, blocks), EMPTY, dtype=torch.int32, device=counts.device)
    lists = [(counts, indices, MIXED), (mask.full_kv_num_blocks, mask.full_kv_indices, FULL)]
    for count, index, kind in lists:
        if count is None:
            continue
        listed = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        # an entry past the list writes where nothing reads
        wide = torch.cat([classes, torch.zeros_like(classes[..., :1])], -1)
        place = torch.where(listed, index.long(), blocks)
        wide.scatter_(-1, place, torch.where(listed, kind, EMPTY).to(torch.int32))
        classes = wide[..., :blocks].contiguous()
    return classes
