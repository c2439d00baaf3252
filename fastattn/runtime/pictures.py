"""How the project's pictures look: axes without clutter, as SVG that is the same on every run."""

import html
import io
import os
from typing import Literal

from fastattn.runtime import files

INK, MUTED, GRID = "#1c2430", "#6b7684", "#e3e7ec"
ACCENT, WARM, PALE = "#2563a8", "#c2571a", "#b9c4d1"
GOOD = "#0b6e4f"
# the colours of a chart's lines, in this order
LINES = (ACCENT, WARM, "#2f8f5b", "#8a4fae", "#8c6d1f", "#4a5563")
# What a colour is on a dark page.
DARK = {
    INK: "#e6eaf0", MUTED: "#a3aebb", GRID: "#2c3540", ACCENT: "#6ea8e6", WARM: "#f08a4b", PALE: "#566373", GOOD: "#5cc9a0",
    "#2f8f5b": "#66c28f", "#8a4fae": "#c493e0", "#8c6d1f": "#d2b35e", "#4a5563": "#9aa7b8",
}  # fmt: skip


def figure(height: float, grid: Literal["x", "y"] = "y"):
    """(matplotlib figure 8.6 inches wide, its axes); `grid`: the axis whose values get grid lines, "x" or "y"."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    drawing = Figure(figsize=(8.6, height), layout="constrained")
    axes = drawing.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9, length=3)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    return drawing, axes


def svg(drawing, label: str, *, transparent: bool = True) -> str:
    """The picture as an <svg> element."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": label}):
        drawing.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def framed(drawing, label: str) -> str:
    """The picture as a <figure> element for a page; `label` says what it shows."""
    picture = svg(drawing, label)
    for colour in DARK:  # as variables of the page's style
        picture = picture.replace(colour, f"var(--c{colour[1:]})")
    return f'<figure role="img" aria-label="{html.escape(label)}">{picture}</figure>'


def write(path: str | os.PathLike, drawing, label: str) -> None:
    """Writes the picture on white to an SVG file, whole or not at all."""
    files.write_text(path, svg(drawing, label, transparent=False))
