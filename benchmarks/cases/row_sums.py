"""Sums of exponentials of rows: with the maximum so far, as the kernels do, against the two-pass softmax's mantissa and exponent
(arXiv 2001.04438), on one thread. Neither attention nor a loss runs these three functions; they say whether one should."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

import fastattn as fa
from benchmarks.registry import Case, Problem
from fastattn import testing

ROOT = Path(__file__).parents[2]
# flags and header of an instruction set, as CMakeLists.txt has them
TARGETS = {
    "avx512": (
        "avx512",
        ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
    ),
    "avx2": ("avx2", ["-mavx2", "-mfma", "-mf16c"]),
    "baseline": ("baseline", []),
}


@functools.cache
def _library() -> ctypes.CDLL:
    """benchmarks/row_sums.cpp, compiled for the best of TARGETS that this processor has."""
    name = next(isa for isa in TARGETS if isa in fa.cpu_isas())
    header, flags = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row_sums.so"
        definitions = [f"-DFASTATTN_ISA={name}", f'-DFASTATTN_ISA_HEADER="isa/{header}.h"']
        options = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast", "-w"]
        source = [f"-I{ROOT / 'src'}", f"-I{ROOT / 'src' / 'cpu'}", str(ROOT / "benchmarks" / "row_sums.cpp")]
        subprocess.run(["c++", *options, *flags, *definitions, *source, "-o", str(path)], check=True)
        return ctypes.CDLL(str(path))  # stays mapped without its file


def _contender(name):
    def run(x):
        rows, width = x.shape
        out = x.new_empty(rows)
        pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())
        getattr(_library(), name)(*pointers, ctypes.c_int64(rows), ctypes.c_int64(width))
        return out

    return run


def row_sums(dtype, rows, width):
    _library()
    x = 5 * testing.random_tensor(rows, width, dtype=dtype, seed=9)
    names = {"fastattn": "online", "two-pass": "two_pass", "maximum first": "maximum_first"}
    return Problem(
        inputs=(x,),
        contenders={name: _contender(function) for name, function in names.items()},
        reference=lambda x: x.logsumexp(-1),
        bytes=x.nbytes,
        bandwidth="read",
        terms=width,
    )


CASES = [
    Case("vocab", "row sums", row_sums, {"rows": rows, "width": 4096}, torch.float32, quick=True)
    for rows in (16, 8192)  # in the cache, and 128 MiB of memory
]
