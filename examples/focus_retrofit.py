"""Focus on a model that was trained without it: perplexity and kept pairs against the groups a token has.

    python examples/focus_retrofit.py     about 6 minutes on two cores; stop and repeat at will

Trains a small Llama of transformers on the demo's text, freezes it, gives each layer a FocusRouter, trains only
those (or leaves them as they were drawn), and evaluates with hard groups through fa.grouped_attention.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from _common import Study, chunks, markdown, options, text_stream, train, windows
from torch import Tensor

import fastattn as fa
from fastattn.nn import FocusRouter
from fastattn.runtime import pictures

VOCABULARY, LENGTH, WINDOW, GROUPS = 512, 512, 8, 8
TOP_K = (1, 2, 3, 4, 6, 8)
HELD_OUT = 32768
ROUTERS = {"untrained": None, "trained, gate multiply": "multiply", "trained, gate log": "log"}


def small_llama(vocabulary: int, width: int, heads: int, layers: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    fa.integrations.transformers.register()
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=LENGTH,
        attn_implementation="fastattn",
    )
    return LlamaForCausalLM(config)


def loss_of(model, pieces: Tensor) -> Tensor:
    """Mean cross-entropy of (B, L + 1) tokens."""
    hidden = model.model(input_ids=pieces[:, :-1], use_cache=False).last_hidden_state
    return fa.linear_cross_entropy(hidden, model.lm_head.weight, pieces[:, 1:])


@torch.no_grad()
def held_out_loss(model, held_out: Tensor) -> float:
    tokens = min(HELD_OUT, (len(held_out) - 1) // LENGTH * LENGTH)
    batches = chunks(held_out, LENGTH, tokens).split(4)
    return sum(loss_of(model, batch).item() * len(batch) for batch in batches) * LENGTH / tokens


@contextmanager
def signatures(routers, none: bool = False) -> Iterator[list[Tensor]]:
    """Collects the signatures (B, L) that the routers give; `none`: gives tokens no group, the window alone."""
    seen: list[Tensor] = []

    def of(router: FocusRouter):
        def signature(h: Tensor, **kwargs):
            groups, potentials = FocusRouter.signature(router, h, **kwargs)
            groups = torch.zeros_like(groups) if none else groups
            seen.append(groups)
            return groups, potentials

        return signature

    for router in routers:
        router.signature = of(router)
    try:
        yield seen
    finally:
        for router in routers:
            del router.signature


def kept_pairs(signature: Tensor) -> float:
    """Fraction of the causal pairs that grouped_attention attends, for signatures (B, L)."""
    i = torch.arange(signature.shape[1])
    distance = i[:, None] - i
    near = (distance >= 0) & (distance <= WINDOW)
    shared = (signature[:, :, None] & signature[:, None, :] != 0) & (distance > WINDOW)
    causal = len(i) * (len(i) + 1) / 2
    return ((near | shared).sum((1, 2)) / causal).mean().item()


def swept(model, routers, held_out: Tensor) -> dict[str, dict[str, float]]:
    """{top_k: loss and kept pairs} of hard groups; "0" is the window alone."""
    routers.eval()
    found = {}
    for top_k in (0, *TOP_K):
        for router in routers:
            router.top_k = max(1, top_k)
        with signatures(routers, none=top_k == 0) as seen:
            loss = held_out_loss(model, held_out)
        found[str(top_k)] = {"loss": loss, "kept": sum(map(kept_pairs, seen)) / len(seen)}
    return found


def main(argv: Sequence[str] | None = None, shape: dict | None = None) -> Study:
    given = options(__doc__, steps=500, argv=argv)
    shape = shape or {"width": 128, "heads": 4, "layers": 3}
    study = Study("focus_retrofit", given, window=WINDOW, groups=GROUPS)
    tokenizer, stream, held_out = text_stream(VOCABULARY)
    folder = given.output / "focus_retrofit"

    def base() -> dict:
        torch.manual_seed(given.seed)
        model = small_llama(tokenizer.vocab_size, **shape)
        batches = windows(stream, LENGTH, 4, given.seed)
        optimizer = train(
            lambda pieces: loss_of(model, pieces), list(model.parameters()), batches, given.steps, 4e-3
        )
        with optimizer.averaged():
            model.eval().save_pretrained(folder)
            return {"loss": held_out_loss(model, held_out)}

    def retrofitted(gate: str | None) -> dict:
        model = type(small_llama(tokenizer.vocab_size, **shape)).from_pretrained(folder)
        torch.manual_seed(given.seed)
        routers = FocusRouter.retrofit(model, groups=GROUPS, window=WINDOW, gate=gate or "multiply")
        if gate is not None:
            batches = windows(stream, LENGTH, 4, given.seed + 1)
            train(
                lambda pieces: loss_of(model, pieces),
                list(routers.parameters()),
                batches,
                max(1, given.steps // 2),
                4e-3,
            )
        return swept(model, routers, held_out)

    study.run("full attention", base)
    for name, gate in ROUTERS.items():
        study.run(name, lambda gate=gate: retrofitted(gate))
    study.finish(table(study.runs), {"focus_retrofit": picture(study.runs)})
    return study


def table(runs: dict) -> str:
    """Perplexity and kept pairs by top_k."""
    full = math.exp(runs["full attention"]["loss"])
    rows = []
    for top_k in map(str, (0, *TOP_K)):
        cells = [runs[name][top_k] for name in ROUTERS]
        rows.append(
            [
                "0 (window alone)" if top_k == "0" else top_k,
                *(f"{math.exp(cell['loss']):.2f} ({100 * cell['kept']:.0f} %)" for cell in cells),
            ]
        )
    return markdown(["top_k", *ROUTERS], [*rows, ["full attention", *[f"{full:.2f} (100 %)"] * len(ROUTERS)]])


def picture(runs: dict):
    drawing, axes = pictures.figure(3.8)
    for color, name in zip(pictures.LINES, ROUTERS, strict=False):
        points = [(100 * cell["kept"], math.exp(cell["loss"])) for cell in runs[name].values()]
        axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=name)
        for top_k, point in zip(runs[name], points, strict=True):
            axes.annotate(top_k, point, (3, 4), textcoords="offset points", color=color, fontsize=7)
    full = math.exp(runs["full attention"]["loss"])
    axes.axhline(full, color=pictures.INK, linewidth=1, linestyle=":", label="full attention")
    axes.set_xlabel("pairs kept, % of the causal ones (the numbers are top_k)")
    axes.set_ylabel("held-out perplexity")
    axes.legend(frameon=False, labelcolor=pictures.INK, fontsize=8)
    return drawing


if __name__ == "__main__":
    main()
