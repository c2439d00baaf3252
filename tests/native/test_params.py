"""Parameter structs: what they point to stays alive, what they cannot hold or address is refused, and so is a call that
memory does not suffice for."""

import subprocess
import sys
import weakref

import pytest
import torch

from fastattn import _native


def test_a_struct_keeps_its_tensors_alive():
    copy = torch.ones(2, 3)
    seen = weakref.ref(copy)
    struct = _native.params("GateParams", a=copy, b=None, threads=1)
    del copy
    assert seen() is not None
    del struct
    assert seen() is None


def test_misspelt_fields_and_too_many_dimensions_are_refused():
    with pytest.raises(AttributeError):
        _native.params("GateParams", aa=1)
    with pytest.raises(ValueError, match="at most 4 dimensions"):
        _native.params("GateParams", a=torch.ones(1, 1, 1, 1, 1))


@pytest.mark.parametrize(
    ("begin", "count", "message"),
    [
        (-1, 2, r"cu_seqlens must lie in \[0, 4\], given -1"),
        (0, -1, r"lengths must lie in \[0, 4\], given -1"),
        (3, 2, r"lengths must lie in \[0, 1\], given 2"),
    ],
)
def test_rows_of_no_scores_are_refused(begin, count, message):
    fields = {name: torch.zeros(4, 3) for name in ("scores", "out")}
    begins, counts = torch.tensor([begin]), torch.tensor([count])
    params = _native.params(
        "SinkhornParams", begins=begins, counts=counts, potentials=torch.zeros(1, 3), **fields
    )
    with pytest.raises(ValueError, match=message):
        _native.kernel("sinkhorn_forward")(params)


def test_a_position_past_the_caches_is_refused():
    caches = torch.zeros(2, 1, 4, 8)  # (B, H, capacity, D)
    params = _native.params(
        "DecodeStepParams", keys=caches, values=caches, positions=torch.tensor([3, 4], dtype=torch.int32)
    )
    with pytest.raises(ValueError, match=r"position must lie in \[0, 3\], given 4 at position 1"):
        _native.kernel("decode_step")(params)


# Two threads that would each have to take 256 MiB for themselves, with 128 MiB left for the process.
_SCARCE = """
import resource
import torch
from fastattn import _native

torch.set_num_threads(2)


def collect(classes, tokens):
    codes = torch.zeros(tokens, dtype=torch.int64)
    scores, logits = torch.empty(2, classes), torch.ones(2, tokens)
    params = _native.params("VocabExpandParams", scores=scores, codes=codes, logits=logits, threads=2)
    def call():
        _native.kernel("vocab_collect")(params)
        return scores[:, 0].tolist()
    return call


small, large = collect(8, 8192), collect(1 << 25, 8192)
small()  # the threads are there
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + (128 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    large()
except MemoryError:
    print("refused", small())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the process by Linux's /proc")
def test_memory_that_is_not_there_is_an_error_and_no_end():
    done = subprocess.run([sys.executable, "-c", _SCARCE], capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "refused [8192.0, 8192.0]", done.stderr
