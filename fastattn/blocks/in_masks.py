"""Block lists as a member of a mask: whether they fit a call, what they allow, and how they read."""

from typing import TYPE_CHECKING

import torch

from ..runtime.checks import has_contents
from .lists import Blocks, elements, table

if TYPE_CHECKING:
    from ..masks import MaskArgs


def check_blocks(op: str, blocks: Blocks, q: torch.Tensor, k: torch.Tensor) -> None:
    """Block lists are of this call's lengths, batch and heads, or ValueError."""
    for name, given, length in (
        ("q_length", blocks.q_length, q.shape[2]),
        ("k_length", blocks.k_length, k.shape[2]),
    ):
        if given != length:
            raise ValueError(
                f"fastattn.{op}: blocks has {name} {given}, the call has {length}; they must agree"
            )
    if blocks.batch != 1 and blocks.batch != q.shape[0]:
        raise ValueError(
            f"fastattn.{op}: blocks has a batch of {blocks.batch}, q has {q.shape[0]}; give one or as many"
        )
    if blocks.heads != 1 and blocks.heads != k.shape[1] and blocks.heads != q.shape[1]:
        raise ValueError(
            f"fastattn.{op}: blocks has {blocks.heads} heads; give 1, the {k.shape[1]} key heads or the {q.shape[1]} query heads"
        )


def describe_lists(mask: "MaskArgs", keys: int) -> str:
    """A mask's block lists of so many keys, to read: how dense and how long they are. Empty where there are none."""
    offsets = mask.list_offsets
    if offsets is None or not has_contents(offsets) or offsets.numel() < 2:
        return ""
    counts = offsets.diff()
    mean, most = float(counts.double().mean()), int(counts.max())
    density = mean / max(-(-keys // mask.list_k), 1)
    return f"block lists of {mask.list_q} x {mask.list_k}: density {density:.3g}, {mean:.4g} key blocks a row, at most {most}"


def listed(lq: int, lk: int, offsets: torch.Tensor, keys: torch.Tensor, mask: "MaskArgs") -> torch.Tensor:
    """bool (B or 1, H or 1, Lq, Lk), True where key j's block is in the list of query i's."""
    nq, nk = -(-lq // mask.list_q), -(-lk // mask.list_k)
    found = table(offsets, keys, mask.list_heads, nq, nk)
    if mask.list_heads != 1:
        found = found.repeat_interleave(mask.list_group, dim=1)
    return elements(found, (mask.list_q, mask.list_k), lq, lk)
