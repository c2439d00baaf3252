"""What the ops of attention ask of their arguments, whoever calls them."""

import math

import torch

from ... import masks
from ...runtime import checks
from .scores import BY_CODE


def check_heads(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """What a public function needs of q, k and v before its op checks the rest: tensors of four dimensions."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, torch.Tensor) or t.dim() != 4:
            checks.check_tensor(op, name, t, dims=4)


def check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Ranks, dtypes, devices and sizes of q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv)."""
    if (
        isinstance(q, torch.Tensor)
        and isinstance(k, torch.Tensor)
        and isinstance(v, torch.Tensor)
        and q.dim() == k.dim() == v.dim() == 4
        and q.dtype is k.dtype is v.dtype
        and q.dtype in checks.FLOATING
        and q.device == k.device == v.device
    ):
        batch, heads, _, head_dim = q.shape
        kv_batch, kv_heads, keys, key_dim = k.shape
        of_v = v.shape
        if (
            batch == kv_batch == of_v[0]
            and kv_heads == of_v[1]
            and keys == of_v[2]
            and head_dim == key_dim
            and kv_heads != 0
            and heads % kv_heads == 0
        ):
            return
    for name, t in (("q", q), ("k", k), ("v", v)):
        checks.check_tensor(op, name, t, dims=4)
    checks.check_floating(op, q=q, k=k, v=v)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"fastattn.{op}: k has a batch of {k.shape[0]}, q has {q.shape[0]}; they must agree")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"fastattn.{op}: v must have k's batch, heads and length {tuple(k.shape[:3])}, given {tuple(v.shape[:3])}"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"fastattn.{op}: k has head dim {k.shape[3]}, q has {q.shape[3]}; they must agree")
    raise ValueError(f"fastattn.{op}: k has {k.shape[1]} heads, which does not divide q's {q.shape[1]}")


def check_results(op: str, grad_out, q, v, out, statistics, name: str, shape: tuple[int, ...]) -> None:
    """A backward's incoming gradient and what its forward kept: out, and `statistics`, which is called `name`."""
    of_out = (*q.shape[:3], v.shape[3])
    checks.check_exact(op, "grad_out", grad_out, of_out, q.dtype, q.device, "(B, Hq, Lq, Dv)")
    checks.check_exact(op, "out", out, of_out, q.dtype, q.device, "(B, Hq, Lq, Dv)")
    checks.check_exact(
        op, name, statistics, shape, checks.statistics_dtype(q), q.device, "as the forward gives it"
    )


def check_scale(op: str, scale: float) -> None:
    number = checks.as_number(op, "scale", scale, kind="a finite number")
    if not -math.inf < number < math.inf:  # math.isfinite takes no symbol
        raise TypeError(f"fastattn.{op}: scale must be a finite number, given {checks.describe(scale)}")


def _check(op: str, q, k, v, bias, score, scale, bias_value, mask) -> None:
    check_qkv(op, q, k, v)
    if score not in BY_CODE:
        raise ValueError(f"fastattn.{op}: {BY_CODE.unknown(score)}")
    if bias is not None:
        checks.check_floating(op, q=q, bias=bias)
        checks.check_tensor(op, "bias", bias, dims=4)
        masks.check_broadcast(op, "bias", bias, q, k)
    masks.check_args(op, q, k, mask)


def check_attention(q, k, v, bias, score, scale, bias_value, mask) -> None:
    _check("attention", q, k, v, bias, score, scale, bias_value, mask)


def check_attention_backward(
    grad_out, grad_lse, q, k, v, bias, out, lse, state, score, scale, bias_value, mask, wanted
) -> None:
    op = "attention_backward"
    _check(op, q, k, v, bias, score, scale, bias_value, mask)
    rows = tuple(q.shape[:3])
    shape, state_shape = (rows, (*rows, 2)) if BY_CODE[score].normalised else ((0,), (0,))
    check_results(op, grad_out, q, v, out, lse, "lse", shape)
    dtype = checks.statistics_dtype(q)
    checks.check_exact(op, "state", state, state_shape, dtype, q.device, "as the forward gives it")
    if grad_lse is not None:
        checks.check_like(op, "grad_lse", grad_lse, "lse", lse)
    if wanted and bias is None:
        raise ValueError(f"fastattn.{op}: wanted asks for the gradient of bias, given None")
