"""Which keys a query attends: `Mask`, its flattening into schemas, and its definition as a dense tensor."""

import itertools
import math
from contextlib import nullcontext
from typing import NamedTuple

import torch

from .blocks.in_masks import check_blocks, listed
from .blocks.lists import Blocks
from .runtime.checks import (
    as_integer,
    broadcasts,
    check_choice,
    check_integer,
    check_same_device,
    check_tensor,
    describe,
    has_contents,
    traced,
)
from .runtime.schema import Size
from .runtime.torch_private import transformed


class MaskArgs(NamedTuple):
    """A mask as ops take it, index tensors int32 on q's device: one member of an op's `Call`, flat in its schema."""

    causal: bool
    window_left: Size  # keys beside the query's own, -1: no limit
    window_right: Size
    prefix_lengths: torch.Tensor | None  # (B,), or (documents,)
    cu_seqlens_q: torch.Tensor | None  # (documents + 1,)
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: Size  # of the longest document, -1: not known
    max_seqlen_k: Size
    key_lengths: torch.Tensor | None  # (B,), or (documents,)
    dense: torch.Tensor | None  # bool, broadcastable to (B, H, Lq, Lk)
    # `Blocks`, None: every block. Query head h has the lists of head h // list_group
    list_offsets: torch.Tensor | None = None  # ((B or 1) * list_heads * ceil(Lq / list_q) + 1,)
    list_keys: torch.Tensor | None = None  # key blocks, row by row
    list_q: Size = 1  # queries and keys of a block
    list_k: Size = 1
    list_heads: Size = 1
    list_group: Size = 1


# Arguments of Mask that exclude keys.
_FIELDS = (
    "causal",
    "window",
    "prefix_lengths",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "key_lengths",
    "dense",
    "blocks",
)

# Added to key lengths in a schema: the last query is aligned with the last key that they count. No length is negative.
_ALIGNED = -(2**31)

# The longest sequence. A wider window, sys.maxsize say, is no limit, and must not overflow a sum.
LONGEST = 2**31 - 1


class Mask:
    """The keys each query attends: those that every given option allows.

    causal: query i attends keys up to i + Lk - Lq, the last query aligned with the last key (per document when packed).
    window: (left, right), the number of keys on each side of the query's own; None on a side means no limit.
    prefix_lengths: (B,) integers, or one a document when packed. Tokens before the length attend each other both ways, the
        rest is causal (PrefixLM): query i attends keys j < max(i + Lk - Lq + 1, prefix). Zero is plain causal.
    cu_seqlens_q, cu_seqlens_k: (documents + 1,) integers from 0, never decreasing: token offsets of documents packed in a batch
        of one, (1, H, total, D). cu_seqlens_k defaults to cu_seqlens_q. Documents never attend each other, and may be empty.
        Rows after the last offset attend nothing.
    key_lengths: (B,) integers, or one a document when packed: how many keys count; later ones are padding.
    align: the key that the last query is aligned with, for causal, window and prefix. "keys": the last key given (of the document
        when packed). "key_lengths": the last key that key_lengths counts, as in a cache with room for more keys; Lk above is then
        the key length, and queries before the first key attend nothing.
    dense: bool tensor broadcastable to (B, H, Lq, Lk), True = attend. It is not copied: every call reads its present contents.
    blocks: a fastattn.Blocks, lists of the key blocks that each block of queries attends, of the call's lengths. Its batch is 1 or
        the call's, its heads 1, the key heads or the query heads. Packed documents are cut in the pack.

    Index tensors are int32 or int64 on any device. Their contents are copied and checked once, here: a Mask does not see what is
    written to them afterwards. Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        prefix_lengths: torch.Tensor | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        key_lengths: torch.Tensor | None = None,
        dense: torch.Tensor | None = None,
        align: str = "keys",
        blocks: Blocks | None = None,
    ) -> None:
        check_choice("Mask", "align", align, ("keys", "key_lengths"))
        if align == "key_lengths" and key_lengths is None:
            raise ValueError('fastattn.Mask: align="key_lengths" needs key_lengths')
        self.align = align
        if not isinstance(causal, bool):
            raise TypeError(f"fastattn.Mask: causal must be a bool, given {type(causal).__name__} {causal!r}")
        self.causal = causal
        self.window_left, self.window_right = _window(window)
        if cu_seqlens_k is not None and cu_seqlens_q is None:
            raise ValueError("fastattn.Mask: cu_seqlens_k needs cu_seqlens_q")
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
        self.prefix_lengths, prefix = _indices("prefix_lengths", prefix_lengths)
        self.cu_seqlens_q, offsets_q = _indices("cu_seqlens_q", cu_seqlens_q)
        self.cu_seqlens_k, offsets_k = _indices("cu_seqlens_k", cu_seqlens_k)
        self.key_lengths, lengths = _indices("key_lengths", key_lengths)
        self.dense = None
        if dense is not None:
            check_tensor("Mask", "dense", dense)
            if dense.dtype != torch.bool:
                raise TypeError(
                    f"fastattn.Mask: dense must be a bool tensor (True = attend), given {dense.dtype}"
                )
            if dense.dim() > 4:
                raise ValueError(
                    f"fastattn.Mask: dense must broadcast to (B, H, Lq, Lk), given {dense.dim()} dimensions"
                )
            self.dense = dense
        if blocks is not None and not isinstance(blocks, Blocks):
            raise TypeError(f"fastattn.Mask: blocks must be a fastattn.Blocks, given {describe(blocks)}")
        self.blocks = blocks
        self.documents: int | None = None
        self.max_seqlen_q = self.max_seqlen_k = -1
        self.total_q = self.total_k = 0
        self.longest_prefix = self.longest_key_length = 0
        if self.cu_seqlens_q is not None and self.cu_seqlens_k is not None:
            self.documents = self.cu_seqlens_q.numel() - 1
            if self.documents < 0:
                raise ValueError("fastattn.Mask: cu_seqlens_q must have at least one entry, given none")
            if self.cu_seqlens_k.numel() != self.cu_seqlens_q.numel():
                raise ValueError(
                    f"fastattn.Mask: cu_seqlens_k has {self.cu_seqlens_k.numel()} entries, cu_seqlens_q has "
                    f"{self.cu_seqlens_q.numel()}; they must agree"
                )
            for name, tensor in (("prefix_lengths", self.prefix_lengths), ("key_lengths", self.key_lengths)):
                if tensor is not None and tensor.numel() != self.documents:
                    raise ValueError(
                        f"fastattn.Mask: {name} has {tensor.numel()} entries for {self.documents} documents; give one a document"
                    )
        if prefix is not None and prefix:
            _not_negative("prefix_lengths", prefix)
            self.longest_prefix = max(prefix)
        if lengths is not None and lengths:
            _not_negative("key_lengths", lengths)
            self.longest_key_length = max(lengths)
        if offsets_q is not None and offsets_k is not None:
            _offsets("cu_seqlens_q", offsets_q)
            _offsets("cu_seqlens_k", offsets_k)
            spans_q = [b - a for a, b in itertools.pairwise(offsets_q)]
            spans_k = [b - a for a, b in itertools.pairwise(offsets_k)]
            self.max_seqlen_q, self.max_seqlen_k = max(spans_q, default=0), max(spans_k, default=0)
            self.total_q, self.total_k = offsets_q[-1], offsets_k[-1]
            for name, values in (("prefix_lengths", prefix), ("key_lengths", lengths)):
                for i, (length, span) in enumerate(zip(values or (), spans_k, strict=False)):
                    if length > span:
                        raise ValueError(
                            f"fastattn.Mask: {name}[{i}] is {length}, longer than its document of {span} keys"
                        )
        self._on_device: dict[torch.device, tuple[torch.Tensor | None, ...]] = {}
        self._constant: MaskArgs | None = None  # where there is no tensor to check and to move
        if all(name in ("causal", "window") for name in self.fields):
            sides = self.window_left, self.window_right
            self._constant = MaskArgs(causal, *sides, None, None, None, -1, -1, None, None)

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def window(self) -> tuple[int | None, int | None] | None:
        """(left, right) as given, None where a side has no limit."""
        left, right = (None if side < 0 else side for side in (self.window_left, self.window_right))
        return None if left is None and right is None else (left, right)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the arguments that exclude keys here, in their order: ("causal", "window"), say; () for no mask.

        A function that serves some masks compares these with the ones it serves, so that it refuses a field added later.
        """
        values = ((name, getattr(self, name)) for name in _FIELDS)
        return tuple(name for name, value in values if value is not None and value is not False)

    def __repr__(self) -> str:
        parts = []
        for name in self.fields:
            value = getattr(self, name)
            if isinstance(value, torch.Tensor):
                value = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            parts.append(f"{name}={value}")
        if self.align != "keys":
            parts.append(f"align={self.align!r}")
        return f"Mask({', '.join(parts)})"

    def _check_contents(self, op: str, q: torch.Tensor, k: torch.Tensor) -> None:
        """The contents of index tensors, known on the host, fit q (B, H, Lq, D) and k (B, Hkv, Lk, D), or ValueError."""
        lq, lk = q.shape[2], k.shape[2]
        if self.blocks is not None:
            check_blocks(op, self.blocks, q, k)
        if self.packed:
            for name, total, length in (
                ("cu_seqlens_q", self.total_q, lq),
                ("cu_seqlens_k", self.total_k, lk),
            ):
                if total > length:
                    raise ValueError(f"fastattn.{op}: {name} ends at {total}, past the {length} tokens given")
        else:
            for name, longest in (
                ("prefix_lengths", self.longest_prefix),
                ("key_lengths", self.longest_key_length),
            ):
                if longest > lk:
                    raise ValueError(
                        f"fastattn.{op}: {name} holds {longest}, longer than the {lk} keys given"
                    )

    def args(self, op: str, q: torch.Tensor, k: torch.Tensor) -> MaskArgs:
        """The mask as this call's op takes it."""
        if self._constant is not None:
            return self._constant
        self._check_contents(op, q, k)
        tensors = self._on_device.get(q.device) if not traced() else None
        if tensors is None:
            with nullcontext() if traced() else torch.inference_mode(False):
                lengths = self.key_lengths
                if self.align == "key_lengths" and lengths is not None:
                    lengths = lengths + _ALIGNED
                given = () if self.blocks is None else (self.blocks.offsets, self.blocks.keys)
                tensors = tuple(
                    None if t is None else t.to(q.device)
                    for t in (self.prefix_lengths, self.cu_seqlens_q, self.cu_seqlens_k, lengths, *given)
                )
            # a tensor made inside a transform of torch.func is that transform's, and has no storage after it
            if not traced() and not transformed() and _lasting(tensors):
                self._on_device[q.device] = tensors
        prefix, offsets_q, offsets_k, lengths, *lists = tensors
        dense, blocks = self.dense, self.blocks
        if dense is not None:
            dense = check_broadcast(op, "dense mask", dense, q, k)
        args = MaskArgs(
            self.causal or prefix is not None,
            self.window_left,
            self.window_right,
            prefix,
            offsets_q,
            offsets_k,
            self.max_seqlen_q,
            self.max_seqlen_k,
            lengths,
            dense,
        )
        if blocks is None:
            return args
        return args._replace(
            list_offsets=lists[0],
            list_keys=lists[1],
            list_q=blocks.block[0],
            list_k=blocks.block[1],
            list_heads=blocks.heads,
            list_group=q.shape[1] // blocks.heads,
        )


def check_broadcast(op: str, name: str, t: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """t as (B or 1, H or 1, Lq or 1, Lk or 1), which it must broadcast from."""
    full = (*q.shape[:3], k.shape[2])
    shape = (1,) * (4 - t.dim()) + tuple(t.shape)
    if t.dim() > 4 or not broadcasts(shape, full):
        raise ValueError(
            f"fastattn.{op}: {name} of shape {tuple(t.shape)} does not broadcast to (B, Hq, Lq, Lk) = {full}"
        )
    return t if t.dim() == 4 else t.view(shape)


def check_args(op: str, q: torch.Tensor, k: torch.Tensor, mask: MaskArgs) -> None:
    """A mask fits q (B, H, Lq, D) and k (B, Hkv, Lk, D), but for what index tensors hold."""
    (
        causal, window_left, window_right, prefix_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_lengths, dense,
        list_offsets, *_,
    ) = mask  # fmt: skip
    if list_offsets is not None:
        _check_lists(op, q, k, mask)
    if window_left > LONGEST or window_right > LONGEST:
        side = max(window_left, window_right)
        raise ValueError(f"fastattn.{op}: a window must be at most {LONGEST} keys, given {side}")
    if dense is not None:
        if dense.dtype != torch.bool or dense.dim() != 4:
            raise TypeError(
                f"fastattn.{op}: dense must be a bool tensor of four dimensions, given {describe(dense)}"
            )
        check_broadcast(op, "dense mask", dense, q, k)
        check_same_device(op, q=q, **{"the dense mask": dense})
    if cu_seqlens_q is None and cu_seqlens_k is None:
        if prefix_lengths is None and key_lengths is None:
            return
        sequences = q.shape[0]
    else:
        if q.shape[0] != 1:
            raise ValueError(
                f"fastattn.{op}: packed documents (cu_seqlens_q) need a batch of one, given {q.shape[0]}"
            )
        if cu_seqlens_q is None or cu_seqlens_k is None:
            raise ValueError(f"fastattn.{op}: cu_seqlens_q and cu_seqlens_k must be given together")
        _check_indices(op, "cu_seqlens_q", cu_seqlens_q, q)
        _check_indices(op, "cu_seqlens_k", cu_seqlens_k, q)
        if cu_seqlens_k.shape[0] != cu_seqlens_q.shape[0] or cu_seqlens_q.shape[0] < 1:
            raise ValueError(
                f"fastattn.{op}: cu_seqlens_k has {cu_seqlens_k.shape[0]} entries, cu_seqlens_q has "
                f"{cu_seqlens_q.shape[0]}; they must agree, and be one at least"
            )
        for name, most, length in (
            ("max_seqlen_q", max_seqlen_q, q.shape[2]),
            ("max_seqlen_k", max_seqlen_k, k.shape[2]),
        ):
            if not -1 <= most <= length:
                raise ValueError(
                    f"fastattn.{op}: {name} must lie in [0, {length}], or be -1 where it is not known, given {most}"
                )
        sequences = cu_seqlens_q.shape[0] - 1
    for name, value in (("prefix_lengths", prefix_lengths), ("key_lengths", key_lengths)):
        if value is None:
            continue
        _check_indices(op, name, value, q)
        if value.shape[0] != sequences:
            # the text is made in the branch that raises: formatting a symbolic size while tracing would make it a constant
            of = f"a batch of {sequences}" if cu_seqlens_q is None else f"{sequences} documents"
            raise ValueError(f"fastattn.{op}: {name} has {value.shape[0]} entries for {of}")
    if prefix_lengths is not None and not causal:
        raise ValueError(f"fastattn.{op}: prefix_lengths needs causal to be True")


def _check_lists(op: str, q: torch.Tensor, k: torch.Tensor, mask: MaskArgs) -> None:
    """Block lists fit q and k, but for what they hold."""
    offsets, keys, list_q, list_k, heads, group = mask[-6:]
    if offsets is None or keys is None:
        raise ValueError(f"fastattn.{op}: list_offsets and list_keys must be given together")
    _check_indices(op, "list_offsets", offsets, q)
    _check_indices(op, "list_keys", keys, q)
    if not (1 <= list_q <= LONGEST and 1 <= list_k <= LONGEST):
        raise ValueError(
            f"fastattn.{op}: list_q and list_k must lie in [1, 2**31), given {list_q} and {list_k}"
        )
    if heads * group != q.shape[1] or not (heads == 1 or heads == k.shape[1] or heads == q.shape[1]):
        raise ValueError(
            f"fastattn.{op}: list_heads must be 1, k's or q's heads, and list_group q's heads by it, given {heads} and {group}"
        )
    rows = heads * (-(-q.shape[2] // list_q))
    if offsets.shape[0] != rows + 1 and offsets.shape[0] != q.shape[0] * rows + 1:
        raise ValueError(
            f"fastattn.{op}: list_offsets must have {rows + 1} entries, or {q.shape[0] * rows + 1} for lists of each batch entry, "
            f"given {offsets.shape[0]}"
        )


def unserved_lists(mask: MaskArgs) -> str | None:
    """Why kernels that read no block lists cannot serve a mask, or None."""
    return None if mask.list_offsets is None else "it does not serve block lists"


def check_causal(op: str, mask: MaskArgs) -> None:
    """No query attends a key after its own, but for those of a prefix, or NotImplementedError."""
    if not mask.causal:
        raise NotImplementedError(f"fastattn.{op}: causal must be True; this op is causal")


def _check_indices(op: str, name: str, value: torch.Tensor, q: torch.Tensor) -> None:
    if value.dtype != torch.int32 or value.dim() != 1:
        raise TypeError(f"fastattn.{op}: {name} must be int32 of one dimension, given {describe(value)}")
    check_same_device(op, q=q, **{name: value})


def _lasting(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether later calls may use the copies that this one made: not fake tensors, nor tensors that a captured graph fills only
    when it is replayed."""
    if any(type(t) is not torch.Tensor for t in tensors if t is not None):
        return False
    on_gpu = any(t is not None and t.is_cuda for t in tensors)
    return not (on_gpu and torch.cuda.is_current_stream_capturing())


def check_mask(op: str, mask: Mask | None) -> Mask:
    if mask is None:
        return NO_MASK
    if not isinstance(mask, Mask):
        hint = "; a bool tensor goes in as fastattn.Mask(dense=...)" if isinstance(mask, torch.Tensor) else ""
        raise TypeError(
            f"fastattn.{op}: mask must be a fastattn.Mask or None, given {type(mask).__name__}{hint}"
        )
    return mask


def _window(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"fastattn.Mask: window must be (left, right), given {window!r}")

    def side(given: int | None) -> int:
        if given is None:
            return -1
        count = as_integer(given)
        if count is None or count < 0:
            raise ValueError(
                f"fastattn.Mask: window counts keys, None or zero or more on each side, given {tuple(window)!r}"
            )
        return LONGEST if count > LONGEST else count

    left, right = window
    return side(left), side(right)


def _indices(name: str, value: torch.Tensor | None) -> tuple[torch.Tensor | None, list[int] | None]:
    """(values as int32, their contents on the host); contents are None while tracing and on the meta device."""
    if value is None:
        return None, None
    check_integer("Mask", name, value, dims=1)
    contents = value.tolist() if has_contents(value) else None
    if contents and max(contents) > LONGEST:
        raise ValueError(f"fastattn.Mask: {name} holds {max(contents)}; at most 2**31 - 1 is allowed")
    # a copy of int32 too: what is checked here is what kernels read; one that autograd can save, whatever the mode
    with torch.inference_mode(False) if contents is not None else nullcontext():
        return value.detach().to(torch.int32, copy=True).contiguous(), contents


def _not_negative(name: str, values: list[int]) -> None:
    if min(values) < 0:
        raise ValueError(
            f"fastattn.Mask: {name} must be zero or more, given {min(values)} at position {values.index(min(values))}"
        )


def _offsets(name: str, values: list[int]) -> None:
    if values[0] != 0:
        raise ValueError(f"fastattn.Mask: {name} must start at 0, given {values[0]}")
    for i, (a, b) in enumerate(itertools.pairwise(values)):
        if b < a:
            raise ValueError(
                f"fastattn.Mask: {name} must not decrease, given {a} then {b} at position {i + 1}"
            )


def positions(
    cu_seqlens: torch.Tensor | None, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(document of each token, or -1 for padding; position in its document), each (length,)."""
    token = torch.arange(length, device=device)
    if cu_seqlens is None:
        return torch.zeros_like(token), token
    starts = cu_seqlens.long()
    document = torch.searchsorted(starts, token, right=True) - 1
    inside = token < starts[-1]
    document = torch.where(inside, document, -1)
    return document, torch.where(inside, token - starts[document.clamp(min=0)], 0)


def key_length(key_lengths: torch.Tensor) -> torch.Tensor:
    """The lengths that a schema's key_lengths hold, int64."""
    lengths = key_lengths.long()
    return torch.where(lengths < 0, lengths - _ALIGNED, lengths)


def token_counts(mask: Mask | None) -> torch.Tensor | None:
    """How many keys of each sequence are tokens and not padding, (B,) or (documents,) int32; None where all are."""
    return None if mask is None else mask.key_lengths


def diagonal_offset(lq: int, lk: int, device: torch.device, mask: MaskArgs) -> torch.Tensor:
    """What a row adds to its position in its sequence to get the key on its diagonal: (B or 1, Lq)."""
    if mask.cu_seqlens_q is None or mask.cu_seqlens_k is None:
        queries, keys = (torch.full((1,), n, device=device) for n in (lq, lk))
    else:
        queries, keys = mask.cu_seqlens_q.diff().long(), mask.cu_seqlens_k.diff().long()
    if mask.key_lengths is not None:
        keys = torch.where(mask.key_lengths < 0, key_length(mask.key_lengths), keys)
    offset = keys - queries  # (B or 1,), or (documents,)
    if mask.cu_seqlens_q is None:
        return offset[:, None].expand(-1, lq)
    document, _ = positions(mask.cu_seqlens_q, lq, device)
    return torch.cat([offset, offset.new_zeros(1)])[document][None]  # document -1 is padding


def dense_allowed(lq: int, lk: int, device: torch.device, mask: MaskArgs) -> torch.Tensor:
    """The definition of a mask: bool (B or 1, H or 1, Lq, Lk), True where query i attends key j."""
    document_q, i = positions(mask.cu_seqlens_q, lq, device)
    document_k, j = positions(mask.cu_seqlens_k, lk, device)

    def per_row(t: torch.Tensor) -> torch.Tensor:
        """One a sequence as (B, 1, 1), or one a document as (1, Lq, 1)."""
        if mask.cu_seqlens_q is None:
            return t.long()[:, None, None]
        return torch.cat([t.long(), t.new_zeros(1).long()])[document_q][None, :, None]

    offset = diagonal_offset(lq, lk, device, mask)
    diagonal = (i + offset)[:, :, None]  # (B or 1, Lq, 1)
    j = j[None, None, :]
    allowed = (document_q[:, None] == document_k[None, :]) & (document_q >= 0)[:, None]
    allowed = allowed[None]  # (1, Lq, Lk)
    if mask.causal:
        end = diagonal + 1
        if mask.prefix_lengths is not None:
            end = torch.maximum(end, per_row(mask.prefix_lengths))
        allowed = allowed & (j < end)
    if mask.window_left >= 0:
        allowed = allowed & (j >= diagonal - mask.window_left)
    if mask.window_right >= 0:
        allowed = allowed & (j <= diagonal + mask.window_right)
    if mask.key_lengths is not None:
        allowed = allowed & (j < per_row(key_length(mask.key_lengths)))
    allowed = allowed[:, None]  # (B or 1, 1, Lq, Lk)
    if mask.list_offsets is not None and mask.list_keys is not None:
        allowed = allowed & listed(lq, lk, mask.list_offsets, mask.list_keys, mask)
    return allowed if mask.dense is None else allowed & mask.dense


def sequence_keys(lq: int, lk: int, device: torch.device, mask: MaskArgs) -> torch.Tensor:
    """The number of keys in each row's sequence, also those that position masks: (B or 1, 1, Lq, 1), at least 1."""
    if mask.cu_seqlens_q is None or mask.cu_seqlens_k is None:
        count = (
            torch.full((1,), lk, device=device) if mask.key_lengths is None else key_length(mask.key_lengths)
        )
        count = count[:, None, None, None].expand(-1, 1, lq, 1)
    else:
        count = mask.cu_seqlens_k.diff().long() if mask.key_lengths is None else key_length(mask.key_lengths)
        count = torch.cat([count, count.new_ones(1)])[positions(mask.cu_seqlens_q, lq, device)[0]][
            None, None, :, None
        ]
    return count.clamp(min=1)


def row_counts(lq: int, lk: int, device: torch.device, mask: MaskArgs) -> torch.Tensor:
    """How many keys each query attends, (B or 1, H or 1, Lq)."""
    if mask.dense is not None or mask.list_offsets is not None:
        return dense_allowed(lq, lk, device, mask).sum(-1)
    document, row = positions(mask.cu_seqlens_q, lq, device)

    def per_row(t: torch.Tensor) -> torch.Tensor:
        """One a sequence as (B, 1), or one a document as (1, Lq)."""
        return t[:, None] if mask.cu_seqlens_q is None else torch.cat([t, t.new_zeros(1)])[document][None]

    if mask.cu_seqlens_k is None:
        keys = torch.full((1, 1), lk, device=device)
    else:
        keys = per_row(mask.cu_seqlens_k.diff().long())  # document -1 has none
    diagonal = row + diagonal_offset(lq, lk, device, mask)  # (B or 1, Lq)
    if mask.key_lengths is not None:
        keys = torch.minimum(keys, per_row(key_length(mask.key_lengths)))
    end, first = keys, torch.zeros_like(keys)
    if mask.causal:
        last = diagonal + 1
        if mask.prefix_lengths is not None:
            last = torch.maximum(last, per_row(mask.prefix_lengths.long()))
        end = torch.minimum(end, last)
    if mask.window_right >= 0:
        end = torch.minimum(end, diagonal + mask.window_right + 1)
    if mask.window_left >= 0:
        first = (diagonal - mask.window_left).clamp(min=0)
    return (end - first).clamp(min=0).expand(-1, lq)[:, None]


def default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if head_dim else 1.0


NO_MASK = Mask()
NO_MASK_ARGS = NO_MASK._constant
