"""What the ops of Focus (arXiv 2604.03260) share: limits, and the checks of causal attention with a local window."""

import torch

from .. import masks
from ..runtime import checks, native
from ..runtime.checks import statistics_dtype
from ..runtime.tuning import Parameter, declare
from .attention.checks import check_qkv, check_scale

MAX_GROUPS = native.limits.groups


def check_group_count(op: str, name: str, value: torch.Tensor) -> int:
    groups = value.shape[2]
    if not 1 <= groups <= MAX_GROUPS:
        raise ValueError(
            f"fastattn.{op}: {name} must be (B, L, G) with G in [1, {MAX_GROUPS}], given G = {groups}"
        )
    return groups


def as_window(window: int) -> int:
    """`window`, at most the length of the longest sequence, so that sums with it do not overflow."""
    count = checks.as_integer(window)
    return masks.LONGEST if count is not None and count > masks.LONGEST else window


def check_causal(op: str, q, k, v, window, scale, mask) -> None:
    check_qkv(op, q, k, v)
    if checks.as_integer(window) is None or window < 0:
        raise ValueError(f"fastattn.{op}: window must be an integer of zero or more, given {window!r}")
    if window > masks.LONGEST:
        raise ValueError(f"fastattn.{op}: window must be at most {masks.LONGEST}, given {window}")
    check_scale(op, scale)
    masks.check_causal(op, mask)
    masks.check_args(op, q, k, mask)


def check_grad_lse(
    op: str, grad_lse: torch.Tensor | None, q: torch.Tensor, shape: tuple[int, ...] | None = None
) -> None:
    """shape: the shape of the lse, by default (B, Hq, Lq)."""
    if grad_lse is not None:
        shape = tuple(q.shape[:3]) if shape is None else shape
        checks.check_exact(op, "grad_lse", grad_lse, shape, statistics_dtype(q), q.device, "as the lse")


def attention_fake(q, k, v, *_):
    """out, and lse and state as in attention's schema; with gates, those of the gated scores."""
    rows, dtype = q.shape[:3], statistics_dtype(q)
    return q.new_empty(*rows, v.shape[3]), q.new_empty(rows, dtype=dtype), q.new_empty(*rows, 2, dtype=dtype)


def declare_tiles(op: str, rows: int) -> None:
    """Declare the tile sizes of an op's CPU kernel and of its backward, whose blocks have `rows` rows by default."""
    default = native.defaults("grouped_forward")
    structural = ("dtype", "head_dim", "value_dim")
    sizes = ("batch", "heads", "kv_heads", "q_length", "k_length")
    declare(
        op,
        "cpu",
        parameters={
            "block_q": Parameter(default["block_q"], (24, 48, 72, 96, 144, 192)),
            "block_k": Parameter(default["block_k"], (32, 64, 128, 192, 256)),
            "pack_kib": Parameter(default["pack_kib"], (4096, 16384, 65536)),
        },
        structural=structural,
        sizes=sizes,
    )
    declare(
        f"{op}_backward",
        "cpu",
        parameters={"block_q": Parameter(rows, (24, 48, 72, 96, 144, 192))},
        structural=structural,
        sizes=sizes,
    )
