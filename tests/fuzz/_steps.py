"""Numbers in float64 and what float32 may make of them: a formula written in `Off` bounds every kernel that computes it.

u = 2^-24 is half a unit in the last place of float32. Each operation carries what its operands may be off by, in the worst case,
and adds its own rounding: u of the result, and 2^-150 of a product, whose rounding is to a multiple of 2^-149 at least. (A fused
product and sum rounds less often.) A sum of n terms has n - 1 roundings of partial sums, in any order, none of which is above the
sum of magnitudes: n * u / (1 - n * u) of that. `to` is the rounding to a 16-bit dtype. Errors of operands that have a source in
common are added as if they had none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastattn import testing

U = testing.EPS32 / 2
LEAST = 2.0**-149  # of float32
# 1 + e^-x by dtype, relative: of sigmoid_divisors in src/cpu/math.h, whose tests (tests/native/math_checks.h) have the same figures;
# and the x from which on they hold. Below it the divisor may be infinite, and the sigmoid 0.
DIVISOR = {torch.float32: 4e-7, torch.bfloat16: 7.5e-5 + 128 * U, torch.float16: 2.6e-6 + 128 * U}
LOWEST = {torch.float32: -88.0, torch.bfloat16: -87.0, torch.float16: -87.0}


@dataclass
class Off:
    """value and off, float64, of one shape or such that broadcast."""

    value: torch.Tensor
    off: torch.Tensor

    def rounded(self, unit: float = U, least: float = 2.0**-150) -> Off:
        return Off(self.value, self.off + unit * (self.value.abs() + self.off) + least)

    def to(self, dtype: torch.dtype) -> Off:
        """Rounded to a 16-bit dtype, or as it is: ties may go either way."""
        limits = torch.finfo(dtype)
        if dtype == torch.float32:
            return self
        return self.rounded(limits.eps / 2, limits.smallest_normal * limits.eps / 2)

    def __mul__(self, other: Off) -> Off:
        a, b = self.value.abs(), other.value.abs()
        return Off(self.value * other.value, a * other.off + self.off * b + self.off * other.off).rounded()

    def __add__(self, other: Off) -> Off:
        return Off(self.value + other.value, self.off + other.off).rounded(least=0)

    def __sub__(self, other: Off) -> Off:
        return self + Off(-other.value, other.off)

    def sum(self, *dims: int) -> Off:
        """Over these dims, which stay with size 1."""
        terms = torch.Size(self.value.shape[d] for d in dims).numel() * U
        size = (self.value.abs() + self.off).sum(dims, keepdim=True)
        off = self.off.sum(dims, keepdim=True) + terms / (1 - terms) * size
        return Off(self.value.sum(dims, keepdim=True), off)

    def times(self, weight: Off, flushed: float = 0.0, added: Off | None = None) -> Off:
        """A product of matrices (M, K) and (K, N). flushed: what each term may lose below the normal numbers (src/cpu/tile.h).
        added (M, N): one more term, which a library may add the others to."""
        terms = self.value.shape[1]
        a, b = self.value.abs(), weight.value.abs()
        size = (a + self.off) @ (b + weight.off) + (0 if added is None else added.value.abs())
        off = self.off @ b + a @ weight.off + self.off @ weight.off
        share = (terms + 2) * U  # and the product's own rounding; two in a product of bf16 pairs
        largest = (
            torch.maximum(a.amax(1, keepdim=True), b.amax(0, keepdim=True)) if size.numel() and terms else 0
        )
        lost = terms * (2.0**-150 + flushed * (2 + largest))
        value = self.value @ weight.value + (0 if added is None else added.value)
        return Off(value, off + share / (1 - share) * size + lost)

    def reciprocal_root(self) -> Off:
        """1 / sqrt of a positive number: two roundings."""
        value = self.value.rsqrt()
        share = (self.off / self.value).clamp(max=1 - 1e-9)
        return Off(value, value * ((1 - share).rsqrt() * (1 + 2 * U) / (1 - 2 * U) - 1))

    def sigmoid(self, dtype: torch.dtype) -> Off:
        """1 / (1 + e^-x). An x that is o off makes it, and what is left to 1, at most e^o times as large, and o / 4 larger."""
        value = torch.sigmoid(self.value)
        times = self.off.clamp(max=700).expm1()
        moved = torch.minimum(torch.minimum(value, torch.sigmoid(-self.value)) * times, self.off / 4)
        lost = torch.where(self.value - self.off < LOWEST[dtype], value + moved, 0.0)
        return Off(value, moved + DIVISOR[dtype] * (value + moved) * 1.001 + lost).rounded()


def given(x: torch.Tensor) -> Off:
    """A number that is what it is."""
    return Off(x.detach().double(), torch.zeros(x.shape, dtype=torch.float64))


def number(x: float) -> Off:
    """A number that float32 rounds."""
    return Off(torch.tensor(x, dtype=torch.float64), torch.tensor(U * abs(x), dtype=torch.float64))


ONE = given(torch.tensor(1.0))


def within(name: str, actual: torch.Tensor, expected: Off) -> None:
    """actual is expected, rounded to its dtype, or beyond what that holds."""
    bound = expected.to(actual.dtype)
    truth, off = bound.value, bound.off.expand_as(bound.value)
    assert actual.shape == truth.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    wide = actual.detach().double()
    beyond = truth.abs() + off > torch.finfo(actual.dtype).max
    wrong = ~(((wide - truth).abs() <= off) | (wide == truth) | (beyond & ~wide.isnan()))
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}{list(place)} is {float(wide[place]):.9g}, expected {float(truth[place]):.9g} within "
            f"{float(off[place]):.3g}; {int(wrong.sum())} of {wrong.numel()} are beyond their bound"
        )
