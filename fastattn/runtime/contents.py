"""Results made from a tensor's contents, kept for as long as its memory lives and holds the same."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial

import torch

from . import native


def digest(source: torch.Tensor) -> int:
    """64 bits of a contiguous CPU tensor's bytes, read at memory's speed; two contents share them by chance only."""
    found = torch.empty(1, dtype=torch.int64)
    of_bytes = source.detach().view(-1).view(torch.uint8)
    native.run("digest", source=of_bytes, digest=found, threads=native.threads())
    return int(found)


class ContentsCache:
    """At most `entries` results of `capacity` bytes in all, the least recently used dropped first; thread-safe.

    A result is found by its tensor's address and layout and trusted only where a digest of all the tensor holds is the one
    that it was made from: whoever wrote in between (a compiler, numpy, `.data`, another tensor of the same memory) is noticed,
    and a tensor's version counter is not asked. It goes when the memory goes.
    """

    def __init__(self, entries: int, capacity: int) -> None:
        self._entries, self._capacity = entries, capacity
        self._found: OrderedDict[tuple, tuple[int, torch.Tensor, weakref.ref]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._found)

    def get(
        self, source: torch.Tensor, key: tuple[Hashable, ...], make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """make(), or what it gave for the same contents of this contiguous tensor and this key before."""
        place = (source.data_ptr(), tuple(source.shape), source.dtype, *key)
        contents = digest(source)
        with self._lock:
            kept = self._found.get(place)
            if kept is not None and kept[0] == contents:
                self._found.move_to_end(place)
                return kept[1]
        result = make()
        storage = source.untyped_storage()
        with self._lock:
            ended = [k for k, (_, _, memory) in self._found.items() if memory() is None]
            for k in {place, *ended} & self._found.keys():
                self.bytes -= self._found.pop(k)[1].nbytes
            self._found[place] = (contents, result, weakref.ref(storage, partial(self._drop, place)))
            self.bytes += result.nbytes
            while len(self._found) > self._entries or self.bytes > self._capacity:
                self.bytes -= self._found.popitem(last=False)[1][1].nbytes
        return result

    def _drop(self, place: tuple, memory: weakref.ref) -> None:
        # memory may end anywhere, inside a look-up too: the next one that finds nothing then drops the result
        if self._lock.acquire(blocking=False):
            try:
                entry = self._found.get(place)
                if entry is not None and entry[2] is memory:
                    self.bytes -= self._found.pop(place)[1].nbytes
            finally:
                self._lock.release()
