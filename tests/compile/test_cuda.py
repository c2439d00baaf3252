"""CUDA C++: every kernel compiles for every target, and its arithmetic, run as one thread on the host, is the reference's."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
CXX = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def compile_for(architecture: str, source: Path, out: Path) -> None:
    subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch={architecture}", "-o", out, source],
        check=True,
        capture_output=True,
        text=True,
    )
    assert out.stat().st_size


@needs_nvcc
def test_one_instantiation_compiles(tmp_path):
    """One kernel for one target; the slow test has all of src/cuda for all."""
    source = tmp_path / "decode.cu"
    source.write_text(
        f'#include "{ROOT}/src/cuda/decode.cuh"\n'
        "template __global__ void fastattn::cuda::decode_step<fastattn::cuda::bf16, 128, 512, 1, 64>(fastattn::cuda::DecodeParams);\n"
    )
    compile_for("sm_90a", source, tmp_path / "decode.cubin")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_compiles(architecture, tmp_path):
    compile_for(architecture, ROOT / "src/cuda/kernels.cu", tmp_path / "kernels.cubin")


def test_backends_say_why_not():
    from fastattn._registry import _OPS

    cuda = torch.device("cuda")
    h, weight, target = torch.ones(2, 4), torch.ones(3, 4), torch.zeros(2, dtype=torch.int64)
    for op, args in (
        ("linear_cross_entropy", (h, weight, None, target, None, 0, 0.0, 0.0, -100, "mean", 0)),
        ("sinkhorn", (torch.ones(1, 4, 2), None, None, 0.1, 3, False)),
    ):
        backend = next(b for b in _OPS[op].backends if b.name == "cuda")
        if not torch.cuda.is_available():
            assert backend.refusal(cuda, args) == "there is no NVIDIA device"
        double = tuple(
            a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
        )
        assert "not float64" in backend.refusal(cuda, double)


def nvrtc() -> ctypes.CDLL | None:
    home = shutil.which("nvcc")
    places = [] if home is None else sorted(Path(home).resolve().parents[1].glob("lib64/libnvrtc.so*"))
    return ctypes.CDLL(str(places[0])) if places else None


@pytest.mark.skipif(nvrtc() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize(
    ("header", "kernel"),
    [
        ("sinkhorn.cuh", "fastattn::cuda::sinkhorn<fastattn::cuda::bf16, 24, 128>"),
        ("vocab_rows.cuh", "fastattn::cuda::vocab_rows<true, 512>"),
    ],
)
def test_compiles_at_run_time(header, kernel):
    """What CuPy's RawModule would be given compiles without the standard library, with other tile constants."""
    from fastattn import _cuda

    library, program = nvrtc(), ctypes.c_void_p()
    source = f'#include "{header}"\n'.encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"program.cu", 0, None, None) == 0
    assert library.nvrtcAddNameExpression(program, kernel.encode()) == 0
    include = Path(shutil.which("nvcc")).resolve().parents[1] / "include"
    options = [f"-I{_cuda.sources()}", f"-I{include}", "--gpu-architecture=sm_90a", "-std=c++17"]
    encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = library.nvrtcCompileProgram(program, len(options), encoded)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    assert size.value


def test_threads_whose_statistics_do_not_fit_are_no_candidates():
    from fastattn.autotune.space import Space

    from fastattn import _config, _cuda, _device

    target = _device.Target("cuda", "a GPU", "sm_90", units=132)
    for groups, most in ((8, 1024), (400, 256)):
        key = {"dtype": "float32", "groups": groups, "batch": 1, "length": 64}
        space = Space(_config.tunings()["sinkhorn", "cuda"], [key], target)
        assert max(space.config(point)["threads"] for point in space.points) == most
    rows = _config.tunings()["vocab_rows", "cuda"]
    assert rows.defaults({}, target) == {"threads": _cuda.THREADS}
