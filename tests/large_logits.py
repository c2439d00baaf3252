"""Losses of logits that are large and that float32 holds exactly, against torch's own in float64.

A loss sees differences of logits only, so that nothing of it may be lost to their size. Every product here is exact in float32
and in 16 bits, in any order, which leaves the roundings after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastattn as fa
from fastattn import testing

SIZES = (2.0**13, 2.0**20, 2.0**27)  # about 1e4, 1e6 and 1e8
IGNORED = -100
NEAR = 60  # classes whose weight beside the largest is not negligible
ROWS = 6


def small_integers(low: int, high: int, shape: tuple, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=generator).float()


def hidden(size: float, step: float, generator: torch.Generator) -> torch.Tensor:
    """(ROWS, 2), whose products with (2^floor, integer) are size + step * integer, of either sign."""
    h = torch.full((ROWS, 2), size / _unit(size))
    h[1::3] *= -1
    h[:, 1] = step * small_integers(1, 2, (ROWS,), generator)
    return h


def _unit(size: float) -> float:
    """A factor of size whose quotient float16 holds too."""
    return 2.0 ** (math.log2(size) // 2)


@dataclass
class Problem:
    h: torch.Tensor
    rows: torch.Tensor  # weight, or codebook
    bias: torch.Tensor | None
    target: torch.Tensor
    codes: torch.Tensor | None = None
    temperature: torch.Tensor | None = None
    shadow: torch.Tensor | None = None
    z_loss: float = 0.0
    names = ("h", "rows", "bias", "temperature", "shadow")

    def leaves(self) -> dict[str, torch.Tensor]:
        return {name: t for name in self.names if (t := getattr(self, name)) is not None}

    def loss(self, leaves: dict, reduction: str, backend: str) -> torch.Tensor:
        h, rows, bias, temperature, shadow = map(leaves.get, self.names)
        options = {"bias": bias, "ignore_index": IGNORED, "reduction": reduction, "backend": backend}
        if self.codes is not None:
            return fa.vq_cross_entropy(h, rows, self.codes, self.target, shadow=shadow, **options)
        return fa.linear_cross_entropy(
            h, rows, self.target, temperature=temperature, z_loss=self.z_loss, **options
        )


def _targets(classes: int, generator: torch.Generator) -> torch.Tensor:
    target = torch.randint(classes, (ROWS,), generator=generator)
    target[2] = IGNORED
    target[0] = 1
    return target


def dense(size: float, classes: int, dtype: torch.dtype = torch.float32, *, biased: bool = False) -> Problem:
    """Logits of `size` less a few roundings or halves; classes 0 and 1 are equal, as are many others. Of many classes all but
    NEAR are far below, so that sums have few terms."""
    generator = torch.Generator().manual_seed(classes)
    step = max(0.5, size * 2.0**-23)
    weight = torch.full((classes, 2), _unit(size))
    weight[:, 1] = small_integers(-3, 0, (classes,), generator)
    weight[torch.randperm(classes, generator=generator)[NEAR:], 1] -= 300
    weight[:2, 1] = 0
    bias = step * small_integers(-2, 0, (classes,), generator) if biased else None
    h = hidden(size, step, generator)
    return Problem(h.to(dtype), weight.to(dtype), bias, _targets(classes, generator))


def heated(classes: int, z_loss: float = 0.0) -> Problem:
    """Logits of about 4, some equal, which a temperature of 1e-3 makes 4000; all but NEAR are far below."""
    generator = torch.Generator().manual_seed(classes)
    weight = torch.full((classes, 2), 2.0)
    weight[:, 1] = small_integers(-3, 0, (classes,), generator)
    weight[torch.randperm(classes, generator=generator)[NEAR:], 1] -= 900
    weight[:2, 1] = 0
    temperature = torch.tensor([1e-3, 1e-3, 1e-3, 2e-3, 1.0, 5e-4])
    h = hidden(4.0, 2.0**-11, generator)
    return Problem(h, weight, None, _targets(classes, generator), temperature=temperature, z_loss=z_loss)


def shared(size: float, dtype: torch.dtype = torch.float32, *, biased: bool = False) -> Problem:
    """A head of 5 codes and 12 tokens: codes 0 and 1 are one vector with 5 and 2 tokens, code 3 has none."""
    generator = torch.Generator().manual_seed(1)
    step = max(0.5, size * 2.0**-23)
    codes = torch.tensor([0, 1, 0, 0, 2, 4, 2, 0, 1, 0, 4, 4])
    codebook = torch.full((5, 2), _unit(size))
    codebook[:, 1] = torch.tensor([0.0, 0.0, -1.0, 0.0, -2.0])
    bias = step * small_integers(-2, 0, codes.shape, generator) if biased else None
    if biased:
        bias[4] = -math.inf  # of a code with another token
    shadow = torch.zeros(len(codes), 2).to(dtype) if biased else None
    h, target = hidden(size, step, generator), _targets(len(codes), generator)
    target[target == 4] = 6
    return Problem(h.to(dtype), codebook.to(dtype), bias, target, codes, shadow=shadow)


def check(problem: Problem, reduction: str, backend: str, *, rounded_gradients: bool = False) -> None:
    """Loss and gradients within what float32 loses after exact logits.

    A weight e^d has 4 roundings (of d, e^d, the quotient by the sum, the product with the incoming gradient), and a sum of n of
    them n / 2 more at worst, which many equal ones come near: `unit`. A gradient is a sum of products of these weights, and of the target's 1, with values of h,
    weight or distances, so that `unit` counts of the sum of their magnitudes. It is rounded to its tensor's dtype, again where
    it was found in the forward pass and is multiplied by the incoming gradient, and with rounded_gradients before the products.
    """
    leaves = {name: t.clone().requires_grad_() for name, t in problem.leaves().items()}
    loss = problem.loss(leaves, reduction, backend)
    upstream = torch.linspace(0.5, 2.0, ROWS) if reduction == "none" else torch.tensor(1.5)
    found = dict(zip(leaves, torch.autograd.grad(loss, leaves.values(), upstream.to(loss)), strict=True))

    exact = {name: t.detach().double() for name, t in leaves.items()}
    h, rows, tau = exact["h"], exact["rows"], exact.get("temperature", torch.ones(ROWS).double())[:, None]
    counted = problem.target != IGNORED
    x = h @ rows.T if problem.codes is None else (h @ rows.T)[:, problem.codes]
    x = x + exact.get("bias", 0.0)
    classes = x.shape[1]
    losses = F.cross_entropy(x / tau, problem.target, ignore_index=IGNORED, reduction="none")
    lse = torch.logsumexp(x / tau, 1) * counted
    losses = losses + problem.z_loss * lse.square()
    scale = 1 / int(counted.sum()) if reduction == "mean" else 1.0
    unit = (4 + min(classes, NEAR) / 2) * testing.EPS32

    true = losses if reduction == "none" else losses.sum() * scale
    limit = unit * (1 + losses + 4 * problem.z_loss * lse.square())
    limit = limit if reduction == "none" else limit.sum() * scale
    within(loss, true, limit, torch.float32, "loss")

    incoming = (upstream.double() * scale).expand(ROWS) * counted
    share, spread = torch.softmax(x / tau, 1), 2 * problem.z_loss * lse[:, None]
    one = F.one_hot(problem.target.clamp(min=0), classes)
    g = (share * (1 + spread) - one) * incoming[:, None] / tau  # of x
    size = (share * (1 + spread.abs()) + one) * incoming[:, None] / tau
    low = h.dtype != leaves["h"].dtype and leaves["h"].dtype != torch.float32
    if rounded_gradients and low:
        rounding = torch.finfo(leaves["h"].dtype)
        unit, size = unit + rounding.eps / 2, size + rounding.smallest_normal
    expected = {}
    if problem.codes is None:
        expected["h"] = g @ rows, size @ rows.abs()
        expected["rows"] = g.T @ h, size.T @ h.abs()
        distance = (x - x.amax(1, keepdim=True)) / tau
        top = spread * x.amax(1, keepdim=True) / tau * incoming[:, None] / tau
        expected["temperature"] = (
            -((g * distance).sum(1) + top[:, 0]),
            (size * distance.abs()).sum(1) + top[:, 0].abs(),
        )
        expected["bias"] = g.sum(0), size.sum(0)
    else:
        codes, count = problem.codes, len(rows)
        of_code = torch.zeros(ROWS, count).double().index_add(1, codes, size)
        # a token's gradient is its part of its code's, less the target's 1
        part = share / torch.zeros(ROWS, count).double().index_add(1, codes, share)[:, codes]
        part = part[counted][0]
        size = size + of_code[:, codes] * part
        expected["h"] = g @ rows[codes], of_code @ rows.abs()
        by_code = torch.zeros_like(rows)
        expected["rows"] = by_code.index_add(0, codes, g.T @ h), of_code.T @ h.abs()
        expected["bias"] = g.sum(0), size.sum(0)
        expected["shadow"] = g.T @ h, size.T @ h.abs()
    for name, gradient in found.items():
        value, magnitude = expected[name]
        within(gradient, value, unit * magnitude, leaves[name].dtype, f"gradient of {name}")


def within(
    found: torch.Tensor, true: torch.Tensor, limit: torch.Tensor, dtype: torch.dtype, name: str
) -> None:
    error = (found.detach().double() - true).abs()
    rounding = torch.finfo(dtype)
    limit = limit + rounding.eps * (true.abs() + 2 * rounding.smallest_normal)
    worst = float((error / limit).detach().max())
    assert bool((error <= limit).all()), f"{name}: {found}, true {true}, {worst:.3g} times the limit"
