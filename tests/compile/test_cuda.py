"""CUDA C++: every kernel compiles for every target, when the package is built and at run time. tests/cuda runs them."""

import contextlib
import ctypes
import importlib.util
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


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
        f'#include "{ROOT}/src/cuda/hrm_step.cuh"\n'
        "template __global__ void fastattn::cuda::decode_step<fastattn::cuda::bf16, 128, 512, 1, 64>(fastattn::cuda::DecodeParams);\n"
    )
    compile_for("sm_90a", source, tmp_path / "decode.cubin")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_compiles(architecture, tmp_path):
    compile_for(architecture, ROOT / "src/cuda/kernels.cu", tmp_path / "kernels.cubin")


def test_backends_say_why_not():
    from fastattn.runtime.registry import OPS

    cuda = torch.device("cuda")
    h, weight, target = torch.ones(2, 4), torch.ones(3, 4), torch.zeros(2, dtype=torch.int64)
    for op, args in (
        (
            "linear_cross_entropy",
            (h, weight, None, target, *[None] * 2, 0, *[0.0] * 3, -100, "mean", False, 0),
        ),
        ("sinkhorn", (torch.ones(1, 4, 2), None, None, None, 0.1, 3, False)),
    ):
        backend = next(b for b in OPS[op].backends if b.name == "cuda")
        if not torch.cuda.is_available():
            assert backend.refusal(cuda, args) == "there is no NVIDIA device"
        double = tuple(
            a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
        )
        assert "not float64" in backend.refusal(cuda, double)


def toolkits() -> list[Path]:
    """Of nvcc, which may be a script, and the folders that NVIDIA's packages install to."""
    roots = [root for entry in sys.path for root in Path(entry, "nvidia").glob("cu[0-9]*")]
    if shutil.which("nvcc") is not None:
        told = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
        roots[:0] = [Path(line.split("TOP=")[1]) for line in told.stderr.splitlines() if " TOP=" in line]
    return roots


TOOLKITS = toolkits()


def packages(pattern: str) -> list[Path]:
    return [found for root in TOOLKITS for found in sorted(root.glob(pattern))]


def run_time_options() -> list[str]:
    """Where CuPy looks for headers: its own copy of CCCL first, then the toolkit's folders."""
    found = importlib.util.find_spec("cupy")
    bundled = [] if found is None else Path(found.origin).parent.glob("_core/include/cupy/_cccl/libcudacxx")
    toolkit = [header.parent for header in packages("include/cooperative_groups.h")[:1]]
    return [f"-I{folder}" for folder in (*bundled, *toolkit, *(folder / "cccl" for folder in toolkit))]


NVRTC = packages("lib*/libnvrtc.so*")
# cooperative_groups.h includes it; PyPI's torch comes with NVRTC and without CCCL
CCCL = [option for option in run_time_options() if Path(option.removeprefix("-I"), "nv/target").exists()]
needs_nvrtc = pytest.mark.skipif(
    not NVRTC or not packages("include/cooperative_groups.h") or not CCCL,
    reason="NVRTC, its headers or CCCL's are not installed",
)


def compile_at_run_time(header: str, kernel: str, architecture: str) -> None:
    """As CuPy's RawModule would: no driver is needed until the kernel is loaded."""
    from fastattn.runtime import cuda as _cuda

    for builtins in NVRTC[0].parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins))
    library, program = ctypes.CDLL(str(NVRTC[0])), ctypes.c_void_p()
    source, name = f'#include "{header}"\n'.encode(), f"fastattn::cuda::{kernel}".encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"program.cu", 0, None, None) == 0
    assert library.nvrtcAddNameExpression(program, name) == 0
    options = [
        f"-I{_cuda.sources()}",
        f"--gpu-architecture={architecture}",
        "-std=c++17",
        *run_time_options(),
    ]
    encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = library.nvrtcCompileProgram(program, len(options), encoded)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    lowered = ctypes.c_char_p()
    assert library.nvrtcGetLoweredName(program, name, ctypes.byref(lowered)) == 0
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    assert library.nvrtcGetCUBIN(program, cubin) == 0
    assert lowered.value in cubin.raw
    library.nvrtcDestroyProgram(ctypes.byref(program))


RUN_TIME = (
    ("sinkhorn.cuh", "sinkhorn<fastattn::cuda::bf16, 24, 128>"),
    ("cross_entropy.cuh", "vocab_rows<true, 512>"),
    ("hrm_step.cuh", "decode_step<fastattn::cuda::bf16, 128, 256, 2, 64>"),
)


@needs_nvrtc
@pytest.mark.parametrize(("header", "kernel"), RUN_TIME)
def test_compiles_at_run_time(header, kernel):
    """With other tile constants than the built ones, without the standard library."""
    compile_at_run_time(header, kernel, "sm_90a")


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("header", "kernel"),
    (
        *RUN_TIME,
        ("sinkhorn.cuh", "sinkhorn<fastattn::cuda::f16, 63, 1024>"),
        ("cross_entropy.cuh", "vocab_rows<false, 1024>"),
        ("hrm_step.cuh", "decode_step<float, 256, 1024, 4, 16>"),
        ("hrm_step.cuh", "decode_step<fastattn::cuda::f16, 96, 128, 1, 256>"),
    ),
)
def test_everything_compiles_at_run_time(header, kernel, architecture):
    compile_at_run_time(header, kernel, architecture)


def test_what_cupy_is_asked_for(monkeypatch):
    """No linking with the toolkit's device runtime, a launch of the whole grid, shared memory beyond the usual asked for."""
    from fastattn.runtime import cuda as _cuda

    made, launched = [], []

    class Kernel:
        max_dynamic_shared_size_bytes = 0

        def kernel(self, *args, **options):
            launched.append((self.max_dynamic_shared_size_bytes, *args, options))

    def module(**options):
        made.append(options)
        return types.SimpleNamespace(get_function=lambda name: Kernel())

    stream = types.SimpleNamespace(ExternalStream=contextlib.nullcontext)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(RawModule=module, cuda=stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    _cuda._compiled.cache_clear()
    for shared, asked in ((48 << 10, 48 << 10), (40 << 10, 0)):
        _cuda._launch_compiled(
            "a.cuh", f"k<{shared}>", 3, 64, _cuda.SinkhornParams(), shared=shared, cooperative=True
        )
        bytes_asked, grid, block, (params,), options = launched.pop()
        assert (bytes_asked, grid, block) == (asked, (3,), (64,))
        assert options == {"shared_mem": shared, "enable_cooperative_groups": True}
        assert params.nbytes == ctypes.sizeof(_cuda.SinkhornParams)
        assert made.pop().keys() == {"code", "options", "name_expressions"}
    _cuda._compiled.cache_clear()


def test_decode_candidates_fit_the_device():
    from fastattn.runtime import cuda as _cuda
    from fastattn.runtime import device as _device
    from fastattn.runtime import tuning as _config

    declared = _config.tunings()["decode_step", "cuda"]
    key = {"dtype": "bfloat16", "head_dim": 128, "hidden": 1536, "inner": 4096, "heads": 12, "cached": 256}
    target = _device.Target("cuda", "a GPU", "sm_90", units=132, shared=227 << 10)
    assert declared.defaults(key, target) == _cuda.DECODE
    assert declared.refuses(_cuda.DECODE, key, target) is None
    assert "of shared memory" in declared.refuses(_cuda.DECODE, key | {"inner": 60000}, target)


def test_threads_whose_statistics_do_not_fit_are_no_candidates():
    from fastattn.autotune.space import Space

    from fastattn.runtime import cuda as _cuda
    from fastattn.runtime import device as _device
    from fastattn.runtime import tuning as _config

    target = _device.Target("cuda", "a GPU", "sm_90", units=132)
    for groups, most in ((8, 1024), (400, 256)):
        key = {"dtype": "float32", "groups": groups, "batch": 1, "length": 64}
        space = Space(_config.tunings()["sinkhorn", "cuda"], [key], target)
        assert max(space.config(point)["threads"] for point in space.points) == most
    rows = _config.tunings()["vocab_rows", "cuda"]
    assert rows.defaults({}, target) == {"threads": _cuda.THREADS}
