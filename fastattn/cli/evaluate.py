"""`fastattn evaluate`."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(evaluate)


def evaluate(
    model: Annotated[Path, typer.Option(help="Folder made by `fastattn train --model hrm` or `convert`.")],
    data: Annotated[Path, typer.Option(help="Folder of puzzles, whose test split is solved.")],
    puzzles: Annotated[str, typer.Option(help="Puzzles (ARC: tasks) at even distances; or all.")] = "all",
    augmentations: Annotated[
        int | None, typer.Option(help="ARC: images of each task beside itself. Default: all in the folder.")
    ] = None,
    segments: Annotated[int, typer.Option(help="Segments to think; each refines the answer.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Puzzles at a time.")] = 64,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's choice.")] = None,
    submission: Annotated[
        Path | None, typer.Option(help="ARC: file for the two best answers to each test, as Kaggle takes it.")
    ] = None,
) -> None:
    """Solve a folder's test split with a trained HRM: cells right, puzzles solved, and for ARC pass@k.

    ARC's answers are brought back from each image of a task and counted; pass@k is the mean share of a task's tests whose
    output is among the k answers of most votes.
    """
    import json

    import torch

    from fastattn.cli import _arc, _puzzles, _run
    from fastattn.runtime.files import write_text
    from fastattn.train.data.arc_folder import read_votes
    from fastattn.train.data.puzzles import PuzzleFolder
    from fastattn.train.puzzles import evaluate as solve_all

    for name, value, least in (
        ("segments", segments, 1),
        ("batch-size", batch_size, 1),
        ("threads", threads, 1),
        ("augmentations", augmentations, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}; it must be at least {least}")
    count = _puzzles.number_or_all("puzzles", puzzles)
    if threads is not None:
        torch.set_num_threads(threads)
    split = PuzzleFolder(data, "test")
    votes = read_votes(data)
    for name, value in (("augmentations", augmentations), ("submission", submission)):
        if value is not None and votes is None:
            raise ValueError(f"--{name} is for ARC; {data} has no tasks of it")
    net = _puzzles.solver(model)
    _puzzles.check_fits(model, net, split.metadata)
    index = split.of_groups(count, None if augmentations is None else augmentations + 1)
    figures = solve_all(
        net,
        split.examples(batch_size, index=index),
        segments=segments,
        seen=None if votes is None else _arc.counted(votes),
    )
    if figures["puzzles"]:
        print(_run.evaluation_line(figures))
    elif votes is None:
        print(f"no puzzle of {data}'s test split has a solution")
    if votes is not None:
        print(_arc.score(votes))
        if submission is not None:
            write_text(submission, json.dumps(votes.submission()) + "\n")
