"""Layers made of a scan: Aaren, H-Net's chunks, S4D and Mamba's block."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.causal_conv1d import causal_conv1d
from ..ops.linear_scan import linear_scan
from ..ops.selective_scan import selective_scan


def aaren(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one learned query over each prefix, as a recurrence ("Attention as an RNN", arXiv 2405.13956, equation 3):

        o_t = sum_{i <= t} exp(s_i) v_i / sum_{i <= t} exp(s_i) = a_t o_{t-1} + (1 - a_t) v_t,  a_t = exp(lse_{t-1} - lse_t)

    scores: (..., L), the query's products with the keys, scaled. v: (..., L, D), of their dtype. Returns (..., L, D), differentiable.

    >>> out = fastattn.nn.aaren(torch.randn(2, 9), torch.randn(2, 9, 4))

    Raises ValueError or TypeError as `linear_scan` does.
    """
    lse = torch.logcumsumexp(scores, -1)[..., None]  # (..., L, 1)
    before = torch.cat([torch.full_like(lse[..., :1, :], -math.inf), lse[..., :-1, :]], -2)
    log_a = before - lse
    return linear_scan(log_a.exp(), -torch.expm1(log_a) * v)


def dechunk(chunks: torch.Tensor, probabilities: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    """H-Net's smoothing and upsampling ("Dynamic Chunking", arXiv 2507.07955, equations 5 and 8): with P the boundaries' probabilities,

        zbar_m = P_m z_m + (1 - P_m) zbar_{m-1},  the first P being 1

    and each token gets the zbar of the chunk that it is in.

    chunks: (L_chunks, D), one for each boundary. probabilities: (L,) of the tokens, clamped to [1e-4, 1 - 1e-4]. boundaries: (L,) bool, the
    first True. One sequence; of chunks' dtype. Returns (L, D), differentiable in chunks and probabilities.

    Raises ValueError unless the boundaries are as many as the chunks, and begin with one.
    """
    if not bool(boundaries[:1].all()) or int(boundaries.sum()) != chunks.shape[0]:
        raise ValueError(
            f"fastattn.nn.dechunk: boundaries must begin with one and be as many as the {chunks.shape[0]} chunks, given "
            f"{int(boundaries.sum())}"
        )
    p = probabilities[boundaries].clamp(1e-4, 1 - 1e-4)[:, None]  # (L_chunks, 1)
    p = torch.cat([torch.ones_like(p[:1]), p[1:]])
    smoothed = linear_scan(1 - p, p * chunks)
    return smoothed[boundaries.long().cumsum(0) - 1]


class S4D(nn.Module):
    """A diagonal state space layer, S4D-Lin ("On the Parameterization and Initialization of Diagonal State Space Models", arXiv
    2206.11893, section 4), by a complex scan. For each of `width` channels with N = states complex numbers:

        h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A * u_t,  y_t = 2 Re(C . h_t) + D u_t

    A = -exp(log_decay) + i * frequency, begun at -1/2 + i pi n. (B, L, width) to the same; one floating dtype.

    >>> y = fastattn.nn.S4D(8, states=4)(torch.randn(2, 9, 8))
    """

    def __init__(self, width: int, states: int = 32, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(torch.empty(width).uniform_(math.log(dt_min), math.log(dt_max)))
        self.log_decay = nn.Parameter(torch.full((width, states), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(states).float().repeat(width, 1))
        self.C = nn.Parameter(torch.randn(width, states, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.ones(width))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        A = torch.complex(-self.log_decay.exp(), self.frequency)  # (width, N)
        exponent = self.log_dt.exp()[:, None] * A
        given = (torch.expm1(exponent) / A) * u[..., None]  # (B, L, width, N)
        h = linear_scan(exponent.flatten(), given.flatten(2), log_a=True).view(given.shape)
        return 2 * (h * torch.view_as_complex(self.C)).real.sum(-1) + self.D * u


class MambaBlock(nn.Module):
    """Mamba's block ("Mamba", arXiv 2312.00752, figure 3): an expansion, a short convolution, the selective scan and its gate, a
    contraction. The parameters have the names and shapes of transformers' MambaMixer.

    width: of (B, L, width), to the same. states: numbers of a channel's state. expand: inner over outer channels. taps: of the
    convolution. rank: of the step size's projection, default width / 16.

    >>> y = fastattn.nn.MambaBlock(16)(torch.randn(2, 9, 16))
    """

    def __init__(
        self, width: int, states: int = 16, expand: int = 2, taps: int = 4, rank: int | None = None
    ) -> None:
        super().__init__()
        inner, self.rank, self.states = expand * width, rank or math.ceil(width / 16), states
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """cu_seqlens: documents packed in a batch of one, as in `selective_scan`."""
        u, z = self.in_proj(x).chunk(2, -1)
        u = causal_conv1d(
            u, self.conv1d.weight[:, 0], bias=self.conv1d.bias, activation="silu", cu_seqlens=cu_seqlens
        )
        low, B, C = self.x_proj(u).split([self.rank, self.states, self.states], -1)
        dt = F.linear(low, self.dt_proj.weight)
        A = -self.A_log.float().exp() if self.A_log.dtype.itemsize == 2 else -self.A_log.exp()
        y = selective_scan(u, dt, A, B, C, D=self.D, z=z, dt_bias=self.dt_proj.bias, cu_seqlens=cu_seqlens)
        return self.out_proj(y)
