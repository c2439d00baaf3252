"""Pages of the site that are not files of docs/: README, CONTRIBUTING and CHANGELOG, and the API out of docstrings.

mkdocs calls `on_files`. A public name that no page has is an error, so the API is whole.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
COPIED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# files of the repository that the site has no page of: named, not linked
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?!https?:|#|[a-z_0-9/]+\.(?:md|svg|png)(?:#|\)))[^)]+\)")

PAGES = {
    "api/attention.md": (
        "Attention",
        "fastattn",
        (
            *(
                "attention",
                "sigmoid_attention",
                "lssa_attention",
                "scaled_dot_product_attention",
                "flex_attention",
            ),
            "Mask",
            "Score",
            "DistanceBias",
            *("merge", "merge_sums"),
            *("grouped_attention", "gated_attention", "focus_groups", "sinkhorn"),
            *("linear_attention", "linear_attention_step"),
        ),
    ),
    "api/rows.md": (
        "Rows and products",
        "fastattn",
        ("rms_norm", "swiglu", "gated", "rotary", "rotary_tables", "fused_linear", "decode_step"),
    ),
    "api/recurrence.md": (
        "Scans and short convolutions",
        "fastattn",
        ("causal_conv1d", "linear_scan", "selective_scan"),
    ),
    "api/losses.md": (
        "Losses and vocabularies",
        "fastattn",
        (
            *("linear_cross_entropy", "stablemax_cross_entropy", "multi_label_cross_entropy", "vq_logits"),
            *("vq_cross_entropy", "vq_argmax", "vq_sample", "nearest_codes"),
        ),
    ),
    "api/tools.md": ("Tools", "fastattn", ("explain", "set_backend", "cpu_isas")),
}
# every public name of these modules
WHOLE = {
    "api/bias.md": ("Biases by distance", ("fastattn.bias",)),
    "api/blocks.md": ("Block lists", ("fastattn.blocks",)),
    "api/modules.md": ("Modules and models", ("fastattn.nn", "fastattn.models")),
    "api/more.md": (
        "Optimizers, processes, integrations",
        ("fastattn.optim", "fastattn.distributed", "fastattn.integrations.transformers"),
    ),
}
ELSEWHERE = {"distributed", "integrations", "models", "nn", "optim", "testing", "softplus_attention"}
ELSEWHERE |= {"bias", "blocks", "Blocks"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, source in COPIED.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for page, other in COPIED.items():
            text = text.replace(f"]({other})", f"]({page})")
        files.append(File.generated(config, name, content=OUTSIDE.sub(r"\1", text)))
    for name, content in pages():
        files.append(File.generated(config, name, content=content))
    return files


def pages() -> Iterator[tuple[str, str]]:
    """(page, its Markdown)."""
    import fastattn

    missing = set(fastattn.__all__) - {name for _, _, names in PAGES.values() for name in names} - ELSEWHERE
    if missing:
        raise PluginError(f"docs/site/pages.py: no page of the API has {', '.join(sorted(missing))}")
    for page, (title, module, names) in PAGES.items():
        yield page, f"# {title}\n\n" + "\n".join(entry(module, name) for name in names)
    for page, (title, modules) in WHOLE.items():
        parts = [f"# {title}\n"]
        for module in modules:
            parts.append(
                f"## {module}\n\n{markdown(inspect.getdoc(importlib.import_module(module)) or '')}\n"
            )
            parts += [entry(module, name, level=3) for name in public(module)]
        yield page, "\n".join(parts)


def public(module: str) -> list[str]:
    found = importlib.import_module(module)
    own = [
        name
        for name, value in vars(found).items()
        if not name.startswith("_") and inspect.getmodule(value) is found and callable(value)
    ]
    return list(getattr(found, "__all__", own))


def entry(module: str, name: str, level: int = 2) -> str:
    """One name: its signature and its docstring, and of a class the public methods."""
    value = getattr(importlib.import_module(module), name)
    lines = [f"{'#' * level} {name}", "", "```python", signature(f"{module}.{name}", value), "```", ""]
    lines.append(markdown(inspect.getdoc(value) or ""))
    if inspect.isclass(value):
        for method, function in vars(value).items():
            if not method.startswith("_") and inspect.isfunction(function) and inspect.getdoc(function):
                lines += [
                    "",
                    f"**`{name}.{signature(method, function)}`**",
                    "",
                    markdown(inspect.getdoc(function)),
                ]
    return "\n".join(lines) + "\n"


def signature(name: str, value: object) -> str:
    try:
        shown = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    kept = [p for p in shown.parameters.values() if p.name not in ("positional", "other", "self")]
    text = f"{name}{shown.replace(parameters=kept)}"
    text = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", text.replace("torch.Tensor", "Tensor"))
    if len(text) <= 90 or not kept:
        return text
    lines, star = [], False
    for parameter in kept:  # one a line
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            lines.append("*")
            star = True
        lines.append(str(parameter).replace("torch.Tensor", "Tensor"))
    _, arrow, returned = text.rpartition(") -> ")
    return (
        f"{name}(\n"
        + "".join(f"    {line},\n" for line in lines)
        + ")"
        + (" -> " + returned if arrow else "")
    )


def markdown(text: str) -> str:
    """A docstring as Markdown: `name: what it is` lines become a list, indented equations stay as they are."""
    blocks = []
    for block in text.split("\n\n"):
        lines = block.split("\n")
        if re.match(r"[\w*]+(, [\w*]+)*: ", lines[0]):
            items: list[str] = []
            for line in lines:
                named = re.match(r"([\w*]+(?:, [\w*]+)*): (.*)", line)
                if named:
                    items.append(f"- **{named[1]}**: {named[2]}")
                elif items:
                    items[-1] += " " + line.strip()
            blocks.append("\n".join(items))
        else:
            blocks.append(block)
    return "\n\n".join(blocks)
