"""Class weights, and label smoothing of a plain softmax, for the backends with a row kernel. The kernel takes two factors for each
row; everything else is computed from vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

_WIDENED = 1 << 22  # elements widened to float32 at once


def unserved(target: torch.Tensor, transform: int, softcap: float, label_smoothing: float) -> str | None:
    """Why the row kernels cannot serve a call, or None."""
    if target.is_floating_point():
        return "it serves class indices, not probabilities"
    if label_smoothing and (transform or softcap):
        return "it serves label_smoothing without softcap and transform"
    return None


def _blocks(matrix: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    step = max(1, _WIDENED // matrix.shape[1])
    for begin in range(0, matrix.shape[0], step):
        yield slice(begin, begin + step), matrix[begin : begin + step].float()


def _combined(factors: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """factors (rows,) times matrix (rows, d), in float32."""
    total = factors.new_zeros(matrix.shape[1])
    for rows, block in _blocks(matrix):
        total.addmv_(block.T, factors[rows])
    return total


def _products(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """matrix (rows, d) times vector (d,), in float32."""
    result = vector.new_empty(matrix.shape[0])
    for rows, block in _blocks(matrix):
        result[rows] = block @ vector
    return result


class Subtracted(NamedTuple):
    """The gradients that smoothing subtracts, each an outer product: rows x combined from h's, by_class x sums from weight's, and
    by_class * sum(rows) from bias's."""

    rows: torch.Tensor  # (N,)
    combined: torch.Tensor  # (d,)
    by_class: torch.Tensor  # (V,)
    sums: torch.Tensor  # (d,)

    def off_h(self, dh: torch.Tensor, begin: int, end: int) -> None:
        dh.addr_(self.rows[begin:end], self.combined, alpha=-1)

    def off_weight(self, dweight: torch.Tensor, begin: int, end: int) -> None:
        dweight.addr_(self.by_class[begin:end], self.sums, alpha=-1)

    def off_bias(self, dbias: torch.Tensor) -> None:
        dbias -= self.by_class * self.rows.sum()


class Smoothing:
    """Label smoothing adds amount * sum_c w_c (largest - x_c) / temperature to a row's loss. The weighted sum of a row's logits is
    h (weight^T w) + bias w. So neither forward nor backward needs a pass over (N, V)."""

    def __init__(
        self,
        h: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        class_weight: torch.Tensor | None,
        label_smoothing: float,
    ) -> None:
        classes = weight.shape[0]
        self.amount = label_smoothing / classes
        self.total: torch.Tensor | float = float(classes)
        if class_weight is None:
            self.by_class = h.new_ones(classes, dtype=torch.float32)
        else:
            self.by_class = class_weight.float()
            self.total = self.by_class.sum()
        self.combined = _combined(self.by_class, weight)
        self.sums = _products(h, self.combined)
        if bias is not None:  # a class of weight 0 may have a bias of -inf
            self.sums += torch.where(self.by_class == 0, 0.0, self.by_class * bias.float()).sum()

    def loss(self, largest: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
        loss = self.amount * (self.total * largest - self.sums)
        return loss if temperature is None else loss / temperature

    def subtracted(
        self, upstream: torch.Tensor, h: torch.Tensor, temperature: torch.Tensor | None
    ) -> Subtracted:
        rows = self.amount * upstream
        if temperature is not None:
            rows = rows / temperature
        return Subtracted(rows, self.combined, self.by_class, _combined(rows, h))

    def off_temperature(
        self,
        dtemperature: torch.Tensor,
        upstream: torch.Tensor,
        largest: torch.Tensor,
        temperature: torch.Tensor,
    ) -> None:
        dtemperature -= upstream * self.loss(largest, temperature) / temperature


class Shares(NamedTuple):
    """The factors of each row's loss, (N,) float32: `own` of the target's logit, `mass` of the log-sum-exp."""

    own: torch.Tensor
    mass: torch.Tensor
    smoothing: Smoothing | None

    @staticmethod
    def of(
        h: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        class_weight: torch.Tensor | None,
        label_smoothing: float,
    ) -> Shares | None:
        """None without class weights and smoothing. The factors of ignored rows are arbitrary."""
        if class_weight is None and not label_smoothing:
            return None
        if class_weight is None:
            own = h.new_ones(h.shape[0], dtype=torch.float32)
        # clamped: an invalid target, which the host cannot see without waiting for a GPU, is handled by the row kernel
        else:
            own = class_weight.float()[target.long().clamp(0, weight.shape[0] - 1)]
        if not label_smoothing:
            return Shares(own, own, None)
        smoothing = Smoothing(h, weight, bias, class_weight, label_smoothing)
        own = own * (1 - label_smoothing)
        return Shares(own, own + smoothing.amount * smoothing.total, smoothing)
