"""python -m benchmarks readme: write the parts of pages between `<!-- generated: NAME -->` and `<!-- end -->`, and the README's
pictures (`pictures.py`).

`support` comes from the registry and from what gpu_check recorded, `speed` from benchmarks/results/<device>/*.json. ROWS says
which cases of a CPU's results are shown; of a GPU's all are.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import torch

import fastattn as fa
from benchmarks import gpu_check
from fastattn.runtime import cuda as _cuda
from fastattn.runtime import examples, explain

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# --- speed -----------------------------------------------------------------------------------------------------------

# what a row is called -> its cases, whose figures stand beside each other
ROWS: dict[str, Sequence[str]] = {
    "attention fp32 / bf16, L 1024, D 64, forward": (
        "softmax fp32 H=8 L=1024 D=64 forward",
        "softmax bf16 H=8 L=1024 D=64 forward",
    ),
    "sigmoid attention fp32 / bf16, L 1024, D 64, forward": (
        "sigmoid fp32 H=8 L=1024 D=64 forward",
        "sigmoid bf16 H=8 L=1024 D=64 forward",
    ),
    "8 short sequences (L 128), fp32 / bf16, forward": (
        "short fp32 H=8 L=128 D=64 B=8 forward",
        "short bf16 H=8 L=128 D=64 B=8 forward",
    ),
    "causal attention fp32, L 4096, D 64, forward": ("causal fp32 H=8 L=4096 D=64 forward",),
    "attention fp32, L 2048, D 64 / 128, backward": (
        "softmax fp32 H=8 L=2048 D=64 backward",
        "softmax fp32 H=8 L=2048 D=128 backward",
    ),
    "attention bf16, L 2048, D 64 / 128, backward": (
        "softmax bf16 H=8 L=2048 D=64 backward",
        "softmax bf16 H=8 L=2048 D=128 backward",
    ),
    "decoding bf16, 4 x 8192 keys, D 128, grouped queries": (
        "decode bf16 H=32 L=8192 D=128 B=4 Hkv=8 Lq=1 forward",
    ),
    "HRM-Text of transformers with our attention, prefill of 2048 tokens, bf16 / fp32": (
        "transformers hrm_text prefill half prefix bf16 tokens=2048 step",
        "transformers hrm_text prefill half prefix fp32 tokens=2048 step",
    ),
    "HRM-Text of transformers with our attention, training step fp32, 1024 tokens": ("transformers hrm_text training step fp32 tokens=1024 step",),
    "LSSAR (softplus, p = 15) fp32, L 2048: forward / with backward": (
        "LSSAR p=15 fp32 H=8 L=2048 D=64 forward",
        "LSSAR p=15 fp32 H=8 L=2048 D=64 forward+backward",
    ),
    "LSSAR / LSSA bf16, L 4096, forward": (
        "LSSAR p=15 bf16 H=8 L=4096 D=64 forward",
        "LSSA bf16 H=8 L=4096 D=64 forward",
    ),
    "LSSAR decoding bf16, 8 heads, 65536 keys": ("LSSAR p=15 decode bf16 H=8 L=65536 D=64 forward",),
    "grouped top-1 of 8 bf16, L 8192 / 65536": (
        "top-1 of 8 bf16 H=4 L=8192 D=64 forward",
        "top-1 of 8 bf16 H=1 L=65536 D=64 forward",
    ),
    "gated attention fp32, L 2048, 8 groups, with backward": ("gated fp32 H=4 L=2048 D=64 G=8 forward+backward",),
    "add + rms_norm bf16, 2048 x 1536: forward / with backward": (
        "rms_norm+residual bf16 rows=2048 width=1536 forward",
        "rms_norm+residual bf16 rows=2048 width=1536 forward+backward",
    ),
    "swiglu bf16, 2048 x 4096: forward / with backward": (
        "swiglu bf16 rows=2048 width=4096 forward",
        "swiglu bf16 rows=2048 width=4096 forward+backward",
    ),
    "rotary bf16, 12 x 2048 x 128: forward / with backward": (
        "rotary bf16 H=12 L=2048 D=128 forward",
        "rotary bf16 H=12 L=2048 D=128 forward+backward",
    ),
    "SwiGLU block (norm, product, SwiGLU, product, sum) forward, fp32 2048 rows / bf16 256 rows": (
        "swiglu block fp32 rows=2048 width=512 inner=1536 forward",
        "swiglu block bf16 rows=256 width=512 inner=1536 forward",
    ),
    "vq_cross_entropy fp32, 2048 rows, V 50257, K 1024, with gradients": (
        "vq_cross_entropy fp32 N=2048 V=50257 d=768 K=1024 step",
    ),
    "vq_argmax bf16, one row, V 131072, K 4096": ("vq_argmax bf16 N=1 V=131072 d=1024 K=4096 step",),
    "linear_cross_entropy StableMax fp32, 2048 rows, V 32000, with gradients": (
        "linear_cross_entropy stablemax fp32 N=2048 V=32000 d=768 step",
    ),
    "linear_cross_entropy fp32, V 32000, three quarters of the rows ignored": (
        "linear_cross_entropy ignored fp32 N=2048 V=32000 d=768 ignored=0.75 step",
    ),
    "stablemax_cross_entropy fp32, 512 rows, V 32000, with gradients": (
        "stablemax_cross_entropy fp32 N=512 V=32000 step",
    ),
    "HRM-Text decoding, hidden 512, 4 layers a stack, 256 cached: bf16, batch 1 / 8": (
        "HrmText decode bf16 hidden=512 layers=4 batch=1 cached=256 step",
        "HrmText decode bf16 hidden=512 layers=4 batch=8 cached=256 step",
    ),
    "HRM-Text decoding, hidden 512, 4 layers a stack, 256 cached: fp32, batch 1 / 8": (
        "HrmText decode fp32 hidden=512 layers=4 batch=1 cached=256 step",
        "HrmText decode fp32 hidden=512 layers=4 batch=8 cached=256 step",
    ),
    "HRM-Text, 2 of XL's layers: prefill of 2048 tokens bf16": (
        "HrmText prefill bf16 hidden=1536 layers=2 tokens=2048 step",
    ),
    "HRM-Text XL bf16: a token decoded / prefill of 256 tokens": (
        "HrmText XL decode bf16 cached=256 step",
        "HrmText XL prefill bf16 tokens=256 step",
    ),
    "HRM-Text training step, 1024 packed tokens: bf16, 2 of XL's layers": (
        "HrmText training step bf16 hidden=1536 layers=2 samples=8 tokens=1024 step",
    ),
    "HRM-Text training step, 1024 packed tokens: fp32, hidden 512, 4 layers": (
        "HrmText training step fp32 hidden=512 layers=4 samples=8 tokens=1024 step",
    ),
    "the same, samples of 32 to 264 tokens (padded by the peer): vocabulary 1024 / 65536": (
        "HrmText training step fp32 hidden=512 layers=4 samples=8 tokens=1024 lengths=unequal vocabulary=1024 step",
        "HrmText training step fp32 hidden=512 layers=4 samples=8 tokens=1024 lengths=unequal vocabulary=65536 step",
    ),
    "HRM training step (Sudoku, 27 M, batch 32) fp32, without / with the second forward": (
        "Hrm training step fp32 hidden=512 layers=4 batch=32 extra_pass=False step",
        "Hrm training step fp32 hidden=512 layers=4 batch=32 extra_pass=True step",
    ),
}  # fmt: skip
PEERS = {
    "sdpa": "SDPA",
    "sdpa causal": "SDPA causal",
    "flex": "FlexAttention",
    "full": "the full mask",
    "row kernels, torch's products": "row kernels with torch's products",
}
LIMITS = {"fp32 fma": "peak", "bf16 dot": "bf16 peak"}
NONE = "–"


def number(x: float) -> str:
    """Two figures, three near one."""
    return f"{x:.2f}" if x < 2 else f"{x:.1f}" if x < 9.95 else f"{x:.0f}"


def beside(cells: Sequence[str], unit: str = "") -> str:
    """The cases' cells of one row, one cell where all are the same, none where all are empty."""
    if not any(cells):
        return ""
    if len(set(cells)) == 1:
        return cells[0] + unit
    return " / ".join(cell or NONE for cell in cells) + unit


def row(label: str, found: Sequence[Mapping | None]) -> str:
    """A line of the table; `found` are its cases' results, None for one that was not measured."""
    found = [r if r and r["correct"] else {} for r in found]
    times = beside([_time(r["milliseconds"]["fastattn"]["median"]) if r else "" for r in found])
    limits = _shares(found)
    peers = list(dict.fromkeys(itertools.chain.from_iterable(r.get("ratios", ()) for r in found)))
    against = ", ".join(_against(peer, found) for peer in peers)
    bars = beside(
        [", ".join(f"{_bar(b['bar'])}: {VERDICT[b['met']]}" for b in r.get("bars", ())) for r in found]
    )
    return f"| {label} | {times} | {limits} | {against} | {bars} |"


VERDICT = {True: "met", False: "**missed**", None: "not measured"}


def _time(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2g} s"
    return f"{milliseconds:.3g} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"


def _shares(found: Sequence[Mapping]) -> str:
    """Of the limit; a rate where a row has no limit."""
    shares = [r.get("share") for r in found]
    units = {LIMITS.get(share["of"], share["of"]) for share in shares if share}
    if len(units) == 1:
        return beside([f"{share['value']:.0%}" if share else "" for share in shares], f" of {units.pop()}")
    return beside([_rate(r) for r in found])


def _rate(r: Mapping) -> str:
    if "share" in r:
        return f"{r['share']['value']:.0%} of {LIMITS.get(r['share']['of'], r['share']['of'])}"
    if "gflops" in r:
        return f"{r['gflops'] / 1000:.0f} TFLOP/s"
    return f"{r['gbytes']:.0f} GB/s" if "gbytes" in r else ""


def _bar(text: str) -> str:
    text = text.replace(">=", "≥").replace("<=", "≤")
    return re.sub(r"(?<=x |f )([^≥≤]+?)(?=$|'s time)", lambda m: PEERS.get(m[1], m[1]), text)


def _against(peer: str, found: Sequence[Mapping]) -> str:
    ratios = [r.get("ratios", {}).get(peer, {}).get("median") for r in found]
    name = PEERS.get(peer, peer)
    if any("of " + peer + "'s time" in b["bar"] for r in found for b in r.get("bars", ())):
        return beside([number(1 / x) if x else "" for x in ratios], f" of {name}'s time")
    return beside([number(x) + "x" if x else "" for x in ratios], f" {name}")


def device_table(files: Sequence[Mapping]) -> Iterator[str]:
    """The heading, what it was measured with, and the table of one device's result files."""
    results = {r["name"]: ({"measured": f["environment"]} | r) for f in files for r in f["results"]}
    on_gpu = any(f["group"] == "gpu" for f in files)
    rows = {name: (name,) for name in results} if on_gpu else ROWS
    shown = {label: names for label, names in rows.items() if any(name in results for name in names)}
    used = [results[name] for names in shown.values() for name in names if name in results]
    environment = files[-1]["environment"]
    yield f"### {environment['device']}"
    yield ""
    yield ", ".join(_facts(files, environment, used)) + "."
    yield ""
    yield f"| case | time | {'rate' if on_gpu else 'share of the limit'} | against | bar |"
    yield "|---|---|---|---|---|"
    for label, names in shown.items():
        yield row(label, [results.get(name) for name in names])


def _facts(files: Sequence[Mapping], environment: Mapping, used: Sequence[Mapping]) -> Iterator[str]:
    if isas := environment.get("isas"):
        yield f"{environment['threads']} threads, {isas[-1].upper().replace('AVX512', 'AVX-512')}"
    yield f"torch {environment['torch']}, Python {environment['python']}"
    for name in ("fp32 fma", "bf16 dot", "copy", "read"):
        values = sorted(f["limits"][name] for f in files if name in f["limits"])
        if values:
            low, high = f"{values[0]:.0f}", f"{values[-1]:.0f}"
            unit = "GB/s" if name in ("copy", "read") else "GFLOP/s"
            yield f"{LIMITS.get(name, name)} {low if low == high else f'{low} to {high}'} {unit}"
    dates = sorted({r["measured"]["date"][:10] for r in used})
    commits = sorted({r["measured"]["commit"] for r in used})
    yield f"measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} at {', '.join(commits)}"


def speed(results: Path) -> str:
    tables = []
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        files = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
        files = [f for f in files if f.get("results")]
        if files:
            tables.append("\n".join(device_table(files)))
    return "\n\n".join(tables)


# --- support ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    "reference": "reference",
    "cpu": "CPU kernels",
    "triton": "Triton kernels",
    "cuda": "CUDA C++ kernels",
}
DTYPES = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
TESTED = {
    "reference": "x86-64, Python 3.11, torch 2.13",
    "cpu": "x86-64: baseline, AVX2, AVX-512 and AVX-512 BF16",
    "triton": "the Triton interpreter, compiling ahead of time",
    "cuda": "the host, a fiber a thread; compiling ahead of time",
}
GPU_COLUMNS = ("triton", "cuda")


def served(name: str, calls: Mapping[torch.dtype, examples.Example]) -> tuple[str, ...]:
    """The dtypes that each column's backend serves of an op, on a device of its own."""
    # whether there is a GPU here is another matter
    with mock.patch.object(_cuda, "missing", lambda: NONE), fa.set_backend(None):
        found = {}
        for dtype, short in DTYPES.items():
            for backend, reason in explain.refusals(name, **calls[dtype].arguments).items():
                if reason in (None, NONE):
                    found.setdefault(backend, []).append(short)
    return tuple(" ".join(found.get(backend, [NONE])) for backend in COLUMNS)


def support(results: Path) -> str:
    by_dtype = {dtype: examples.examples(dtype) for dtype in DTYPES}
    names = [name for name in by_dtype[torch.float32] if name in fa.__all__]
    calls = {name: {dtype: found[name] for dtype, found in by_dtype.items()} for name in names}
    lines = [f"| op | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]

    def family(name: str) -> tuple[str, tuple[str, ...]]:
        """A row: ops of one folder that are served alike."""
        return calls[name][torch.float32].function.__module__.split(".")[2], served(name, calls[name])

    for (_, cells), alike in itertools.groupby(names, family):
        lines.append(f"| {', '.join(f'`{name}`' for name in alike)} | {' | '.join(cells)} |")
    checks = [json.loads(p.read_text()) for p in sorted(results.glob("*/check.json"))]
    cells = []
    for backend in COLUMNS:
        where = [TESTED[backend]]
        if backend in GPU_COLUMNS:
            where += [_ran(backend, check) for check in checks] or ["**never on a GPU**"]
        cells.append("; ".join(filter(None, where)))
    lines.append(f"| **tested on** | {' | '.join(cells)} |")
    said = [_checked(check) for check in checks]
    return "\n".join(
        [*lines, "", *(said or ["**No GPU kernel, Triton or CUDA C++, has ever run on a GPU.**"])]
    )


def _ran(backend: str, check: Mapping) -> str:
    """What a device's checks say of a column's kernels."""
    results = check["steps"].get("checks", {}).get("results", {})
    mine = [r for name, r in results.items() if name.startswith("CUDA C++") == (backend == "cuda")]
    passed = sum(r == gpu_check.PASSED for r in mine)
    device = check["environment"]["device"]
    return f"{device}: {passed} of {len(mine)} checks passed" if mine else f"**never on {device}**"


def _checked(check: Mapping) -> str:
    """A paragraph about `make gpu-check` on one device: every step, and what failed."""
    environment, said = check["environment"], []
    for step, record in check["steps"].items():
        results = record.get("results", {})
        if not results:
            said.append(f"{step} not run ({gpu_check.brief(record.get('not run', ''))})")
            continue
        good = sum(r == gpu_check.PASSED or (isinstance(r, dict) and r["correct"]) for r in results.values())
        said.append(f"{step} {good} of {len(results)} passed")
    failed = list(gpu_check.failures(check["steps"]))
    lines = [
        f"`make gpu-check` on {environment['device']}, {environment['date'][:10]}, {environment['commit']}: {'; '.join(said)}."
    ]
    lines += ["", "Failed there:", *(f"- {line}" for line in failed)] if failed else []
    return "\n".join(lines)


# --- the files -------------------------------------------------------------------------------------------------------

# page -> its parts
PAGES = {"docs/backends.md": {"support": support}, "docs/performance.md": {"speed": speed}}


def generated(page: str, text: str, results: Path = RESULTS) -> str:
    """A page's text with each part made anew."""
    for name, make in PAGES[page].items():
        text, count = re.subn(
            rf"(<!-- generated: {name}\b[^>]*-->\n).*?(\n<!-- end -->)",
            lambda m, make=make: f"{m[1]}\n{make(results)}\n{m[2]}",
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"benchmarks readme: {page} has {count} parts called {name}, must be one")
    return text


def missing(results: Path = RESULTS) -> Iterable[str]:
    """Cases of ROWS that no result file has."""
    files = [json.loads(p.read_text()) for p in results.glob("*/*.json")]
    there = {r["name"] for f in files for r in f.get("results", ()) if r["correct"]}
    return [name for names in ROWS.values() for name in names if name not in there]


def write() -> None:
    from benchmarks import pictures

    for page in PAGES:
        path = ROOT / page
        text = path.read_text()
        new = generated(page, text)
        if new != text:
            path.write_text(new)
        print(f"{page}: {'written' if new != text else 'as it was'}")
    for path in pictures.write(RESULTS, ROOT / "docs"):
        print(f"{path.relative_to(ROOT)}: written")
    for name in missing():
        print(f"not measured: {name}")
