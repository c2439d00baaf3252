"""`fastattn build`: folders of puzzles from the files in which they are published."""

from pathlib import Path
from typing import Annotated

import typer

from fastattn.cli._console import flag

_OUTPUT = typer.Option(help="Folder to write, for `fastattn train --model hrm --data`.")
_CSV = typer.Argument(help="Folder of train.csv and test.csv.")
_SAMPLE = typer.Option(help="Training puzzles to draw. Default: all.")
_SEED = typer.Option(help="Seed of what is drawn.")


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Make a folder of puzzles from published files.")
    for command in (arc, maze, sudoku):
        group.command()(command)
    app.add_typer(group, name="build")


def arc(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of a JSON file a task (ARC-AGI-1 and 2, ConceptARC), or of SET_challenges.json (Kaggle)."
        ),
    ],
    output: Annotated[Path, _OUTPUT],
    test_set: Annotated[
        str, typer.Option(help="Set whose tests are held out: a task's folder, or SET.")
    ] = "evaluation",
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Set to read; may be repeated. Default: all.")
    ] = None,
    augmentations: Annotated[
        int, typer.Option(help="Images of each task, by symmetries and colors, beside itself.")
    ] = 1000,
    side: Annotated[
        int, typer.Option(help="Of the square for a grid; tasks with larger grids are left out.")
    ] = 30,
    seed: Annotated[int, _SEED] = 0,
) -> None:
    """ARC: a puzzle for each task and image of it. The held-out set's demonstrations are trained on, its tests are not."""
    from fastattn.train.data.arc_folder import build_arc

    _check(output, augmentations=(augmentations, 0), side=(side, 1), seed=(seed, 0))
    if side > 30:
        raise ValueError(f"--side is {side}; ARC's grids are at most 30 x 30")
    lines = build_arc(
        *(sources, output), test_set=test_set, sets=sets, augmentations=augmentations, side=side, seed=seed
    )
    print("\n".join(lines))


def maze(
    source: Annotated[Path, _CSV],
    output: Annotated[Path, _OUTPUT],
    sample: Annotated[int | None, _SAMPLE] = None,
    symmetries: Annotated[bool, flag("--symmetries", "All eight images of each training maze.")] = False,
    seed: Annotated[int, _SEED] = 0,
) -> None:
    """Mazes: # for a wall, a space, S, G, and o for the answer's path."""
    from fastattn.train.data.csv_puzzles import build_maze

    _check(output, sample=(sample, 1), seed=(seed, 0))
    print("\n".join(build_maze(source, output, sample=sample, symmetries=symmetries, seed=seed)))


def sudoku(
    source: Annotated[Path, _CSV],
    output: Annotated[Path, _OUTPUT],
    sample: Annotated[int | None, _SAMPLE] = None,
    augmentations: Annotated[int, typer.Option(help="Random symmetries of each training board.")] = 0,
    min_rating: Annotated[int | None, typer.Option(help="Leave out boards of a smaller rating.")] = None,
    seed: Annotated[int, _SEED] = 0,
) -> None:
    """Sudoku-Extreme: digits, 0 or . for a blank."""
    from fastattn.train.data.csv_puzzles import build_sudoku

    _check(output, sample=(sample, 1), augmentations=(augmentations, 0), seed=(seed, 0))
    lines = build_sudoku(
        *(source, output), sample=sample, augmentations=augmentations, min_rating=min_rating, seed=seed
    )
    print("\n".join(lines))


def _check(output: Path, **numbers: tuple[int | None, int]) -> None:
    """Numbers are at least what stands beside them, and the folder holds no puzzles."""
    for name, (value, least) in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    for split in ("train", "test"):
        if (output / split / "dataset.json").exists():
            raise ValueError(f"{output}: holds puzzles already; give another folder")
