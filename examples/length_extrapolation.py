"""Loss at 16 times the training length: softmax, sigmoid and softplus attention, with and without re-weighting.

    python examples/length_extrapolation.py       about 8 minutes on two cores; stop and repeat at will

Trains small decoders that differ in nothing but their attention on 256 tokens of the demo's text, then measures the
held-out loss of the same tokens cut into pieces of 256 to 4096.
"""

from collections.abc import Sequence
from functools import partial

import torch
from _common import Study, chunks, markdown, options, text_stream, train, windows
from torch import Tensor, nn

import fastattn as fa
from fastattn.nn.blocks import PreNormBlock, PreNormStack, Routing, clipped_normal_
from fastattn.runtime import pictures

VOCABULARY, TRAINED, LENGTHS = 512, 256, (256, 512, 1024, 2048, 4096)
HELD_OUT = 32768
ATTENTION = {
    "softmax": fa.attention,
    "sigmoid": fa.sigmoid_attention,
    "LSSA": fa.lssa_attention,
    "LSSAR p=3": partial(fa.lssa_attention, power=3),
    "LSSAR p=15": partial(fa.lssa_attention, power=15),
}


class Decoder(nn.Module):
    """A causal language model of pre-norm blocks with rotary positions and one kind of attention."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, attend) -> None:
        super().__init__()
        inner = 128 * round(width * 8 / 3 / 128) or 64
        self.embedding = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        blocks = [
            PreNormBlock(width, heads, width // heads, inner, rope_theta=1e4, eps=1e-6, attend=attend)
            for _ in range(layers)
        ]
        self.stack = PreNormStack(blocks, eps=1e-6)
        clipped_normal_(self.embedding.weight, 1.0)
        clipped_normal_(self.head.weight, width**-0.5)
        for block in blocks:
            block.attn.reset_parameters(width**-0.5, width**-0.5)
            block.mlp.reset_parameters(width**-0.5, inner**-0.5)

    def loss(self, pieces: Tensor) -> Tensor:
        """Mean cross-entropy of (B, L + 1) tokens."""
        x = self.embedding(pieces[:, :-1])
        routing = Routing(fa.Mask(causal=True), torch.arange(x.shape[1]))
        hidden = self.stack(x, torch.zeros_like(x), routing)
        return fa.linear_cross_entropy(hidden, self.head.weight, pieces[:, 1:])


def measured(
    attend, stream: Tensor, held_out: Tensor, given, shape: dict, vocabulary: int
) -> dict[str, float]:
    """Held-out loss at each length after training at TRAINED."""
    torch.manual_seed(given.seed)
    model = Decoder(vocabulary, **shape, attend=attend)
    batches = windows(stream, TRAINED, 8, given.seed)
    optimizer = train(model.loss, list(model.parameters()), batches, given.steps, 4e-3)
    tokens = min(HELD_OUT, (len(held_out) - 1) // LENGTHS[-1] * LENGTHS[-1])
    with optimizer.averaged(), torch.no_grad():
        return {
            str(length): sum(model.loss(piece[None]).item() for piece in pieces) / len(pieces)
            for length in LENGTHS
            for pieces in [chunks(held_out, length, tokens)]
        }


def main(argv: Sequence[str] | None = None, shape: dict | None = None) -> Study:
    given = options(__doc__, steps=600, argv=argv)
    shape = shape or {"width": 128, "heads": 4, "layers": 3}
    study = Study("length_extrapolation", given)
    tokenizer, stream, held_out = text_stream(VOCABULARY)
    for name, attend in ATTENTION.items():
        study.run(name, lambda a=attend: measured(a, stream, held_out, given, shape, tokenizer.vocab_size))
    study.finish(table(study.runs), {"length_extrapolation": picture(study.runs)})
    return study


def table(runs: dict) -> str:
    """Loss by attention and length."""
    rows = [[name, *(f"{runs[name][str(length)]:.3f}" for length in LENGTHS)] for name in ATTENTION]
    return markdown(["attention", *map(str, LENGTHS)], rows)


def picture(runs: dict):
    drawing, axes = pictures.figure(3.8)
    for color, name in zip(pictures.LINES, ATTENTION, strict=False):
        axes.plot(
            LENGTHS,
            [runs[name][str(length)] for length in LENGTHS],
            "o-",
            color=color,
            markersize=4,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, map(str, LENGTHS))
    axes.set_xlabel(f"tokens in a piece (trained at {TRAINED})")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(frameon=False, labelcolor=pictures.INK, fontsize=8)
    return drawing


if __name__ == "__main__":
    main()
