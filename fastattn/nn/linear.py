"""Layers of linear attention, each a way to make the inputs of `linear_attention`: decays, feature maps and the delta rule.

All of them take (B, L, width) to the same, keep a state between calls, and take documents packed in a batch of one.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.causal_conv1d import causal_conv1d
from ..ops.linear_attention import linear_attention
from ..ops.rowwise import rms_norm, rotary

State = tuple[Tensor, ...]
Inputs = tuple[Tensor, Tensor, Tensor, dict[str, Any]]


def _wide(t: Tensor) -> Tensor:
    """At least float32."""
    return t.float() if t.dtype.itemsize == 2 else t


def _like(t: Tensor, x: Tensor) -> Tensor:
    """In float32, or float64 beside float64."""
    return t.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


class LinearMixer(nn.Module):
    """Projections to queries, keys and values, a short convolution of them where `taps` is given, `linear_attention`, and a projection
    back. A layer says what becomes of q, k and v in between, and of the output: `features` and `output`.

    width: of (B, L, width). heads: of values, `value_dim` wide, default width / heads. key_dim: of queries and keys, default
    width / heads. key_heads: default as many as heads. taps: of the convolution, with SiLU; 0 is none.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        key_heads: int | None = None,
        taps: int = 0,
    ) -> None:
        super().__init__()
        if width % heads and (key_dim is None or value_dim is None):
            raise ValueError(
                f"fastattn.nn.{type(self).__name__}: width must be a multiple of heads, given {width} and {heads}"
            )
        self.heads, self.key_heads = heads, heads if key_heads is None else key_heads
        self.key_dim = width // heads if key_dim is None else key_dim
        self.value_dim = width // heads if value_dim is None else value_dim
        self.keys, self.values = self.key_heads * self.key_dim, heads * self.value_dim
        self.qkv = nn.Linear(width, 2 * self.keys + self.values, bias=False)
        self.out = nn.Linear(self.values, width, bias=False)
        self.conv = (
            nn.Parameter(torch.randn(2 * self.keys + self.values, taps) / max(taps, 1) ** 0.5)
            if taps
            else None
        )

    def features(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Inputs:
        """What `linear_attention` gets of (B, L, H, D), and its further arguments."""
        raise NotImplementedError

    def output(self, out: Tensor, x: Tensor) -> Tensor:
        """(B, L, H, value_dim) before the last projection, flat."""
        return out.flatten(2)

    def split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, L, H, D), views."""
        q, k, v = mixed.split([self.keys, self.keys, self.values], -1)
        return *(t.unflatten(2, (self.key_heads, -1)) for t in (q, k)), v.unflatten(2, (self.heads, -1))

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """(B, L, width), or (that, state). state: of an earlier call, one a document when packed. cu_seqlens: (documents + 1,)
        offsets of documents in a batch of one."""
        mixed, tail = self.qkv(x), None
        if self.conv is not None:
            mixed, tail = causal_conv1d(
                mixed,
                self.conv,
                activation="silu",
                initial_state=None if state is None else state[1],
                return_state=True,
                cu_seqlens=cu_seqlens,
            )
        q, k, v, options = self.features(*self.split(mixed), x)
        out, memory = linear_attention(
            *(t.transpose(1, 2) for t in (q, k, v)),
            initial_state=None if state is None else state[0],
            return_state=True,
            cu_seqlens=cu_seqlens,
            **options,
        )
        out = self.out(self.output(out.transpose(1, 2), x))
        return (out, (memory,) if tail is None else (memory, tail)) if return_state else out


class Lightning(LinearMixer):
    """Lightning attention, as TransNormerLLM (arXiv 2307.14995) and MiniMax-01 (2501.08313) have it:

        S_t = exp(-s_h) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t,  y = (RMSNorm(o) * sigmoid(x W_g)) W_o

    q, k, v = silu(x W). s_h = share * 2^(-8 h / H), h from 1; share: less in later layers, 1 - layer / layers there.

    >>> y = fastattn.nn.Lightning(32, heads=2)(torch.randn(1, 9, 32))
    """

    def __init__(self, width: int, heads: int, share: float = 1.0) -> None:
        super().__init__(width, heads)
        self.share = share
        self.gate = nn.Linear(width, self.values, bias=False)
        self.norm = nn.Parameter(torch.ones(self.values))

    def features(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Inputs:
        head = torch.arange(1, self.heads + 1, device=x.device, dtype=torch.float64)
        decay = _like(-self.share * torch.exp2(-8 * head / self.heads), x)
        return F.silu(q), F.silu(k), F.silu(v), {"decay": decay, "scale": 1.0}

    def output(self, out: Tensor, x: Tensor) -> Tensor:
        return rms_norm(out.flatten(2), weight=self.norm) * self.gate(x).sigmoid()


class Retention(LinearMixer):
    """Retention of RetNet (arXiv 2307.08621), several scales:

        S_t = g_h S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t / sqrt(dk),  y = (GroupNorm(o) * silu(x W_g)) W_o,  g_h = 1 - 2^(-5 - h)

    q and k are rotated by their positions, in a document when packed. The state has the number of tokens seen.

    >>> y = fastattn.nn.Retention(32, heads=2)(torch.randn(1, 9, 32))
    """

    def __init__(self, width: int, heads: int, theta: float = 10000.0) -> None:
        super().__init__(width, heads)
        self.theta = theta
        self.gate = nn.Linear(width, self.values, bias=False)

    def output(self, out: Tensor, x: Tensor) -> Tensor:
        return F.layer_norm(out, out.shape[-1:]).flatten(2) * F.silu(self.gate(x))

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """As LinearMixer's."""
        seen, length = x.new_zeros(x.shape[0], dtype=torch.int64) if state is None else state[1], x.shape[1]
        positions = torch.arange(length, device=x.device)
        added: int | Tensor = length
        if cu_seqlens is not None:
            offsets = cu_seqlens.long()
            document = torch.searchsorted(offsets[1:], positions, right=True).clamp(max=len(offsets) - 2)
            seen = seen if state is not None else seen.new_zeros(len(offsets) - 1)
            positions, added = (positions - offsets[document] + seen[document])[None], offsets.diff()
        else:
            positions = positions + seen[:, None]
        q, k, v = (t.transpose(1, 2) for t in self.split(self.qkv(x)))
        q, k = rotary(q, k, positions, theta=self.theta)
        head = torch.arange(self.heads, device=x.device, dtype=torch.float64)
        decay = _like(torch.log1p(-torch.exp2(-5 - head)), x)
        memory = None if state is None else state[0]
        out, memory = linear_attention(
            q, k, v, decay=decay, initial_state=memory, return_state=True, cu_seqlens=cu_seqlens
        )
        out = self.out(self.output(out.transpose(1, 2), x))
        return (out, (memory, seen + added)) if return_state else out


class GatedLinearAttention(LinearMixer):
    """GLA ("Gated Linear Attention", arXiv 2312.06635), a decay of each key channel:

        S_t = Diag(a_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t / sqrt(dk),  a_t = sigmoid(x W_1 W_2 + b)^(1/16)
        y = (RMSNorm(o) * silu(x W_g)) W_o, the norm over a head

    rank: of W_1 W_2, default 16.

    >>> y = fastattn.nn.GatedLinearAttention(32, heads=2)(torch.randn(1, 9, 32))
    """

    def __init__(self, width: int, heads: int, rank: int = 16) -> None:
        super().__init__(width, heads, key_dim=width // heads // 2)
        self.decay = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, self.keys))
        self.gate, self.norm = nn.Linear(width, self.values), nn.Parameter(torch.ones(self.value_dim))

    def features(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Inputs:
        decay = F.logsigmoid(_wide(self.decay(x))).unflatten(2, (self.heads, -1)) / 16
        return q, k, v, {"decay": decay.transpose(1, 2)}

    def output(self, out: Tensor, x: Tensor) -> Tensor:
        return rms_norm(out, weight=self.norm).flatten(2) * F.silu(self.gate(x))


def taylor_features(x: Tensor) -> Tensor:
    """(..., d) to (..., 1 + d + d (d + 1) / 2): phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q.k / sqrt(d) (Based, arXiv 2402.18668).
    Products x_i x_j with i < j stand for both orders."""
    d = x.shape[-1]
    rows, columns = torch.triu_indices(d, d, device=x.device)
    factors = torch.full_like(rows, math.sqrt(1 / d), dtype=torch.float64)  # sqrt(2) / sqrt(2 d)
    factors = factors.masked_fill(rows == columns, math.sqrt(1 / (2 * d))).to(x.dtype)
    squares = x[..., rows] * x[..., columns] * factors
    return torch.cat([torch.ones_like(x[..., :1]), x / d**0.25, squares], -1)


class Based(LinearMixer):
    """The linear attention of Based ("Simple linear attention language models", arXiv 2402.18668), the second-order
    expansion of softmax attention:

        o_t = sum_{i <= t} f(q_t . k_i) v_i / sum_{i <= t} f(q_t . k_i),  f(s) = 1 + s / sqrt(d) + s^2 / (2 d)

    key_dim: default 16, 153 features. Its sliding-window layers are attention with a window, beside it.

    >>> y = fastattn.nn.Based(32, heads=2)(torch.randn(1, 9, 32))
    """

    def __init__(self, width: int, heads: int, key_dim: int = 16) -> None:
        super().__init__(width, heads, key_dim=key_dim)

    def features(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Inputs:
        return taylor_features(q), taylor_features(k), v, {"normalize": True, "scale": 1.0}


class PrefixLinearAttention(Based):
    """Prefix linear attention of JRT-RNN ("Just read twice", arXiv 2407.05483): the first `prefix` tokens are read whole, with
    keys and values of their own, before the causal reading of all:

        o_t = phi(q_t) (sum_{i <= t} phi(k_i) v_i^T + sum_{j < prefix} phi(k'_j) v'_j^T) / (the same of ones for values)

    phi: Based's features.

    >>> layer = fastattn.nn.PrefixLinearAttention(32, heads=2)
    >>> y = layer(torch.randn(1, 9, 32), prefix=4)
    """

    def __init__(self, width: int, heads: int, key_dim: int = 16) -> None:
        super().__init__(width, heads, key_dim)
        self.prefix_kv = nn.Linear(width, self.keys + self.values, bias=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: State | None = None, return_state: bool = False, prefix: int = 0
    ) -> Any:
        """As LinearMixer's, without documents. prefix: tokens that are read whole, of a call without a state."""
        if state is None and prefix:
            k, v = self.prefix_kv(x[:, :prefix]).split([self.keys, self.values], -1)
            k = taylor_features(k.unflatten(2, (self.heads, -1))).transpose(1, 2)
            v = v.unflatten(2, (self.heads, -1)).transpose(1, 2)
            _, memory = linear_attention(k, k, v, causal=False, normalize=True, scale=1.0, return_state=True)
            state = (memory,)
        return super().forward(x, state, return_state)


class Hedgehog(LinearMixer):
    """Hedgehog ("The Hedgehog & the Porcupine", arXiv 2402.04347), a learned feature map that imitates softmax attention:

        o_t = sum_{i <= t} phi(q_t).phi(k_i) v_i / sum_{i <= t} phi(q_t).phi(k_i),  phi(x) = softmax([x W, -x W])

    W: one of each head, for queries and for keys, begun as the identity.

    >>> y = fastattn.nn.Hedgehog(32, heads=2)(torch.randn(1, 9, 32))
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        identity = torch.eye(self.key_dim).repeat(heads, 1, 1)
        self.of_q, self.of_k = nn.Parameter(identity), nn.Parameter(identity.clone())

    def features(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Inputs:
        def phi(t: Tensor, weight: Tensor) -> Tensor:
            t = torch.einsum("blhd,hde->blhe", t, weight)
            return torch.cat([t, -t], -1).softmax(-1)

        return phi(q, self.of_q), phi(k, self.of_k), v, {"normalize": True, "scale": 1.0}


class MagnitudeAware(LinearMixer):
    """MALA ("Rectifying Magnitude Neglect in Linear Attention", arXiv 2507.00698), causal, with s_ti = phi(q_t).phi(k_i)
    and S_t = sum_{i <= t} s_ti:

        o_t = sum_{i <= t} ((1 + 1 / S_t) s_ti - S_t / t) v_i,  phi(x) = elu(x) + 1

    The state's last column has the sum of phi(k) and the number of tokens. eps: the least S_t, default 1e-6.

    >>> y = fastattn.nn.MagnitudeAware(32, heads=2)(torch.randn(1, 9, 32))
    """

    def __init__(self, width: int, heads: int, eps: float = 1e-6) -> None:
        super().__init__(width, heads)
        self.eps = eps

    def forward(  # type: ignore[override]
        self, x: Tensor, state: State | None = None, return_state: bool = False
    ) -> Any:
        """As LinearMixer's, without documents."""
        q, k, v = (t.transpose(1, 2) for t in self.split(self.qkv(x)))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        before = _wide(q.new_zeros(1)) if state is None else state[0][..., None, :, -1]  # (B, H, 1, dk + 1)
        total = _wide(F.pad(k, (0, 1), value=1.0)).cumsum(2) + before
        sums = (_wide(q) * total[..., :-1]).sum(-1, keepdim=True).clamp(min=self.eps)
        reading = torch.cat([(1 + 1 / sums) * q, -sums / total[..., -1:]], -1).to(v.dtype)
        out, memory = linear_attention(
            reading,
            F.pad(k, (0, 1), value=1.0),
            F.pad(v, (0, 1), value=1.0),
            scale=1.0,
            initial_state=None if state is None else state[0],
            return_state=True,
        )
        out = self.out(self.output(out[..., :-1].transpose(1, 2), x))
        return (out, (memory,)) if return_state else out


class GatedDeltaNet(LinearMixer):
    """Gated DeltaNet ("Gated Delta Networks", arXiv 2412.06464), with S as `linear_attention` has it:

        S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(dk),  y = (RMSNorm(o) * silu(x W_g)) W_o

    a_t = exp(-exp(A) softplus(x W_a + dt)), b_t = sigmoid(x W_b), q and k of length one after a convolution and SiLU.
    negative: b_t up to 2, which allows negative eigenvalues (arXiv 2411.12537). Default False.

    >>> layer = fastattn.nn.GatedDeltaNet(32, heads=2)
    >>> y, state = layer(torch.randn(1, 9, 32), return_state=True)
    >>> following = layer(torch.randn(1, 1, 32), state)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        key_heads: int | None = None,
        taps: int = 4,
        negative: bool = False,
    ) -> None:
        super().__init__(width, heads, key_dim, value_dim, key_heads, taps)
        self.strongest = 2.0 if negative else 1.0
        self.beta = nn.Linear(width, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.norm = nn.Parameter(torch.ones(self.value_dim))
        self.make_gates(width)

    def make_gates(self, width: int) -> None:
        self.decay = nn.Linear(width, self.heads, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.heads))
        self.gate: nn.Module = nn.Linear(width, self.values, bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        """(B, L, H) or (B, L, H, dk)."""
        return -_wide(self.A_log).exp() * F.softplus(_wide(self.decay(x)) + self.dt_bias)

    def features(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Inputs:
        beta = self.strongest * self.beta(x).sigmoid()
        options = {"decay": self.log_decay(x).transpose(1, 2), "beta": beta.transpose(1, 2), "qk_norm": True}
        return q, k, v, options

    def output(self, out: Tensor, x: Tensor) -> Tensor:
        return rms_norm(out, weight=self.norm).flatten(2) * F.silu(self.gate(x))


class KimiDeltaAttention(GatedDeltaNet):
    """Kimi delta attention ("Kimi Linear", arXiv 2510.26692): the gated delta rule with a decay of each key channel:

        S_t = (I - b_t k_t k_t^T) Diag(a_t) S_{t-1} + b_t k_t v_t^T,  o_t = S_t^T q_t / sqrt(dk),  y = (RMSNorm(o) * sigmoid(..)) W_o

    a_t = exp(-exp(A) softplus(x W_1 W_2 + dt)); the output's gate is of two such factors too. Both have a head's width between them.

    >>> y = fastattn.nn.KimiDeltaAttention(32, heads=2)(torch.randn(1, 9, 32))
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        taps: int = 4,
    ) -> None:
        super().__init__(width, heads, key_dim, value_dim, taps=taps)

    def make_gates(self, width: int) -> None:
        def factors(out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(width, self.value_dim, bias=False), nn.Linear(self.value_dim, out, bias=False)
            )

        self.decay, self.gate = factors(self.keys), factors(self.values)  # type: ignore[assignment]
        self.dt_bias = nn.Parameter(torch.zeros(self.keys))

    def log_decay(self, x: Tensor) -> Tensor:
        rate = F.softplus(_wide(self.decay(x)) + self.dt_bias).unflatten(2, (self.heads, -1))
        return -_wide(self.A_log).exp()[:, None] * rate

    def output(self, out: Tensor, x: Tensor) -> Tensor:
        return rms_norm(out, weight=self.norm).flatten(2) * self.gate(x).sigmoid()


class TitansMemory(LinearMixer):
    """The linear memory of Titans ("Learning to Memorize at Test Time", arXiv 2501.00663) without momentum, gradient
    descent on |M^T k - v|^2 / 2 with forgetting:

        M_t = (1 - alpha_t) M_{t-1} - theta_t k_t (M_{t-1}^T k_t - v_t)^T,  o_t = M_t^T q_t

    q and k of length one after a convolution and SiLU; alpha = sigmoid(x W_a + b_a), theta = sigmoid(x W_t). It is the gated delta rule
    with beta = theta / (1 - alpha) and values (1 - alpha) v: its error is that of the memory before the decay.

    >>> y = fastattn.nn.TitansMemory(32, heads=2)(torch.randn(1, 9, 32))
    """

    def __init__(self, width: int, heads: int, taps: int = 4) -> None:
        super().__init__(width, heads, taps=taps)
        self.alpha, self.theta = nn.Linear(width, heads), nn.Linear(width, heads)
        nn.init.constant_(self.alpha.bias, -4.0)  # forgets 2 % a token

    def features(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Inputs:
        decay = F.logsigmoid(-_wide(self.alpha(x)))  # of 1 - alpha
        beta = _wide(self.theta(x)).sigmoid() * (-decay).exp()
        v = (v * decay.exp()[..., None]).to(q.dtype)
        options = {
            "decay": decay.transpose(1, 2),
            "beta": beta.transpose(1, 2),
            "qk_norm": True,
            "scale": 1.0,
        }
        return q, k, v, options


class _Weight(nn.Module):
    """A norm's weight under the name that it has in transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Mamba2Block(nn.Module):
    """Mamba-2's block ("Transformers are SSMs", arXiv 2405.21060). Of each head, with B and C shared by the
    heads of a group:

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T,  y_t = h_t^T C_t + D x_t,  out = RMSNorm(y * silu(z)) W_o

    The parameters have the names and shapes of transformers' Mamba2Mixer. width: of (B, L, width), to the same. heads, head_dim: their
    product is the inner width. states: numbers of B and C. groups: of heads, and of the norm. taps: of the convolution.

    >>> layer = fastattn.nn.Mamba2Block(32, heads=4, head_dim=16, states=8)
    >>> y, state = layer(torch.randn(1, 9, 32), return_state=True)
    >>> following = layer(torch.randn(1, 1, 32), state)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int = 64,
        states: int = 128,
        groups: int = 1,
        taps: int = 4,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if heads % groups:
            raise ValueError(
                f"fastattn.nn.Mamba2Block: heads must be a multiple of groups, given {heads} and {groups}"
            )
        self.heads, self.states, self.groups, self.eps = heads, states, groups, eps
        inner, mixed = heads * head_dim, heads * head_dim + 2 * groups * states
        self.sizes = (inner, mixed, heads)
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, taps, groups=mixed, padding=taps - 1)
        self.dt_bias, self.D = nn.Parameter(torch.ones(heads)), nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.arange(1.0, heads + 1).log())
        self.norm = _Weight(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """As LinearMixer's. The state's first tensor is h (B, heads, states, head_dim)."""
        z, mixed, dt = self.in_proj(x).split(self.sizes, -1)
        mixed, tail = causal_conv1d(
            mixed,
            self.conv1d.weight[:, 0],
            bias=self.conv1d.bias,
            activation="silu",
            initial_state=None if state is None else state[1],
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        n = self.groups * self.states
        u, B, C = mixed.split([self.sizes[0], n, n], -1)
        u, B, C = (t.unflatten(2, (h, -1)) for t, h in ((u, self.heads), (B, self.groups), (C, self.groups)))
        dt = F.softplus(_wide(dt) + self.dt_bias).transpose(1, 2)
        out, memory = linear_attention(
            *(t.transpose(1, 2) for t in (C, B, u)),
            decay=-_wide(self.A_log).exp()[:, None] * dt,
            beta=dt,
            delta_rule=False,
            scale=1.0,
            initial_state=None if state is None else state[0],
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        out = (out.transpose(1, 2) + self.D[:, None] * u).flatten(2) * F.silu(z)
        out = rms_norm(out.unflatten(2, (self.groups, -1)), eps=self.eps).flatten(2) * self.norm.weight
        out = self.out_proj(out.to(x.dtype))
        return (out, (memory, tail)) if return_state else out
