"""The score table: how a scaled product s becomes an attention weight. One row a score.

A new score is one row here, one functor in src/cpu/attention_score.h and one pair of functions in scores_triton.py.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Score:
    """code: its number in schemas and kernels. weight: s -> unnormalised weight (softmax subtracts the row maximum itself).
    normalised: weights are divided by their row sum, and a log-sum-exp exists.
    log_n_bias: the default bias is -log(keys of the row's sequence) instead of 0.
    shifted: kernels subtract the row maximum from s first, because the weight would overflow otherwise.
    """

    name: str
    code: int
    weight: Callable[[torch.Tensor], torch.Tensor]
    normalised: bool
    log_n_bias: bool
    shifted: bool = False

    @property
    def triton(self) -> tuple[Any, Any]:
        """The score's Triton functions: (weight, its derivative). Imports triton."""
        column = importlib.import_module("fastattn.ops.attention.scores_triton")
        return getattr(column, f"{self.name}_weight"), getattr(column, f"{self.name}_derivative")


SCORES: dict[str, Score] = {
    row.name: row
    for row in (
        Score("softmax", 0, torch.exp, normalised=True, log_n_bias=False, shifted=True),
        Score("sigmoid", 1, torch.sigmoid, normalised=False, log_n_bias=True),
        Score("softplus", 2, F.softplus, normalised=True, log_n_bias=False),
    )
}


def has_residual(dtype: torch.dtype, code: int) -> bool:
    """Whether attention keeps the rounding error of its output: if the output has 16 bits and the backward reads it."""
    return dtype in (torch.bfloat16, torch.float16) and BY_CODE[code].normalised


class _ByCode(dict[int, Score]):
    def __missing__(self, code: int) -> Score:
        raise ValueError(f"fastattn: {self.unknown(code)}")

    def unknown(self, code: int) -> str:
        known = ", ".join(f"{row.code} ({row.name})" for row in self.values())
        return f"score must be one of {known}, given {code!r}"


BY_CODE = _ByCode({row.code: row for row in SCORES.values()})
