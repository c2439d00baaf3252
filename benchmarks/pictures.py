"""The README's two pictures, drawn from benchmarks/results: shares of the peak beside a peer's, and time against length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastattn.runtime import pictures

# what a bar is called -> its case
SHARES = {
    "forward, float32": "softmax fp32 H=8 L=2048 D=64 forward",
    "forward, bfloat16": "softmax bf16 H=8 L=2048 D=64 forward",
    "causal, float32": "causal fp32 H=8 L=4096 D=64 forward",
    "causal, bfloat16": "causal bf16 H=8 L=4096 D=64 forward",
    "backward, float32": "softmax fp32 H=8 L=2048 D=64 backward",
    "backward, bfloat16": "softmax bf16 H=8 L=2048 D=64 backward",
}
# the same work a head at each length
LENGTHS = {
    2048: "top-1 of 8 bf16 H=4 L=2048 D=64 forward",
    8192: "top-1 of 8 bf16 H=4 L=8192 D=64 forward",
    65536: "top-1 of 8 bf16 H=1 L=65536 D=64 forward",
}


def write(results: Path, folder: Path) -> list[Path]:
    """Draws speed.svg and length.svg from the device whose results are the most."""
    rows = max((_rows(device) for device in sorted(results.iterdir()) if device.is_dir()), key=len)
    written = []
    for name, draw in (("speed.svg", speed), ("length.svg", length)):
        drawing, label = draw(rows)
        pictures.write(folder / name, drawing, label)
        written.append(folder / name)
    return written


def _rows(device: Path) -> dict[str, Mapping[str, Any]]:
    files = [json.loads(path.read_text()) for path in sorted(device.glob("*.json"))]
    return {row["name"]: row for file in files for row in file.get("results", ()) if row["correct"]}


def speed(rows: Mapping[str, Mapping[str, Any]]) -> tuple[Any, str]:
    """Bars of attention's share of the peak, torch's beside each."""
    label = "Share of the processor's peak that attention reaches, fastattn beside torch's SDPA"
    drawing, axes = pictures.figure(3.6, grid="x")
    names = [name for name, case in SHARES.items() if case in rows]
    for place, name in enumerate(reversed(names)):
        row = rows[SHARES[name]]
        own = 100 * row["share"]["value"]
        peer = own / row["ratios"]["sdpa"]["median"]
        for value, shift, colour, who in (
            (own, 0.2, pictures.ACCENT, "fastattn"),
            (peer, -0.2, pictures.PALE, "torch SDPA"),
        ):
            axes.barh(place + shift, value, 0.36, color=colour, label=who if place == 0 else None)
            axes.text(value + 1, place + shift, f"{value:.0f}", va="center", fontsize=9, color=pictures.INK)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the peak, %")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return drawing, label


def length(rows: Mapping[str, Mapping[str, Any]]) -> tuple[Any, str]:
    """Lines of a head's time over the number of tokens: torch, own causal attention, and grouped attention."""
    label = "Time of causal attention for one head against the number of tokens: torch, fastattn, and fastattn by groups"
    drawing, axes = pictures.figure(3.6)
    there = {tokens: rows[case] for tokens, case in LENGTHS.items() if case in rows}
    for colour, name, key in (
        (pictures.PALE, "torch SDPA, causal", "sdpa causal"),
        (pictures.LINES[2], "fastattn, causal", "own causal"),
        (pictures.ACCENT, "fastattn, top 1 of 8 groups and a window", "fastattn"),
    ):
        times = [
            row["milliseconds"][key]["median"] / int(row["name"].split("H=")[1].split()[0])
            for row in there.values()
        ]
        axes.plot(list(there), times, color=colour, marker="o", markersize=4, linewidth=2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(there), [f"{tokens:,}" for tokens in there])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("ms a head")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return drawing, label
