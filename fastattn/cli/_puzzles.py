"""`fastattn train --model hrm`: a run of HRM on Sudoku or a folder of puzzles."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn.models import Hrm
    from fastattn.train.data.puzzle_sets import FolderData, SudokuData
    from fastattn.train.data.puzzles import PuzzleMetadata
    from fastattn.train.puzzles import HrmTrainer

BOXES = {"sudoku": 2, "sudoku-4x4": 2, "sudoku-9x9": 3}
BLANKS = {2: (6, 10), 3: (4, 12)}
HELD_OUT = {2: 200, 3: 100}  # at most; on 9 x 9 boards evaluations take long
EVALUATIONS = 16  # of a run whose length is planned


def start(
    output: Path,
    data: str,
    *,
    shape: str,
    blanks: str | None,
    puzzles: int,
    seed: int,
    init: Path | None = None,
    **options: Any,
) -> "HrmTrainer":
    """A fresh run; its puzzles come from the seed, and so do its weights, unless `init` is a model's folder."""
    import torch

    from fastattn.models import Hrm
    from fastattn.train.data.puzzle_sets import FolderData, SudokuData
    from fastattn.train.puzzles import HrmTrainConfig, HrmTrainer, model_config

    box = BOXES.get(data)
    if box is None:
        source = FolderData(data)
    else:
        held_out = max(1, min(HELD_OUT[box], puzzles // 10))
        source = SudokuData(
            box, blanks=blank_cells(blanks, box), puzzles=puzzles, held_out=held_out, seed=seed
        )
    torch.manual_seed(seed)
    model = Hrm(model_config(source, shape)) if init is None else initial_model(init, source)
    config = HrmTrainConfig(seed=seed, sudoku=source.options, **options)
    return HrmTrainer(output, model, source, config)


def initial_model(folder: Path, data: "SudokuData | FolderData") -> "Hrm":
    """The model of `--init`, in float32, for the puzzles of the data: another number of them starts at the mean."""
    import dataclasses

    import torch

    from fastattn.cli import _run
    from fastattn.models import Hrm
    from fastattn.models.convert import resized

    model = Hrm.from_pretrained(folder, dtype=torch.float32)
    for name in ("vocab_size", "seq_len"):
        own, wanted = getattr(model.config, name), data.config[name]
        if own != wanted:
            raise ValueError(f"{folder}: its model has {name} {own}, the data {wanted}")
    count = data.config.get("num_puzzles", 1)
    if count != model.config.num_puzzles:
        if model.config.puzzle_emb_dim:
            _run.console.print(
                f"{count:,} puzzles in place of {model.config.num_puzzles:,}: each starts at the mean of their vectors"
            )
            model.puzzle_emb.weights = resized(model.puzzle_emb.weights, count)
        model.config = dataclasses.replace(model.config, num_puzzles=count)
    return model


def resume(output: Path, data: str) -> "HrmTrainer":
    from fastattn.train.data.puzzle_sets import FolderData
    from fastattn.train.puzzles import HrmTrainer

    return HrmTrainer.resume(output, None if data in BOXES else FolderData(data))


def write_report(trainer: "HrmTrainer", data: str, output: Path) -> Path:
    """Prints a held-out board as it is solved, where boards are Sudoku's; writes the run's pictures and its page."""
    from fastattn.cli import _run
    from fastattn.cli._environment import environment
    from fastattn.runtime import pictures
    from fastattn.train import report
    from fastattn.train.puzzles import show_steps

    boards, guesses = [], {}
    count = next((row["puzzles"] for row in reversed(trainer.history) if "puzzles" in row), None)
    summary = f"HRM trained on {data}, " + (
        f"evaluated on {count:,} of the {trainer.data.test_size:,} puzzles of its test split."
        if count
        else "not evaluated: no puzzle of its test split has a solution."
    )
    if trainer.config.sudoku is not None:
        source = trainer.data
        with trainer.averaged():
            boards = list(show_steps(trainer.model, source.held_out))
        for step in boards:
            _run.console.print(f"\n{step}")
        guesses = source.guesses()
        side = source.box**2
        apart = (
            "no image of one under Sudoku's symmetries is trained on"
            if source.box == 2
            else "no training puzzle equals one"
        )
        summary = (
            f"HRM trained on {source.options['puzzles']:,} {side} x {side} Sudoku puzzles with {source.blanks[0]} to "
            f"{source.blanks[1]} blanks, shown under random symmetries; {source.options['held_out']} others are held out: "
            f"{apart}."
        )
    if any("exact" in row for row in trainer.history):
        drawing = report.accuracy_picture(trainer.history, guesses)
        pictures.write(output / "accuracy.svg", drawing, "Held-out accuracy by minutes of training")
    page = report.Report(
        f"fastattn train: HRM on {Path(data).name}",
        summary,
        trainer.history,
        boards=boards,
        guesses=guesses,
        op_times=trainer.op_times(steps=1),
        environment=environment(),
        notes=_run.notes(trainer),
    )
    return report.write(output / "report.html", page)


def number_or_all(name: str, text: str) -> int | None:
    """Of an option: a number of puzzles, or None for all."""
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--{name} is {text!r}; it must be a number of puzzles, or all")
    return int(text)


def solver(folder: Path) -> "Hrm":
    """The HRM of a model's folder, to solve with."""
    from fastattn.cli import _run
    from fastattn.models import Hrm

    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; `fastattn train --model hrm` makes one")
    if _run.model_type(folder) == "hrm_text":
        raise ValueError(f"{folder}: holds an HRM-Text, which answers text; only HRM solves puzzles")
    return Hrm.from_pretrained(folder).eval()


def check_fits(folder: Path, net: "Hrm", metadata: "PuzzleMetadata") -> None:
    """ValueError naming what a model and a folder of puzzles do not have in common."""
    for name, wanted in (
        ("vocab_size", metadata.vocab_size),
        ("seq_len", metadata.seq_len),
        ("num_puzzles", metadata.num_puzzle_identifiers),
    ):
        own = getattr(net.config, name)
        if own != wanted:
            raise ValueError(f"{folder}: its model has {name} {own}, the data {wanted}")


def blank_cells(text: str | None, box: int) -> tuple[int, int]:
    if text is None:
        return BLANKS[box]
    fewest, dash, most = text.partition("-")
    if not (fewest.isdigit() and (most.isdigit() or not dash)):
        raise ValueError(f"--blanks is {text!r}; it must be a number or FEWEST-MOST")
    return int(fewest), int(most or fewest)
