"""What a tuned configuration depends on: a frozen description of one device.

Only the standard library is imported; describing a GPU imports torch.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_ISA_FLAGS = (  # best first; the flags a processor must have
    ("avx512bf16", ("avx512_bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c")),
    ("avx512", ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c")),
    ("avx2", ("avx2", "fma", "f16c")),
)


@dataclass(frozen=True)
class Target:
    """One device, described by what its best tile sizes depend on.

    Tables are matched on kind, name, arch and units, then on kind and arch; the sizes (bytes, 0 = unknown) feed feasibility tests.
    """

    kind: str  # "cpu" | "cuda" | "hip"
    name: str
    arch: str  # "avx2" | "sm_90" | "gfx942" ...
    units: int = 1  # cores this process may use, or streaming multiprocessors
    l1: int = 0  # data cache of one core
    l2: int = 0  # of one core on a CPU, of the whole device on a GPU
    l3: int = 0
    shared: int = 0  # shared memory one block may ask for
    registers: int = 0  # 32-bit registers of one multiprocessor
    memory: int = 0

    @property
    def slug(self) -> str:
        """The table's file name, without its suffix."""
        text = f"{self.name}-{self.arch}-{self.units}".lower()
        return re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:120]

    @property
    def intel(self) -> bool:
        return "Intel" in self.name

    @property
    def fast_bf16(self) -> bool:
        """Whether a CPU multiplies bfloat16 faster than float32. AMD's bf16 dot takes as long as a float32 multiply-add and does
        twice as much (measured on a Zen 4: 470 and 236 GFLOP/s), Intel's takes four times as long (on an Emerald Rapids: 186 and
        369 GFLOP/s)."""
        return self.arch == "avx512bf16" and not self.intel

    def describe(self) -> dict[str, Any]:
        return asdict(self)

    def matches(self, described: Any) -> bool:
        """Whether a table's device section describes this device."""
        return self._agrees(described, ("kind", "name", "arch", "units"))

    def resembles(self, described: Any) -> bool:
        """Whether it describes a device of the same instruction set or GPU architecture."""
        return self._agrees(described, ("kind", "arch"))

    def _agrees(self, described: Any, fields: tuple[str, ...]) -> bool:
        return isinstance(described, dict) and all(
            type(described.get(field)) is type(getattr(self, field))
            and described[field] == getattr(self, field)
            for field in fields
        )


def target(device: Any = "cpu") -> Target:
    """Describe a device: a torch.device, a string such as "cuda:0", or a Target (returned as it is)."""
    if isinstance(device, Target):
        return device
    kind, _, index = str(device).partition(":")
    if kind == "cpu":
        return _cpu(cpu_isa())
    if kind == "cuda":
        return _cuda(int(index) if index else -1)
    return Target(kind=kind, name=kind, arch=kind)


def present(device: str, where: str) -> Target:
    """The target of a device that tables are made for: "cpu", "cuda" or "cuda:1". Raises ValueError, beginning with `where`,
    for any other string and for a GPU that this machine does not have."""
    kind, colon, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or bool(colon) != index.isdecimal()):
        raise ValueError(f"{where}: device is {device!r}, expected cpu, cuda or cuda:1")
    if kind == "cuda":
        import torch

        count = torch.cuda.device_count()
        if int(index or 0) >= count:
            raise ValueError(
                f"{where}: there is no {device}: torch sees {count or 'no'} GPU{'s' * (count > 1)}"
            )
    described = target(device)
    if described.arch == "none":
        raise ValueError(
            f"{where}: this installation has no compiled kernels to tune; install the wheel of your platform, or `pip install .` "
            "in a clone"
        )
    return described


def cpu_isa() -> str:
    """The instruction set the CPU kernels use: the compiled module's choice, else what the flags allow."""
    native = sys.modules.get("fastattn.runtime.native")
    chosen = getattr(native, "cpu_isa", None)
    return chosen() if chosen is not None else _isa_from_flags()


@functools.cache
def _isa_from_flags() -> str:
    flags = set(_cpuinfo().get("flags", "").split())
    supported = [name for name, needs in _ISA_FLAGS if flags.issuperset(needs)] + ["baseline"]
    if _cpuinfo().get("vendor_id") == "GenuineIntel" and "avx512bf16" in supported:
        # its dot is slower than float32 products (src/cpu/dispatch.cpp)
        supported.sort(key="avx512bf16".__eq__)
    forced = os.environ.get("FASTATTN_CPU_ISA", "")
    return forced if forced in supported else supported[0]


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's section of /proc/cpuinfo, empty where there is none."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    if fields:
                        break
                    continue
                key, _, value = line.partition(":")
                fields[key.strip()] = value.strip()
    except OSError:
        pass
    return fields


def _cpu_name() -> str:
    info = _cpuinfo()
    if "model name" in info and "cpu family" in info:
        # Virtual machines often show the brand alone ("AMD EPYC"); family and model numbers identify the processor.
        return f"{info['model name']} (family {info['cpu family']} model {info.get('model', '?')})"
    if "CPU part" in info:
        return f"Arm {info.get('CPU implementer', '?')} {info['CPU part']}"
    return platform.processor() or platform.machine() or "cpu"


def _cache_sizes() -> dict[str, int]:
    sizes: dict[str, int] = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, kind, size = ((index / field).read_text().strip() for field in ("level", "type", "size"))
            if kind != "Instruction":
                scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:], 1)
                sizes[f"l{level}"] = int(size.rstrip("KMG")) * scale
        except (OSError, ValueError):
            continue
    return {level: sizes.get(level, 0) for level in ("l1", "l2", "l3")}


@functools.cache
def memory_bytes() -> int:
    """This machine's memory in bytes, or the limit of its control group (a container) if that is less; 0 if neither is known."""
    limits = []
    with contextlib.suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(limits, default=0)


@functools.cache
def _cpu(isa: str) -> Target:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Target("cpu", _cpu_name(), isa, units=cores, memory=memory_bytes(), **_cache_sizes())


def _cuda(index: int) -> Target:
    import torch

    return _cuda_at(index if index >= 0 else torch.cuda.current_device())


@functools.cache
def _cuda_at(index: int) -> Target:
    import torch

    properties = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    arch = properties.gcnArchName.partition(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or getattr(
        properties, "shared_memory_per_block", 48 << 10
    )
    return Target(
        "hip" if hip else "cuda",
        properties.name,
        arch,
        units=properties.multi_processor_count,
        l2=getattr(properties, "L2_cache_size", 0),
        shared=shared,
        registers=getattr(properties, "regs_per_multiprocessor", 0),
        memory=properties.total_memory,
    )
