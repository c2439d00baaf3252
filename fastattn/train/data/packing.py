"""Samples laid end to end, so that no computation is spent on padding."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastattn.train.data.tokenizer import Sample

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """N samples packed into one row of T tokens; positions and attention restart at each."""

    input_ids: torch.Tensor  # (1, T) int64
    labels: torch.Tensor  # (1, T) int64: response tokens, IGNORED elsewhere
    cu_seqlens: torch.Tensor  # (N + 1,) int32
    prompt_lengths: torch.Tensor  # (N,) int32

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def response_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())


def pack(samples: list[Sample]) -> Batch:
    """Packs all of `samples` in their order."""
    ids, labels, ends, prefixes = [], [], [0], []
    for tokens, prefix in samples:
        ids += tokens
        labels += [IGNORED] * prefix + tokens[prefix:]
        ends.append(len(ids))
        prefixes.append(prefix)
    return Batch(
        input_ids=torch.tensor([ids]),
        labels=torch.tensor([labels]),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        prompt_lengths=torch.tensor(prefixes, dtype=torch.int32),
    )


def check_lengths(samples: list[Sample], longest: int, what: str) -> None:
    """ValueError naming the first sample of more than `longest` tokens."""
    for number, sample in enumerate(samples, 1):
        if len(sample.tokens) > longest:
            raise ValueError(
                f"{what}: example {number} has {len(sample.tokens)} tokens; at most {longest} are allowed"
            )


def fitted(samples: list[Sample], longest: int, too_long: str, what: str) -> tuple[list[Sample], int]:
    """(samples of at most `longest` tokens, how many others there were). `too_long`: "skip" leaves those out, "cut" shortens
    their responses and leaves out what has no room for one token of it, "refuse" raises ValueError."""
    if too_long == "refuse":
        check_lengths(samples, longest, what)
    fit = [sample for sample in samples if len(sample.tokens) <= longest]
    others = len(samples) - len(fit)
    if too_long == "cut" and others:
        fit = [
            Sample(sample.tokens[:longest], sample.prefix_length)
            for sample in samples
            if sample.prefix_length < longest
        ]
    if samples and not fit:
        shortest = min(len(sample.tokens) for sample in samples)
        raise ValueError(f"{what}: no example has at most {longest} tokens, the shortest has {shortest}")
    return fit, others


def batches(samples: list[Sample], batch_tokens: int) -> Iterator[Batch]:
    """Every sample once, in order, at most `batch_tokens` tokens a batch."""
    position = 0
    while position < len(samples):
        taken, position = _take(samples, range(len(samples)), position, batch_tokens)
        yield pack(taken)


class Order:
    """An endless shuffled stream of batches whose place is two numbers, so that a run can resume exactly.

    Each epoch is a permutation of the samples made from (seed, epoch) alone.
    """

    def __init__(
        self, samples: list[Sample], batch_tokens: int, seed: int, epoch: int = 0, position: int = 0
    ):
        if not samples:
            raise ValueError("Order: there are no samples")
        check_lengths(samples, batch_tokens, "Order")
        self._samples, self._batch_tokens, self._seed = samples, batch_tokens, seed
        self.epoch, self.position = epoch, position
        self._permutation = self._shuffled(epoch)

    def next(self) -> Batch:
        """The next batch; an epoch's last one may be short."""
        if self.position >= len(self._samples):
            self.epoch, self.position = self.epoch + 1, 0
            self._permutation = self._shuffled(self.epoch)
        taken, self.position = _take(self._samples, self._permutation, self.position, self._batch_tokens)
        return pack(taken)

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._samples), generator=generator).tolist()


def _take(samples: list[Sample], order, position: int, batch_tokens: int) -> tuple[list[Sample], int]:
    taken, total = [], 0
    while position < len(samples):
        sample = samples[order[position]]
        if taken and total + len(sample.tokens) > batch_tokens:
            break
        taken.append(sample)
        total += len(sample.tokens)
        position += 1
    return taken, position
