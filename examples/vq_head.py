"""A dense output layer against quantised ones on real text: held-out loss, parameters, time.

    python examples/vq_head.py            about 15 minutes on two cores; stop and repeat at will

Trains the demo's small HRM-Text (fastattn.train.data.stdlib) with a dense head and with VQ heads of K vectors, with and
without a bias a token; then converts the dense one by k-means and trains it on for a fifth of the steps.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from _common import Study, markdown, options

import fastattn as fa
from fastattn.cli._run import SMALL_MODEL
from fastattn.models import HrmText, HrmTextConfig
from fastattn.runtime import pictures
from fastattn.train.data import stdlib
from fastattn.train.data.tokenizer import Tokenizer
from fastattn.train.text import TrainConfig, Trainer

VOCABULARY, SIZES = 2048, (64, 256, 1024, 2048)
BIASES = ("bias", "no bias", "bias from counts")
OTHERS = ("fixed", "ema")  # ways to find codes, tried at K = 256
FURTHER_RATE = 1e-3  # of the steps after a conversion


class Data:
    """The demo's tokenizer and samples."""

    def __init__(self, shape: dict | None) -> None:
        examples, held_out = stdlib.build()
        self.tokenizer = Tokenizer.train(examples, VOCABULARY)
        self.samples, self.held_out = map(self.tokenizer.samples, (examples, held_out))
        self.shape = SMALL_MODEL if shape is None else shape

        said = [token for sample in self.samples for token in sample.tokens[sample.prefix_length :]]
        counts = torch.bincount(torch.tensor(said), minlength=self.tokenizer.vocab_size)
        self.log_counts = (counts + 1.0).log()  # (V,), of the tokens that are predicted

    def model(self, **head) -> HrmText:
        return HrmText(HrmTextConfig(vocab_size=self.tokenizer.vocab_size, **self.shape, **head))

    def quantised(self, size: int, bias: str) -> HrmText:
        """A fresh model; "bias from counts" starts from how often each token occurs."""
        moving = {"head": "vq", "codebook_assignment": "straight_through"}
        model = self.model(**moving, codebook_size=size, codebook_bias=bias != "no bias")
        if bias == "bias from counts":
            with torch.no_grad():
                model.lm_head.bias.copy_(self.log_counts - self.log_counts.logsumexp(0))
        return model

    def converted(self, folder: Path, size: int, bias: str, seed: int) -> HrmText:
        """The dense model of `folder`; "bias from counts" tells a code's tokens apart and leaves the code's weight."""
        model = HrmText.from_pretrained(folder)
        model.quantize_head(size, bias=bias != "no bias", seed=seed, progress=False)
        if bias == "bias from counts":
            codes = model.lm_head.codes
            members = torch.bincount(codes, minlength=size)
            mean = torch.zeros(size).index_add_(0, codes, self.log_counts.exp()) / members
            with torch.no_grad():
                model.lm_head.bias.copy_(self.log_counts - mean[codes].log())
        return model


def trained(
    folder: Path, make: Callable[[], HrmText], data: Data, steps: int, seed: int, further: bool = False
) -> dict:
    """Trains what `make` gives and says what it reached; `further`: from a trained model."""
    torch.manual_seed(seed)
    model = make()
    config = TrainConfig(
        steps=steps,
        seed=seed + further,
        ema=1 - 1 / max(5.0, steps / 15),
        warmup_steps=min(20, max(1, steps // 10)),
        **({"credit_warmup": 0.0, "learning_rate": FURTHER_RATE} if further else {}),
    )
    trainer = Trainer(folder, model, data.tokenizer, data.samples, data.held_out, config)
    before = trainer.evaluate()["held_out"] if further else None
    rows = [trainer.step() for _ in range(steps)]
    held_out = trainer.evaluate()["held_out"]
    trainer.save()
    full = [row for row in rows if row["bp_steps"] == rows[-1]["bp_steps"]]  # these do the same work
    return {
        "before": before,
        "held_out": held_out,
        "parameters": sum(p.numel() for p in model.parameters()),
        "head": head_size(model.lm_head),
        "microseconds_per_token": 1e6 * statistics.median(row["seconds"] / row["tokens"] for row in full),
    }


def head_size(head: torch.nn.Module) -> int:
    """Parameters of the output layer that inference needs: not the rows that only the codes are found from."""
    return sum(
        p.numel()
        for name, p in head.named_parameters()
        if isinstance(head, torch.nn.Linear) or name != "weight"
    )


def head_times(
    width: int, vocabulary: int, rows: int = 1024, rounds: int = 15
) -> dict[str, dict[str, float]]:
    """Microseconds a row of each head alone, medians of interleaved rounds."""
    torch.manual_seed(0)
    h = torch.randn(rows, width, requires_grad=True)
    target = torch.randint(vocabulary, (rows,))
    dense = torch.nn.Linear(width, vocabulary, bias=False)
    calls = {
        "dense": (
            lambda: fa.linear_cross_entropy(h, dense.weight, target).backward(),
            lambda: dense(h[:1]).argmax(-1),
        )
    }
    for size in sizes(vocabulary):
        head = fa.nn.VQHead(width, vocabulary, size)
        calls[str(size)] = (
            lambda head=head: head.loss(h, target).backward(),
            lambda head=head: head.argmax(h[:1]),
        )
    taken: dict[str, list[list[float]]] = {name: [[], []] for name in calls}
    for _ in range(rounds):
        for name, both in calls.items():
            for times, call in zip(taken[name], both, strict=True):
                start = time.perf_counter()
                with torch.set_grad_enabled(times is taken[name][0]):
                    call()
                times.append(1e6 * (time.perf_counter() - start))
    return {
        name: {"loss": statistics.median(loss) / rows, "greedy": statistics.median(greedy)}
        for name, (loss, greedy) in taken.items()
    }


def sizes(vocabulary: int) -> list[int]:
    return [size for size in SIZES if size <= vocabulary]


def main(argv: Sequence[str] | None = None, shape: dict | None = None) -> Study:
    given = options(__doc__, steps=250, argv=argv)
    study = Study("vq_head", given)
    data = Data(shape)
    folder, steps, seed = given.output / "vq_head", given.steps, given.seed
    further = max(1, steps // 5)

    def scratch(name: str, make: Callable[[], HrmText]) -> None:
        study.run(name, lambda: trained(folder / name, make, data, steps, seed))

    def on(name: str, make: Callable[[], HrmText]) -> None:
        study.run(name, lambda: trained(folder / name, make, data, further, seed, further=True))

    dense = folder / "dense"
    study.run("times", lambda: head_times(data.shape["hidden_size"], data.tokenizer.vocab_size))
    scratch("dense", data.model)
    on("dense, further", lambda: HrmText.from_pretrained(dense))
    for size in sizes(data.tokenizer.vocab_size):
        for bias in BIASES:
            scratch(f"{size}, {bias}", partial(data.quantised, size, bias))
            on(f"{size}, {bias}, converted", partial(data.converted, dense, size, bias, seed))
    for assignment in OTHERS:
        head = {"head": "vq", "codebook_size": 256, "codebook_assignment": assignment}
        scratch(f"256, {assignment}", partial(data.model, **head))
    study.finish(table(study.runs), {"vq_head_loss": loss_picture(study.runs)})
    return study


def table(runs: dict) -> str:
    """One row a head; a dash where there was no such run."""

    def cell(name: str, key: str, form: str = ".3f") -> str:
        return format(runs[name][key], form) if name in runs else "–"

    names = [
        "dense",
        *(f"{size}, {bias}" for size in SIZES for bias in BIASES),
        *(f"256, {o}" for o in OTHERS),
    ]
    rows = []
    for name in (name for name in names if name in runs):
        after = "dense, further" if name == "dense" else f"{name}, converted"
        times = runs["times"].get(name.split(",")[0]) if name == "dense" or name.endswith(", bias") else None
        rows.append(
            [
                name if name == "dense" else f"K = {name}",
                f"{runs[name]['head']:,}",
                cell(name, "held_out"),
                cell(after, "before"),
                cell(after, "held_out"),
                f"{runs[name]['microseconds_per_token']:.0f}",
                *([f"{times['loss']:.2f}", f"{times['greedy']:.0f}"] if times else ["–", "–"]),
            ]
        )
    head = ["head", "parameters", "from scratch", "converted", "and trained on"]
    return markdown([*head, "step, µs a token", "loss, µs a token", "greedy token, µs"], rows)


def loss_picture(runs: dict):
    drawing, axes = pictures.figure(3.8)
    for color, bias in zip(pictures.LINES, BIASES, strict=False):
        for ending, style, what in (
            ("", "o-", "from scratch"),
            (", converted", "s--", "converted, trained on"),
        ):
            names = {size: f"{size}, {bias}{ending}" for size in SIZES}
            points = [(size, runs[name]["held_out"]) for size, name in names.items() if name in runs]
            if points:
                axes.plot(
                    *zip(*points, strict=True), style, color=color, markersize=4, label=f"{what}, {bias}"
                )
    for name, style in (("dense", ":"), ("dense, further", "-.")):
        axes.axhline(runs[name]["held_out"], color=pictures.INK, linewidth=1, linestyle=style, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, map(str, SIZES))
    axes.set_xlabel("vectors K (the vocabulary has 2048 tokens)")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(frameon=False, labelcolor=pictures.INK, fontsize=8)
    return drawing


if __name__ == "__main__":
    main()
