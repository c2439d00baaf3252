"""These tests run every Triton kernel in the interpreter, which has to be chosen before triton is imported; without it, on the
GPU where there is one."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # tests are no packages
from on_device import triton_on

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def on_the_device():
    if INTERPRETED:
        yield
        return
    with triton_on("cuda"):
        yield


@pytest.fixture(scope="session", autouse=True)
def patch_once_a_launch():
    """The interpreter patches triton.language again at every call of a device function, which takes half its time.

    Once for each module that a launch reaches is enough. Where this triton is built differently nothing is changed.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    launch = getattr(interpreter, "GridExecutor", None)
    if patch is None or launch is None:
        yield
        return
    patched = set()
    call = launch.__call__

    def patch_new(fn):
        modules = frozenset(id(v) for v in fn.__globals__.values() if type(v) is type(sys))
        if modules in patched:
            return None
        patched.add(modules)
        return patch(fn)

    def start(self, *args, **kwargs):
        patched.clear()
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_new)
        monkeypatch.setattr(launch, "__call__", start)
        yield
