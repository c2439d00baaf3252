"""State space layers and parallel recurrent networks made of `linear_scan`: S5, HiSS and ParaRNN."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear_scan import linear_scan


def perturbed_hippo(states: int, size: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(eigenvalues (N,), eigenvectors (N, N)) of HiPPO-LegS plus a perturbation: perturb-then-diagonalise ("Robustifying State-space
    Models for Long Sequences via Approximate Diagonalization", arXiv 2310.01698).

        A_ij = -sqrt(2i + 1) sqrt(2j + 1) for i > j, -(i + 1) for i = j, 0 else;  A + E = V diag(lambda) V^-1, |E| = size

    complex128. The eigenvectors of A itself are as good as dependent: at N = 32 their condition is 6e18, and 6e4 of A + E.
    states: N. size: the spectral norm of E, default 0.1. seed: of E, Gaussian.

    >>> eigenvalues, vectors = fastattn.nn.perturbed_hippo(8)
    """
    i = torch.arange(states, dtype=torch.float64)
    root = (2 * i + 1).sqrt()
    A = -(root[:, None] * root).tril(-1) - torch.diag(i + 1)
    E = torch.randn(states, states, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    eigenvalues, vectors = torch.linalg.eig(A + E * (size / torch.linalg.matrix_norm(E, 2)))
    return eigenvalues, vectors


class S5(nn.Module):
    """A state space layer with one state of N complex numbers for all channels ("Simplified State Space Layers", arXiv 2208.04933), by a
    complex scan, begun by `perturbed_hippo`:

        h_t = exp(lambda d) h_{t-1} + (exp(lambda d) - 1) / lambda * (B u_t),  y_t = Re(C h_t) + D u_t

    lambda = -exp(log_decay) + i * frequency; d = exp(log_dt), one of each state; B (N, width) and C (width, N) begin as V^-1 and V times
    Gaussian matrices, which is the state matrix V diag(lambda) V^-1. width: of (B, L, width), to the same; float32 or float64.

    >>> layer = fastattn.nn.S5(8, states=4)
    >>> y, state = layer(torch.randn(2, 9, 8), return_state=True)
    >>> following = layer(torch.randn(2, 1, 8), state)
    """

    def __init__(
        self, width: int, states: int = 32, dt_min: float = 1e-3, dt_max: float = 0.1, size: float = 0.1
    ) -> None:
        super().__init__()
        eigenvalues, vectors = perturbed_hippo(states, size)
        drawn = (
            torch.randn(states, width, dtype=torch.float64) / width**0.5,
            torch.randn(width, states, dtype=torch.float64) / states**0.5,
        )
        B, C = torch.linalg.solve(vectors, drawn[0].to(vectors.dtype)), drawn[1].to(vectors.dtype) @ vectors
        # the perturbation may bring an eigenvalue over to growth
        self.log_decay = nn.Parameter((-eigenvalues.real).clamp(min=1e-4).log().float())
        self.frequency = nn.Parameter(eigenvalues.imag.float())
        self.B, self.C = (nn.Parameter(torch.view_as_real(t).float().contiguous()) for t in (B, C))
        self.log_dt = nn.Parameter(torch.empty(states).uniform_(math.log(dt_min), math.log(dt_max)))
        self.D = nn.Parameter(torch.randn(width))

    def forward(self, u: Tensor, state: Tensor | None = None, return_state: bool = False) -> Any:
        """(B, L, width), or (that, state (B, N) complex), which an earlier call returned."""
        eigenvalues = torch.complex(-self.log_decay.exp(), self.frequency)
        exponent = self.log_dt.exp() * eigenvalues
        B = torch.view_as_complex(self.B) * (torch.expm1(exponent) / eigenvalues)[:, None]
        h = linear_scan(exponent, u.to(B.dtype) @ B.mT, initial=state, log_a=True)  # (B, L, N)
        y = (h @ torch.view_as_complex(self.C).mT).real + self.D * u
        if not return_state:
            return y
        return y, (h[:, -1] if u.shape[1] else _zeros(h, state))


def _zeros(h: Tensor, state: Tensor | None) -> Tensor:
    return h.new_zeros(h.shape[0], h.shape[2]) if state is None else state


class HiSS(nn.Module):
    """A hierarchy of two sequence models ("Hierarchical State Space Models", arXiv 2402.10211): the lower one runs over each chunk of
    the input alone, and the last outputs of the chunks are the input of the upper one:

        z_c = low(x_{cK}, .., x_{(c+1)K - 1})_last,  y = high(z_0, z_1, ..)

    low, high: modules of (B, L, D), causal, as S4D, S5 or MambaBlock are. chunk: K. (B, L, D) to (B, L / K, D').

    >>> layer = fastattn.nn.HiSS(fastattn.nn.S4D(8, states=4), fastattn.nn.S4D(8, states=4), chunk=5)
    >>> y = layer(torch.randn(2, 20, 8))

    Raises ValueError unless L is a multiple of the chunk.
    """

    def __init__(self, low: nn.Module, high: nn.Module, chunk: int) -> None:
        super().__init__()
        self.low, self.high, self.chunk = low, high, chunk

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        if length % self.chunk:
            raise ValueError(
                f"fastattn.nn.HiSS: the length must be a multiple of the chunk of {self.chunk}, given {length}"
            )
        last = self.low(x.reshape(-1, self.chunk, width))[:, -1]
        return self.high(last.view(batch, length // self.chunk, -1))


def newton_scan(
    step: Callable[[Tensor], Tensor],
    guess: Tensor,
    *,
    initial: Tensor | None = None,
    tolerance: float | None = None,
    iterations: int | None = None,
) -> Tensor:
    """h_t = f_t(h_{t-1}) for all tokens at once, by Newton's method ("ParaRNN", arXiv 2510.21450; DEER, 2309.12252). From h on, with the
    step's derivative J_t at h_{t-1}:

        h'_t = J_t h'_{t-1} + f_t(h_{t-1}) - J_t h_{t-1}

    which is one `linear_scan`. The first k tokens are exact after k iterations, and a few make all of them so where f is smooth.

    step: (B, L, D) of all h_{t-1} to f, (B, L, D), element by element in h; it may read tokens' inputs, and parameters, which get the
        gradient of the solution: one scan with J the other way, however many iterations there were.
    guess: (B, L, D), where iterations begin, floating; zeros do.
    initial: (B, D), h before the first token. Default 0.
    tolerance: on the largest change of an iteration, over the largest |h|. Default 32 eps.
    iterations: at most, default L: the result is then the recurrence's, also where Newton's method does not converge before.

    Returns h (B, L, D). Not under torch.compile: each iteration asks for its change.

    >>> x, w = torch.randn(2, 9, 4), torch.rand(4, requires_grad=True)
    >>> h = fastattn.nn.newton_scan(lambda h: torch.tanh(w * h + x), torch.zeros_like(x))

    Raises ValueError or TypeError as `linear_scan` does.
    """
    first = guess.new_zeros(guess.shape[0], guess.shape[2]) if initial is None else initial
    tolerance = 32 * torch.finfo(guess.dtype).eps if tolerance is None else tolerance

    def before(h: Tensor) -> Tensor:
        return torch.cat([first[:, None], h[:, :-1]], 1)

    def value_and_slope(h: Tensor) -> tuple[Tensor, Tensor]:
        results = torch.func.jvp(step, (h,), (torch.ones_like(h),))
        return results[0], results[1]

    h = guess.detach()
    with torch.no_grad():
        most = guess.shape[1] if iterations is None else iterations
        for _ in range(most if guess.numel() else 0):
            previous = before(h)
            value, slope = value_and_slope(previous)
            new = linear_scan(slope, value - slope * previous, initial=first)
            change, largest = (new - h).abs().max(), new.abs().max()
            h = new
            if not bool(change > tolerance * largest):
                break
        previous = before(h)
        _, slope = value_and_slope(previous)
    # one more iteration, whose gradient is that of the solution: J depends on h alone
    value = step(previous)
    return linear_scan(slope, value - slope * previous, initial=first)


class ParaGRU(nn.Module):
    """A GRU whose gates read their own channel of the state alone, run over all tokens at once ("ParaRNN", arXiv 2510.21450) by
    `newton_scan`:

        z = sigmoid(W_z x + a_z h),  r = sigmoid(W_r x + a_r h),  c = tanh(W_c x + a_c (r h)),  h' = (1 - z) h + z c

    width: of (B, L, width). hidden: default width. Returns (B, L, hidden).

    >>> layer = fastattn.nn.ParaGRU(8)
    >>> h, state = layer(torch.randn(2, 9, 8), return_state=True)
    >>> following = layer(torch.randn(2, 1, 8), state)
    """

    def __init__(self, width: int, hidden: int | None = None, tolerance: float | None = None) -> None:
        super().__init__()
        hidden = width if hidden is None else hidden
        self.inputs = nn.Linear(width, 3 * hidden)
        self.own = nn.Parameter(torch.randn(3, hidden) * 0.5)
        self.tolerance = tolerance

    def forward(self, x: Tensor, state: Tensor | None = None, return_state: bool = False) -> Any:
        """h (B, L, hidden), or (that, state (B, hidden)), which an earlier call returned."""
        of_z, of_r, of_c = self.inputs(x).chunk(3, -1)

        def step(h: Tensor) -> Tensor:
            z, r = torch.sigmoid(of_z + self.own[0] * h), torch.sigmoid(of_r + self.own[1] * h)
            return torch.lerp(h, torch.tanh(of_c + self.own[2] * (r * h)), z)

        h = newton_scan(step, torch.zeros_like(of_z), initial=state, tolerance=self.tolerance)
        if not return_state:
            return h
        return h, (h[:, -1] if x.shape[1] else F.pad(h, (0, 0, 0, 1))[:, 0] if state is None else state)
