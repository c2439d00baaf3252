"""What a run or a slow call depends on: read by `doctor` and printed in reports."""

import importlib.metadata
import os
import platform

import torch

import fastattn
from fastattn.runtime import device

NO_KERNELS = "no compiled kernels: this is the wheel for any platform"


def environment() -> list[tuple[str, str]]:
    """(what, value) rows."""
    target = device.target("cpu")
    isas = fastattn.cpu_isas()
    kernels = f"{target.arch} (this machine runs {', '.join(isas)})" if isas else NO_KERNELS
    rows = [
        ("processor", target.name),
        ("instruction set", kernels),
        ("threads", f"{torch.get_num_threads()} of {target.units} cores"),
        ("memory", f"{target.memory / 2**30:.0f} GiB"),
    ]
    for index in range(torch.cuda.device_count()):
        gpu = device.target(f"cuda:{index}")
        rows.append((f"GPU {index}", f"{gpu.name} ({gpu.arch}), {gpu.memory / 2**30:.0f} GiB"))
    rows.append(("system", platform.platform(terse=True)))
    rows.append(("Python", platform.python_version()))
    rows += [(name, version) for name, version in versions() if version]
    rows += [(name, os.environ[name]) for name in SETTINGS if os.environ.get(name)]
    return rows


SETTINGS = (
    *("FASTATTN_CPU_ISA", "FASTATTN_CONFIG_DIR", "FASTATTN_CACHE_DIR", "FASTATTN_BACKEND", "FASTATTN_LOG"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
)


def versions() -> list[tuple[str, str]]:
    """(package, version or "") of fastattn and of what it uses when it is there."""
    names = ("fastattn", "torch", "numpy", "safetensors", "triton", "transformers", "tokenizers", "optuna")
    return [(name, _version(name)) for name in (*names, "matplotlib", "cupy-cuda13x")]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
