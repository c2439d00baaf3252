"""The CUDA C++ kernels of src/cuda: built with the package where there was nvcc, or compiled at run time through CuPy.

`import fastattn` does not import this module, and both ways are optional. The structs below repeat those of src/cuda/params.h
field by field.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import device as _device

DTYPES = {
    torch.float32: (0, "float"),
    torch.bfloat16: (1, "fastattn::cuda::bf16"),
    torch.float16: (2, "fastattn::cuda::f16"),
}
# Tile constants of the built kernels; others are compiled at run time.
GROUPS = (4, 8, 16, 32)
THREADS = 256
DECODE = {"threads": 512, "rows": 1, "span": 64}
# Bytes of dynamic shared memory that a block gets without opting in: 48 KiB less room for the kernel's static arrays.
NO_OPT_IN = 44 << 10
MOST_LAYERS, MOST_HEAD_DIM = 40, 256  # of a decode step

_pointer, _i64, _i32, _f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class SinkhornParams(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("scores", "assignment", "potentials", "lengths", "partial")] + [
        ("batch", _i64), ("length", _i64), ("iterations", _i32), ("temperature", _f32),
    ]  # fmt: skip


class VocabRowsParams(ctypes.Structure):
    _fields_ = [
        (name, _pointer)
        for name in (
            "logits", "bias", "target", "temperature", "grad", "loss", "largest", "total", "grad_temperature"
        )
    ] + [
        ("rows", _i64), ("classes", _i64), ("row_stride", _i64), ("ignore_index", _i64),
        ("softcap", _f32), ("z_loss", _f32),
    ]  # fmt: skip


class DecodeParams(ctypes.Structure):
    _fields_ = [(name, _pointer * MOST_LAYERS * 2) for name in ("gqkv", "out", "gate_up", "down")] + [
        (name, _pointer) for name in ("k_cache", "v_cache", "z_h", "z_l", "positions", "result", "workspace")
    ] + [
        ("capacity", _i64), ("position", _i64), ("hidden", _i32), ("heads", _i32), ("head_dim", _i32), ("inner", _i32),
        ("layers", _i32), ("h_cycles", _i32), ("l_cycles", _i32), ("theta", _f32), ("eps", _f32),
    ]  # fmt: skip


def unserved_dtype(t: torch.Tensor) -> str | None:
    """Why no CUDA C++ kernel takes a floating tensor of this dtype, or None."""
    if t.dtype in DTYPES:
        return None
    return f"it serves float32, bfloat16 and float16, not {str(t.dtype).removeprefix('torch.')}"


def sources() -> Path | None:
    """The folder with the kernels' headers: in the checkout, or as installed."""
    package = Path(__file__).parents[1]
    places = (package / "_cuda_sources", package.parent / "src" / "cuda")
    return next((place for place in places if (place / "hrm_step.cuh").is_file()), None)


@cache
def built() -> ctypes.CDLL | None:
    """The library of kernels that the build compiled, or None if there is none. It loads without a driver."""
    spec = importlib.util.find_spec("fastattn._core_cuda")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    for name in ("sinkhorn", "vocab_rows", "decode_step"):
        getattr(library, f"fastattn_{name}").restype = ctypes.c_char_p
    return library


@contextmanager
def _current(device: torch.device) -> Iterator[int]:
    """Makes the device current inside the block and yields its number of multiprocessors."""
    with torch.cuda.device(device):
        yield torch.cuda.get_device_properties(device).multi_processor_count


@cache
def missing() -> str | None:
    """Why no CUDA C++ kernel can run here, or None."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "there is no NVIDIA device"
    if built() is None and not compilable():
        return "src/cuda was not built (FASTATTN_CUDA=ON) and CuPy is not installed"
    return None


@cache
def _compiled(header: str, kernel: str) -> Any:
    """A template instantiation compiled at run time, for each device where it is first launched.

    CuPy's enable_cooperative_groups would link a library of the CUDA toolkit, which a grid's barrier does not need.
    """
    import cupy

    folder = sources()
    module = cupy.RawModule(
        code=f'#include "{header}"\n',
        options=("-std=c++17", f"-I{folder}"),
        name_expressions=[kernel],
    )
    return module.get_function(kernel)


def compilable() -> bool:
    return importlib.util.find_spec("cupy") is not None and sources() is not None


def _launch_compiled(
    header: str,
    kernel: str,
    blocks: int,
    threads: int,
    params: ctypes.Structure,
    *,
    shared: int = 0,
    cooperative: bool,
) -> None:
    import cupy
    import numpy as np

    function = _compiled(header, f"fastattn::cuda::{kernel}")
    if shared > NO_OPT_IN:
        function.max_dynamic_shared_size_bytes = shared
    by_value = np.frombuffer(bytes(params), dtype=np.dtype(f"V{ctypes.sizeof(params)}"))
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        function.kernel(
            (blocks,), (threads,), (by_value,), shared_mem=shared, enable_cooperative_groups=cooperative
        )


def _launch_built(name: str, params: ctypes.Structure, *arguments: Any) -> None:
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    function: Callable = getattr(built(), f"fastattn_{name}")
    error = function(ctypes.byref(params), *arguments, stream)
    if error is not None:
        raise RuntimeError(f"fastattn.{name}: CUDA: {error.decode()}")


def _address(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def sinkhorn(scores, lengths, temperature: float, iterations: int, threads: int = THREADS):
    """(assignment (B, L, G), column potentials (B, 1, G)) of scores (B, L, G), whole columns (not causal)."""
    if not compilable():  # a table of another machine may name a size that is not built here
        threads = THREADS
    batch, length, groups = scores.shape
    scores = scores.contiguous()
    assignment = torch.empty_like(scores)
    potentials = scores.new_empty(batch, 1, groups, dtype=torch.float32)
    if scores.numel() == 0:
        return assignment, potentials.zero_()
    lengths = None if lengths is None else lengths.to(torch.int32).contiguous()
    with _current(scores.device) as processors:
        blocks = max(1, min(processors, -(-length * 32 // threads)))
        partial = scores.new_empty(batch * blocks * groups * 2, dtype=torch.float32)
        tensors = (scores, assignment, potentials, lengths, partial)
        params = SinkhornParams(*map(_address, tensors), batch, length, iterations, temperature)
        code, element = DTYPES[scores.dtype]
        if built() is not None and groups in GROUPS and threads == THREADS:
            _launch_built(
                "sinkhorn", params, ctypes.c_int(code), ctypes.c_int(groups), ctypes.c_int64(blocks)
            )
        else:
            kernel = f"sinkhorn<{element}, {groups}, {threads}>"
            _launch_compiled("sinkhorn.cuh", kernel, blocks, threads, params, cooperative=True)
    return assignment, potentials


def vocab_rows(
    logits, bias, target, temperature, grad, loss, largest, total, grad_temperature, *, stablemax, softcap, z_loss,
    ignore_index, threads: int = THREADS,
) -> None:  # fmt: skip
    """Fill loss, largest and total, each (N,), from logits (N, classes). If grad (N,) is given, overwrite the logits with their gradient.

    All are float32, except target (N,) int64; logits may have a row stride. bias, temperature and grad_temperature may be None.
    """
    if logits.shape[0] == 0:
        return
    if not compilable():
        threads = THREADS
    tensors = (logits, bias, target, temperature, grad, loss, largest, total, grad_temperature)
    with _current(logits.device):
        params = VocabRowsParams(
            *map(_address, tensors), *logits.shape, logits.stride(0), ignore_index, softcap, z_loss
        )
        if built() is not None and threads == THREADS:
            _launch_built("vocab_rows", params, ctypes.c_int(stablemax))
        else:
            kernel = f"vocab_rows<{str(bool(stablemax)).lower()}, {threads}>"
            blocks = min(logits.shape[0], 1 << 20)
            _launch_compiled("cross_entropy.cuh", kernel, blocks, threads, params, cooperative=False)


def most_shared(device: torch.device) -> int:
    """Bytes of dynamic shared memory that a block may have beside its static arrays, which take a few KiB."""
    return _device.target(device).shared - (4 << 10)


def decode_shared(hidden: int, width: int, inner: int) -> int:
    """Bytes of dynamic shared memory of a block of decode_step: it holds the longest vector that a weight multiplies, in float32."""
    return 4 * max(hidden, width, inner)


def decode_step(
    z_h, z_l, weights, k_cache, v_cache, positions, position: int, h_cycles: int, l_cycles: int, theta: float, eps: float,
    *, threads: int, rows: int, span: int,
):  # fmt: skip
    """fastattn.decode_step for batch 1. positions is (1,), or None for `position`. Tensors are contiguous, weights aligned to 16 bytes."""
    _, layers, _, heads, capacity, head_dim = k_cache.shape
    hidden, width, inner = z_h.shape[1], heads * head_dim, weights[3].shape[1]
    config = {"threads": threads, "rows": rows, "span": span}
    if not compilable():
        config = DECODE
    addresses = [_address(w) for w in weights]
    by_part = [
        (_pointer * MOST_LAYERS * 2)(
            *(
                (_pointer * MOST_LAYERS)(*addresses[stack * 4 * layers + part : (stack + 1) * 4 * layers : 4])
                for stack in (0, 1)
            )
        )
        for part in range(4)
    ]
    result = torch.empty_like(z_h)
    positions = None if positions is None else positions.to(torch.int64)
    num_spans = position // config["span"] + 1
    workspace = z_h.new_empty(
        3 * hidden + 4 * width + inner + heads * num_spans * (head_dim + 2), dtype=torch.float32
    )
    with _current(z_h.device) as processors:
        tensors = (k_cache, v_cache, z_h, z_l, positions, result, workspace)
        params = DecodeParams(
            *by_part, *map(_address, tensors), capacity, position, hidden, heads, head_dim, inner, layers, h_cycles,
            l_cycles, theta, eps,
        )  # fmt: skip
        shared = decode_shared(hidden, width, inner)
        code, element = DTYPES[z_h.dtype]
        if built() is not None and config == DECODE:
            _launch_built(
                "decode_step", params, ctypes.c_int(code), ctypes.c_int64(shared), ctypes.c_int64(processors)
            )
        else:
            constants = (-(-head_dim // 32) * 32, *config.values())
            kernel = f"decode_step<{element}, {', '.join(map(str, constants))}>"
            _launch_compiled(
                "hrm_step.cuh", kernel, processors, config["threads"], params, shared=shared, cooperative=True
            )
    return result
