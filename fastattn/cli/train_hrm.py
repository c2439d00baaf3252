"""`fastattn train-hrm`: HRM on Sudoku or a folder of puzzles."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command(name="train-hrm")(train_hrm)


def train_hrm(
    output: Annotated[Path, typer.Option(help="Folder for the model, accuracy.json and accuracy.png.")],
    data: Annotated[
        str,
        typer.Option(
            help="sudoku (4 x 4), sudoku-9x9, or a folder in HRM's layout with train and test splits."
        ),
    ] = "sudoku",
    blanks: Annotated[
        str | None, typer.Option(help="Blank cells, FEWEST-MOST. Default: 6-10, or 4-12 for 9 x 9.")
    ] = None,
    puzzles: Annotated[int, typer.Option(help="Training puzzles made.")] = 2000,
    size: Annotated[str, typer.Option(help="small, or full: the published 27 M.")] = "small",
    trm: Annotated[
        bool, typer.Option("--trm", help="TRM's shape: one stack in both roles, 3 x 6 cycles.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Optimizer steps, at most.")] = 100_000,
    minutes: Annotated[float, typer.Option(help="Minutes of training, at most.")] = 9.0,
    batch_size: Annotated[int, typer.Option(help="Puzzles a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="After a short linear warm-up, constant.")] = 1e-3,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the puzzles, the weights and the order.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's choice.")] = None,
) -> None:
    """Train HRM on puzzles, and watch it solve a held-out one.

    Ctrl-C ends the training; the model is saved all the same.
    """
    import torch
    from rich.console import Console

    from fastattn import training_hrm
    from fastattn.models import Hrm

    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)
    console = Console(highlight=False)
    box = {"sudoku": 2, "sudoku-4x4": 2, "sudoku-9x9": 3}.get(data)
    if box is not None:
        source = training_hrm.SudokuData(box, blanks=_blanks(blanks, box), puzzles=puzzles, seed=seed)
    else:
        source = training_hrm.FolderData(data)
    torch.manual_seed(seed)
    model = Hrm(training_hrm.model_config(source, size=size, trm=trm))
    count = sum(p.numel() for p in model.parameters())
    console.print(f"HRM with {count:,} parameters; {torch.get_num_threads()} threads")
    options = training_hrm.HrmTrainConfig(
        steps=steps,
        minutes=minutes,
        batch_size=batch_size,
        lr=learning_rate,
        eval_every=eval_every,
        seed=seed,
    )
    with console.status("training") as status:

        def show(point: training_hrm.Point) -> None:
            console.print(
                f"step {point.step:6,}  {point.seconds / 60:5.1f} min  loss {point.loss:.3f}  "
                f"blank cells right {point.cells:6.1%}  solved {point.exact:6.1%}"
            )

        points = training_hrm.train(
            model,
            source,
            options,
            report=show,
            progress=lambda step, loss: status.update(f"step {step:,}, loss {loss:.3f}"),
        )
    training_hrm.save_run(output, model, points, options)
    if box is not None:
        for text in training_hrm.show_steps(model, source.held_out):
            console.print(f"\n{text}")
    console.print(f"model, accuracy.json and accuracy.png in {output}")


def _blanks(text: str | None, box: int) -> tuple[int, int]:
    if text is None:
        return (6, 10) if box == 2 else (4, 12)
    fewest, dash, most = text.partition("-")
    if not (fewest.isdigit() and (most.isdigit() or not dash)):
        raise ValueError(f"--blanks is {text!r}; it must be a number or FEWEST-MOST")
    return int(fewest), int(most or fewest)
