"""The checks of the attention ops' arguments, run for every caller."""

import math

import torch

from ... import masks
from ...runtime import checks, hints, native
from .scores import BY_CODE, has_residual

ALL_DROPPED = native.limits.dropped  # dropout compares a number of 16 bits with `dropped` for every weight
WANTS_BIAS, WANTS_SINK = 1, 2  # bits of `wanted`, the requested gradients of a backward


def check_heads(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """q, k and v are tensors of four dimensions, as a public function needs before its op checks everything else."""
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
        v_shape = v.shape
        if (
            batch == kv_batch == v_shape[0]
            and kv_heads == v_shape[1]
            and keys == v_shape[2]
            and head_dim == key_dim
            and kv_heads != 0
            and heads % kv_heads == 0
        ):
            if kv_heads >= hints.MANY_HEADS:
                hints.check_layout(op, q, k)
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
    """A backward's incoming gradient and the results of its forward: out, and `statistics`, which messages call `name`."""
    out_shape = (*q.shape[:3], v.shape[3])
    checks.check_exact(op, "grad_out", grad_out, out_shape, q.dtype, q.device, "(B, Hq, Lq, Dv)")
    checks.check_exact(op, "out", out, out_shape, q.dtype, q.device, "(B, Hq, Lq, Dv)")
    checks.check_exact(
        op, name, statistics, shape, checks.statistics_dtype(q), q.device, "as the forward gives it"
    )


def check_scale(op: str, scale: float) -> None:
    number = checks.as_number(op, "scale", scale, kind="a finite number")
    if not -math.inf < number < math.inf:  # math.isfinite does not take a SymFloat
        raise TypeError(f"fastattn.{op}: scale must be a finite number, given {checks.describe(scale)}")


def check_distances(op: str, bias: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
    """A bias with one value for each distance: (Hq or 1, Lq + Lk - 1), q's dtype or float32."""
    shape = (q.shape[1], max(q.shape[2] + k.shape[2] - 1, 0))
    dtypes = dict.fromkeys((q.dtype, checks.statistics_dtype(q)))
    if bias.dtype not in dtypes or bias.shape[1] != shape[1] or bias.shape[0] not in (1, shape[0]):
        allowed = " or ".join(str(t).removeprefix("torch.") for t in dtypes)
        raise ValueError(
            f"fastattn.{op}: bias by distance must be {allowed} of shape (Hq or 1, Lq + Lk - 1) = {shape}, "
            f"given {checks.describe(bias)}"
        )
    checks.check_same_device(op, q=q, bias=bias)


def _check_options(op: str, q, sink, score, softcap, dropped, rng) -> None:
    if sink is not None:
        if not BY_CODE[score].shifted:
            raise ValueError(f"fastattn.{op}: sink is for softmax only, given score={BY_CODE[score].name!r}")
        checks.check_tensor(op, "sink", sink, dims=1)
        if sink.shape[0] != q.shape[1] or sink.dtype not in (q.dtype, torch.float32):
            dtypes = " or ".join(
                dict.fromkeys(str(t).removeprefix("torch.") for t in (q.dtype, torch.float32))
            )
            raise ValueError(
                f"fastattn.{op}: sink must be {dtypes} of shape ({q.shape[1]},), one for each head of q, given {checks.describe(sink)}"
            )
        checks.check_same_device(op, q=q, sink=sink)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"fastattn.{op}: softcap must be a finite number above 0, given {softcap}")
    if not 0 <= dropped <= ALL_DROPPED:
        raise ValueError(f"fastattn.{op}: dropped must lie in [0, {ALL_DROPPED}], given {dropped}")
    if dropped:
        checks.check_tensor(op, "rng", rng, dims=1)
        if rng.shape[0] != 2 or rng.dtype != torch.int64:
            raise ValueError(
                f"fastattn.{op}: rng must be int64 of shape (2,), seed and offset, given {checks.describe(rng)}"
            )
        checks.check_same_device(op, q=q, rng=rng)


def _check(op: str, q, k, v, bias, sink, score, scale, bias_value, softcap, dropped, rng, mask) -> None:
    check_qkv(op, q, k, v)
    if score not in BY_CODE:
        raise ValueError(f"fastattn.{op}: {BY_CODE.unknown(score)}")
    if bias is not None and bias.dim() == 2:
        check_distances(op, bias, q, k)
    elif bias is not None:
        checks.check_floating(op, q=q, bias=bias)
        checks.check_tensor(op, "bias", bias, dims=4)
        masks.check_broadcast(op, "bias", bias, q, k)
    if sink is not None or softcap is not None or dropped:
        _check_options(op, q, sink, score, softcap, dropped, rng)
    masks.check_args(op, q, k, mask)


def check_attention(*members) -> None:
    _check("attention", *members)


def check_attention_backward(
    grad_out, grad_lse, q, k, v, bias, sink, out, lse, state, residual, score, scale, bias_value, softcap, dropped, rng, mask, wanted
) -> None:  # fmt: skip
    op = "attention_backward"
    _check(op, q, k, v, bias, sink, score, scale, bias_value, softcap, dropped, rng, mask)
    rows = tuple(q.shape[:3])
    shape, state_shape = (rows, (*rows, 2)) if BY_CODE[score].normalised else ((0,), (0,))
    check_results(op, grad_out, q, v, out, lse, "lse", shape)
    dtype = checks.statistics_dtype(q)
    checks.check_exact(op, "state", state, state_shape, dtype, q.device, "as the forward gives it")
    residual_shape = out.shape if has_residual(q.dtype, score) else (0,)
    checks.check_exact(op, "residual", residual, residual_shape, q.dtype, q.device, "as the forward gives it")
    if grad_lse is not None:
        checks.check_like(op, "grad_lse", grad_lse, "lse", lse)
    for bit, (name, t) in enumerate((("bias", bias), ("sink", sink))):
        if wanted >> bit & 1 and t is None:
            raise ValueError(f"fastattn.{op}: wanted requests the gradient of {name}, given {name}=None")
