"""Linear attention with decay, the delta rule and a normaliser: a recurrence over tokens, and one step of it."""

from typing import Literal, overload

import torch

from ...masks import default_scale
from ...runtime import checks as _checks
from ...runtime.registry import call, requested
from . import schema  # noqa: F401  registers the ops


@overload
def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    delta_rule: bool | None = None,
    scale: float | None = None,
    normalize: bool = False,
    qk_norm: bool = False,
    causal: bool = True,
    initial_state: torch.Tensor | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    delta_rule: bool | None = None,
    scale: float | None = None,
    normalize: bool = False,
    qk_norm: bool = False,
    causal: bool = True,
    initial_state: torch.Tensor | None = None,
    return_state: Literal[True],
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    delta_rule: bool | None = None,
    scale: float | None = None,
    normalize: bool = False,
    qk_norm: bool = False,
    causal: bool = True,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Linear attention: a state of keys times values that every token decays, writes to and reads.

    Of each batch and value head, with a_t = exp(decay_t) and S_0 the initial state (arXiv 2006.16236; the gate of 2312.06635,
    the delta rule of 2102.11174, both in 2412.06464, a gate a channel with it in 2510.26692):

        u_t = v_t - (a_t S_{t-1})^T k_t  with the delta rule, else v_t
        S_t = a_t S_{t-1} + k_t (beta_t u_t)^T
        o_t = scale * S_t^T q_t

    a_t is one factor, or one of each key channel (a row of S). A token's output reads the state after the token is written, and
    a decay comes before the delta rule reads. A decay of -inf forgets everything before the token, exactly; a token with beta 0
    and decay 0 changes nothing (padding).

    q, k: (B, Hk, L, dk); v: (B, Hv, L, dv), Hv a multiple of Hk: value head h reads key head h // (Hv / Hk). One floating dtype
        and device, any strides.
    decay: natural logarithm of the factor: (Hv,) constant, (B, Hv, L) or (B, Hv, L, dk), floating. At most 0 and -inf allowed
        (not checked: more than 0 grows the state). Default none, a factor of 1.
    beta: (B, Hv, L) floating, the strength of a write. Default 1. The delta rule is stable for beta * |k|^2 <= 2.
    delta_rule: whether the value that the state has for a key is taken off before the write. Default: where beta is given.
    scale: default 1/sqrt(dk).
    normalize: divide o_t by the same sum with ones for values: o = scale * S^T q / (scale * z.q). There is no epsilon; where the
        divisor is 0, so are the output and its gradients. Not with the delta rule.
    qk_norm: q and k times 1/sqrt(sum x^2 + 1e-6) over the head dim, in float32.
    causal: False: every token reads the state after the last one of its sequence. Neither decay, beta nor the delta rule then.
    initial_state: (B, Hv, dk, dv), or (documents, ...) when packed, in float32 (float64 for float64), any strides; with
        `normalize` (B, Hv, dk, dv + 1), its last column the sum of keys. Default 0.
    return_state: also return the state after the last token, of the initial state's shape and dtype.
    cu_seqlens: (documents + 1,) integers from 0, never decreasing: documents packed in a batch of one, each with a state of its
        own. Outputs after the last one are 0.

    Differentiable in q, k, v, decay, beta and initial_state, from the output and the state. Sums and the state are in float32;
    decay factors are products of numbers, never exponentials of differences. The backward keeps the states before every 64
    tokens, so that memory is linear in L.

    Returns (B, Hv, L, dv) in v's dtype, and the state. Raises ValueError, TypeError or NotImplementedError naming the argument.

        out, state = fa.linear_attention(q, k, v, decay=decay, beta=beta, qk_norm=True, return_state=True)  # gated delta rule
    """
    op = "linear_attention"
    _checks.check_tensor(op, "q", q, dims=4)
    out, state = call(
        op,
        q,
        k,
        v,
        decay,
        beta,
        initial_state,
        cu_seqlens,
        default_scale(q.shape[3]) if scale is None else scale,
        beta is not None if delta_rule is None else delta_rule,
        normalize,
        qk_norm,
        causal,
        requested(op, backend),
        reads=2,
    )[:2]
    return (out, state) if return_state else out


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    *,
    decay: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    delta_rule: bool | None = None,
    scale: float | None = None,
    normalize: bool = False,
    qk_norm: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """One token of `linear_attention` for decoding; its state is updated in place.

    q, k: (B, Hk, dk); v: (B, Hv, dv).
    state: (B, Hv, dk, dv), or (B, Hv, dk, dv + 1) with `normalize`, float32 (float64 for float64), written in place, any strides.
    decay: (Hv,), (B, Hv) or (B, Hv, dk). beta: (B, Hv). The other arguments are those of `linear_attention`.

    Returns (B, Hv, dv) in v's dtype. It has no gradients: an input that requires one raises NotImplementedError outside of
    no_grad. Raises ValueError or TypeError naming the argument.

        out = fa.linear_attention_step(q, k, v, state, decay=decay, beta=beta, qk_norm=True)
    """
    op = "linear_attention_step"
    _checks.check_tensor(op, "q", q, dims=3)
    return call(
        op,
        q,
        k,
        v,
        decay,
        beta,
        state,
        default_scale(q.shape[2]) if scale is None else scale,
        beta is not None if delta_rule is None else delta_rule,
        normalize,
        qk_norm,
        requested(op, backend),
    )
