"""`fastattn.Score`: weights of attention that a Python function makes of scores, with or without a softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from .runtime import checks as _checks

STATISTICS = ("mean", "max", "count")
_NORMALISE = ("softmax", "sum", None)


@dataclass(frozen=True, repr=False)
class Score:
    """How scores become weights, as a Python function: `fastattn.attention(q, k, v, score=...)`. Make one with `Score.from_function`."""

    weight: Callable
    before: Callable | None = None
    normalise: Literal["softmax", "sum"] | None = "softmax"
    statistics: tuple[str, ...] = ()

    @classmethod
    def from_function(
        cls,
        weight: Callable,
        *,
        before: Callable | None = None,
        normalise: Literal["softmax", "sum"] | None = "softmax",
        statistics: Iterable[str] = (),
    ) -> Score:
        """A score that is a function, traced, differentiated and run in attention's tiles as `flex_attention`'s are.

        With s_ij = scale * q_i.k_j and x_ij = before(s_ij, b, h, i, j), over the keys j that the mask allows for row i:

            normalise="softmax"  out_i = sum_j softmax_j(weight(x_ij, b, h, i, j)) v_j
            normalise="sum"      out_i = sum_j w_ij v_j / sum_j w_ij,  w_ij = weight(x_ij, row_i, b, h, i, j)
            normalise=None       out_i = sum_j w_ij v_j

        weight: for "softmax" a score_mod of `flex_attention`, weight(x, b, h, q_idx, kv_idx) -> score. Otherwise
            weight(x, row, b, h, q_idx, kv_idx) -> weight; `row` has the row's `statistics` as numbers. A function may do what a score_mod may
            (`docs/flex.md`) and capture tensors, which may require a gradient. Numbers are float32.
        before: what becomes of a scaled product before statistics are taken of it, before(s, b, h, q_idx, kv_idx) -> x. Default: nothing.
        normalise: "softmax", "sum" or None. Weights may have any sign. With "sum" they are divided by their sum whatever its sign, so that
            weights of both signs may make it small and the result large and inexact: leave those undivided. A row whose sum is 0 (in
            float32 below 2^-126 in size) gives 0 and has gradient 0.
        statistics: of "mean", "max" and "count", those that weight reads as row.mean, row.max (of x) and row.count (of keys), of the keys
            that the row attends, with gradients. For "sum" and None. "mean" costs a pass over the keys more and "max" one or two; calls of
            16-bit tensors with either are computed in float32 and rounded once. A maximum passes over NaN; of equal ones the first has
            the gradient.

        A row that attends no key gives 0 and gradient 0, whatever weight is.
        Raises ValueError or TypeError, naming the argument. What a function may not do is raised by the call, as for `flex_attention`.

        Example:
            >>> relu_squared = fastattn.Score.from_function(lambda x, row, *places: torch.relu(x) ** 2, normalise="sum")
            >>> sharpened = fastattn.Score.from_function(
            ...     lambda x, row, *places: torch.relu(x - row.mean) ** 3, normalise="sum", statistics=("mean",)
            ... )
            >>> q = torch.randn(1, 2, 100, 64)
            >>> out = fastattn.attention(q, q, q, score=sharpened, mask=fastattn.Mask(causal=True))
        """
        if isinstance(statistics, str):
            statistics = (statistics,)
        return cls(weight, before, normalise, tuple(statistics))

    def __post_init__(self) -> None:
        name = "fastattn.Score"
        for what, function in (("weight", self.weight), ("before", self.before)):
            if not callable(function) and not (what == "before" and function is None):
                or_none = " or None" if what == "before" else ""
                raise TypeError(
                    f"{name}: {what} must be a function{or_none}, given {_checks.describe(function)}"
                )
        if self.normalise not in _NORMALISE:
            raise ValueError(f'{name}: normalise must be "softmax", "sum" or None, given {self.normalise!r}')
        for statistic in self.statistics:
            if statistic not in STATISTICS:
                raise ValueError(
                    f"{name}: statistics must be of {', '.join(STATISTICS)}, given {statistic!r}"
                )
        if self.statistics and self.normalise == "softmax":
            raise ValueError(f'{name}: statistics go with normalise="sum" and None, given {self.normalise!r}')

    def __repr__(self) -> str:
        def named(function: Callable) -> str:
            return str(getattr(function, "__qualname__", repr(function)))

        parts = [named(self.weight)]
        parts += [] if self.before is None else [f"before={named(self.before)}"]
        parts += [f"normalise={self.normalise!r}"]
        parts += [f"statistics={self.statistics!r}"] if self.statistics else []
        return f"Score.from_function({', '.join(parts)})"

    def of(self, statistics: dict[str, torch.Tensor], *, of_product: bool = True) -> Callable:
        """The weight, or softmax's score, as a function (s, b, h, q, k) of the scaled product, or of what `before` has made of it; from
        the statistics (B, Hq, Lq) of rows."""
        return _Composed(self, statistics, of_product)


class Row:
    """What a weight function sees of its row."""

    def __init__(self, known: tuple[str, ...], tensors: dict[str, torch.Tensor], place: tuple) -> None:
        self._known, self._tensors, self._place = known, tensors, place

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in self._known:
            asked = (
                f"statistics=({name!r},) of the Score asks for it" if name in STATISTICS else "there is none"
            )
            raise AttributeError(f"fastattn.Score: row has no {name!r}; {asked}")
        return self._tensors[name][self._place]


class _Composed:
    """before, then weight, as one function of a scaled product."""

    def __init__(self, score: Score, statistics: dict[str, torch.Tensor], of_product: bool) -> None:
        self.score, self.statistics, self.of_product = score, statistics, of_product
        self.parts = (score.weight,) if score.before is None else (score.weight, score.before)

    def __call__(
        self, s: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        score = self.score
        x = s if score.before is None or not self.of_product else score.before(s, b, h, q, k)
        if score.normalise == "softmax":
            return score.weight(x, b, h, q, k)
        return score.weight(x, Row(score.statistics, self.statistics, (b, h, q)), b, h, q, k)
