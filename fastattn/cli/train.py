"""`fastattn train`."""

from pathlib import Path
from typing import Annotated

import typer

from fastattn.cli._console import flag
from fastattn.runtime.hints import did_you_mean

_SUDOKU = ("sudoku", "sudoku-4x4", "sudoku-9x9")
_TEXT_ONLY = (
    "tokenizer",
    "held_out",
    "config",
    "head",
    "codebook_size",
    "vocab_size",
    "batch_tokens",
    "too_long",
)
_HRM_ONLY = ("shape", "blanks", "puzzles", "batch_size", "eval_puzzles")
_PUZZLE_VECTORS = ("puzzle_learning_rate", "puzzle_weight_decay")
_RATES = ("learning_rate", "schedule", "min_learning_rate_ratio", "warmup_steps", "weight_decay", "ema")
_TEXT, _HRM = {"rich_help_panel": "HRM-Text"}, {"rich_help_panel": "HRM"}


def register(app: typer.Typer) -> None:
    app.command()(train)


def train(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="hrm-text: a file of instructions and responses: JSONL, JSON, CSV or parquet, also .gz or .zst, with the usual "
            "fields (instruction and response or output, prompt and completion, messages, conversations ...). hrm: sudoku (4 x 4), "
            "sudoku-9x9, or a folder in HRM's layout with train and test splits."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the model, its training state and report.html. Needed.")
    ] = None,
    model: Annotated[str, typer.Option(help="hrm-text, or hrm: puzzles.")] = "hrm-text",
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps. Default: what --minutes allows.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Train about this long, unless --steps is given.")] = 5.0,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="After a linear warm-up. Default: 4e-3, or 1.5e-3 for hrm."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="Of the learning rate after the warm-up: constant, the default, or cosine."),
    ] = None,
    min_learning_rate_ratio: Annotated[
        float | None,
        typer.Option(help="With --schedule cosine: share of the rate at the last step. Default: 0."),
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(help="Of the learning rate. Default: 20, or 50 for hrm; fewer in a short run."),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: 0.1.")] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            help="Decay of the averaged weights that are evaluated and saved. Default: by the steps; 0: no average."
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data, in place of --steps or --minutes.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the weights, of generated puzzles and of the order of the data.")
    ] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's choice.")] = None,
    resume: Annotated[
        bool,
        flag(
            "--resume",
            "Continue the run in --output. It keeps its options: another value is refused, except for --threads.",
        ),
    ] = False,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Start from the weights of a model's folder, a released, converted or own one. Its shape and, for "
            "hrm-text, its tokenizer are taken; hrm: puzzles in another number start at the mean of its vectors."
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="JSONL file to evaluate on. Default: every 20th example of --data.", **_TEXT),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with HrmTextConfig keys; vocab_size is filled in. Default: a model of 1.7 M parameters.",
            **_TEXT,
        ),
    ] = None,
    head: Annotated[
        str, typer.Option(help="dense, or vq: tokens share --codebook-size vectors (VQ-logits).", **_TEXT)
    ] = "dense",
    codebook_size: Annotated[
        int,
        typer.Option(help="Vectors of --head vq; its codes follow the training (straight-through).", **_TEXT),
    ] = 256,
    vocab_size: Annotated[
        int, typer.Option(help="Tokens of the tokenizer trained on --data.", **_TEXT)
    ] = 2048,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="tokenizer.json, or a folder with it, in place of one trained on --data. Special tokens that it lacks "
            "(the format's, and tags) are added.",
            **_TEXT,
        ),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens in a packed batch.", **_TEXT)] = 1024,
    too_long: Annotated[
        str,
        typer.Option(
            help="Examples of more tokens than the model or a batch takes: skip leaves them out, cut shortens their responses, "
            "refuse names the first.",
            **_TEXT,
        ),
    ] = "skip",
    shape: Annotated[
        str,
        typer.Option(
            help="small: learns within minutes; trm: TRM's shape, as small; published: HRM's 27 M parameters.",
            **_HRM,
        ),
    ] = "small",
    blanks: Annotated[
        str | None,
        typer.Option(help="Blank cells of Sudoku, FEWEST-MOST. Default: 6-10, or 4-12 for 9 x 9.", **_HRM),
    ] = None,
    puzzles: Annotated[
        int,
        typer.Option(
            help="Sudoku puzzles to generate for training. A tenth as many are held out, at most 200 (9 x 9: 100).",
            **_HRM,
        ),
    ] = 2000,
    batch_size: Annotated[int, typer.Option(help="Puzzles a step.", **_HRM)] = 64,
    puzzle_learning_rate: Annotated[
        float | None, typer.Option(help="Of the puzzles' vectors. Default: as of the weights.", **_HRM)
    ] = None,
    puzzle_weight_decay: Annotated[
        float | None, typer.Option(help="Of the puzzles' vectors. Default: as of the weights.", **_HRM)
    ] = None,
    eval_puzzles: Annotated[
        str,
        typer.Option(
            help="Held-out puzzles that an evaluation solves, the same ones each time; or all.", **_HRM
        ),
    ] = "256",
) -> None:
    """Train a small HRM-Text on instruction-response text, or HRM on puzzles.

    Ctrl-C ends the current step and saves. **--resume** continues from there, bit for bit where the number of threads
    is the same. Under **torchrun --nproc-per-node N -m fastattn.cli train ...** N processes share each batch, and
    HRM-Text's weights (FSDP2), with --threads each. A run may continue with another N; its losses are then close, not
    equal. A trained HRM-Text answers with **fastattn generate --model DIR "prompt"**. A 4 x 4 Sudoku that is held out is
    no image of a training puzzle under Sudoku's symmetries; its solved grid is, as the 288 grids are images of two.
    """
    if model not in ("hrm-text", "hrm"):
        raise ValueError(f"--model is {model!r}; it must be hrm-text or hrm")
    from fastattn.cli import _resume

    for name in (*_HRM_ONLY, *_PUZZLE_VECTORS) if model == "hrm-text" else _TEXT_ONLY:
        if _resume.given_by_user(context, name):
            raise ValueError(f"--{name.replace('_', '-')} is not for --model {model}")
    if model == "hrm" and data not in _SUDOKU:
        for name in ("blanks", "puzzles"):
            if _resume.given_by_user(context, name):
                raise ValueError(f"--{name} is for Sudoku that is made, not for a folder of puzzles")
    if min_learning_rate_ratio is not None and schedule != "cosine" and not resume:
        raise ValueError("--min-learning-rate-ratio is for --schedule cosine")
    lengths = [name for name in ("steps", "epochs", "minutes") if _resume.given_by_user(context, name)]
    if len(lengths) > 1 and not resume:
        raise ValueError(f"--{lengths[0]} and --{lengths[1]} exclude each other; give one")
    if resume:
        _resume.refuse(context, "init", "tokenizer", "epochs")
    for option, value, others in (
        ("--init", init, ("config", "head", "codebook_size", "vocab_size", "tokenizer", "shape")),
        ("--tokenizer", tokenizer, ("vocab_size",)),
    ):
        for name in others if value is not None else ():
            if _resume.given_by_user(context, name):
                raise ValueError(f"--{name.replace('_', '-')} is not for {option}")
    _check_data(data, model)
    if output is None:
        raise ValueError(
            "--output is missing: a folder for the model and its report, such as --output runs/first"
        )
    import torch

    from fastattn.cli import _run
    from fastattn.train import ranks as training_ranks
    from fastattn.train.state import STATE

    ranks = training_ranks.launched()
    if ranks and steps is None and epochs is None and not resume:
        raise ValueError("give --steps or --epochs: --minutes is for one process, not for torchrun")
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)
    given = {name: context.params[name] for name in (*_RATES, *_PUZZLE_VECTORS)}
    given = {name: value for name, value in given.items() if value is not None}
    if resume:
        if not training_ranks.has_state(output):
            raise FileNotFoundError(f"{output / STATE}: no such file; there is no run to resume")
        if model == "hrm-text" and _run.model_type(output) == "hrm":
            raise ValueError(f"{output}: is a run of hrm, not of hrm-text; give --model hrm")
    elif training_ranks.has_state(output):
        raise ValueError(f"{output}: holds a run already; give --resume to go on with it, or another folder")
    if ranks:
        training_ranks.start()
        _run.console.quiet = not training_ranks.first()
    if model == "hrm":
        from fastattn.cli import _puzzles

        if resume:
            run = _puzzles.resume(output, data)
            _resume.check_puzzles(context, run, data)
            _run.say_resumed(run, _resume.given_by_user(context, "minutes"))
        else:
            run = _puzzles.start(
                *(output, data),
                shape=shape,
                blanks=blanks,
                puzzles=puzzles,
                seed=seed,
                init=init,
                steps=1 if steps is None else steps,
                batch_size=batch_size,
                eval_puzzles=_puzzles.number_or_all("eval-puzzles", eval_puzzles),
                **given,
            )
            if epochs is not None:
                _run.plan_epochs(run, epochs)
            elif steps is None:
                _run.plan_steps(run, minutes, _puzzles.EVALUATIONS, given)
        if ranks:
            run.share()
        finished = _run.train(run, limit_s=66 * minutes if not resume and steps is epochs is None else None)
        if not finished:
            _run.console.print(f"saved at step {run.step_number:,}; go on with --resume")
        if ranks:
            _leave(finished)
            run = _puzzles.resume(output, data)
        if not finished:
            raise typer.Exit(130)
        path = _puzzles.write_report(run, data, output)
        _run.console.print(f"model in {output}, report in {path}")
        if ranks:
            training_ranks.end(0)
        return

    if too_long not in ("skip", "cut", "refuse"):
        raise ValueError(f"--too-long is {too_long!r}; it must be skip, cut or refuse")
    if head not in ("dense", "vq"):
        raise ValueError(f"--head is {head!r}; it must be dense or vq")
    if head == "dense" and not resume and _resume.given_by_user(context, "codebook_size"):
        raise ValueError("--codebook-size is for --head vq")
    changes = _run.quantised(codebook_size) if head == "vq" else {}

    from fastattn.train.data.examples import read_examples
    from fastattn.train.data.tokenizer import Tokenizer, tags_of
    from fastattn.train.text import TrainConfig, Trainer

    read = read_examples(Path(data))
    _run.console.print(f"{data}: {read}", markup=False)
    examples = read.examples
    if held_out is None:
        test = examples[19::20]
        examples = [example for i, example in enumerate(examples) if i % 20 != 19]
    else:
        test = read_examples(held_out).examples
    if resume:
        words = Tokenizer.load(output)
        trainer = Trainer.resume(output, words, words.samples(examples), words.samples(test))
        _resume.check_text(context, trainer, examples, tags_of([*examples, *test]), **changes)
        _run.say_resumed(trainer, _resume.given_by_user(context, "minutes"))
    else:
        tags, net = tags_of([*examples, *test]), None
        if init is not None:
            words = Tokenizer.load(init)
            net = _run.initial_model(init, words)
            shape = net.config
        else:
            if tokenizer is None:
                words = Tokenizer.train(examples, vocab_size, tags)
            else:
                words = Tokenizer.load(tokenizer, added=tags)
            shape = _run.with_ends(_run.model_config(config, words.vocab_size, **changes), words)
        options = TrainConfig(
            steps=1 if steps is None else steps,
            batch_tokens=batch_tokens,
            too_long=too_long,
            seed=seed,
            **given,
        )
        longest = shape.max_position_embeddings
        limits = (min(batch_tokens, longest), longest) if too_long == "refuse" else (None, None)
        trainer = _run.start(
            *(output, shape, words),
            words.samples(examples, limits[0]),
            words.samples(test, limits[1]),
            options,
            net,
        )
        if epochs is not None:
            _run.plan_epochs(trainer, epochs)
        elif steps is None:
            _run.plan_steps(trainer, minutes, given=given)
    if trainer.too_long:
        what = "were left out" if trainer.config.too_long == "skip" else "were cut"
        _run.console.print(f"{trainer.too_long:,} examples of too many tokens {what} (--too-long)")
    if ranks:
        trainer.shard()
    finished = _run.train(trainer)
    if not finished:
        _run.console.print(f"saved at step {trainer.step_number:,}; go on with --resume")
    if ranks:
        _leave(finished)
        trainer = Trainer.resume(output, words, words.samples(examples), words.samples(test))
    if not finished:
        raise typer.Exit(130)
    path = _run.write_report(
        trainer,
        f"fastattn train: {Path(data).name}",
        f"HRM-Text trained on {len(examples):,} examples, evaluated on {len(test):,} held out.",
        _run.answers(trainer, test[:8]),
        output / "report.html",
    )
    _run.console.print(f"model in {output}, report in {path}")
    if ranks:
        training_ranks.end(0)


def _check_data(data: str, model: str) -> None:
    """Raises where --data is no file or folder, with what was probably meant."""
    if data in _SUDOKU:
        if model == "hrm-text":
            raise ValueError(
                f"--data {data} is for HRM: fastattn train --model hrm --data {data} --output DIR"
            )
    elif not Path(data).exists():
        meant = did_you_mean(data, _SUDOKU, "--model hrm --data {}")
        if meant or model == "hrm-text":  # what a folder of puzzles lacks is said where it is read
            raise FileNotFoundError(f"{data}: no such file{meant}")


def _leave(finished: bool) -> None:
    """Parts from the other processes of torchrun; only the first of a finished run goes on, to write the report."""
    from fastattn.train import ranks

    first = ranks.first()
    ranks.leave()
    if not first or not finished:
        ranks.end(0 if finished else 130)
