"""The definition of tiled attention, in plain torch (specification: scores, masks, rows with nothing to attend)."""

import math

import torch

from ... import masks
from ...runtime.arithmetic import residual_of, widened
from .checks import ALL_DROPPED
from .scores import BY_CODE, has_residual

# below this score e^s equals log(1 + e^s) within float64's rounding (a factor of 1 - e^-38 / 2). It is not much higher: float32's
# subnormals would lose digits of weights that are small beside a row's others
LIMIT_SCORE = -38.0


_WORD = (1 << 32) - 1


def attention(*members) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out (B, Hq, Lq, Dv), lse (B, Hq, Lq), or (0,) for a score without a normaliser, state, residual).

    Its backward recomputes the weights. state and residual are as in the schema; the maxima in state are those of scores.
    """
    q, score = members[0], members[5]
    out, *statistics = _attention(*(widened(a) if isinstance(a, torch.Tensor) else a for a in members))
    residual = residual_of(out.detach(), q) if has_residual(q.dtype, score) else q.new_empty(0)
    return out.to(q.dtype), *statistics, residual


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    sink: torch.Tensor | None,
    score: int,
    scale: float,
    bias_value: float | None,
    softcap: float | None,
    dropped: int,
    rng: torch.Tensor | None,
    mask: masks.MaskArgs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    row = BY_CODE[score]
    lq, lk = q.shape[2], k.shape[2]
    k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    s = scale * (q @ k.transpose(-1, -2))  # (B, H, Lq, Lk)
    if softcap is not None:
        s = softcap * _tanh(s / softcap)
    if bias is not None:
        s = s + (bias if bias.dim() == 4 else of_pairs(bias, lq, lk, mask).to(s.dtype))
    common = 0.0  # a constant added to all scores of a row: it cancels in softmax's weights
    if bias_value is not None and row.shifted and math.isfinite(bias_value):
        common = bias_value
    elif bias_value is not None:
        s = s + bias_value
    elif row.log_n_bias and bias is None:
        n = masks.sequence_keys(lq, lk, q.device, mask)
        s = s - n.to(s.dtype if s.dtype == torch.float64 else torch.float32).log().to(s.dtype)
    allowed = masks.dense_allowed(lq, lk, q.device, mask)
    if not row.normalised:
        nothing = q.new_empty(0, dtype=_statistics(q.dtype))
        weight = dropout(row.weight(s).masked_fill(~allowed, 0.0), dropped, rng)
        return weight @ v, nothing, nothing.clone()
    wide = (s if s.dtype == torch.float64 else s.float()).masked_fill(~allowed, -torch.inf)
    top = wide.detach().amax(-1, keepdim=True) if lk else wide.new_zeros(*wide.shape[:-1], 1)
    if not row.shifted:
        # rows whose weights may all underflow use the exponentials that the weights tend to
        top = top.masked_fill(top >= LIMIT_SCORE, -torch.inf)
    shifted = top != -torch.inf  # true for NaN, which stays NaN
    weight = torch.exp((wide - top).masked_fill(~shifted, -torch.inf))
    if not row.shifted:
        plain = row.weight(s).masked_fill(~allowed, 0.0).to(wide.dtype)
        weight = torch.where(shifted, weight, plain)
    total = weight.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    lse = (total.log() + top.masked_fill(~shifted, 0.0) + common).masked_fill(nothing, -torch.inf).squeeze(-1)
    weight, state = weight / total, row_state(top, total, nothing)
    if sink is not None:
        lse, share = with_sink(lse, sink.to(lse.dtype)[None, :, None])
        # the value of weight * share with the gradient of exp(s - lse): the product's own gradient has two terms that nearly cancel
        # where the sink takes nearly all of the weight
        change = wide.masked_fill(~allowed | wide.isinf(), 0.0) - lse.masked_fill(lse.isinf(), 0.0)[..., None]
        weight = (weight * share[..., None]).detach() * torch.exp(change - change.detach())
        state[..., 1] -= share.detach().log()
    out = dropout(weight, dropped, rng).to(v.dtype) @ v
    return out, lse.to(_statistics(q.dtype)), state.to(_statistics(q.dtype))


def of_pairs(bias: torch.Tensor, lq: int, lk: int, mask: masks.MaskArgs) -> torch.Tensor:
    """A bias by distance (Hq or 1, Lq + Lk - 1) as (B or 1, Hq or 1, Lq, Lk): row i and key j get the value at index
    j - diagonal(i) + Lk - 1. The diagonal is a causal mask's; in packed documents it and j count from the document's start."""
    _, i = masks.positions(mask.cu_seqlens_q, lq, bias.device)
    _, j = masks.positions(mask.cu_seqlens_k, lk, bias.device)
    diagonal = i + masks.diagonal_offset(lq, lk, bias.device, mask)  # (B or 1, Lq)
    index = j - diagonal[..., None] + lk - 1
    # pairs of different documents lie outside of the table; the mask excludes them
    return bias[:, index.clamp(0, max(bias.shape[1] - 1, 0))].movedim(0, 1)


def _tanh(x: torch.Tensor) -> torch.Tensor:
    """tanh with a gradient that is accurate far from 0, where torch.tanh's, 1 - y * y, cancels."""
    sign = torch.where(x < 0, -1.0, 1.0).to(x.dtype)
    e = torch.exp(-2 * x * sign)
    return torch.where(x.abs() < 0.6, torch.tanh(x), sign * (1 - 2 * (e / (1 + e))))


def with_sink(lse: torch.Tensor, sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the log-sum-exp of a row's scores and its sink, the part of the weight that remains for the keys)."""
    empty = lse == -torch.inf
    # not by torch.sigmoid, whose gradient forms 1 - y and cancels where the sink is far above
    share = torch.nn.functional.logsigmoid(lse.masked_fill(empty, 0.0) - sink).exp()
    # not by logaddexp, whose gradient is NaN where both are -inf
    low, high = torch.minimum(lse, sink), torch.maximum(lse, sink)
    difference = (low - high).masked_fill(low == -torch.inf, -torch.inf)
    return high + torch.log1p(difference.exp()), share.masked_fill(empty, 0.0)


def dropout(weight: torch.Tensor, dropped: int, rng: torch.Tensor | None) -> torch.Tensor:
    """The weights (B, H, Lq, Lk) that `kept` selects, divided by the probability to be kept; the others become 0."""
    if not dropped:
        return weight
    scale = ALL_DROPPED / (ALL_DROPPED - dropped) if dropped < ALL_DROPPED else 0.0
    return (weight * scale).masked_fill(~kept(weight.shape, dropped, rng), 0.0)


def kept(shape: torch.Size, dropped: int, rng: torch.Tensor) -> torch.Tensor:
    """bool (B, H, Lq, Lk): the weights that dropout keeps. For keys 8g to 8g + 7 of a row `philox` draws eight numbers of 16 bits. Its
    counter is (g, row, batch * H + head, lower half of the offset); its key is (lower half of the seed, upper half of the seed xor
    that of the offset). Key 8g + t takes the lower half of word t & 3 for t < 4, else the upper half."""
    batch, heads, rows, keys = shape
    groups = -(-keys // 8)
    seed, offset = rng.unbind()
    planes = torch.arange(batch * heads, device=rng.device).view(-1, 1, 1)
    row = torch.arange(rows, device=rng.device).view(1, -1, 1)
    group = torch.arange(groups, device=rng.device).view(1, 1, -1)
    counter = [t.expand(batch * heads, rows, groups) for t in (group, row, planes, offset & _WORD)]
    words = philox(counter, [seed & _WORD, ((seed >> 32) ^ (offset >> 32)) & _WORD])
    numbers = torch.stack([w & 0xFFFF for w in words] + [w >> 16 for w in words], -1)
    return (numbers >= dropped).view(batch, heads, rows, groups * 8)[..., :keys]


def philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Four words of 32 bits, held in int64, by ten rounds of Philox 4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    2011)."""
    for _ in range(10):
        a, b, c, d = counter
        counter = [
            _upper_half(c, 0xCD9E8D57) ^ b ^ key[0],
            (c * 0xCD9E8D57) & _WORD,
            _upper_half(a, 0xD2511F53) ^ d ^ key[1],
            (a * 0xD2511F53) & _WORD,
        ]
        key = [(key[0] + 0x9E3779B9) & _WORD, (key[1] + 0xBB67AE85) & _WORD]
    return counter


def _upper_half(a: torch.Tensor, b: int) -> torch.Tensor:
    """The upper 32 bits of the unsigned 64-bit product of a and b, which would overflow int64."""
    return (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16


def row_state(top: torch.Tensor, total: torch.Tensor, nothing: torch.Tensor) -> torch.Tensor:
    """(..., 2): row maxima and logarithms of sums relative to them, (0, inf) for a row with nothing to attend to."""
    log_sum = total.detach().log().masked_fill(nothing, torch.inf)
    return torch.cat([top.masked_fill(nothing, 0.0), log_sum], -1)


def expand_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, Hkv, L, D) -> (B, heads, L, D), each key head serving heads / Hkv query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
