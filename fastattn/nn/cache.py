"""Static key/value cache: one slot for each (stack call, layer)."""

import weakref

import torch
from torch import Tensor

from ..ops.rowwise import rotary, rotary_append
from ..runtime.registry import needs_grad, requested, serves


class KeyValueCache:
    """Keys and values of every attention call, in two tensors made once.

    Args:
        calls, layers: stack calls in a forward, and layers in a stack; slot (call, layer).
        batch_size, heads, capacity, head_dim: each slot's shape (B, H, capacity, D).

    Row b holds ``lengths[b]`` tokens at positions ``0 .. lengths[b] - 1`` without gaps, and rows may have different
    lengths. A forward calls :meth:`reserve` once, every attention layer calls :meth:`LayerCache.append`, and the forward
    calls :meth:`commit` at its end. The keys and values were computed by the present weights: call :meth:`reset` after
    the weights change.
    """

    def __init__(
        self,
        calls: int,
        layers: int,
        batch_size: int,
        heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        if batch_size < 1 or capacity < 1:
            raise ValueError(
                f"KeyValueCache: batch_size {batch_size} and capacity {capacity} must both be at least 1"
            )
        shape = (calls, layers, batch_size, heads, capacity, head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.longest = 0  # an upper bound of lengths, on the host
        self.ragged = False  # rows differ in length
        self._prefix: Tensor | None = None
        self._positions: Tensor | None = None
        self._rows = torch.arange(batch_size, device=device)[:, None]
        self._slots = self._make_slots()

    def _make_slots(self) -> list[list["LayerCache"]]:
        calls, layers = self.keys.shape[:2]
        return [[LayerCache(self, call, layer) for layer in range(layers)] for call in range(calls)]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_slots"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._slots = self._make_slots()  # views of this cache's memory

    @property
    def keys(self) -> Tensor:
        """(calls, layers, B, H, capacity, D). It cannot be replaced by another tensor, as the slots are views of it."""
        return self._keys

    @property
    def values(self) -> Tensor:
        """As keys."""
        return self._values

    @property
    def batch_size(self) -> int:
        return self.keys.shape[2]

    @property
    def capacity(self) -> int:
        return self.keys.shape[4]

    def __getitem__(self, call: int) -> list["LayerCache"]:
        return self._slots[call]

    def reset(self) -> None:
        """Forget every token; the memory stays."""
        self.lengths.zero_()
        self.longest = 0
        self.ragged = False
        self._prefix = None

    def truncate(self, count: int) -> None:
        """Keeps at most the first ``count`` tokens of each row; 0 forgets everything.

        Raises ValueError where ``count`` lies inside a prompt whose tokens see each other both ways: the kept keys depend
        on the tokens that would be forgotten.
        """
        if count < 0:
            raise ValueError(f"KeyValueCache: count is {count}; it must not be negative")
        if count == 0:
            return self.reset()
        prefix = self._prefix
        if prefix is not None and bool((prefix > count).any()):
            raise ValueError(
                f"KeyValueCache: count is {count}, inside a prompt of {int(prefix.max())} tokens, which see each other "
                "both ways: reset the cache and prefill the shorter prompt"
            )
        self.lengths.clamp_(max=count)
        self.longest = min(self.longest, count)

    def reserve(self, batch_size: int, count: int) -> Tensor:
        """Room for ``count`` more tokens a row; returns their positions (B, count)."""
        if batch_size != self.batch_size:
            raise ValueError(
                f"KeyValueCache: input_ids has {batch_size} rows; the cache has {self.batch_size}"
            )
        if self.longest + count > self.capacity:
            raise ValueError(
                f"KeyValueCache: {count} more tokens after {self.longest} exceed the capacity {self.capacity}"
            )
        self._positions = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        return self._positions

    def commit(self, count: int, lengths: Tensor | None = None, *, prefix: Tensor | None = None) -> None:
        """Keeps the ``count`` tokens just written, or the first ``lengths[b]`` of them in row b.

        prefix: (B,), how many of these tokens see each other both ways.
        """
        if prefix is not None:
            self._prefix = prefix
        if lengths is None:
            self.lengths += count
        else:
            self.lengths += lengths.to(self.lengths)
            self.ragged = True
        self.longest += count


class LayerCache:
    """One slot, as an attention layer sees it."""

    def __init__(self, cache: KeyValueCache, call: int, layer: int) -> None:
        self._cache = weakref.proxy(cache)
        self._keys, self._values = cache.keys[call, layer], cache.values[call, layer]  # (B, H, capacity, D)

    def append_rotated(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, theta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(q rotated, all keys, all values): `rotary` of q and k, then `append`, in one launch where a backend has it."""
        cache = self._cache
        q, k, v = (t.to(self._keys.dtype) for t in (q, k, v))  # autocast makes narrower ones
        args = q, k, v, positions, cache._positions, self._keys, self._values
        if (
            torch.compiler.is_compiling()
            or needs_grad(args)
            or not serves("rotary_append", *args, theta, requested("rotary_append", None))
        ):
            q, k = rotary(q, k, positions, theta=theta)
            return q, *self.append(k, v)
        end = cache.longest + k.shape[2]
        q = rotary_append(*args, theta=theta)
        return q, self._keys.narrow(2, 0, end), self._values.narrow(2, 0, end)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, H, count, D) at the reserved positions.

        Returns all keys and values so far, as views (B, H, longest + count, D).
        """
        cache, count = self._cache, k.shape[2]
        end = cache.longest + count
        if cache.ragged:
            self._keys[cache._rows, :, cache._positions] = k.transpose(1, 2)
            self._values[cache._rows, :, cache._positions] = v.transpose(1, 2)
        else:
            self._keys.narrow(2, cache.longest, count).copy_(k)
            self._values.narrow(2, cache.longest, count).copy_(v)
        return self._keys.narrow(2, 0, end), self._values.narrow(2, 0, end)
