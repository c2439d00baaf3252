"""From products to weights and dS of a tile: shared by all backward kernels of attention."""

import triton
import triton.language as tl

from ...runtime.triton import LOG2E
from .triton_tiles import exponent_of, load_statistics, tile_scores

_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def score_gradient(s, dp, statistics, allowed, scale2, SCORE: tl.constexpr, MASKED: tl.constexpr):
    """(weights P, dS) of scores as `tile_scores` returns them; statistics: (top, log_sum, delta) broadcast along the rows' dim."""
    top, log_sum, delta = statistics
    if SCORE.shifted:
        # products may be rounded differently than in the forward; near 1e9 the last bit of a float32 is 64
        s = tl.minimum(s - top, 0.0, propagate_nan=tl.PropagateNan.ALL) * scale2 - log_sum * _LOG2E
    weight = SCORE.weight(s)
    slope = SCORE.derivative(s, weight)
    if SCORE.normalised and not SCORE.shifted:
        inverse = tl.where(log_sum == float("-inf"), 0.0, tl.exp2(-log_sum * _LOG2E))
        weight = weight * inverse
        slope = slope * inverse
    if MASKED:
        weight = tl.where(allowed, weight, 0.0)
        slope = tl.where(allowed, slope, 0.0)
    if SCORE.normalised:
        dp = dp - delta
    return weight, slope * dp


@triton.jit
def weights_and_gradients(
    products, dp, statistics, allowed, bias, columns, end, count, factors, scale, kept, SCORE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(weights P, dS) of products q.k. kept: a mask of the weights that dropout keeps and multiplies by `scale`, or None."""
    if kept is not None:
        dp = tl.where(kept, dp * scale, 0.0)
    s = tile_scores(products, bias, columns, end, count, factors, SCORE.shifted)
    weight, ds = score_gradient(s, dp, statistics, allowed, factors.scale2, SCORE, MASKED)
    if SCORE.limit is not None:
        top, log_sum, delta = statistics
        limited = top > float("-inf")  # rows for which the forward used the limit's weights
        if tl.max(tl.max(limited.to(tl.int32), 1), 0) > 0:
            s = tile_scores(products, bias, columns, end, count, factors, True)
            limit_statistics = (tl.where(limited, top, 0.0), log_sum, delta)
            limit_weight, limit_ds = score_gradient(
                s, dp, limit_statistics, allowed, exponent_of(bias, factors.scale2), SCORE.limit, MASKED
            )
            weight = tl.where(limited, limit_weight, weight)
            ds = tl.where(limited, limit_ds, ds)
    if kept is not None:
        weight = tl.where(kept, weight * scale, 0.0)
    return weight, ds


@triton.jit
def user_gradients(
    products, dp, statistics, allowed, at, rows, keys, factors, SCORE: tl.constexpr, MASKED: tl.constexpr
):
    """(weights P, dS of the scaled products, dS of the scores)."""
    score, slope = SCORE.user_slope(products * factors.size, at.entry, at.head, rows, keys, at.captured)
    weight, ds = score_gradient(score, dp, statistics, allowed, factors.scale2, SCORE, MASKED)
    # what is masked has any derivative
    return weight, tl.where(ds == 0.0, 0.0, ds * slope), ds


@triton.jit
def add_captured_gradients(products, ds, inside, at, rows, keys, factors, SCORE: tl.constexpr):
    """Add what a tile (rows, keys) gives to the gradients of the captured tensors. inside (rows,): which are queries."""
    if at.captured.gradients is not None:
        ds = tl.where(inside[:, None], ds, 0.0)
        SCORE.user_scatter(ds, products * factors.size, at.entry, at.head, rows, keys, at.captured)


@triton.jit
def share_of_kept(drawn):
    """The factor of the weights that dropout keeps; 1 without dropout."""
    scale = 1.0
    if drawn is not None:
        scale = drawn.scale
    return scale


@triton.jit
def along_rows(statistics):
    """Three values of each row (M,) as (M, 1)."""
    a, b, c = statistics
    return a[:, None], b[:, None], c[:, None]


@triton.jit
def along_columns(statistics):
    """Three values of each row (M,) as (1, M)."""
    a, b, c = statistics
    return a[None, :], b[None, :], c[None, :]


@triton.jit
def statistics_of(state, delta, at, inside, SCORE: tl.constexpr, META: tl.constexpr):
    """(top, log_sum, delta) of rows; zeros for a score without a normaliser."""
    zero = tl.zeros([META.block_m], tl.float32)
    statistics = (zero, zero, zero)
    if SCORE.normalised:
        statistics = load_statistics(state, delta, at, inside)
    return statistics
