"""`fastattn train`."""

from pathlib import Path
from typing import Annotated

import typer

_VOCAB_SIZE, _BATCH_TOKENS, _LEARNING_RATE, _CODEBOOK_SIZE = 2048, 1024, 4e-3, 256


def register(app: typer.Typer) -> None:
    app.command()(train)


def train(
    data: Annotated[
        Path,
        typer.Option(
            help="JSONL file: one object a line with `instruction` and `response`. For --model hrm: sudoku, "
            "sudoku-9x9, or a folder of puzzles."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the model, its training state and report.html.")],
    model: Annotated[
        str, typer.Option(help="hrm-text, or hrm: puzzles, with more options under `fastattn train-hrm`.")
    ] = "hrm-text",
    held_out: Annotated[
        Path | None, typer.Option(help="JSONL file to evaluate on. Default: every 20th example of --data.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with HrmTextConfig keys; vocab_size is filled in. Default: a 1.7 M model."
        ),
    ] = None,
    head: Annotated[
        str, typer.Option(help="dense, or vq: tokens share --codebook-size vectors (VQ-logits).")
    ] = "dense",
    codebook_size: Annotated[
        int, typer.Option(help="Vectors of --head vq; its codes follow the training (straight-through).")
    ] = _CODEBOOK_SIZE,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps. Default: what --minutes allows.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Train about this long; not used with --steps.")] = 5.0,
    vocab_size: Annotated[int, typer.Option(help="Tokens of the tokenizer trained on --data.")] = _VOCAB_SIZE,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a packed batch, at most.")] = _BATCH_TOKENS,
    learning_rate: Annotated[
        float, typer.Option(help="After a short linear warm-up, constant.")
    ] = _LEARNING_RATE,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the data.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's choice.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in --output; its own options hold, --threads aside."
        ),
    ] = False,
) -> None:
    """Train a small HRM-Text on instruction-response text.

    Ctrl-C ends the current step and saves; **--resume** goes on from there, bit for bit where the number of
    threads is the same. Under **torchrun --nproc-per-node N -m fastattn.cli train ...** N processes share the weights
    and each batch (FSDP2), with --threads each; a run may go on with another N, its losses then close.
    The folder then answers: **fastattn generate --model DIR "prompt"**.
    """
    if model not in ("hrm-text", "hrm"):
        raise ValueError(f"--model is {model!r}; it must be hrm-text or hrm")
    import torch

    from fastattn import training_ranks

    ranks = training_ranks.launched()
    if ranks and model == "hrm":
        raise ValueError("--model hrm is for one process, not for torchrun")
    if ranks and steps is None and not resume:
        raise ValueError("give --steps: --minutes is for one process, not for torchrun")
    if model == "hrm":
        given = {
            "--held-out": held_out is not None,
            "--config": config is not None,
            "--head": head != "dense",
            "--codebook-size": codebook_size != _CODEBOOK_SIZE,
            "--vocab-size": vocab_size != _VOCAB_SIZE,
            "--batch-tokens": batch_tokens != _BATCH_TOKENS,
            "--learning-rate": learning_rate != _LEARNING_RATE,
            "--resume": resume,
        }
        for option in (option for option, is_given in given.items() if is_given):
            raise ValueError(
                f"{option} is for --model hrm-text; HRM's own options are under fastattn train-hrm"
            )
        from fastattn.cli.train_hrm import train_hrm

        limits = {} if steps is None else {"steps": steps}
        return train_hrm(output, str(data), minutes=minutes, seed=seed, threads=threads, **limits)

    if head not in ("dense", "vq"):
        raise ValueError(f"--head is {head!r}; it must be dense or vq")
    if head == "dense" and codebook_size != _CODEBOOK_SIZE:
        raise ValueError("--codebook-size is for --head vq")
    changes = (
        {"head": "vq", "codebook_size": codebook_size, "codebook_assignment": "straight_through"}
        if head == "vq"
        else {}
    )

    from fastattn.cli import _run
    from fastattn.data.jsonl import read_jsonl
    from fastattn.data.tokenizer import Tokenizer
    from fastattn.training import TrainConfig, Trainer

    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)
    if ranks:
        training_ranks.start()
        _run.console.quiet = not training_ranks.first()
    examples = read_jsonl(data)
    if held_out is None:
        test = examples[19::20]
        examples = [example for i, example in enumerate(examples) if i % 20 != 19]
    else:
        test = read_jsonl(held_out)
    if resume:
        tokenizer = Tokenizer.load(output)
        trainer = Trainer.resume(output, tokenizer, tokenizer.samples(examples), tokenizer.samples(test))
        _run.console.print(f"resuming {output} at step {trainer.step_number:,} of {trainer.config.steps:,}")
        if trainer.threads != torch.get_num_threads():
            _run.console.print(
                f"the run was on {trainer.threads} threads and goes on with {torch.get_num_threads()}: results "
                "will be close, not equal bit by bit"
            )
    else:
        if training_ranks.has_state(output):
            raise ValueError(
                f"{output}: holds a run already; give --resume to go on with it, or another folder"
            )
        tokenizer = Tokenizer.train(examples, vocab_size)
        shape = _run.model_config(config, tokenizer.vocab_size, **changes)
        options = TrainConfig(
            steps=1 if steps is None else steps,
            batch_tokens=batch_tokens,
            learning_rate=learning_rate,
            seed=seed,
        )
        trainer = _run.start(
            output, shape, tokenizer, tokenizer.samples(examples), tokenizer.samples(test), options
        )
        if steps is None:
            _run.plan_steps(trainer, minutes)
    if ranks:
        trainer.shard()
    finished = _run.train(trainer)
    if not finished:
        _run.console.print(f"saved at step {trainer.step_number:,}; go on with --resume")
    if ranks:
        first = training_ranks.first()
        training_ranks.leave()
        if not first or not finished:
            training_ranks.end(0 if finished else 130)
        trainer = Trainer.resume(output, tokenizer, tokenizer.samples(examples), tokenizer.samples(test))
    if not finished:
        raise typer.Exit(130)
    path = _run.write_report(
        trainer,
        f"fastattn train: {data.name}",
        f"HRM-Text trained on {len(examples):,} examples, evaluated on {len(test):,} held out.",
        _run.answers(trainer, test[:8]),
        output / "report.html",
    )
    _run.console.print(f"model in {output}, report in {path}")
    if ranks:
        training_ranks.end(0)
