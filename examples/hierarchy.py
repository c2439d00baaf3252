"""Does a hierarchy help? HRM, TRM and one flat recurrent stack of equal parameters on 4 x 4 Sudoku, three seeds each.

    python examples/hierarchy.py       about a quarter of an hour on one core; stop and repeat at will

Every model trains with deep supervision and halting as HRM does, for the same number of multiply-adds; measured is the share
of held-out puzzles solved, over the multiply-adds and over the processor time of training.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from _common import Study, markdown, options
from torch import Tensor

from fastattn.models import Hrm, HrmConfig
from fastattn.nn.blocks import Routing
from fastattn.optim import AdamATan2
from fastattn.runtime import pictures
from fastattn.train.data.puzzle_sets import SudokuData
from fastattn.train.data.puzzles import PuzzleOrder
from fastattn.train.puzzles import evaluate

SEEDS, BATCH, POINTS, SEGMENTS = 3, 64, 7, 8
PUZZLES, HELD_OUT, BLANKS = 2000, 200, (6, 10)
LEARNING_RATE, WARMUP, EMA = 1.5e-3, 50, 0.99
BLOCKS = 4  # of each model: two stacks of two, or one of four
SHARED: dict[str, Any] = {"puzzle_emb_dim": 0, "halt_max_steps": 4, "q_continue": False}
MODELS = ("HRM", "TRM", "flat")
SMALL = {"hidden_size": 64, "num_heads": 4, "intermediate_size": 192}


class Flat(Hrm):
    """One stack and one state: `z = stack(z, x)`, as often as HRM's stacks are called for as many blocks, the last call with
    gradients, which are as many blocks as in HRM."""

    CALLS = 3

    def segment(self, zH: Tensor, zL: Tensor, inputs: Tensor, puzzle_ids: Tensor) -> tuple[Tensor, ...]:
        x, stack = self.embed(inputs, puzzle_ids), self.recurrence.L_stack
        routing = Routing(None, torch.arange(x.shape[1]))
        enabled = torch.is_grad_enabled()
        for call in range(self.CALLS):
            with torch.set_grad_enabled(enabled and call == self.CALLS - 1):
                zH = stack(zH, x, routing)
        q = self.q_head(zH[:, 0]).float()
        return zH, zL, self.lm_head(zH), q[:, 0], q[:, 1]


def model_of(name: str, sizes: dict[str, int]) -> Hrm:
    if name == "HRM":
        return Hrm(HrmConfig(**sizes, **SHARED, H_layers=BLOCKS // 2, L_layers=BLOCKS // 2))
    one = {"H_layers": BLOCKS, "L_layers": BLOCKS, "shared_stack": True}
    config = HrmConfig(**sizes, **SHARED, **one, full_last_cycle=name == "TRM")
    return Hrm(config) if name == "TRM" else Flat(config)


def blocks_of(name: str) -> tuple[int, int]:
    """(blocks that run, those of them with gradients) of a training step: 2 x 2 cycles of HRM and TRM."""
    return {"HRM": (6 * BLOCKS // 2, BLOCKS), "TRM": (6 * BLOCKS, 3 * BLOCKS), "flat": (3 * BLOCKS, BLOCKS)}[
        name
    ]


def cost(name: str, config: HrmConfig) -> int:
    """Multiply-adds of a step's blocks; a backward takes twice its forward."""
    D, L = config.hidden_size, config.seq_len
    block = BATCH * L * (4 * D * D + 3 * D * config.intermediate_size + 2 * L * D)
    run, differentiated = blocks_of(name)
    return block * (run + 2 * differentiated)


def measured(name: str, seed: int, data: SudokuData, sizes: dict[str, int], steps: int) -> dict[str, Any]:
    """A run of as many multiply-adds as `steps` of HRM's, evaluated at POINTS equal distances."""
    torch.manual_seed(seed)
    model = model_of(name, sizes)
    each = cost(name, model.config)
    steps = max(1, round(steps * cost("HRM", model.config) / each))
    optimizer = AdamATan2(model.parameters(), lr=LEARNING_RATE, ema=EMA)
    order = PuzzleOrder(data, BATCH, seed)
    carry = model.initial_carry(BATCH)
    ends = {max(1, round(steps * point / POINTS)) for point in range(1, POINTS + 1)}
    seconds, rows = 0.0, []
    for step in range(1, steps + 1):
        batch = order.next()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / min(WARMUP, steps))
        start = time.process_time()
        model.train()
        carry, out = model(carry, batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds += time.process_time() - start
        if step in ends:
            with optimizer.averaged():
                figures = evaluate(model, data.evaluation(BATCH), segments=SEGMENTS)
            rows.append(
                {"step": step, "compute": step * each, "seconds": round(seconds, 1)}
                | {key: round(figures[key], 4) for key in ("cells", "exact")}
            )
            print(f"  step {step} of {steps}: solved {figures['exact']:.1%}", flush=True)
    return {"parameters": sum(p.numel() for p in model.parameters()), "rows": rows}


def main(argv: Sequence[str] | None = None, shape: dict | None = None) -> Study:
    given = options(__doc__, steps=800, argv=argv)
    data = SudokuData(2, blanks=BLANKS, puzzles=PUZZLES, held_out=HELD_OUT, seed=given.seed)
    sizes = {**data.config, **(shape or SMALL)}
    study = Study("hierarchy", given, seeds=SEEDS)
    for seed in range(given.seed, given.seed + SEEDS):
        for name in MODELS:
            study.run(
                f"{name}, seed {seed}",
                lambda name=name, seed=seed: measured(name, seed, data, sizes, given.steps),
            )
    drawings = {
        "hierarchy": picture(study.runs, "compute", 1e12, "multiply-adds of training, 10^12"),
        "hierarchy_time": picture(study.runs, "seconds", 1, "processor seconds of training"),
    }
    study.finish(table(study.runs), drawings)
    return study


def _of(runs: dict, name: str) -> list[dict]:
    return [run for key, run in runs.items() if key.startswith(f"{name}, ")]


def table(runs: dict) -> str:
    """The last evaluation of each model: mean over the seeds, least and most."""
    lines = []
    for name in MODELS:
        own = _of(runs, name)
        last = [run["rows"][-1] for run in own]
        solved = [row["exact"] for row in last]
        run, differentiated = blocks_of(name)
        lines.append(
            [
                name,
                f"{own[0]['parameters']:,}",
                f"{run} ({differentiated})",
                f"{last[0]['step']:,}",
                f"{last[0]['compute'] / 1e12:.2f}",
                f"{sum(row['seconds'] for row in last) / len(last):.0f}",
                f"{sum(row['cells'] for row in last) / len(last):.1%}",
                f"{sum(solved) / len(solved):.1%} ({min(solved):.1%} to {max(solved):.1%})",
            ]
        )
    head = ["model", "parameters", "blocks a step (with gradients)", "steps", "multiply-adds, 10^12"]
    return markdown([*head, "processor s", "cells right", "puzzles solved"], lines)


def picture(runs: dict, key: str, unit: float, label: str):
    """Held-out cells right (dashed) and puzzles solved, a line a run."""
    drawing, axes = pictures.figure(3.8)
    for color, name in zip(pictures.LINES, MODELS, strict=False):
        for number, run in enumerate(_of(runs, name)):
            places = [row[key] / unit for row in run["rows"]]
            for figure, style in (("cells", "--"), ("exact", "-")):
                axes.plot(
                    places,
                    [100 * row[figure] for row in run["rows"]],
                    style,
                    color=color,
                    linewidth=1.2,
                    label=name if number == 0 and style == "-" else None,
                )
    axes.set_xlabel(label)
    axes.set_ylabel("held out: puzzles solved, cells right (dashed), %")
    axes.legend(frameon=False, labelcolor=pictures.INK, fontsize=8)
    return drawing


if __name__ == "__main__":
    main()
