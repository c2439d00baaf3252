"""Packed documents, for ops whose tensors are (B, L, ...): offsets `cu_seqlens` (documents + 1,) cut a batch of one."""

import itertools
from collections.abc import Callable

import torch

from ..runtime import checks


def count(batch: int, cu_seqlens: torch.Tensor | None) -> int:
    """How many sequences there are: batches, or documents."""
    return batch if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check_offsets(
    op: str, name: str, tokens: torch.Tensor, batch: int, cu_seqlens: torch.Tensor | None
) -> int:
    """`count`, for tokens of this batch size, the tensor of that name; raises unless the offsets fit it."""
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
    """The offsets, None where there are none or where they cannot be read; raises unless they cut `length` tokens."""
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
    """A definition document by document: definition(i, span) gives (its tokens' result, another); both in order, zeros after the
    last document. tokens (1, L, ...)."""
    cuts = cu_seqlens.tolist()
    parts = [definition(i, slice(*span)) for i, span in enumerate(itertools.pairwise(cuts))]
    after = torch.zeros_like(tokens[:, cuts[-1] :])
    return torch.cat([*(part for part, _ in parts), after], 1), [other for _, other in parts]


def clear_rest(cu_seqlens: torch.Tensor | None, *results: torch.Tensor) -> None:
    """Tokens after the last document become 0 in contiguous (1, L, ...) results, which kernels leave as they are."""
    if cu_seqlens is not None:
        end = int(cu_seqlens[-1])
        for result in results:
            result[:, end:].zero_()
