"""The only module that imports the compiled one. It passes tensors as addresses, sizes and strides; threads are torch's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch  # before _core: both must use torch's OpenMP library

from .. import _core
from . import tuning

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.bool: 6,
    torch.uint8: 6,
}
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_core.set_dtypes(DTYPES)


def unserved_dtype(t: torch.Tensor, what: str | None = None) -> str | None:
    """Why no CPU kernel takes a tensor of this dtype, or None. what: its name, if a call has several tensors."""
    if t.dtype in FAST_DTYPES:
        return None
    given = str(t.dtype).removeprefix("torch.")
    return f"it serves float32, bfloat16 and float16, not {given}" + (f" as {what}" if what else "")


# run(kernel, /, **fields): the fields of src/cpu/params.h; tensors are passed by reference, None is absent
run = _core.run
limits = _core.limits  # what the kernels can hold, src/cpu/limits.h
# the operations of a score program in the order of their codes, src/cpu/score_program_ops.def
score_ops = _core.score_ops


def defaults(kernel: str) -> dict:
    """The default values of a kernel's fields, None for a tensor."""
    return _core.fields[kernel]


def rows(t: torch.Tensor) -> torch.Tensor:
    """t as (A, B, C, D) with a contiguous last dim: a view where strides allow, else a copy."""
    if t.stride(-1) != 1:
        # a negated view such as `z.conj().imag` has strides of 2: a single column needs no copy, only its sign resolved
        t = t.contiguous() if t.shape[-1] > 1 else t.resolve_neg()
    if t.dim() <= 4:
        return t
    return t.reshape(-1, *t.shape[-3:])


def plain(t: torch.Tensor) -> torch.Tensor:
    """t without torch's pending sign or conjugation, for kernels that take any strides and read memory directly."""
    return t.resolve_conj().resolve_neg()


def threads() -> int:
    return torch.get_num_threads()


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets of the CPU kernels that this machine can run, best last."""
    return _core.cpu_isas()


def cpu_isa() -> str:
    """The instruction set in use: the best one, or the one that FASTATTN_CPU_ISA or `use_cpu_isa` names."""
    return _core.cpu_isa()


def select_cpu_isa(name: str) -> None:
    if not _core.select_cpu_isa(name):
        raise ValueError(
            f"fastattn: FASTATTN_CPU_ISA must be one of {', '.join(cpu_isas())} here, given {name!r}"
        )
    tuning.reload()  # tables are per instruction set


@contextmanager
def use_cpu_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels of one instruction set inside the block. Process-wide."""
    previous = cpu_isa()
    select_cpu_isa(name)
    try:
        yield
    finally:
        select_cpu_isa(previous)


if os.environ.get("FASTATTN_CPU_ISA"):
    select_cpu_isa(os.environ["FASTATTN_CPU_ISA"])
