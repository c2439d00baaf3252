"""`fastattn convert`."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(convert)


def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint: a file, or a folder of which the latest step_N is taken.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder for config.json and model.safetensors.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON file of arch keys. Default: all_config.yaml or config.json beside the weights."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="HRM: folder of puzzles, which tells their size and number.")
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="HRM: cells of a puzzle, where nothing else tells: Sudoku 81, mazes and ARC 900."),
    ] = None,
    num_puzzles: Annotated[
        int | None,
        typer.Option(
            help="HRM: another number of puzzles; their vectors start at the mean of the checkpoint's."
        ),
    ] = None,
) -> None:
    """Make a model folder of a checkpoint that HRM's, TRM's or HRM-Text's own code saved.

    Reads torch.save'd files (weights only: nothing in them is run), DCP folders and safetensors. The folder is for
    **from_pretrained**, **fastattn train --init** and **fastattn solve** or **generate**.
    """
    from fastattn.models.convert import convert as convert_checkpoint

    for name, value in (("seq-len", seq_len), ("num-puzzles", num_puzzles)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    if (output / "config.json").exists():
        raise ValueError(f"{output}: holds a model already; give another folder")
    for line in convert_checkpoint(
        source, output, config=config, data=data, seq_len=seq_len, num_puzzles=num_puzzles
    ):
        print(line)
