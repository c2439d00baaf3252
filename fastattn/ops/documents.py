"""Packed documents in tensors (B, L, ...): the offsets `cu_seqlens` (documents + 1,) divide a batch of one into documents."""

import itertools
from collections.abc import Callable

import torch

from ..runtime import checks


def count(batch: int, cu_seqlens: torch.Tensor | None) -> int:
    """The number of sequences: batch entries, or documents when packed."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check_offsets(
    op: str, name: str, tokens: torch.Tensor, batch: int, cu_seqlens: torch.Tensor | None
) -> int:
    """`count` for the tensor `tokens`, which messages call `name`. Raises unless the offsets suit its batch size and device."""
    if cu_seqlens is None:
        return batch
    checks.check_integer(op, "cu_seqlens", cu_seqlens, dims=1)
    checks.check_same_device(op, **{name: tokens, "cu_seqlens": cu_seqlens})
    if batch != 1:
        raise ValueError(f"fastattn.{op}: cu_seqlens needs a batch of one, given {batch}")
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"fastattn.{op}: cu_seqlens must have at least one entry, given none")
    return cu_seqlens.shape[0] - 1


def check_offsets_contents(op: str, length: int, cu_seqlens: torch.Tensor | None) -> list[int] | None:
    """The offsets as a list; None if there are none or they are not on the CPU. Raises unless they divide `length` tokens."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return None
    cuts = cu_seqlens.tolist()
    spans = [end - begin for begin, end in itertools.pairwise(cuts)]
    if cuts[0] != 0 or min(spans, default=0) < 0 or cuts[-1] > length:
        raise ValueError(
            f"fastattn.{op}: cu_seqlens must start at 0, not decrease and end at most at {length}, given {cuts}"
        )
    return cuts


def cut(
    definition: Callable[[int, slice], tuple[torch.Tensor, torch.Tensor]],
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Apply a definition to each document: definition(i, span) returns (the result of its tokens, another result). Returns the first
    results concatenated, with zeros after the last document, and a list of the others. tokens: (1, L, ...)."""
    cuts = cu_seqlens.tolist()
    parts = [definition(i, slice(*span)) for i, span in enumerate(itertools.pairwise(cuts))]
    padding = torch.zeros_like(tokens[:, cuts[-1] :])
    return torch.cat([*(part for part, _ in parts), padding], 1), [other for _, other in parts]


def clear_rest(cu_seqlens: torch.Tensor | None, *results: torch.Tensor) -> None:
    """Set tokens after the last document to 0 in contiguous results (1, L, ...); kernels do not write them."""
    if cu_seqlens is not None:
        end = int(cu_seqlens[-1])
        for result in results:
            result[:, end:].zero_()
