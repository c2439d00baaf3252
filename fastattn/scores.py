"""The score table: how a scaled product s becomes an attention weight. One row a score.

A new score is one row here and one functor in src/common/score.h.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Score:
    """code: its number in schemas and kernels. weight: s -> unnormalised weight (softmax subtracts the row maximum itself).
    normalised: weights are divided by their row sum, and a log-sum-exp exists.
    log_n_bias: the default bias is -log(keys of the row's sequence) instead of 0.
    """

    name: str
    code: int
    weight: Callable[[torch.Tensor], torch.Tensor]
    normalised: bool
    log_n_bias: bool


SCORES: dict[str, Score] = {
    row.name: row
    for row in (
        Score("softmax", 0, torch.exp, normalised=True, log_n_bias=False),
        Score("sigmoid", 1, torch.sigmoid, normalised=False, log_n_bias=True),
        Score("softplus", 2, F.softplus, normalised=True, log_n_bias=False),
    )
}
BY_CODE: dict[int, Score] = {row.code: row for row in SCORES.values()}
