"""`fastattn doctor`."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import typer

# Public names whose gradient is another op's: rotary turns back by rotating the other way.
_BACKWARD_OF = {
    "sigmoid_attention": "attention_backward",
    "scaled_dot_product_attention": "attention_backward",
    "lssa_attention": "softplus_attention_backward",
    "rotary": "rotary",
}
_DTYPES = ("float32", "bfloat16", "float16")


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor() -> None:
    """Show the device, the versions, which backend serves each op, the tuned tables in use, and what is slow.

    Nothing is run or changed: each op is only asked which kernel it would take.
    """
    import torch
    from rich.table import Table

    from fastattn.cli._environment import environment, versions
    from fastattn.cli._run import console

    facts = Table.grid(padding=(0, 3))
    for name, value in environment():
        facts.add_row(f"[dim]{name}[/dim]", value)
    console.print(facts)
    missing = [name for name, version in versions() if not version]
    if missing:
        console.print(f"[dim]not installed:[/dim] {', '.join(missing)}")

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        table = Table(title=f"\nbackends on {device}", title_justify="left")
        for column in ("op", *_DTYPES, "gradients"):
            table.add_column(column, overflow="fold")  # whole names on a narrow terminal
        reasons: dict[str, list[str]] = {}
        for name, arguments in probes(device):
            served = [_served(name, arguments, dtype) for dtype in _DTYPES]
            table.add_row(name, *(text for text, _ in served), _gradients(name, device))
            for why in dict.fromkeys(why for _, why in served if why):
                reasons.setdefault(why, []).append(name)
        console.print(table)
        _print_tables(console, device)
        console.print("\n[bold]why something is not fast[/bold]")
        for line in [*_hints(), *(f"{', '.join(names)}: {why}" for why, names in reasons.items())]:
            console.print(f"- {line}", markup=False)


def _served(name: str, arguments: Callable[..., tuple[tuple, dict]], dtype: str) -> tuple[str, str]:
    """(the table's cell, why the reference serves the call or "")."""
    import torch

    import fastattn

    args, kwargs = arguments(getattr(torch, dtype))
    try:
        explanation = fastattn.explain(name, *args, **kwargs)
    except NotImplementedError:
        return "-", ""
    text = f"{explanation.backend} (tuned)" if os.path.exists(explanation.source) else explanation.backend
    if explanation.backend != "reference":
        return text, ""
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in explanation.ruled_out.items())
    return text, f"served by the reference, for {reasons}" if reasons else "only the reference serves it"


def _gradients(name: str, device: str) -> str:
    """The first backend of the op's backward on a device."""
    from fastattn.runtime import registry as _registry

    op = _registry._OPS.get(f"{name}_backward") or _registry._OPS.get(_BACKWARD_OF.get(name, ""))
    if op is None:
        return "-"
    return next(b.name for b in op.backends if b.devices is None or device in b.devices)


def probes(device: str) -> Iterator[tuple[str, Callable[..., tuple[tuple, dict]]]]:
    """(op, arguments of a small typical call by dtype) for every op that this version has."""
    import torch

    import fastattn

    def rows(*shape: int) -> Callable[..., tuple[tuple, dict]]:
        return lambda dtype: ((torch.zeros(shape, dtype=dtype, device=device),), {})

    def qkv(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(1, 4, 64, 64, dtype=dtype, device=device) for _ in range(3))

    def head(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        target = torch.zeros(16, dtype=torch.int64, device=device)
        return (
            torch.zeros(16, 64, dtype=dtype, device=device),
            torch.zeros(128, 64, dtype=dtype, device=device),
            target,
        )

    def coded(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        h, weight, target = head(dtype)
        return h, weight[:32], torch.zeros(128, dtype=torch.int64, device=device), target

    def signatures() -> torch.Tensor:
        return torch.ones(1, 64, dtype=torch.int64, device=device)

    def step(dtype: torch.dtype) -> tuple[tuple, dict]:
        shapes = ((256, 64), (64, 64), (256, 64), (64, 128))  # one layer in each of the two stacks
        state = torch.zeros(1, 64, dtype=dtype, device=device)
        cache = torch.zeros(2, 1, 1, 4, 16, 16, dtype=dtype, device=device)
        weights = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes * 2]
        return (state, state, weights, cache, cache, 3), {"h_cycles": 1, "l_cycles": 1}

    probes: dict[str, Callable[..., tuple[tuple, dict]]] = {
        "attention": lambda dtype: (qkv(dtype), {}),
        "sigmoid_attention": lambda dtype: (qkv(dtype), {}),
        "scaled_dot_product_attention": lambda dtype: (qkv(dtype), {}),
        "lssa_attention": lambda dtype: (qkv(dtype), {}),
        "grouped_attention": lambda dtype: ((*qkv(dtype), signatures()), {}),
        "gated_attention": lambda dtype: (
            (*qkv(dtype), torch.zeros(1, 64, 8, dtype=dtype, device=device)),
            {},
        ),
        "sinkhorn": rows(1, 64, 8),
        "linear_cross_entropy": lambda dtype: (head(dtype), {}),
        "stablemax_cross_entropy": lambda dtype: (
            head(dtype)[1:2] + (torch.zeros(128, dtype=torch.int64, device=device),),
            {},
        ),
        "vq_cross_entropy": lambda dtype: (coded(dtype), {}),
        "vq_logits": lambda dtype: (coded(dtype)[:3], {}),
        "vq_argmax": lambda dtype: (coded(dtype)[:3], {}),
        "vq_sample": lambda dtype: (coded(dtype)[:3], {}),
        "nearest_codes": lambda dtype: (head(dtype)[:2], {}),
        "decode_step": step,
        "fused_linear": lambda dtype: (head(dtype)[:2], {}),
        "rms_norm": rows(16, 64),
        "swiglu": rows(16, 64),
        "rotary": lambda dtype: (
            (
                *(torch.zeros(1, 4, 16, 64, dtype=dtype, device=device) for _ in range(2)),
                torch.arange(16, device=device),
            ),
            {},
        ),
        "gated": lambda dtype: (rows(16, 64)(dtype)[0] * 2, {}),
    }
    return ((name, arguments) for name, arguments in probes.items() if hasattr(fastattn, name))


def _print_tables(console: Any, device: str) -> None:
    from fastattn.runtime import device as _device
    from fastattn.runtime import tables as _tables

    target = _device.target(device)
    tables = _tables.tables(target)
    relatives = [(f"{source} (another {target.arch} device)", t) for source, t in _tables.relatives(target)]
    console.print("tuned tables in use:" if tables or relatives else "tuned tables in use: none")
    for source, table in (*tables, *relatives):
        console.print(f"  {source}: {', '.join(table.get('ops', ()))}", markup=False)


def _hints() -> list[str]:
    import torch

    import fastattn
    from fastattn.runtime import device as _device
    from fastattn.runtime import tables as _tables
    from fastattn.runtime.native import cpu_isa

    target = _device.target("cpu")
    hints = []
    if torch.get_num_threads() < target.units:
        why = " (OMP_NUM_THREADS says so)" if os.environ.get("OMP_NUM_THREADS") else ""
        hints.append(f"torch uses {torch.get_num_threads()} of {target.units} cores{why}")
    if cpu_isa() != fastattn.cpu_isas()[-1]:
        hints.append(f"the CPU kernels use {cpu_isa()}, though this machine runs {fastattn.cpu_isas()[-1]}")
    if os.environ.get("FASTATTN_BACKEND"):
        hints.append(f"FASTATTN_BACKEND={os.environ['FASTATTN_BACKEND']} rules out every other backend")
    if not _tables.tables(target):
        used = (
            f"those of other {target.arch} processors are"
            if _tables.relatives(target)
            else "built-in tile sizes are"
        )
        hints.append(f"no tuned table for this processor: {used} used; `fastattn tune` makes one")
    if not torch.cuda.is_available():
        kind = (
            "torch is a CPU build"
            if torch.version.cuda is None and torch.version.hip is None
            else "none is visible"
        )
        hints.append(f"no GPU: {kind}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 1.5 * target.units:
        hints.append(f"the machine is busy: load {load:.1f} on {target.units} cores")
    return hints
