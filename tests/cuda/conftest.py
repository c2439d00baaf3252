"""src/cuda's kernels on the host: compiled by a C++ compiler, each thread of a grid a fiber (host/grid.cpp)."""

import contextlib
import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastattn.runtime import cuda as _cuda
from fastattn.runtime import registry as _registry
from fastattn.runtime import tuning as _config

HERE = Path(__file__).parent / "host"
CXX = shutil.which("g++") or shutil.which("clang++")
# The kernels' memory accesses call grid.cpp, in place of the sanitizers' own libraries.
CHECKED = "-fsanitize=thread,alignment,bounds --param tsan-instrument-func-entry-exit=0"
PROCESSORS = 2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What torch does here is tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The kernels, their launches and the grid, in one library."""
    if CXX is None or "g++" not in CXX:
        pytest.skip("no g++")
    out = tmp_path_factory.mktemp("host")
    units = {"grid": "", "kernels": f"{CHECKED} -include cuda_runtime.h"}
    compilers = [
        subprocess.Popen(
            [CXX, *["-std=c++17", "-O1", "-fPIC", "-Wno-unknown-pragmas"], *flags.split(), f"-I{HERE}", "-c",
             f"{HERE}/{unit}.cpp", "-o", f"{out}/{unit}.o"],
            stderr=subprocess.PIPE, text=True,
        )
        for unit, flags in units.items()
    ]  # fmt: skip
    for compiler in compilers:
        errors = compiler.communicate()[1]
        assert compiler.returncode == 0, errors
    objects = [f"{out}/{unit}.o" for unit in units]
    subprocess.run([CXX, "-shared", "-o", f"{out}/host.so", *objects], check=True)
    library = ctypes.CDLL(f"{out}/host.so")
    for name in (
        "fastattn_sinkhorn",
        "fastattn_vocab_rows",
        "fastattn_decode_step",
        "host_faulty",
        "host_compiled",
    ):
        getattr(library, name).restype = ctypes.c_char_p
    return library


class Host:
    """What stands for the device: the tensors that kernels may touch, and the order in which threads run."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.launches: list[str] = []
        self.most_blocks = 1 << 20  # of a launch that is not cooperative
        self.schedule(0)

    def schedule(self, seed: int) -> None:
        """0: threads and blocks in order; 1: backwards; others: at random, drawn again at every turn."""
        self.library.host_configure(ctypes.c_uint32(seed), PROCESSORS, 1)

    def allow(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        storage = tensor.untyped_storage()
        self.library.host_allow(ctypes.c_void_p(storage.data_ptr()), ctypes.c_int64(storage.nbytes()))
        return tensor.data_ptr()

    def launch(self, op: str, function, *arguments) -> None:
        self.launches.append(op)
        error = function(*arguments)
        self.library.host_forget()
        if error is not None:
            raise RuntimeError(error.decode())

    def launch_built(self, name, params, *arguments) -> None:
        function = getattr(self.library, f"fastattn_{name}")
        self.launch(name, function, ctypes.byref(params), *arguments, None)

    def launch_compiled(self, header, kernel, blocks, threads, params, *, shared=0, cooperative) -> None:
        assert (_cuda.sources() / header).is_file()
        name = f"fastattn::cuda::{kernel}".encode()
        if not cooperative:
            blocks = min(blocks, self.most_blocks)
        self.launch(
            kernel, self.library.host_compiled, name, ctypes.byref(params), blocks, threads,
            ctypes.c_int64(shared), int(cooperative),
        )  # fmt: skip


@pytest.fixture
def host(library, monkeypatch, nan_outputs):
    """backend="cuda" takes CPU tensors and runs the kernels on the host."""
    host = Host(library)
    library.host_forget()
    monkeypatch.setattr(_cuda, "missing", lambda: None)
    monkeypatch.setattr(_cuda, "most_shared", lambda device: 16 << 10)
    monkeypatch.setattr(_cuda, "compilable", lambda: True)
    monkeypatch.setattr(_cuda, "built", lambda: library)
    monkeypatch.setattr(_cuda, "_current", lambda device: contextlib.nullcontext(PROCESSORS))
    monkeypatch.setattr(_cuda, "_address", host.allow)
    monkeypatch.setattr(_cuda, "_launch_built", host.launch_built)
    monkeypatch.setattr(_cuda, "_launch_compiled", host.launch_compiled)
    _config.tunings()
    with _registry.replaced(
        lambda op, backend: replace(backend, devices=("cpu",)) if backend.name == "cuda" else backend
    ):
        yield host
