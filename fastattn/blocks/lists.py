"""Which key blocks a block of queries attends: `Blocks`, a list of key blocks a row of query blocks."""

from typing import Any, NoReturn

import torch

from ..runtime.checks import as_integer, check_integer, check_tensor, describe, has_contents, traced

_LONGEST = 2**31 - 1


class Blocks:
    """Lists of key blocks, one for each block of queries: `Mask(blocks=...)`. Immutable.

    Queries are cut into blocks of bq, keys into blocks of bk; the last of either may be short. A row (b, h, I) lists the key
    blocks that query block I of batch entry b and head h attends: query i attends key j where j // bk is in row (b, h, i // bq).
    A row without keys attends nothing: its output is 0. bq = 1 is a list a token, bk = 1 lists tokens.

    offsets: (batch * heads * ceil(q_length / bq) + 1,) integers from 0, never decreasing: row r, in the order (b, h, I), has
        keys[offsets[r]:offsets[r + 1]].
    keys: integers, the listed key blocks, ascending and unique in a row. What lies past the last offset is not used.
    block: (bq, bk), each 1 or more.
    q_length, k_length: how many queries and keys the blocks cut: those of the calls that take them. Packed documents are cut in
        the pack; their own test still applies.
    batch: 1, the lists of every batch entry, or as many as a call's batch.
    heads: 1, the key heads of a call (a list for each group of query heads), or its query heads.
    leaks: None, or in a sentence how a token's list depends on later tokens. Of lists that leak, attention warns once in training
        with a causal mask.

    offsets and keys are int32 or int64 on one device. They are copied to int32 and checked once, here; a selection has no gradient.
    Raises ValueError or TypeError naming the argument.

    >>> fastattn.Blocks(torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1]), block=(64, 64), q_length=128, k_length=128)
    Blocks(block=(64, 64), q_length=128, k_length=128, 3 of 4 blocks)
    """

    _batch: int
    _heads: int

    def __init__(
        self,
        offsets: torch.Tensor,
        keys: torch.Tensor,
        *,
        block: tuple[int, int],
        q_length: int,
        k_length: int,
        batch: int = 1,
        heads: int = 1,
        leaks: str | None = None,
    ) -> None:
        for name, t in (("offsets", offsets), ("keys", keys)):
            check_integer("Blocks", name, t, dims=1)
        if offsets.device != keys.device:
            raise ValueError(f"fastattn.Blocks: keys is on {keys.device} but offsets is on {offsets.device}")
        sizes = _sizes(block, q_length, k_length, batch, heads)
        self._set(offsets, keys, *sizes, leaks=leaks)
        rows = self._batch * self._heads * self.q_blocks
        if offsets.shape[0] != rows + 1:
            raise ValueError(
                f"fastattn.Blocks: offsets must have {rows + 1} entries, one more than the {self._batch} x {self._heads} x "
                f"{self.q_blocks} rows (batch, heads, query blocks), given {offsets.shape[0]}"
            )
        if keys.shape[0] > _LONGEST:
            raise ValueError(
                f"fastattn.Blocks: keys must have at most 2**31 - 1 entries, given {keys.shape[0]}"
            )
        if has_contents(offsets) and has_contents(keys):
            _check_contents(offsets, keys, self.k_blocks)
        self._offsets = offsets.detach().to(torch.int32, copy=True).contiguous()
        self._keys = keys.detach().to(torch.int32, copy=True).contiguous()

    def _set(
        self,
        offsets: torch.Tensor,
        keys: torch.Tensor,
        block: tuple[int, int],
        q_length: int,
        k_length: int,
        batch: int,
        heads: int,
        leaks: str | None,
    ) -> None:
        self._offsets, self._keys = offsets, keys
        self._block, self._q_length, self._k_length = block, q_length, k_length
        self._batch, self._heads = batch, heads
        if leaks is not None and not isinstance(leaks, str):
            raise TypeError(f"fastattn.Blocks: leaks must be a str or None, given {describe(leaks)}")
        self._leaks = leaks
        self._transposed: Blocks | None = None

    @classmethod
    def _made(cls, offsets, keys, like: "Blocks | None" = None, **fields: Any) -> "Blocks":
        """Lists that are right by construction."""
        made = cls.__new__(cls)
        of = {} if like is None else {name: getattr(like, name) for name in _FIELDS}
        of |= fields
        made._set(offsets, keys, *(of[name] for name in _FIELDS))
        return made

    @classmethod
    def from_indices(
        cls,
        indices: torch.Tensor,
        *,
        block: tuple[int, int],
        q_length: int,
        k_length: int,
        leaks: str | None = None,
    ) -> "Blocks":
        """Lists from indices (batch, heads, ceil(q_length / bq), top) of key blocks: -1 is none, duplicates count once, any order.

        int32 or int64 on any device; contents are checked on the CPU (elsewhere, entries outside are dropped as -1 is).
        """
        check_integer("Blocks.from_indices", "indices", indices, dims=4)
        batch, heads, rows, _ = indices.shape
        fields = _fields("Blocks.from_indices", block, q_length, k_length, batch, heads, leaks)
        nq, nk = _counts(fields)
        if rows != nq:
            raise ValueError(
                f"fastattn.Blocks.from_indices: indices must have {nq} rows of query blocks, given {describe(indices)}"
            )
        if has_contents(indices) and indices.device.type == "cpu" and indices.numel():
            low, high = (int(x) for x in torch.aminmax(indices))
            if low < -1 or high >= nk:
                raise ValueError(
                    f"fastattn.Blocks.from_indices: indices must lie in [0, {nk}) or be -1, given {low if low < -1 else high}"
                )
        indices = indices.detach().long()
        row = torch.arange(batch * heads * rows, device=indices.device)[:, None]
        flat = indices.flatten(0, 2)
        inside = (flat >= 0) & (flat < nk)
        codes = torch.where(inside, row * nk + flat, batch * heads * rows * nk).flatten()
        return _from_codes(codes.sort().values, None, **fields)

    @classmethod
    def from_dense(
        cls,
        dense: torch.Tensor,
        *,
        block: tuple[int, int],
        q_length: int,
        k_length: int,
        leaks: str | None = None,
    ) -> "Blocks":
        """Lists from a bool table of blocks, (batch, heads, ceil(q_length / bq), ceil(k_length / bk)) or of the last two or three."""
        op = "Blocks.from_dense"
        check_tensor(op, "dense", dense, dims=(2, 3, 4))
        if dense.dtype != torch.bool:
            raise TypeError(
                f"fastattn.{op}: dense must be a bool tensor (True = listed), given {describe(dense)}"
            )
        dense = dense.detach().reshape((1,) * (4 - dense.dim()) + tuple(dense.shape))
        batch, heads, rows, columns = dense.shape
        fields = _fields(op, block, q_length, k_length, batch, heads, leaks)
        if (rows, columns) != _counts(fields):
            raise ValueError(
                f"fastattn.{op}: dense must have {_counts(fields)} blocks of queries and keys, given {describe(dense)}"
            )
        flat = dense.reshape(batch * heads * rows, columns)
        offsets = _offsets(flat.sum(1))
        if _trims(flat):
            return cls._made(offsets, flat.nonzero()[:, 1].to(torch.int32), **fields)
        # as many keys as there can be, those listed first: nothing waits for their number
        place = torch.where(flat.flatten(), flat.flatten().cumsum(0) - 1, flat.numel())
        column = torch.arange(columns, device=flat.device).repeat(flat.shape[0])
        keys = torch.zeros(flat.numel() + 1, dtype=torch.int64, device=flat.device).scatter(0, place, column)
        return cls._made(offsets, keys[:-1].to(torch.int32), **fields)

    @classmethod
    def from_block_mask(cls, block_mask: Any) -> "Blocks":
        """The blocks that a BlockMask of torch.nn.attention.flex_attention lists, full ones included; its mask_mod is not asked."""
        op = "Blocks.from_block_mask"
        try:
            counts, indices = block_mask.kv_num_blocks, block_mask.kv_indices
            full, full_indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
            (q_length, k_length), block = block_mask.seq_lengths, tuple(block_mask.BLOCK_SIZE)
        except AttributeError as error:
            raise TypeError(
                f"fastattn.{op}: block_mask must be a torch.nn.attention.flex_attention.BlockMask, given {describe(block_mask)}"
            ) from error
        lists = []
        for count, index in ((counts, indices), (full, full_indices)):
            if count is not None:
                there = torch.arange(index.shape[-1], device=index.device) < count[..., None]
                lists.append(torch.where(there, index, -1))
        nq = -(-q_length // block[0])
        both = torch.cat(lists, -1)[:, :, :nq]
        return cls.from_indices(both, block=block, q_length=q_length, k_length=k_length)

    @property
    def offsets(self) -> torch.Tensor:
        """(batch * heads * q_blocks + 1,) int32."""
        return self._offsets

    @property
    def keys(self) -> torch.Tensor:
        """int32, key blocks row by row; the last offset says how many count."""
        return self._keys

    @property
    def block(self) -> tuple[int, int]:
        """(bq, bk)."""
        return self._block

    @property
    def q_length(self) -> int:
        """Queries that the blocks cut."""
        return self._q_length

    @property
    def k_length(self) -> int:
        """Keys that the blocks cut."""
        return self._k_length

    @property
    def batch(self) -> int:
        """Batch entries with lists of their own, or 1."""
        return self._batch

    @property
    def heads(self) -> int:
        """Heads with lists of their own, or 1."""
        return self._heads

    @property
    def leaks(self) -> str | None:
        """How a list depends on later tokens, or None."""
        return self._leaks

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self._keys.device

    @property
    def q_blocks(self) -> int:
        """Blocks of queries."""
        return -(-self._q_length // self._block[0])

    @property
    def k_blocks(self) -> int:
        """Blocks of keys."""
        return -(-self._k_length // self._block[1])

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_"):
            raise AttributeError(f"fastattn.Blocks: {name} cannot be set; a Blocks is immutable")
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __bool__(self) -> NoReturn:
        raise TypeError("fastattn.Blocks: has no truth value; ask .density")

    @property
    def density(self) -> float:
        """The share of (query block, key block) pairs that are listed. Reads the last offset, on a GPU waiting for it."""
        pairs = self._batch * self._heads * self.q_blocks * self.k_blocks
        return int(self._offsets[-1]) / pairs if pairs else 0.0

    @property
    def transposed(self) -> "Blocks":
        """The query blocks that list each key block, ascending: block (bk, bq), lengths swapped. Made once and kept."""
        kept = self._transposed
        if kept is None:
            planes = self._batch * self._heads
            lists = transpose(self._offsets, self._keys, planes, self.q_blocks, self.k_blocks)
            swapped = {"block": self._block[::-1], "q_length": self._k_length, "k_length": self._q_length}
            kept = Blocks._made(*lists, like=self, **swapped)
            if not traced():
                self._transposed, kept._transposed = kept, self
        return kept

    def to(self, device: torch.device | str) -> "Blocks":
        """The same lists on another device."""
        if torch.device(device) == self.device:
            return self
        return Blocks._made(self._offsets.to(device), self._keys.to(device), like=self)

    def table(self) -> torch.Tensor:
        """bool (batch, heads, q_blocks, k_blocks), True where listed."""
        return table(self._offsets, self._keys, self._heads, self.q_blocks, self.k_blocks, self._batch)

    def to_dense(self) -> torch.Tensor:
        """bool (batch, heads, q_length, k_length), True where query i attends key j."""
        return elements(self.table(), self._block, self._q_length, self._k_length)

    def __or__(self, other: "Blocks") -> "Blocks":
        """What either lists; of the same block, lengths and device, batch and heads broadcast."""
        return self._with(other, lambda codes, next_: codes != next_)

    def __and__(self, other: "Blocks") -> "Blocks":
        """What both list; of the same block, lengths and device, batch and heads broadcast."""
        return self._with(other, lambda codes, next_: codes == next_)

    def _with(self, other: "Blocks", keep) -> "Blocks":
        if not isinstance(other, Blocks):
            return NotImplemented
        for name in ("block", "q_length", "k_length", "device"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"fastattn.Blocks: both must have the same {name}, given {getattr(self, name)} and {getattr(other, name)}"
                )
        sizes = []
        for name in ("batch", "heads"):
            a, b = getattr(self, name), getattr(other, name)
            if a != b and 1 not in (a, b):
                raise ValueError(f"fastattn.Blocks: {name} must agree or be 1, given {a} and {b}")
            sizes.append(max(a, b))
        codes = torch.cat([x._codes(*sizes) for x in (self, other)]).sort().values
        # a pair of both is there twice, side by side
        next_ = torch.cat([codes[1:], codes.new_full((1,), -1)])
        leaks = "; ".join(dict.fromkeys(x._leaks for x in (self, other) if x._leaks)) or None
        fields = {name: getattr(self, name) for name in _FIELDS} | {
            "batch": sizes[0],
            "heads": sizes[1],
            "leaks": leaks,
        }
        return _from_codes(codes, keep(codes, next_), **fields)

    def _codes(self, batch: int, heads: int) -> torch.Tensor:
        """row * k_blocks + key of every listed pair with lists for each batch entry and head; what is past the end has the code
        after the last pair's."""
        nq, nk = self.q_blocks, self.k_blocks
        row, there = row_of_entries(self._offsets, self._keys)
        plane, i = row // nq if nq else row, row % nq if nq else row
        b, h = plane // self._heads, plane % self._heads
        own_b = torch.arange(batch if self._batch == 1 else 1, device=row.device)[:, None, None]
        own_h = torch.arange(heads if self._heads == 1 else 1, device=row.device)[None, :, None]
        code = (((b + own_b) * heads + h + own_h) * nq + i) * nk + self._keys.long()
        return torch.where(there, code, batch * heads * nq * nk).flatten()

    def split(self, block: tuple[int, int]) -> "Blocks":
        """The same pairs in finer blocks, whose sizes divide these."""
        fine = _sizes(block, self._q_length, self._k_length, 1, 1)[0]
        if any(a % b for a, b in zip(self._block, fine, strict=True)):
            raise ValueError(f"fastattn.Blocks: split needs sizes that divide {self._block}, given {fine}")
        down, across = (a // b for a, b in zip(self._block, fine, strict=True))
        nq, nk = -(-self._q_length // fine[0]), -(-self._k_length // fine[1])
        row, there = row_of_entries(self._offsets, self._keys)
        plane, i = (row // self.q_blocks, row % self.q_blocks) if self.q_blocks else (row, row)
        i = i[:, None, None] * down + torch.arange(down, device=row.device)[:, None]
        j = self._keys.long()[:, None, None] * across + torch.arange(across, device=row.device)
        inside = there[:, None, None] & (i < nq) & (j < nk)
        code = (plane[:, None, None] * nq + i) * nk + j
        codes = torch.where(inside, code, self._batch * self._heads * nq * nk).flatten()
        fields = {name: getattr(self, name) for name in _FIELDS} | {"block": fine}
        return _from_codes(codes.sort().values, None, **fields)

    def __repr__(self) -> str:
        parts = [f"block={self._block}", f"q_length={self._q_length}", f"k_length={self._k_length}"]
        parts += [f"{name}={n}" for name, n in (("batch", self._batch), ("heads", self._heads)) if n != 1]
        if self.device.type != "cpu":
            parts.append(f"device={str(self.device)!r}")
        elif has_contents(self._offsets):
            pairs = self._batch * self._heads * self.q_blocks * self.k_blocks
            parts.append(f"{int(self._offsets[-1])} of {pairs} blocks")
        if self._leaks:
            parts.append("leaks the future")
        return f"Blocks({', '.join(parts)})"


_FIELDS = ("block", "q_length", "k_length", "batch", "heads", "leaks")


def _sizes(
    block: Any, q_length: Any, k_length: Any, batch: Any, heads: Any, op: str = "Blocks"
) -> tuple[tuple[int, int], int, int, int, int]:
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        raise TypeError(f"fastattn.{op}: block must be (queries, keys), given {block!r}")

    def size(name: str, value: Any, least: int) -> int:
        count = as_integer(value)
        if count is None:
            raise TypeError(f"fastattn.{op}: {name} must be an integer, given {describe(value)}")
        if not least <= count <= _LONGEST:
            raise ValueError(f"fastattn.{op}: {name} must lie in [{least}, 2**31), given {value!r}")
        return count

    return (
        (size("block", block[0], 1), size("block", block[1], 1)),
        size("q_length", q_length, 0),
        size("k_length", k_length, 0),
        size("batch", batch, 1),
        size("heads", heads, 1),
    )


def _fields(op: str, block, q_length, k_length, batch, heads, leaks) -> dict[str, Any]:
    return dict(zip(_FIELDS, (*_sizes(block, q_length, k_length, batch, heads, op), leaks), strict=True))


def _counts(fields: dict[str, Any]) -> tuple[int, int]:
    """Blocks of queries and of keys."""
    bq, bk = fields["block"]
    return -(-fields["q_length"] // bq), -(-fields["k_length"] // bk)


def _check_contents(offsets: torch.Tensor, keys: torch.Tensor, k_blocks: int) -> None:
    """The contents are lists, or ValueError."""
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise ValueError(f"fastattn.Blocks: offsets must start at 0, given {first}")
    steps = offsets.diff()
    if bool((steps < 0).any()):
        at = int((steps < 0).nonzero()[0])
        raise ValueError(
            f"fastattn.Blocks: offsets must not decrease, given {int(offsets[at])} then {int(offsets[at + 1])} at position {at + 1}"
        )
    if last > keys.shape[0]:
        raise ValueError(f"fastattn.Blocks: offsets end at {last}, past the {keys.shape[0]} keys given")
    used = keys[:last]
    outside = (used < 0) | (used >= k_blocks)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"fastattn.Blocks: keys must lie in [0, {k_blocks}), given {int(used[at])} at position {at}"
        )
    row, _ = row_of_entries(offsets, used)
    unsorted = (used.diff() <= 0) & (row.diff() == 0)
    if bool(unsorted.any()):
        at = int(unsorted.nonzero()[0])
        raise ValueError(
            f"fastattn.Blocks: keys must ascend in a row, each once, given {int(used[at])} then {int(used[at + 1])} at position {at + 1}"
        )


def _trims(t: torch.Tensor) -> bool:
    """Whether the number of listed pairs may be asked for: on the CPU, where that waits for nobody."""
    return t.device.type == "cpu" and has_contents(t)


def _offsets(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


def row_of_entries(offsets: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(row of each entry of keys, whether it is before the last offset)."""
    place = torch.arange(keys.shape[0], device=keys.device)
    row = torch.searchsorted(offsets.long(), place, right=True) - 1
    return row.clamp(max=max(offsets.shape[0] - 2, 0)), place < offsets[-1]


def _from_codes(codes: torch.Tensor, keep: torch.Tensor | None, **fields: Any) -> Blocks:
    """Lists of sorted codes row * k_blocks + key, those that `keep` keeps, by default the first of each; codes of no pair are the
    largest."""
    nq, nk = _counts(fields)
    rows = fields["batch"] * fields["heads"] * nq
    if keep is None:
        keep = codes != torch.cat([codes.new_full((1,), -1), codes[:-1]])
    keep = keep & (codes < rows * nk)
    if _trims(codes):
        codes = codes[keep]
        row = codes // max(nk, 1)
        return Blocks._made(
            _offsets(torch.bincount(row, minlength=rows)), (codes % max(nk, 1)).to(torch.int32), **fields
        )
    row = torch.where(keep, codes // max(nk, 1), rows)
    ones = torch.ones_like(row)
    counts = torch.zeros(rows + 1, dtype=torch.int64, device=row.device).scatter_add(0, row, ones)[:rows]
    place = torch.where(keep, keep.cumsum(0) - 1, codes.shape[0])
    keys = torch.zeros(codes.shape[0] + 1, dtype=torch.int64, device=row.device)
    keys = keys.scatter(0, place, codes % max(nk, 1))[:-1]
    return Blocks._made(_offsets(counts), keys.to(torch.int32), **fields)


def transpose(
    offsets: torch.Tensor, keys: torch.Tensor, planes: int, q_blocks: int, k_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(offsets, keys) of the transposed lists of `planes` (batch entry, head) pairs: for each key block its query blocks."""
    row, there = row_of_entries(offsets, keys)
    of_rows = max(q_blocks, 1)
    bucket = torch.where(there, row // of_rows * k_blocks + keys, planes * k_blocks).to(torch.int32)
    order = bucket.argsort(stable=True)  # query blocks stay ascending
    counts = torch.zeros(planes * k_blocks + 1, dtype=torch.int64, device=keys.device)
    counts = counts.scatter_add(0, bucket.long(), torch.ones_like(row))[:-1]
    return _offsets(counts), (row % of_rows).to(torch.int32)[order]


def table(
    offsets: torch.Tensor,
    keys: torch.Tensor,
    heads: int,
    q_blocks: int,
    k_blocks: int,
    batch: int | None = None,
) -> torch.Tensor:
    """bool (batch, heads, q_blocks, k_blocks), True where listed. batch: by default as the offsets have it, of no queries 1."""
    row, there = row_of_entries(offsets, keys)
    rows = offsets.shape[0] - 1
    place = torch.where(there, row * k_blocks + keys, rows * k_blocks)
    flat = torch.zeros(rows * k_blocks + 1, dtype=torch.bool, device=keys.device)
    flat = flat.scatter(0, place, torch.ones_like(place, dtype=torch.bool))
    if batch is None:
        batch = rows // (heads * q_blocks) if q_blocks else 1
    return flat[:-1].reshape(batch, heads, q_blocks, k_blocks)


def elements(table: torch.Tensor, block: tuple[int, int], q_length: int, k_length: int) -> torch.Tensor:
    """A table (batch, heads, q_blocks, k_blocks) as (batch, heads, q_length, k_length)."""
    i = torch.arange(q_length, device=table.device) // block[0]
    j = torch.arange(k_length, device=table.device) // block[1]
    return table[:, :, i[:, None], j]
