"""`train --resume`: a run keeps the options it began with, and an option that contradicts them is refused."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from fastattn.train.data.jsonl import Example
    from fastattn.train.puzzles import HrmTrainer
    from fastattn.train.run import Run
    from fastattn.train.text import Trainer

_CONFIG = (
    *(
        "steps",
        "learning_rate",
        "seed",
        "schedule",
        "min_learning_rate_ratio",
        "warmup_steps",
        "weight_decay",
        "ema",
    ),
)


def refuse(context: typer.Context, *names: str) -> None:
    """ValueError naming an option that only the start of a run has."""
    for name in names:
        if given_by_user(context, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is for the start of a run: leave it out with --resume"
            )


def check_text(
    context: typer.Context, run: "Trainer", examples: "list[Example]", tags: list[str], **changes: Any
) -> None:
    """ValueError naming an option of HRM-Text that is not the run's. `tags`: of all examples; `changes`: the head that
    was asked for."""
    from fastattn.cli import _run
    from fastattn.train.data.tokenizer import Tokenizer

    shape, given = run.model.config, context.params
    _check(context, run, {"head": shape.head, "codebook_size": shape.codebook_size})
    _check_config(context, run, "batch_tokens", "too_long")
    if given_by_user(context, "vocab_size"):
        # the most that was allowed is not kept: fewer tokens are learned where the text has no more
        learned = Tokenizer.train(examples, given["vocab_size"], tags).vocab_size
        if learned != shape.vocab_size:
            _refuse("vocab_size", given["vocab_size"], shape.vocab_size, run)
    if given["config"] is not None:
        if not given_by_user(context, "head") and shape.head == "vq":
            changes = _run.quantised(shape.codebook_size)
        asked = _run.model_config(given["config"], shape.vocab_size, **changes)
        if _run.with_ends(asked, run.tokenizer) != _run.with_ends(shape, run.tokenizer):
            _refuse("config", given["config"], "a model of another shape", run)


def check_puzzles(context: typer.Context, run: "HrmTrainer", data: str) -> None:
    """ValueError naming an option of HRM that is not the run's."""
    from fastattn.cli import _puzzles
    from fastattn.train.puzzles import SHAPES, model_config

    _check_config(context, run, "batch_size", "puzzle_learning_rate", "puzzle_weight_decay")
    if given_by_user(context, "eval_puzzles"):
        asked = _puzzles.number_or_all("eval-puzzles", context.params["eval_puzzles"])
        if asked != run.config.eval_puzzles:
            _refuse("eval_puzzles", context.params["eval_puzzles"], run.config.eval_puzzles or "all", run)
    own = next((name for name in SHAPES if model_config(run.data, name) == run.model.config), "another")
    _check(context, run, {"shape": own})
    made = run.config.sudoku
    if made is None:
        return
    if _puzzles.BOXES.get(data) != made["box"]:
        side = made["box"] ** 2
        _refuse("data", data, f"sudoku-{side}x{side}", run)
    _check(context, run, {"puzzles": made["puzzles"]})
    blanks = tuple(made["blanks"])
    if given_by_user(context, "blanks"):
        asked = context.params["blanks"]
        if _puzzles.blank_cells(asked, made["box"]) != blanks:
            _refuse("blanks", asked, "{}-{}".format(*blanks), run)


def given_by_user(context: typer.Context, name: str) -> bool:
    return context.get_parameter_source(name).name != "DEFAULT"


def _check_config(context: typer.Context, run: "Run", *extra: str) -> None:
    _check(context, run, {name: getattr(run.config, name) for name in (*_CONFIG, *extra)})


def _check(context: typer.Context, run: "Run", own: dict[str, Any]) -> None:
    for name, value in own.items():
        if given_by_user(context, name) and context.params[name] != value:
            _refuse(name, context.params[name], value, run)


def _refuse(name: str, given: Any, own: Any, run: "Run") -> None:
    own = "none" if own is None else own
    raise ValueError(
        f"--{name.replace('_', '-')} is {given}, but the run in {Path(run.folder)} has {own}: leave the option out "
        "with --resume, or start a run in another folder"
    )
