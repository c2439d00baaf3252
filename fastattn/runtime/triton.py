"""What every Triton kernel shares: offsets, tiles, products, launching, and compiling ahead of time.

The only module outside `ops/*/triton.py` that imports triton; `import fastattn` does not import it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from . import device as _device

INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# the size of an unlimited window side; doubled or added to a length it still fits 32 bits
NO_LIMIT = (1 << 30) - 2
LONGEST = 1 << 29  # the longest sequence served

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- operands ------------------------------------------------------------------------------------------------------
#
# A kernel takes a tensor and its strides as one named tuple, or None where the tensor is absent. It takes its compile-time values
# as one `Constants`. Triton specialises the members of a tuple as it does arguments, but `do_not_specialize` applies to arguments
# only: a number that must not be specialised is passed in a tuple as `encoded_count`.


class Rows(NamedTuple):
    """(B, H, L, D) with a contiguous last dim: a pointer and its strides."""

    base: Any
    batch: int
    head: int
    row: int


class Pairs(NamedTuple):
    """One element a (query, key) pair, (B, H, rows, columns): a pointer and its strides."""

    base: Any
    batch: int
    head: int
    row: int
    column: int


class Line(NamedTuple):
    """Rows or elements of one head: a pointer to the first (or a block of such pointers), and the stride between neighbours."""

    base: Any
    stride: int


def rows(t: torch.Tensor | None) -> Rows | None:
    return None if t is None else Rows(t, *t.stride()[:3])


def pairs(t: torch.Tensor | None) -> Pairs | None:
    return None if t is None else Pairs(t, *t.stride())


def encoded_count(count: int) -> int:
    """A count, at most NO_LIMIT, as a member of a tuple: odd and never 1, so that Triton does not specialise it."""
    return 2 * count + 3


class Constants:
    """A kernel's compile-time values, by name. `constants` makes them; equal ones are the same object.

    Its repr is part of the key under which Triton stores binaries, so it names a function by the hash of its code.
    """

    def __init__(self, values: Mapping[str, Any]):
        for name, value in values.items():
            setattr(self, name, value if INTERPRETED else tl.constexpr(value))
        self._text = ", ".join(
            f"{name}={getattr(value, 'cache_key', value)}" for name, value in values.items()
        )

    def __repr__(self) -> str:
        return f"Constants({self._text})"


@lru_cache(maxsize=None, typed=True)
def constants(**values: Any) -> Constants:
    return Constants(values)


# --- device functions ----------------------------------------------------------------------------------------------


@triton.jit
def decoded_count(member):
    """The count that `encoded_count` turned into `member`."""
    return (member - 3) >> 1


@triton.jit
def offset(index, stride):
    """index * stride in 64 bits: a tensor may hold more than 2**31 elements."""
    return index.to(tl.int64) * stride


@triton.jit
def load_tile(
    base, stride, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr
):
    """(ROWS, COLUMNS) from `base`, zero past column WIDTH and, when MASKED, past row `count`. Columns have stride 1."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    pointers = base + offset(rows, stride)[:, None] + columns[None, :]
    if MASKED:
        if WIDTH == COLUMNS:
            return tl.load(pointers, mask=(rows < count)[:, None], other=0.0)
        return tl.load(pointers, mask=(rows < count)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    if WIDTH == COLUMNS:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)


@triton.jit
def load_rows(
    line, first, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr
):
    """`load_tile` of the rows from `first` on of a line of `count` rows."""
    base = line.base + offset(first, line.stride)
    return load_tile(base, line.stride, count - first, WIDTH, ROWS, COLUMNS, MASKED)


@triton.jit
def gather_tile(base, rows, stride, inside, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """(rows, COLUMNS) from `base` at the given row indices; zero past column WIDTH and in rows that are not `inside`."""
    columns = tl.arange(0, COLUMNS)
    pointers = base + offset(rows, stride)[:, None] + columns[None, :]
    return tl.load(pointers, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def scatter_tile(base, rows, stride, inside, value, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Round `value` to the element type at `base` and store its `inside` rows and first WIDTH columns at the row indices `rows`."""
    columns = tl.arange(0, COLUMNS)
    pointers = base + offset(rows, stride)[:, None] + columns[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def store_tile(base, stride, count, value, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Round `value` (ROWS, COLUMNS) to the element type at `base` and store its first `count` rows and WIDTH columns."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    pointers = base + offset(rows, stride)[:, None] + columns[None, :]
    keep = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=keep)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b with float32 sums. In the interpreter both sides are converted first, because its bfloat16 product is wrong."""
    if _INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


# --- host side -----------------------------------------------------------------------------------------------------


def refusal(*tensors: torch.Tensor | None) -> str | None:
    """Why Triton cannot serve these floating tensors, or None."""
    for t in tensors:
        if t is not None and t.dtype not in DTYPES:
            return f"it serves float32, bfloat16 and float16, not {str(t.dtype).removeprefix('torch.')}"
    return None


def block(size: int, smallest: int = 16) -> int:
    """The power of two that holds `size`."""
    return max(smallest, triton.next_power_of_2(size))


def precision(dtype: torch.dtype) -> str:
    """How float32 products are formed: as three TF32 products, as accurate as float32, or as one if torch's settings allow TF32.

    Products of 16-bit types are exact either way. AMD devices have no such mode.
    """
    hip = _recording.target.kind == "hip" if _recording is not None else torch.version.hip is not None
    if dtype != torch.float32 or hip:
        return "ieee"
    return "tf32" if tf32_allowed() else "tf32x3"


def tf32_allowed() -> bool:
    """Whether torch's settings allow TF32 for float32 products. torch has several such settings; get_float32_matmul_precision
    knows only one and raises after the others."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def stream(device: torch.device) -> int | None:
    """The device's current stream, or None while a graph captures it. A tensor made during capture must not be kept for later
    calls: it is the graph's memory, which is filled only when the graph is replayed."""
    if device.type != "cuda":
        return 0
    with torch.cuda.device(device):
        return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream().cuda_stream


def last_dim_contiguous(t: torch.Tensor) -> torch.Tensor:
    if t.stride(-1) == 1:
        return t
    return t.contiguous() if t.shape[-1] > 1 else t.resolve_neg()  # contiguous() resolves a pending sign too


def target(device: torch.device) -> _device.Target:
    """The device's description; while launches are recorded, the description they are recorded for."""
    return _recording.target if _recording is not None else _device.target(device)


@dataclass(frozen=True)
class Launch:
    """One kernel launch as recorded: what `compile_ahead` needs to build the same binary."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    meta: dict[str, Any]


@dataclass
class _Recording:
    target: _device.Target
    launches: list[Launch]


_recording: _Recording | None = None
_OPTIONS = ("num_warps", "num_stages")
# Set explicitly: without it Triton 3.9 warns, and the next version is to compile a multiply-add as two instructions.
_FUSED = {"enable_fp_fusion": True}


def launch(kernel: Callable, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Start `kernel` on the device of its first tensor. Nothing happens for an empty grid."""
    if 0 in grid:
        return
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, args, meta))
        return
    device = _device_of(args)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **_FUSED, **meta)


def _device_of(args: tuple) -> torch.device:
    first = next(a for a in args if isinstance(a, (torch.Tensor, tuple)))
    return first[0].device if isinstance(first, tuple) else first.device


def start(kernel: Callable, grid: tuple[int, ...], values: Mapping[str, Any], **options: int) -> None:
    """Launch `kernel` with the values that its parameters name; `values` may hold more."""
    launch(kernel, grid, *[values[name] for name in kernel.arg_names], **options)


@contextmanager
def recorded(target: _device.Target) -> Iterator[list[Launch]]:
    """Inside, launches are recorded instead of run, with the configuration that `target` would use.

    Tensors may be on the meta device. For compiling ahead of time and for tests.
    """
    global _recording
    previous, _recording = _recording, _Recording(target, [])
    try:
        yield _recording.launches
    finally:
        _recording = previous


_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


def _specialised(
    value: Any, path: tuple[int, ...], specialise: bool, constexprs: dict, attributes: dict
) -> Any:
    """The type of an argument, or of each member of a tuple. Constants and divisibility by 16 are entered in the dicts by path."""
    if isinstance(value, tuple):
        types = [_specialised(v, (*path, i), True, constexprs, attributes) for i, v in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if value is None or (type(value) is int and value == 1 and specialise):
        constexprs[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor) or (type(value) is int and specialise and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if type(value) is int:
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def source(launched: Launch) -> triton.compiler.ASTSource:
    """The specialisation that a recorded launch would compile. Pointers count as 16-byte aligned, as torch allocates them."""
    kernel = launched.kernel
    values = dict(zip(kernel.arg_names, launched.args, strict=False))
    values |= {name: value for name, value in launched.meta.items() if name not in _OPTIONS}
    signature, constexprs, attributes = {}, {}, {}
    for parameter in kernel.params:
        name, path = parameter.name, (parameter.num,)
        if parameter.is_constexpr:
            signature[name], constexprs[path] = "constexpr", values[name]
        else:
            specialise = not parameter.do_not_specialize
            signature[name] = _specialised(values[name], path, specialise, constexprs, attributes)
    return triton.compiler.ASTSource(kernel, signature, constexprs, attributes)


def compile_ahead(launched: Launch, target: GPUTarget):
    """Compile a recorded launch for `target` with no driver. Returns triton's compiled kernel (`.asm`, `.metadata`)."""
    options = _FUSED | {name: launched.meta[name] for name in _OPTIONS if name in launched.meta}
    return triton.compile(source(launched), target=target, options=options)


# The devices we compile for. `shared` is the shared memory (KiB) that one block may use, the limit of a configuration.
TARGETS = {
    name: (GPUTarget(backend, arch, warp), _device.Target(kind, name, name, units=units, shared=shared << 10))
    for name, backend, arch, warp, kind, units, shared in (
        ("sm_80", "cuda", 80, 32, "cuda", 108, 163),
        ("sm_86", "cuda", 86, 32, "cuda", 84, 99),
        ("sm_89", "cuda", 89, 32, "cuda", 128, 99),
        ("sm_90", "cuda", 90, 32, "cuda", 132, 227),
        ("sm_100", "cuda", 100, 32, "cuda", 148, 227),
        ("sm_120", "cuda", 120, 32, "cuda", 170, 99),
        ("gfx942", "hip", "gfx942", 64, "hip", 304, 64),
    )
}
