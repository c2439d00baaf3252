"""`fastattn generate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from standard input.")],
    model: Annotated[Path, typer.Option(help="Folder made by `fastattn train`.")],
    condition: Annotated[
        list[str] | None,
        typer.Option(
            help="Tag before the instruction, a special token of the tokenizer, or some with commas between them. May be "
            "repeated. HRM-Text's released models know direct, cot, noisy and synth."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest response, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="With --temperature: draw from the k most likely tokens; 0: from all.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="With --temperature: draw from the likeliest tokens whose probabilities add up to p."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="With --temperature: seed of the random draws.")] = 0,
) -> None:
    """Answer a prompt with a trained model, token by token as they come."""
    if temperature == 0:
        for name in ("top_k", "top_p", "seed"):
            if context.get_parameter_source(name).name != "DEFAULT":
                raise ValueError(
                    f"--{name.replace('_', '-')} is for drawing tokens; without --temperature the most likely is taken"
                )
    import torch

    from fastattn.cli import _run
    from fastattn.models import HrmText
    from fastattn.models.checkpoint import check_converted
    from fastattn.train.data.tokenizer import Tokenizer

    if prompt == "-":
        prompt = sys.stdin.read().strip()
    if not model.is_dir():
        raise FileNotFoundError(f"{model}: no such folder; `fastattn train` makes one")
    check_converted(model)
    inside = [folder.parent for folder in sorted(model.glob("*/config.json"))]
    if inside and not (model / "config.json").exists():
        raise ValueError(f"{model}: is no model's folder, but has one in it; give --model {inside[0]}")
    if _run.model_type(model) == "hrm":
        raise ValueError(f"{model}: holds an HRM, which solves puzzles; only HRM-Text answers")
    tokenizer = Tokenizer.load(model)

    def show(text: str) -> None:
        print(_run.visible(text) if sys.stdout.isatty() else text, end="", flush=True)

    _run.respond(
        HrmText.from_pretrained(model),
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        condition=[tag.strip() for text in condition or () for tag in text.split(",")],
        show=show,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator().manual_seed(seed),
    )
    print()
