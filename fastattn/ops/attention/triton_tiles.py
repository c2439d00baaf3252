"""Device functions that the attention kernels share: which keys a row attends, what a tile reads, and a query tile's pass over keys.

A kernel's program works on one tile of one sequence. `extent` is that sequence's
(queries, keys, prefix, key length, keys before the diagonal, keys after it, from a query to the key on its diagonal).
"""

import triton
import triton.language as tl

from ...runtime.triton import LN2, LOG2E, dot, load_tile, offset, store_tile
from .scores_triton import softmax_weight

_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)
_CHUNK = tl.constexpr(64)  # tiles whose classes are looked at together
_LIMIT_SUM = tl.constexpr(
    1e-20
)  # softplus: a row whose weights add up to less has softmax's, to which they tend


# --- which keys a row attends --------------------------------------------------------------------------------------


@triton.jit
def key_interval(rows, extent, CAUSAL: tl.constexpr):
    """[begin, end) of the keys that query `rows` attend; both ends never decrease with the row."""
    _lq, _lk, prefix, key_length, window_left, window_right, shift = extent
    diagonal = rows + shift
    end = tl.minimum(diagonal + window_right + 1, key_length)
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(diagonal + 1, prefix))
    begin = tl.maximum(diagonal - window_left, 0)
    return begin, end


@triton.jit
def query_interval(keys, extent, CAUSAL: tl.constexpr):
    """[begin, end) of the queries that attend `keys`: the same relation read the other way."""
    lq, _lk, prefix, key_length, window_left, window_right, shift = extent
    diagonal = keys - shift
    begin = tl.maximum(diagonal - window_right, 0)
    if CAUSAL:
        begin = tl.where(keys < prefix, begin, tl.maximum(begin, diagonal))
    end = tl.minimum(diagonal + window_left + 1, lq)
    return begin, tl.where(keys < key_length, end, 0)


@triton.jit
def sequence(
    document, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k, window_left, window_right
):
    """(first query, first key, extent) of one document, or of one batch entry."""
    start_q = length_q * 0
    start_k = start_q
    lq = length_q
    lk = length_k
    if offsets_q is not None:
        start_q = tl.load(offsets_q + document)
        start_k = tl.load(offsets_k + document)
        lq = tl.load(offsets_q + document + 1) - start_q
        lk = tl.load(offsets_k + document + 1) - start_k
    prefix = length_q * 0
    if prefix_lengths is not None:
        prefix = tl.load(prefix_lengths + document)
    key_length = lk
    shift = lk - lq
    if key_lengths is not None:
        entry = tl.load(key_lengths + document)
        key_length = tl.minimum(
            entry & 0x7FFFFFFF, lk
        )  # less the sign, which says what the last query is aligned with
        shift = tl.where(entry < 0, key_length - lq, shift)
    return start_q, start_k, (lq, lk, prefix, key_length, window_left, window_right, shift)


@triton.jit
def query_tile(
    tiles,
    heads,
    prefix_lengths,
    offsets_q,
    offsets_k,
    key_lengths,
    length_q,
    length_k,
    window_left,
    window_right,
):
    """This program's work when there is one a tile of queries, head and sequence:
    (tile, head, batch entry, first query, first key, queries, keys, extent)."""
    program = tl.program_id(0)
    # Under a causal mask the last tiles have most to do: they start first.
    tile = tiles - 1 - program % tiles
    head = (program // tiles) % heads
    document = program // tiles // heads  # a batch entry, or a packed document
    entry = document
    if offsets_q is not None:
        entry = document * 0
    start_q, start_k, extent = sequence(
        document, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k, window_left, window_right
    )  # fmt: skip
    return tile, head, entry, start_q, start_k, extent[0], extent[1], extent


@triton.jit
def key_tile(
    tiles,
    kv_heads,
    prefix_lengths,
    offsets_q,
    offsets_k,
    key_lengths,
    length_q,
    length_k,
    window_left,
    window_right,
):
    """As query_tile, with one program a tile of keys and key head; the first tiles, with most to do, start first."""
    tile, kv_head, entry, start_q, start_k, lq, lk, extent = query_tile(
        tiles, kv_heads, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k, window_left,
        window_right,
    )  # fmt: skip
    return tiles - 1 - tile, kv_head, entry, start_q, start_k, lq, lk, extent


@triton.jit
def query_intervals(first, extent, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """(rows (M,), their key intervals begin and end (M,), edges: those of the first and of the last row)."""
    rows = first + tl.arange(0, BLOCK_M)
    begin, end = key_interval(rows, extent, CAUSAL)
    end = tl.where(rows < extent[0], end, 0)
    first_begin, first_end = key_interval(first, extent, CAUSAL)
    last_begin, last_end = key_interval(tl.minimum(first + BLOCK_M, extent[0]) - 1, extent, CAUSAL)
    return rows, begin, end, (first_begin, first_end, last_begin, last_end)


@triton.jit
def key_tiles(edges, BLOCK_N: tl.constexpr):
    """[begin, end) of the tiles of keys that a query tile with these edges attends."""
    first_begin, _first_end, _last_begin, last_end = edges
    begin = first_begin // BLOCK_N
    return begin, tl.maximum(tl.cdiv(last_end, BLOCK_N), begin)


@triton.jit
def whole_tiles(edges, begin, end, BLOCK_N: tl.constexpr):
    """[full, full_end) within tiles [begin, end): those that need no test of their elements."""
    _first_begin, first_end, last_begin, _last_end = edges
    full = tl.minimum(tl.cdiv(last_begin, BLOCK_N), end)
    return full, tl.maximum(tl.minimum(tl.maximum(first_end, 0) // BLOCK_N, end), full)


@triton.jit
def next_attended(classes, stride, at, stop):
    """[begin, end) of the next tiles side by side, from `at` on, whose classes are not 0; begin is `stop` where there are none.

    Loops over such a range are pipelined by the compiler, as one over tiles to be tested one by one is not.
    """
    begin = at * 0 + stop
    end = begin
    while at < stop:
        ahead = at + tl.arange(0, _CHUNK)
        live = tl.load(classes + offset(ahead, stride), mask=ahead < stop, other=0) != 0
        begin = tl.min(tl.where(live, ahead, stop), 0)
        end = tl.min(tl.where((ahead > begin) & (live == 0), ahead, at + _CHUNK), 0)
        at = tl.where(begin < stop, stop, at + _CHUNK)
    return begin, end


@triton.jit
def query_tiles(first, extent, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(keys (N,) of a tile, their query intervals low and high (N,), [begin, end) of the tiles of queries that attend them)."""
    keys = first + tl.arange(0, BLOCK_N)
    low, high = query_interval(keys, extent, CAUSAL)
    high = tl.where(keys < extent[1], high, 0)
    begin = tl.min(tl.where(high > 0, low, extent[0]), 0) // BLOCK_M
    return keys, low, high, begin, tl.cdiv(tl.max(high, 0), BLOCK_M)


@triton.jit
def allowed_pairs(columns, begin, end, dense_rows, dense_stride):
    """(rows, columns) bool: which columns lie in each row's interval, and in the dense mask at dense_rows (or None)."""
    allowed = (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
    if dense_rows is not None:
        at = dense_rows[:, None] + offset(columns, dense_stride)[None, :]
        allowed = allowed & (tl.load(at, mask=allowed, other=0) != 0)
    return allowed


# --- what a tile reads ---------------------------------------------------------------------------------------------


@triton.jit
def place(base, entry, stride_b, head, stride_h, row, stride_l):
    """Where row `row` of (B, H, L, ...) begins."""
    return base + offset(entry, stride_b) + offset(head, stride_h) + offset(row, stride_l)


@triton.jit
def place_two(a, a_b, a_h, a_l, b, b_b, b_h, b_l, entry, head, row):
    """`place` of two tensors of the same rows: keys and values, or queries and the output's gradient."""
    return place(a, entry, a_b, head, a_h, row, a_l), place(b, entry, b_b, head, b_h, row, b_l)


@triton.jit
def row_pointers(base, entry, stride_b, head, stride_h, row, stride_l, column, stride_c):
    """Where column `column` of row `row` of (B, H, L, C) is, or None where `base` is."""
    pointers = base
    if base is not None:
        pointers = place(base, entry, stride_b, head, stride_h, row, stride_l) + offset(column, stride_c)
    return pointers


@triton.jit
def load_two(
    a, a_l, b, b_l, first, count, A_DIM: tl.constexpr, B_DIM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles (ROWS, BLOCK_A) and (ROWS, BLOCK_B) of two tensors from row `first` of `count` on."""
    a_tile = load_tile(a + offset(first, a_l), a_l, count - first, A_DIM, ROWS, BLOCK_A, MASKED)
    b_tile = load_tile(b + offset(first, b_l), b_l, count - first, B_DIM, ROWS, BLOCK_B, MASKED)
    return a_tile, b_tile


@triton.jit
def store_two(
    a, a_b, a_h, a_l, a_tile, b, b_b, b_h, b_l, b_tile, entry, head, row, count, A_DIM: tl.constexpr,
    B_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Store the first `count` rows of both tiles from row `row` on: a key tile's gradients."""
    a_base, b_base = place_two(a, a_b, a_h, a_l, b, b_b, b_h, b_l, entry, head, row)
    store_tile(a_base, a_l, count, a_tile, A_DIM, ROWS, BLOCK_A)
    store_tile(b_base, b_l, count, b_tile, B_DIM, ROWS, BLOCK_B)


@triton.jit
def load_state(state, at, inside):
    """Each row's maximum (-inf: none was taken off) and the logarithm of its sum of weights relative to it, base e."""
    at = state + 2 * at
    return tl.load(at, mask=inside, other=float("-inf")), tl.load(at + 1, mask=inside, other=0.0)


@triton.jit
def store_state(state, at, top, log_sum, inside):
    at = state + 2 * at
    tl.store(at, top, mask=inside)
    tl.store(at + 1, log_sum, mask=inside)


@triton.jit
def load_statistics(state, delta, at, inside):
    """What each row's weights are found from, and dO.O: (top, log_sum, delta)."""
    top, log_sum = load_state(state, at, inside)
    return top, log_sum, tl.load(delta + at, mask=inside, other=0.0)


@triton.jit
def two_products(a, b, c, d, PRECISION: tl.constexpr):
    """(a @ b^T, c @ d^T): scores and the weights' gradients."""
    zero = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    return dot(a, tl.trans(b), zero, PRECISION), dot(c, tl.trans(d), zero, PRECISION)


@triton.jit
def add_bias(s, bias_rows, bias_stride, columns, end, count):
    """s (rows, columns) in base 2 plus the bias at bias_rows (or None), read for rows that attend anything."""
    if bias_rows is not None:
        at = bias_rows[:, None] + offset(columns, bias_stride)[None, :]
        inside = (end > 0)[:, None] & (columns < count)[None, :]
        bias = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        bias2 = bias * _LOG2E
        # A finite mask, the dtype's lowest value, stays finite: -inf alone is nothing to attend to.
        overflows = (tl.abs(bias2) == float("inf")) & (tl.abs(bias) != float("inf"))
        s += tl.where(overflows, tl.where(bias < 0, -3e38, 3e38), bias2)
    return s


@triton.jit
def tile_scores(
    products, bias_rows, bias_stride, columns, end, count, size, scale2, shift2, SHIFTED: tl.constexpr
):
    """Scores of products q.k: in base 2; where the row maximum is to be taken off, the products themselves, or with a tensor bias
    the scores in base e, so that the difference is exact."""
    if SHIFTED:
        if bias_rows is not None:
            at = bias_rows[:, None] + offset(columns, bias_stride)[None, :]
            inside = (end > 0)[:, None] & (columns < count)[None, :]
            products = products * size + tl.load(at, mask=inside, other=0.0).to(tl.float32)
        return products
    return add_bias(products * scale2 + shift2, bias_rows, bias_stride, columns, end, count)


@triton.jit
def score_shift(bias2, key_length, LOG_N: tl.constexpr):
    """What is added to every scaled product, in base 2."""
    if LOG_N:
        return -tl.log2(tl.maximum(key_length, 1).to(tl.float32))
    return bias2


# --- a query tile over its keys --------------------------------------------------------------------------------------


@triton.jit
def fold(
    acc,  # (M, Dv)
    top,  # (M,) running maximum
    total,  # (M,) running normaliser
    s,  # (M, N) scores: in base 2, or when SHIFTED once the maximum is off and they are multiplied by scale2
    allowed,  # (M, N), when MASKED
    v_tile,  # (N, Dv)
    scale2,
    WEIGHT: tl.constexpr,
    SHIFTED: tl.constexpr,
    NORMALISED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of scores and values added to a query tile's running state."""
    if SHIFTED:
        if MASKED:
            s = tl.where(allowed, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = WEIGHT((s - finite[:, None]) * scale2)
        rescale = tl.exp2((top - finite) * scale2)
        total = total * rescale + tl.sum(weight, 1)
        acc = acc * rescale[:, None]
        top = new_top
    else:
        weight = WEIGHT(s)
        if MASKED:
            weight = tl.where(allowed, weight, 0.0)
        if NORMALISED:
            total = total + tl.sum(weight, 1)
    acc = dot(weight.to(v_tile.dtype), v_tile, acc, PRECISION)
    return acc, top, total


@triton.jit
def attend_tile(
    acc,  # (M, Dv)
    top,  # (M,) running maximum
    total,  # (M,) running normaliser
    q_tile,  # (M, D)
    k_base,
    v_base,
    k_l,
    v_l,
    bias_rows,  # (M,) pointers to each row's bias, or None
    bias_k,
    dense_rows,
    dense_k,
    begin,  # (M,) interval of keys
    end,
    tile,
    count,  # of keys: padding after them, which may hold anything, is not read
    size,
    scale2,
    shift2,
    WEIGHT: tl.constexpr,
    SHIFTED: tl.constexpr,
    NORMALISED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys added to a query tile's running state."""
    first = tile * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k_base + offset(first, k_l), k_l, count - first, HEAD_DIM, BLOCK_N, BLOCK_D, MASKED)
    s = tl.zeros([begin.shape[0], BLOCK_N], tl.float32)
    s = dot(q_tile, tl.trans(k_tile), s, PRECISION)  # (M, N)
    s = tile_scores(s, bias_rows, bias_k, keys, end, count, size, scale2, shift2, SHIFTED)
    allowed = None
    if MASKED:
        allowed = allowed_pairs(keys, begin, end, dense_rows, dense_k)
    v_tile = load_tile(v_base + offset(first, v_l), v_l, count - first, V_DIM, BLOCK_N, BLOCK_DV, MASKED)
    return fold(acc, top, total, s, allowed, v_tile, scale2, WEIGHT, SHIFTED, NORMALISED, MASKED, PRECISION)


@triton.jit
def attend(
    q_tile,
    k_base,
    v_base,
    k_l,
    v_l,
    bias_rows,
    bias_k,
    dense_rows,
    dense_k,
    tile_classes,  # this row of tiles' classes (0 = nothing to attend), or None
    begin,
    end,
    edges,
    count,  # of keys: padding after them, which may hold anything, is not read
    size,
    scale2,
    shift2,
    WEIGHT: tl.constexpr,
    SHIFTED: tl.constexpr,
    NORMALISED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A query tile over all the keys that it attends: (acc (M, Dv), top (M,), total (M,))."""
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    tile_begin, tile_end = key_tiles(edges, BLOCK_N)
    full = tile_end
    full_end = tile_end
    if dense_rows is None:
        full, full_end = whole_tiles(edges, tile_begin, tile_end, BLOCK_N)
        for tile in range(full, full_end):
            acc, top, total = attend_tile(
                acc, top, total, q_tile, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows, dense_k, begin,
                end, tile, count, size, scale2, shift2, WEIGHT, SHIFTED, NORMALISED, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D,
                BLOCK_DV, False, PRECISION,
            )  # fmt: skip
    left = full - tile_begin
    if tile_classes is None:
        for step in range(0, left + (tile_end - full_end)):
            tile = tl.where(step < left, tile_begin + step, full_end + step - left)
            acc, top, total = attend_tile(
                acc, top, total, q_tile, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows, dense_k, begin,
                end, tile, count, size, scale2, shift2, WEIGHT, SHIFTED, NORMALISED, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D,
                BLOCK_DV, True, PRECISION,
            )  # fmt: skip
    else:
        here, past = next_attended(tile_classes, 1, tile_begin, tile_end)
        while here < tile_end:
            for tile in range(here, past):
                acc, top, total = attend_tile(
                    acc, top, total, q_tile, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows, dense_k, begin,
                    end, tile, count, size, scale2, shift2, WEIGHT, SHIFTED, NORMALISED, HEAD_DIM, V_DIM, BLOCK_N, BLOCK_D,
                    BLOCK_DV, True, PRECISION,
                )  # fmt: skip
            here, past = next_attended(tile_classes, 1, past, tile_end)
    return acc, top, total


@triton.jit
def exponent_of(bias_rows, scale2):
    """What multiplies a score once its row's maximum is off: a tensor bias leaves scores in base e."""
    if bias_rows is not None:
        return _LOG2E
    return scale2


@triton.jit
def or_limit(
    acc, top, total, q_tile, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows, dense_k, class_row, begin, end, edges,
    count, size, scale2, shift2,
    NORMALISED: tl.constexpr, SHIFTED: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `attend` gave, but softmax's in rows whose softplus weights may all have underflowed: e^s differs from log(1 + e^s) by
    half of it at most, and with the maximum off its sum is at least 1."""
    if NORMALISED and not SHIFTED:
        limited = (total < _LIMIT_SUM) & (end > begin)
        if tl.max(limited.to(tl.int32), 0) > 0:
            limit_acc, limit_top, limit_total = attend(
                q_tile, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows, dense_k, class_row, begin, end, edges,
                count, size, exponent_of(bias_rows, scale2), shift2,
                softmax_weight, True, True, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
            acc = tl.where(limited[:, None], limit_acc, acc)
            top = tl.where(limited, limit_top, top)
            total = tl.where(limited, limit_total, total)
    return acc, top, total


@triton.jit
def finish(acc, top, total, scale2, bias2, NORMALISED: tl.constexpr):
    """(normalised output, natural log-sum-exp, the state that `load_state` gives back): 0, -inf and weights of 2^-inf for a row
    with nothing to attend to. bias2: the constant bias, which scores below a maximum are without."""
    lse = total
    log_sum = total
    if NORMALISED:
        nothing = total == 0.0
        acc = acc / tl.where(nothing, 1.0, total)[:, None]
        log_sum = tl.log2(tl.where(nothing, 1.0, total)) * _LN2
        lse = log_sum
        top = tl.where(nothing, 0.0, top)
        lse += tl.where(top == float("-inf"), 0.0, top * (scale2 * _LN2) + bias2 * _LN2)
        log_sum = tl.where(nothing, float("inf"), log_sum)
        lse = tl.where(nothing, float("-inf"), lse)
    return acc, lse, top, log_sum
