"""Results computed from a tensor's contents, kept until its memory is freed or its bytes change."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial

import torch

from . import native


def digest(source: torch.Tensor) -> int:
    """A 64-bit hash of a contiguous CPU tensor's bytes, computed at the speed of memory; different contents collide by chance only."""
    result = torch.empty(1, dtype=torch.int64)
    # as_strided: a single element counts as contiguous with any stride
    as_bytes = source.detach().as_strided((source.numel(),), (1,)).view(torch.uint8)
    native.run("digest", source=as_bytes, digest=result, threads=native.threads())
    return int(result)


class ContentsCache:
    """At most `entries` results of `capacity` bytes in all, the least recently used dropped first; thread-safe.

    A result is looked up by its tensor's address and layout, and returned only if the digest of the tensor's bytes is still the
    one that the result was made from. So every write is noticed, also one that raises no version counter (by a compiler, numpy,
    `.data` or another tensor of the same memory). A result is dropped when the tensor's memory is freed.
    """

    def __init__(self, entries: int, capacity: int) -> None:
        self._entries, self._capacity = entries, capacity
        self._results: OrderedDict[tuple, tuple[int, torch.Tensor, weakref.ref]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._results)

    def get(
        self, source: torch.Tensor, key: tuple[Hashable, ...], make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """make(), or its earlier result for this key and the same contents of this contiguous tensor."""
        slot = (source.data_ptr(), tuple(source.shape), source.dtype, *key)
        contents = digest(source)
        with self._lock:
            entry = self._results.get(slot)
            if entry is not None and entry[0] == contents:
                self._results.move_to_end(slot)
                return entry[1]
        result = make()
        storage = source.untyped_storage()
        with self._lock:
            freed = [k for k, (_, _, memory) in self._results.items() if memory() is None]
            for k in {slot, *freed} & self._results.keys():
                self.bytes -= self._results.pop(k)[1].nbytes
            self._results[slot] = (contents, result, weakref.ref(storage, partial(self._drop, slot)))
            self.bytes += result.nbytes
            while len(self._results) > self._entries or self.bytes > self._capacity:
                self.bytes -= self._results.popitem(last=False)[1][1].nbytes
        return result

    def _drop(self, slot: tuple, memory: weakref.ref) -> None:
        # Memory may be freed at any point, also while this thread holds the lock; the next `get` that misses then drops the result.
        if self._lock.acquire(blocking=False):
            try:
                entry = self._results.get(slot)
                if entry is not None and entry[2] is memory:
                    self.bytes -= self._results.pop(slot)[1].nbytes
            finally:
                self._lock.release()
