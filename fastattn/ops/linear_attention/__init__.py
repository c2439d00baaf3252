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
    """Linear attention: each token decays, writes to and reads a state, which is a sum of products of keys and values.

    For each batch entry and value head, with a_t = exp(decay_t) and S_0 the initial state (arXiv 2006.16236; the gate of 2312.06635,
    the delta rule of 2102.11174, both in 2412.06464, the delta rule with a gate for each channel in 2510.26692):

        u_t = v_t - (a_t S_{t-1})^T k_t  with the delta rule, else v_t
        S_t = a_t S_{t-1} + k_t (beta_t u_t)^T
        o_t = scale * S_t^T q_t

    a_t is one factor, or one for each key channel (a row of S). A token's output reads the state after the token is written. The decay
    is applied before the delta rule reads. A decay of -inf forgets everything before the token exactly. A token with beta 0 and decay
    0 does not change the state (padding).

    q, k: (B, Hk, L, dk); v: (B, Hv, L, dv), Hv a multiple of Hk: value head h reads key head h // (Hv / Hk). One floating dtype
        and device, any strides.
    decay: natural logarithm of the factor: (Hv,) constant, (B, Hv, L) or (B, Hv, L, dk), floating, at most 0; -inf is allowed. Not
        checked: with more than 0 the state grows. Default none, a factor of 1.
    beta: (B, Hv, L) floating, the strength of a write. Default 1. The delta rule is stable for beta * |k|^2 <= 2.
    delta_rule: whether to subtract the state's value for the key before the write. Default: True if beta is given.
    scale: default 1/sqrt(dk).
    normalize: divide o_t by the same sum with ones for values: o = scale * S^T q / (scale * z.q). There is no epsilon; where the
        divisor is 0, the output and its gradients are 0. Default False; excludes the delta rule.
    qk_norm: multiply q and k by 1/sqrt(sum x^2 + 1e-6) over the head dim, in float32. Default False.
    causal: default True. If False, every token reads the state after the last token of its sequence; decay, beta and the delta rule
        are then excluded.
    initial_state: (B, Hv, dk, dv), or (documents, Hv, dk, dv) when packed, in float32 (float64 for float64), any strides; with
        `normalize` the last dim is dv + 1, and its last column is the sum of keys. Default 0.
    return_state: also return the state after the last token, of the initial state's shape and dtype. Default False.
    cu_seqlens: (documents + 1,) integers from 0, never decreasing: the offsets of documents packed in a batch of one, each with its
        own state. Outputs after the last document are 0.

    Differentiable once in q, k, v, decay, beta and initial_state, from the output and the state. Sums and the state are in float32;
    products of decays are products of factors, never exponentials of differences. The backward keeps the state before every 64th
    token, so memory is linear in L.

    Returns (B, Hv, L, dv) in v's dtype, or with return_state (output, state). Raises ValueError, TypeError or NotImplementedError
    naming the argument. The gated delta rule:

    >>> q, v, gates = torch.randn(1, 2, 9, 8), torch.randn(1, 4, 9, 6), torch.rand(2, 1, 4, 9)
    >>> out, state = fastattn.linear_attention(q, q, v, decay=-gates[0], beta=gates[1], qk_norm=True, return_state=True)
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
    """One token of `linear_attention`, for decoding. It updates the state in place.

    q, k: (B, Hk, dk); v: (B, Hv, dv).
    state: (B, Hv, dk, dv), or (B, Hv, dk, dv + 1) with `normalize`, float32 (float64 for float64), written in place, any strides.
    decay: (Hv,), (B, Hv) or (B, Hv, dk). beta: (B, Hv). The other arguments are those of `linear_attention`, which has the sources.

    Returns (B, Hv, dv) in v's dtype. It has no gradients: an input that requires one raises NotImplementedError outside of
    no_grad. Raises ValueError or TypeError naming the argument.

    >>> q, v, state = torch.randn(1, 2, 8), torch.randn(1, 4, 6), torch.zeros(1, 4, 8, 6)
    >>> out = fastattn.linear_attention_step(q, q, v, state, decay=-torch.rand(1, 4), beta=torch.rand(1, 4), qk_norm=True)
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
