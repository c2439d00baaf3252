"""python -m benchmarks <group> [--quick] [--slow] [--case GLOB] [--out DIR | --keep]; python -m benchmarks readme"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import limits, readme, registry, report, runner
from fastattn.runtime import device as _device


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Times fastattn against its peers."
    )
    parser.add_argument(
        "group",
        help="readme (writes the tables and pictures of README.md and docs from the results kept), peak (the machine's limits), all, or: "
        + ", ".join(registry.groups()),
    )
    parser.add_argument("--quick", action="store_true", help="a few rows, few rounds")
    parser.add_argument("--case", default="*", metavar="GLOB", help="only rows whose name matches")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/out"), metavar="DIR", help="for JSON and picture"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="write to benchmarks/results/<device>, kept in git; rows that are not run again stay there",
    )
    parser.add_argument(
        "--slow",
        action="store_true",
        help="also rows whose peers take minutes to hours on a machine like this",
    )
    parser.add_argument("--threads", type=int, default=None, help="torch.set_num_threads")
    parser.add_argument("--list", action="store_true", help="only name the rows")
    options = parser.parse_args()
    if options.group == "readme":
        readme.write()
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    names = registry.groups() if options.group == "all" else [options.group]
    chosen = {}
    if options.group != "peak":
        chosen = {g: registry.select(g, quick=options.quick, pattern=options.case) for g in names}
        if not any(chosen.values()):
            parser.error(f"no row matches group {options.group!r}, case {options.case!r}")
    if options.list:
        for group, cases in chosen.items():
            print("\n".join(f"{group}: {case.name}" for case in cases))
        return 0

    device = "cuda" if options.group == "gpu" and torch.cuda.is_available() else "cpu"
    if options.keep:
        if "gpu" in chosen and device == "cpu":
            parser.error("--keep: rows of group gpu are kept by themselves, and where there is a GPU")
        options.out = readme.RESULTS / _device.target(device).slug
    console = Console() if sys.stdout.isatty() else Console(width=160)
    torch.manual_seed(0)
    env = report.environment(device)
    console.print(f"{env['device']}, {env['threads']} threads, torch {env['torch']}, load {env['load']}")
    measured = limits.measure(quick=options.quick)
    report.print_limits(console, measured)
    if options.group == "peak":
        report.write_json(options.out / "peak.json", report.as_json("peak", env, measured, []))
        return 0
    failed = False
    for group, cases in chosen.items():
        results = []
        for i, case in enumerate(cases):
            with console.status(f"{group} {i + 1}/{len(cases)}: {case.name}"):
                results.append(runner.run(case, measured, quick=options.quick, slow=options.slow))
        console.print(report.table(group, results))
        path, data = options.out / f"{group}.json", report.as_json(group, env, measured, results)
        if options.keep:
            data = report.joined(path, data)
        report.write_json(path, data)
        picture = path.with_suffix(".png")
        # of a part of the rows that are kept there is no picture
        whole = len(data["results"]) == len(results)
        shown = whole and report.write_picture(picture, group, results, measured)
        console.print(f"wrote {path}" + (f" and {picture}" if shown else ""))
        failed |= any(r.wrong for r in results)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
