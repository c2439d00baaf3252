"""Results made from a tensor's contents, kept for as long as the same memory, unchanged, is used."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import lru_cache, partial

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


def _count_fused_writes(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """torch's fused optimizers write to parameters and leave their version counters as they were."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


register_optimizer_step_post_hook(_count_fused_writes)


class VersionedCache:
    """At most `entries` tensors of `capacity` bytes in all, the least recently used dropped first; thread-safe.

    A result belongs to a tensor's storage (weakly: it goes with it), address, layout and version counter. Writes that the
    counter misses (through `.data`, or from outside of torch) are not seen: with `sampled`, for matrices, an element of
    every row and of every column is compared as well, which finds an update of a whole row, column or matrix. After a
    smaller one `torch.autograd.graph.increment_version(tensor)` says that the tensor has changed.
    """

    def __init__(self, entries: int, capacity: int, *, sampled: bool = False) -> None:
        self._entries, self._capacity, self._sampled = entries, capacity, sampled
        self._found: OrderedDict[tuple, tuple] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._found)

    def get(
        self, source: torch.Tensor, key: tuple[Hashable, ...], make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """make(), or what it gave for this source and key before."""
        if source.is_inference():  # no version counter
            return make()
        storage = StorageWeakRef(source.untyped_storage())
        layout = (source.data_ptr(), tuple(source.shape), source.stride(), source.dtype)
        full = (storage.cdata, source._version, layout, *key)
        sample = self._sample(source)
        with self._lock:
            kept = self._found.get(full)
            # the weak reference keeps the address from being given to another storage
            if kept is not None and (sample is None or torch.equal(kept[2], sample)):
                self._found.move_to_end(full)
                return kept[1]
        result = make()
        with self._lock:
            old = self._found.pop(full, None)
            if old is not None:
                self.bytes -= old[1].nbytes
            stale = [k for k, entry in self._found.items() if entry[0].expired() or _outdated(k, full)]
            for k in stale:
                self.bytes -= self._found.pop(k)[1].nbytes
            ended = weakref.ref(source.untyped_storage(), partial(self._drop, full))
            self._found[full] = (storage, result, None if sample is None else sample.clone(), ended)
            self.bytes += result.nbytes
            while len(self._found) > self._entries or self.bytes > self._capacity:
                self.bytes -= self._found.popitem(last=False)[1][1].nbytes
        return result

    def _drop(self, key: tuple, _: weakref.ref) -> None:
        # memory may end anywhere, inside a look-up too: the next one that finds nothing then drops the result
        if self._lock.acquire(blocking=False):
            try:
                entry = self._found.pop(key, None)
                if entry is not None:
                    self.bytes -= entry[1].nbytes
            finally:
                self._lock.release()

    def _sample(self, source: torch.Tensor) -> torch.Tensor | None:
        if not self._sampled:
            return None
        return source.detach().reshape(-1).index_select(0, _diagonal(*source.shape))


@lru_cache(maxsize=64)
def _diagonal(rows: int, columns: int) -> torch.Tensor:
    """Flat indices of elements of a matrix, among them one of every row and one of every column."""
    along = torch.arange(max(rows, columns))
    return along % rows * columns + along % columns


def _outdated(key: tuple, new: tuple) -> bool:
    """Whether key is of an earlier version of new's memory."""
    return key[0] == new[0] and key[2] == new[2] and key[1] != new[1]
