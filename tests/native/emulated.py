"""Run tests on the AVX-512 kernels without AVX-512: `python tests/native/emulated.py [pytest arguments]`.

Builds the compiled module with FASTATTN_EMULATE_AVX512 (the same kernels, 64-byte vectors lowered to AVX2, the bf16
instructions imitated in plain C++, what they flush included), runs kernel_check, puts the module in the place of the
installed one, and runs the ops' tests on each instruction set.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pybind11
import torch  # noqa: F401  before the compiled module: both use torch's OpenMP

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulated"
OPS = [
    "attention_cpu",
    "causal_conv1d",
    "linear_scan",
    "selective_scan",
    "fused_linear",
    "matvec",
    "lssa",
    "grouped",
    "gated",
    "rowwise",
    "sinkhorn",
    "cross_entropy",
    "codes",
    "every_op",
]
TESTS = [
    *(str(ROOT / "tests" / "ops" / f"test_{op}.py") for op in OPS),
    str(ROOT / "tests/models/test_decode.py"),
    "-q",
]


def build() -> Path:
    options = [
        "-DFASTATTN_EMULATE_AVX512=ON",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    subprocess.run(["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *options], check=True)
    subprocess.run(["cmake", "--build", BUILD, "-j2", "--target", "all", "kernel_check"], check=True)
    return next(BUILD.glob("_core*.so"))


def load(path: Path) -> None:
    spec = importlib.util.spec_from_file_location("fastattn._core", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fastattn._core"] = module


if __name__ == "__main__":
    import pytest

    load(build())
    if not sys.argv[1:]:
        subprocess.run([BUILD / "kernel_check", "avx512", "avx512bf16"], check=True)
    sys.exit(pytest.main(sys.argv[1:] or TESTS))
