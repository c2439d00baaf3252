"""The definition of linear attention, in plain torch: the recurrence, token by token."""

import itertools

import torch

from ...runtime.arithmetic import widened
from ...runtime.checks import statistics_dtype
from .. import documents
from .checks import CHUNK, kept_states

EPS = 1e-6  # for qk_norm


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    delta_rule: bool,
    normalize: bool,
    qk_norm: bool,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out (B, Hv, L, dv), state after the last token, states that are kept for the backward)."""
    heads, length, wide = v.shape[1], v.shape[2], widened(q).dtype
    q, k, values, a, b = _operands(q, k, v, decay, beta, normalize, qk_norm)
    sequences = documents.count(q.shape[0], cu_seqlens)
    state_shape = (heads, k.shape[3], values.shape[3])
    if initial_state is None:
        state = values.new_zeros(sequences, *state_shape)
    else:
        state = initial_state.to(wide)
    kept = values.new_zeros(q.shape[0], heads, kept_states(length, causal, cu_seqlens), *state_shape[1:])
    cuts = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
        initial = state if cu_seqlens is None else state[i : i + 1]
        document = [x[:, :, begin:end] for x in (q, k, values, a, b)]
        if causal:
            out, after, starts = _recurrence(*document, initial, scale, delta_rule)
            slot = 0 if cu_seqlens is None else begin // CHUNK + i
        else:
            after = initial + document[1].mT @ document[2]
            out, starts, slot = scale * (document[0] @ after), [after.detach()], i
        outputs.append(out)
        states.append(after)
        if starts:
            kept[:, :, slot : slot + len(starts)] = torch.stack(starts, 2)
    outputs.append(torch.zeros_like(values[:, :, cuts[-1] :]))
    out = torch.cat(outputs, 2)
    state = torch.cat(states) if states else values.new_zeros(0, *state_shape)
    if normalize:
        out = _normalized(out)
    dtype = statistics_dtype(v)
    return out.to(v.dtype), state.to(dtype), kept.detach().to(dtype)


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    state: torch.Tensor,
    scale: float,
    delta_rule: bool,
    normalize: bool,
    qk_norm: bool,
) -> torch.Tensor:
    """(B, Hv, dv); overwrites `state` with the state after the token."""
    decay = decay if decay is None or decay.dim() == 1 else decay.unsqueeze(2)
    out, after, _ = linear_attention(
        *(x.unsqueeze(2) for x in (q, k, v)),
        decay,
        None if beta is None else beta.unsqueeze(2),
        state,
        None,
        scale,
        delta_rule,
        normalize,
        qk_norm,
        True,
    )
    state.copy_(after)
    return out.squeeze(2)


def _operands(q, k, v, decay, beta, normalize, qk_norm):
    """q, k (B, Hv, L, dk), values, factors a (B, Hv, L, 1 or dk) and write strengths b (B, Hv, L, 1), in one dtype."""
    q, k, values = (widened(x) for x in (q, k, v))
    if qk_norm:
        q, k = (x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt() for x in (q, k))
    if k.shape[1]:
        group = v.shape[1] // k.shape[1]
        q, k = (x.repeat_interleave(group, 1) for x in (q, k))
    one = values.new_ones(values.shape[:3] + (1,))
    if normalize:
        values = torch.cat([values, one], -1)
    if decay is None:
        a = one
    elif decay.dim() == 1:
        a = decay.to(values.dtype).exp()[:, None, None].expand_as(one)
    else:
        a = decay.to(values.dtype).exp()
        a = a.unsqueeze(-1) if a.dim() == 3 else a
    b = one if beta is None else beta.to(values.dtype).unsqueeze(-1)
    return q, k, values, a, b


def _recurrence(q, k, values, a, b, state, scale: float, delta_rule: bool):
    """(outputs, the state after the last token, the states before every chunk)."""
    outputs, starts = [], []
    for t, (q_t, k_t, v_t, a_t, b_t) in enumerate(
        zip(*(x.unbind(2) for x in (q, k, values, a, b)), strict=True)
    ):
        if t % CHUNK == 0:
            starts.append(state.detach())
        state = a_t[..., None] * state
        u_t = v_t - (k_t[..., None, :] @ state).squeeze(-2) if delta_rule else v_t
        state = state + k_t[..., None] * (b_t * u_t)[..., None, :]
        outputs.append(scale * (q_t[..., None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 2) if outputs else values, state, starts


def _normalized(out: torch.Tensor) -> torch.Tensor:
    """The sums divided by the last column, the sum with ones for values; 0 where that is 0."""
    sums, divisor = out[..., :-1], out[..., -1:]
    zero = divisor == 0
    return torch.where(zero, 0.0, sums / torch.where(zero, 1.0, divisor))
