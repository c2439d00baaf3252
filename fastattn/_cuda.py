"""The CUDA C++ kernels of src/cuda: built with the package where there was nvcc, or compiled at run time through CuPy.

Nothing here is imported by `import fastattn`, and both ways in are optional. Params structs are mirrored field by field.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    torch.float32: (0, "float"),
    torch.bfloat16: (1, "fastattn::cuda::bf16"),
    torch.float16: (2, "fastattn::cuda::f16"),
}
GROUPS = (4, 8, 16, 32)  # of the built Sinkhorn kernel; others are compiled at run time
THREADS = 256  # a block, of the built kernels; other numbers are compiled at run time

_pointer, _i64, _i32, _f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class SinkhornParams(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("scores", "assignment", "potentials", "lengths", "partial")] + [
        ("batch", _i64), ("length", _i64), ("iterations", _i32), ("temperature", _f32),
    ]  # fmt: skip


class VocabRowsParams(ctypes.Structure):
    _fields_ = [
        (name, _pointer)
        for name in ("logits", "bias", "target", "temperature", "grad", "loss", "lse", "grad_temperature")
    ] + [
        ("rows", _i64), ("classes", _i64), ("row_stride", _i64), ("ignore_index", _i64),
        ("softcap", _f32), ("z_loss", _f32),
    ]  # fmt: skip


class DecodeParams(ctypes.Structure):
    _fields_ = [(name, _pointer * 2) for name in ("gqkv", "out", "gate_up", "down")] + [
        (name, _pointer)
        for name in ("k_cache", "v_cache", "z_h", "z_l", "cos", "sin", "result", "workspace")
    ] + [
        ("capacity", _i64), ("position", _i64), ("hidden", _i32), ("heads", _i32), ("head_dim", _i32), ("inner", _i32),
        ("layers", _i32), ("h_cycles", _i32), ("l_cycles", _i32), ("eps", _f32),
    ]  # fmt: skip


def sources() -> Path | None:
    """The folder with the kernels' headers: in the checkout, or as installed."""
    here = Path(__file__).parent
    places = (here / "_cuda_sources", here.parent / "src" / "cuda")
    return next((place for place in places if (place / "decode.cuh").is_file()), None)


@cache
def built() -> ctypes.CDLL | None:
    """The kernels that the build compiled, or None. Loads without a driver."""
    spec = importlib.util.find_spec("fastattn._core_cuda")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    for name in ("sinkhorn", "vocab_rows", "decode_step", "decode_workspace"):
        getattr(library, f"fastattn_{name}").restype = ctypes.c_char_p
    return library


@cache
def missing() -> str | None:
    """Why no CUDA C++ kernel can run here, or None."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "there is no NVIDIA device"
    if built() is None and not _compilable():
        return "src/cuda was not built (FASTATTN_CUDA=ON) and CuPy is not installed"
    return None


@cache
def _compiled(header: str, kernel: str) -> Any:
    """A template instantiation compiled at run time, for this process's device."""
    import cupy

    folder = sources()
    module = cupy.RawModule(
        code=f'#include "{header}"\n',
        options=("-std=c++17", f"-I{folder}"),
        name_expressions=[kernel],
        enable_cooperative_groups=True,
    )
    return module.get_function(kernel)


def _compilable() -> bool:
    return importlib.util.find_spec("cupy") is not None and sources() is not None


def _launch_compiled(function: Any, blocks: int, threads: int, params: ctypes.Structure, shared: int) -> None:
    import cupy
    import numpy as np

    by_value = np.frombuffer(bytes(params), dtype=np.dtype(f"V{ctypes.sizeof(params)}"))
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        function((blocks,), (threads,), (by_value,), shared_mem=shared)


def _call(name: str, params: ctypes.Structure, *arguments: Any) -> None:
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    function: Callable = getattr(built(), f"fastattn_{name}")
    error = function(ctypes.byref(params), *arguments, stream)
    if error is not None:
        raise RuntimeError(f"fastattn.{name}: CUDA: {error.decode()}")


def _address(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def sinkhorn(scores, lengths, temperature: float, iterations: int, threads: int = THREADS):
    """(assignment (B, L, G), column potentials (B, 1, G)) of scores (B, L, G), whole columns (not causal)."""
    if not _compilable():  # a table may come from where they could be
        threads = THREADS
    batch, length, groups = scores.shape
    scores = scores.contiguous()
    assignment = torch.empty_like(scores)
    potentials = scores.new_empty(batch, 1, groups, dtype=torch.float32)
    if scores.numel() == 0:
        return assignment, potentials.zero_()
    lengths = None if lengths is None else lengths.to(torch.int32)
    with torch.cuda.device(scores.device):
        processors = torch.cuda.get_device_properties(scores.device).multi_processor_count
        blocks = max(1, min(processors, -(-length * 32 // threads)))
        partial = scores.new_empty(batch * blocks * groups * 2, dtype=torch.float32)
        tensors = (scores, assignment, potentials, lengths, partial)
        params = SinkhornParams(*map(_address, tensors), batch, length, iterations, temperature)
        code, element = DTYPES[scores.dtype]
        if built() is not None and groups in GROUPS and threads == THREADS:
            _call("sinkhorn", params, ctypes.c_int(code), ctypes.c_int(groups), ctypes.c_int64(blocks))
        else:
            kernel = f"fastattn::cuda::sinkhorn<{element}, {groups}, {threads}>"
            _launch_compiled(_compiled("sinkhorn.cuh", kernel), blocks, threads, params, 0)
    return assignment, potentials


def vocab_rows(
    logits, bias, target, temperature, grad, loss, lse, grad_temperature, *, stablemax, softcap, z_loss, ignore_index,
    threads: int = THREADS,
) -> None:  # fmt: skip
    """Fills loss and lse (N,) of logits (N, classes), and where grad (N,) is given puts the gradient over the logits.

    All float32 but target (N,) int64; logits may have a row stride. bias, temperature and grad_temperature may be None.
    """
    if logits.shape[0] == 0:
        return
    if not _compilable():
        threads = THREADS
    tensors = (logits, bias, target, temperature, grad, loss, lse, grad_temperature)
    with torch.cuda.device(logits.device):
        params = VocabRowsParams(
            *map(_address, tensors), *logits.shape, logits.stride(0), ignore_index, softcap, z_loss
        )
        if built() is not None and threads == THREADS:
            _call("vocab_rows", params, ctypes.c_int(stablemax))
        else:
            kernel = f"fastattn::cuda::vocab_rows<{str(bool(stablemax)).lower()}, {threads}>"
            blocks = min(logits.shape[0], 1 << 20)
            _launch_compiled(_compiled("vocab_rows.cuh", kernel), blocks, threads, params, 0)


def decode_step(
    weights, k_cache, v_cache, z_h, z_l, cos, sin, position: int, h_cycles: int, l_cycles: int, eps: float
):
    """The final high state (hidden,) float32 of one token at batch 1; its keys and values join the caches at `position`.

    weights: gqkv (2, layers, 4 * H * D, hidden), out (2, layers, hidden, H * D), gate_up (2, layers, 2 * inner, hidden) and
        down (2, layers, hidden, inner), the L stack first, each a pair of contiguous tensors of one dtype on one device.
    k_cache, v_cache: (calls, layers, 1, H, capacity, D) in that dtype. z_h, z_l (hidden,), cos, sin (D / 2,): float32.
    """
    op = "decode_step"
    if built() is None:
        raise NotImplementedError(f"fastattn.{op}: src/cuda was not built; build with FASTATTN_CUDA=ON")
    calls, layers, batch, heads, capacity, head_dim = k_cache.shape
    hidden, inner = z_h.shape[0], weights[3][0].shape[-1]
    if batch != 1 or calls != h_cycles * (l_cycles + 1) or not 0 <= position < capacity or head_dim > 256:
        raise ValueError(
            f"fastattn.{op}: k_cache must be (h_cycles * (l_cycles + 1), layers, 1, H, capacity > position, D <= 256), "
            f"given {tuple(k_cache.shape)} and position {position}"
        )
    shapes = (
        (layers, 4 * heads * head_dim, hidden), (layers, hidden, heads * head_dim), (layers, 2 * inner, hidden),
        (layers, hidden, inner),
    )  # fmt: skip
    for pair, shape in zip(weights, shapes, strict=True):
        for weight in pair:
            if tuple(weight.shape) != shape or weight.dtype != k_cache.dtype or not weight.is_contiguous():
                raise ValueError(
                    f"fastattn.{op}: a weight must be contiguous {shape}, given {tuple(weight.shape)}"
                )
    result = torch.empty_like(z_h)
    with torch.cuda.device(z_h.device):
        params = DecodeParams(
            *((_pointer * 2)(*(w.data_ptr() for w in pair)) for pair in weights),
            *map(_address, (k_cache, v_cache, z_h, z_l, cos, sin, result)), None, capacity, position, hidden, heads,
            head_dim, inner, layers, h_cycles, l_cycles, eps,
        )  # fmt: skip
        floats = ctypes.c_int64()
        built().fastattn_decode_workspace(ctypes.byref(params), ctypes.byref(floats))
        workspace = z_h.new_empty(floats.value)
        params.workspace = workspace.data_ptr()
        _call(op, params, ctypes.c_int(DTYPES[k_cache.dtype][0]))
    return result
