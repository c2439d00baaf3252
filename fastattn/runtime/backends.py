"""The kinds of backends: which devices each serves, and what must be installed for it."""

import importlib.util
import os
from collections.abc import Callable
from functools import cache

from . import native
from .registry import Backend, Lazy

__all__ = ["Lazy", "cpu_backend", "cuda_backend", "reference_backend", "triton_backend"]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def cpu_backend(
    run: Callable, refusal: Callable, configure: Callable | None = None, leading: Callable | None = None
) -> Backend:
    if not native.cpu_isas():  # the wheel for any platform
        return Backend("cpu", run, _no_kernels, devices=())
    return Backend("cpu", run, refusal, configure, devices=("cpu",), leading=leading)


def _no_kernels(*members) -> str:
    return "this installation has no compiled kernels"


def cuda_backend(run: Callable, refusal: Callable, configure: Callable | None = None) -> Backend:
    """CUDA C++. `refusal` also says whether a device is missing."""
    return Backend("cuda", run, refusal, configure, devices=("cuda",))


def reference_backend(run: Callable) -> Backend:
    """The definition, which serves every call."""
    return Backend("reference", run)


@cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") is not None else "triton is not installed"


def triton_backend(
    run: Callable, refusal: Callable, configure: Callable | None = None, describe: Callable | None = None
) -> Backend:
    """Triton. It serves CUDA tensors, and CPU tensors where TRITON_INTERPRET=1 runs every kernel in the interpreter."""

    def supports(*members):
        return _triton_missing() or refusal(*members)

    devices = ("cuda", "cpu") if _INTERPRETED else ("cuda",)
    return Backend("triton", run, supports, configure, devices, describe=describe)
