"""A CUDA device that is the CPU: what gpu_check does on a GPU, rehearsed where there is none.

Tensors asked for on "cuda" are made on the CPU, where the interpreter serves the Triton backend; graphs call their kernels when
they are captured and do nothing when they are replayed.
"""

import contextlib
import dataclasses
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.runtime import cuda as _cuda
from fastattn.runtime import registry as _registry

PROPERTIES = SimpleNamespace(
    name="Pretended GPU", major=9, minor=0, multi_processor_count=4, total_memory=1 << 30, L2_cache_size=1 << 20,
    regs_per_multiprocessor=1 << 16, shared_memory_per_block_optin=227 << 10,
)  # fmt: skip
SMALL = 32


def _here(value):
    """The CPU for "cuda", in any argument."""
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith("cuda")):
        return torch.device("cpu")
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)(map(_here, value))
    return value


class _OnTheCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0].clone()
        if getattr(function, "__module__", "").startswith("torch._ops"):  # "cuda" is a backend's name there
            return function(*args, **(kwargs or {}))
        return function(*map(_here, args), **{name: _here(value) for name, value in (kwargs or {}).items()})


class Graph:
    def replay(self):
        pass


class _Capture(TorchDispatchMode):
    """What a capture would be refused for, is refused: the host reading from the device."""

    READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split(".")[0] in self.READS:
            raise RuntimeError(f"{function.name()} waits for the device inside a captured graph")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def installed():
    """torch.cuda as on a machine with one GPU."""
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "synchronize": lambda *_: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: PROPERTIES,
        "CUDAGraph": Graph,
        "graph": lambda _: _Capture(),
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "compile", lambda fn, **_: fn))
        stack.enter_context(mock.patch.object(_cuda, "missing", lambda: None))
        stack.enter_context(_registry.replaced(_on_the_cpu))
        stack.enter_context(_OnTheCpu())
        yield


def _on_the_cpu(op, backend):
    """The definition for the CUDA C++ kernels, whose own tests run them on the host."""
    if backend.name != "cuda":
        return backend
    return dataclasses.replace(backend, devices=("cpu",), run=op.backends[-1].run, supports=lambda *_: None)


def small_rows(shape):
    """A benchmark's row with counts of one and other sizes of SMALL, but N, whose check slices it."""
    counts = {
        "groups": 8,
        "documents": 3,
        "layers": 1,
        "heads": 1,
        "H": 1,
        "kv_heads": 1,
        "B": 1,
        "batch": 1,
        "N": 704,
    }
    kept = {"causal"} | (
        {"hidden"} if {"tokens", "batch"} & set(shape) else set()
    )  # whole models come in few widths
    return {name: n if name in kept else counts.get(name, SMALL) for name, n in shape.items()}
