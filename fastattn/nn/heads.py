"""Output layers and losses that are small: a Fourier head, a temperature a token, the spherical Z-loss."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.cross_entropy import linear_cross_entropy
from ..ops.vocabulary import REDUCTIONS

IGNORED = -100


class FourierHead(nn.Module):
    """Log-probabilities of bins of a number in [-1, 1], by a density of few frequencies ("Fourier Head", arXiv 2410.22269)::

        a_0 ... a_K = Linear(h), complex;  S(x) = sum_k a_k e^(i k pi x)
        p(x) = 1/2 + Re sum_(k >= 1) (c_k / c_0) e^(i k pi x) = |S(x)|^2 / (2 sum_k |a_k|^2),   c the autocorrelation of a

    The second form is computed: one product with the cosines and sines at the bins' centres, no autocorrelation, nothing clamped, and never
    negative. The mean of p over the bins is exactly 1/2 where there are more bins than frequencies, so that p * 2 / bins is a probability.

    Args:
        d_model: width of h.
        bins: equal parts of [-1, 1].
        frequencies: K, at least 1, under bins. Fewer make a smoother density.

    Parameters: ``coefficients``, Linear(d_model, 2 (K + 1)), real parts first.

    >>> head = fastattn.nn.FourierHead(64, bins=40, frequencies=6)
    >>> loss = torch.nn.functional.nll_loss(head(torch.randn(5, 64)), torch.randint(40, (5,)))
    """

    waves: Tensor

    def __init__(self, d_model: int, bins: int, frequencies: int) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("bins", bins), ("frequencies", frequencies)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"FourierHead: {name} is {value!r}; it must be an int of at least 1")
        if frequencies >= bins:
            raise ValueError(f"FourierHead: frequencies is {frequencies}; it must be under the {bins} bins")
        self.bins, self.frequencies = bins, frequencies
        self.coefficients = nn.Linear(d_model, 2 * (frequencies + 1))
        centres = (2 * torch.arange(bins, dtype=torch.float64) + 1) / bins - 1
        angles = math.pi * torch.arange(frequencies + 1, dtype=torch.float64)[:, None] * centres
        cos, sin = angles.cos(), angles.sin()
        # (2 (K + 1), 2 bins): [u | v] times it is [Re S | Im S]
        waves = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])
        self.register_buffer("waves", waves.to(self.coefficients.weight.dtype), persistent=False)

    def extra_repr(self) -> str:
        return f"bins={self.bins}, frequencies={self.frequencies}"

    def forward(self, h: Tensor) -> Tensor:
        """(..., bins) of h (..., d_model): log-probabilities, float32 at least; -inf where the density is 0."""
        a = self.coefficients(h)
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        real, imaginary = (a @ self.waves.to(a.dtype)).chunk(2, -1)
        power = a.square().sum(-1, keepdim=True)  # c_0
        return (real.square() + imaginary.square()).log() - power.log() - math.log(self.bins)


class TemperatureNet(nn.Module):
    """A temperature for each row, of its features ("To Cool or not to Cool? Temperature Network Meets Large Foundation Models via
    DRO", arXiv 2404.04575)::

        z = W_2 dropout(sigmoid(W_1 x / |x|));  s = v . ((softmax(z / e^t) - 1 / hidden) * z) + b
        tau = low + (high - low) sigmoid(s)

    and :meth:`loss`, the robust loss that it is trained by. Its authors feed it the logits; any features (..., d) will do, such as the
    hidden state, which is what makes it cheap beside a vocabulary.

    Args:
        d_features: width of x.
        hidden: width of z, default 256.
        low, high: of the temperatures, defaults 0.5 and 5.
        dropout: default 0.5.

    >>> net = fastattn.nn.TemperatureNet(64)
    >>> h, weight, target = torch.randn(5, 64), torch.randn(100, 64), torch.randint(100, (5,))
    >>> loss = net.loss(h, h, weight, target)
    """

    def __init__(
        self, d_features: int, hidden: int = 256, *, low: float = 0.5, high: float = 5.0, dropout: float = 0.5
    ) -> None:
        super().__init__()
        for name, value in (("d_features", d_features), ("hidden", hidden)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"TemperatureNet: {name} is {value!r}; it must be an int of at least 1")
        if not 0 < low <= high:
            raise ValueError(
                f"TemperatureNet: low and high are {low} and {high}; they must be over 0, rising"
            )
        self.low, self.high = low, high
        self.project = nn.Sequential(
            nn.Linear(d_features, hidden), nn.Sigmoid(), nn.Dropout(dropout), nn.Linear(hidden, hidden)
        )
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.score = nn.Linear(hidden, 1)
        nn.init.ones_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}"

    def forward(self, x: Tensor) -> Tensor:
        """tau (...) of x (..., d_features)."""
        z = self.project(F.normalize(x, dim=-1))
        weights = (z / self.log_scale.exp()).softmax(-1) - 1 / z.shape[-1]
        return self.low + (self.high - self.low) * self.score(weights * z)[..., 0].sigmoid()

    def loss(
        self,
        x: Tensor,
        h: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        rho: float = 0.0,
        ignore_index: int = IGNORED,
    ) -> Tensor:
        """Mean over the rows that count of ``tau (lse(o / tau) - log V) - o[target] + rho tau``, o = h weight^T, tau of x; the (N, V) logits
        are never held. 0 where no row counts.

        x: (..., d_features). h: (..., d), weight: (V, d), target: (...) int64, as in :func:`fastattn.linear_cross_entropy`. rho: the radius of
        the robust problem, at least 0.
        """
        tau = self(x)
        loss = linear_cross_entropy(
            h, weight, target, temperature=tau, ignore_index=ignore_index, reduction="none"
        )
        counted = target != ignore_index
        rows = torch.where(counted, tau * (loss + (rho - math.log(weight.shape[0]))), 0.0)
        return rows.sum() / counted.sum().clamp(min=1)


def spherical_z_loss(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    a: float,
    b: float,
    ignore_index: int = IGNORED,
    reduction: str = "mean",
) -> Tensor:
    """The Z-loss of the spherical family ("The Z-loss: a shift and scale invariant classification loss belonging to the Spherical
    Family", arXiv 1604.08859), without the logits::

        o = h weight^T;  z = (o[target] - mean(o)) / std(o);  loss = softplus(a (b - z)) / a

    **Not a probability model**, and not PaLM's z-loss, which is ``z_loss=`` of :func:`fastattn.linear_cross_entropy`. Mean and deviation are
    over the V classes (divided by V). They follow from the mean row m of weight and Q = (weight - m)^T (weight - m), a (d, d): the cost
    of a row is d^2, whatever V is, and Q costs one product of V d^2 a call. m is subtracted first, so that a mean far larger than the
    deviation loses no digits. A row whose deviation is 0 has z = 0 and no gradient.

    Args:
        h: (..., d), floating. weight: (V, d), h's dtype. target: (...), int64, in [0, V) or ignore_index.
        a: softness, over 0. b: the z that is aimed at. Both are to be tuned.
        reduction: "mean" over the rows that count, "sum" or "none"; ignored rows have loss 0.

    Returns float32 (float64 for float64). Differentiable in h and weight.

    Raises ValueError or TypeError naming the argument.
    """
    op = "spherical_z_loss"
    if not h.is_floating_point() or weight.dtype != h.dtype:
        raise TypeError(f"{op}: h is {h.dtype} and weight {weight.dtype}; they must be floating and the same")
    if weight.dim() != 2 or h.dim() < 1 or h.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: h is {tuple(h.shape)} and weight {tuple(weight.shape)}; (..., d) and (V, d) are needed"
        )
    if target.shape != h.shape[:-1] or target.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{op}: target is {target.dtype} of shape {tuple(target.shape)}; it must be int64, {tuple(h.shape[:-1])}"
        )
    if not a > 0:
        raise ValueError(f"{op}: a is {a}; it must be over 0")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")
    wide = torch.promote_types(h.dtype, torch.float32)
    rows, centred = h.to(wide), weight.to(wide)
    centred = centred - centred.mean(0)
    counted = target != ignore_index
    variance = ((rows @ (centred.T @ centred)) * rows).sum(-1).clamp(min=0) / len(weight)
    spread = variance > 0
    deviation = torch.where(spread, variance, 1.0).sqrt()
    above = (rows * centred[torch.where(counted, target, 0).long()]).sum(-1)
    z = torch.where(spread, above / deviation, 0.0)
    loss = torch.where(counted, F.softplus(a * (b - z)) / a, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)
