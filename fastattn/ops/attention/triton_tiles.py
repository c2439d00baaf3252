"""Device functions that the attention kernels share: the keys that a row attends, the loads of a tile, and the loops over tiles.

A program works on one tile of one sequence. SCORE has the score's constants and META the call's, as `Problem` makes them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...runtime.triton import LN2, LOG2E, Line, decoded_count, dot, load_rows, offset, store_tile
from .triton_options import Cap, Drawn, kept_pairs, tanh_parts
from .triton_placed import Placed, user_scores

_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)
_CHUNK = tl.constexpr(64)  # tiles whose classes are read together
# softplus: a row whose weights sum to less gets softmax's weights, their limit
_LIMIT_SUM = tl.constexpr(1e-20)


class MaskOperand(NamedTuple):
    """A mask as a kernel takes it, without its dense part; each index tensor may be None."""

    window_left: tl.tensor  # an encoded_count, so that Triton does not specialise on it
    window_right: tl.tensor  # likewise
    prefix_lengths: tl.tensor
    cu_seqlens_q: tl.tensor
    cu_seqlens_k: tl.tensor
    key_lengths: tl.tensor


class Factors(NamedTuple):
    """The factors and offsets of a call's scores."""

    scale: tl.tensor  # factor of the gradients' products
    size: tl.tensor  # the scale's absolute value
    scale2: tl.tensor  # from a product to a score in base 2
    bias2: tl.tensor  # a constant bias in base 2
    cap: Cap  # or None


class Extent(NamedTuple):
    """One sequence's sizes."""

    queries: tl.tensor
    keys: tl.tensor
    prefix: tl.tensor
    key_length: tl.tensor  # padding after it may hold anything and is not read
    before: tl.tensor  # number of keys attended before the diagonal
    after: tl.tensor  # and after it
    shift: tl.tensor  # from a query to the key on its diagonal


class Work(NamedTuple):
    """One program's part."""

    tile: tl.tensor
    head: tl.tensor
    entry: tl.tensor  # of the batch
    start_q: tl.tensor  # first query and key of the sequence
    start_k: tl.tensor
    extent: Extent


class Edges(NamedTuple):
    """The key intervals of the first and of the last row of a tile of queries."""

    first_begin: tl.tensor
    first_end: tl.tensor
    last_begin: tl.tensor
    last_end: tl.tensor


class Tiles(NamedTuple):
    """[begin, end) of the tiles to visit; all pairs of the tiles in [full, full_end) are attended."""

    begin: tl.tensor
    full: tl.tensor
    full_end: tl.tensor
    end: tl.tensor


# --- which keys a row attends --------------------------------------------------------------------------------------


@triton.jit
def key_interval(rows, extent, CAUSAL: tl.constexpr):
    """[begin, end) of the keys that query `rows` attend; both ends never decrease with the row."""
    diagonal = rows + extent.shift
    end = tl.minimum(diagonal + extent.after + 1, extent.key_length)
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(diagonal + 1, extent.prefix))
    begin = tl.maximum(diagonal - extent.before, 0)
    return begin, end


@triton.jit
def query_interval(keys, extent, CAUSAL: tl.constexpr):
    """[begin, end) of the queries that attend `keys`: the inverse of `key_interval`."""
    diagonal = keys - extent.shift
    begin = tl.maximum(diagonal - extent.after, 0)
    if CAUSAL:
        begin = tl.where(keys < extent.prefix, begin, tl.maximum(begin, diagonal))
    end = tl.minimum(diagonal + extent.before + 1, extent.queries)
    return begin, tl.where(keys < extent.key_length, end, 0)


@triton.jit
def sequence(document, mask, length_q, length_k):
    """(first query, first key, extent) of one document, or of one batch entry."""
    start_q = length_q * 0
    start_k = start_q
    lq = length_q
    lk = length_k
    if mask.cu_seqlens_q is not None:
        start_q = tl.load(mask.cu_seqlens_q + document)
        start_k = tl.load(mask.cu_seqlens_k + document)
        lq = tl.load(mask.cu_seqlens_q + document + 1) - start_q
        lk = tl.load(mask.cu_seqlens_k + document + 1) - start_k
    prefix = length_q * 0
    if mask.prefix_lengths is not None:
        prefix = tl.load(mask.prefix_lengths + document)
    key_length = lk
    shift = lk - lq
    if mask.key_lengths is not None:
        entry = tl.load(mask.key_lengths + document)
        # the sign bit is set where the last query is aligned with the last valid key
        key_length = tl.minimum(entry & 0x7FFFFFFF, lk)
        shift = tl.where(entry < 0, key_length - lq, shift)
    before, after = decoded_count(mask.window_left), decoded_count(mask.window_right)
    return start_q, start_k, Extent(lq, lk, prefix, key_length, before, after, shift)


@triton.jit
def query_tile(tiles, heads, mask, length_q, length_k):
    """This program's work, with one program for each tile of queries, head and sequence."""
    program = tl.program_id(0)
    # Under a causal mask the last tiles have most to do: they start first.
    tile = tiles - 1 - program % tiles
    head = (program // tiles) % heads
    document = program // tiles // heads  # a batch entry, or a packed document
    entry = document
    if mask.cu_seqlens_q is not None:
        entry = document * 0
    start_q, start_k, extent = sequence(document, mask, length_q, length_k)
    return Work(tile, head, entry, start_q, start_k, extent)


@triton.jit
def key_tile(tiles, kv_heads, mask, length_q, length_k):
    """Like query_tile, with one program for each tile of keys and key head. The first tiles have most to do and start first."""
    work = query_tile(tiles, kv_heads, mask, length_q, length_k)
    return Work(tiles - 1 - work.tile, work.head, work.entry, work.start_q, work.start_k, work.extent)


@triton.jit
def query_intervals(first, extent, META: tl.constexpr):
    """(rows (M,), their key intervals begin and end (M,), the edges)."""
    rows = first + tl.arange(0, META.block_m)
    begin, end = key_interval(rows, extent, META.causal)
    end = tl.where(rows < extent.queries, end, 0)
    first_begin, first_end = key_interval(first, extent, META.causal)
    last = tl.minimum(first + META.block_m, extent.queries) - 1
    last_begin, last_end = key_interval(last, extent, META.causal)
    return rows, begin, end, Edges(first_begin, first_end, last_begin, last_end)


@triton.jit
def key_tiles(edges, BLOCK_N: tl.constexpr):
    """[begin, end) of the tiles of keys that a query tile with these edges attends."""
    begin = edges.first_begin // BLOCK_N
    return begin, tl.maximum(tl.cdiv(edges.last_end, BLOCK_N), begin)


@triton.jit
def key_passes(edges, dense, BLOCK_N: tl.constexpr):
    """The tiles of keys that a query tile with these edges attends. Under a dense mask no tile counts as full."""
    begin, end = key_tiles(edges, BLOCK_N)
    full = end
    full_end = end
    if dense is None:
        full = tl.minimum(tl.cdiv(edges.last_begin, BLOCK_N), end)
        full_end = tl.maximum(tl.minimum(tl.maximum(edges.first_end, 0) // BLOCK_N, end), full)
    return Tiles(begin, full, full_end, end)


@triton.jit
def next_attended(classes, at, stop):
    """[begin, end) of the next run of tiles from `at` on whose classes are not 0; begin is `stop` if there is none.

    The compiler pipelines a loop over such a range, but not a loop that tests each tile.
    """
    begin = at * 0 + stop
    end = begin
    while at < stop:
        ahead = at + tl.arange(0, _CHUNK)
        live = tl.load(classes.base + offset(ahead, classes.stride), mask=ahead < stop, other=0) != 0
        begin = tl.min(tl.where(live, ahead, stop), 0)
        end = tl.min(tl.where((ahead > begin) & (live == 0), ahead, at + _CHUNK), 0)
        at = tl.where(begin < stop, stop, at + _CHUNK)
    return begin, end


@triton.jit
def query_tiles(first, extent, META: tl.constexpr):
    """(keys (N,) of a tile, their query intervals low and high (N,), [begin, end) of the tiles of queries that attend them)."""
    keys = first + tl.arange(0, META.block_n)
    low, high = query_interval(keys, extent, META.causal)
    high = tl.where(keys < extent.keys, high, 0)
    begin = tl.min(tl.where(high > 0, low, extent.queries), 0) // META.block_m
    return keys, low, high, begin, tl.cdiv(tl.max(high, 0), META.block_m)


@triton.jit
def allowed_pairs(columns, begin, end, dense):
    """(rows, columns) bool: which columns lie in each row's interval, and in the dense mask's rows (or None)."""
    allowed = (columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None])
    if dense is not None:
        at = dense.base[:, None] + offset(columns, dense.stride)[None, :]
        allowed = allowed & (tl.load(at, mask=allowed, other=0) != 0)
    return allowed


# --- what a tile reads ---------------------------------------------------------------------------------------------


@triton.jit
def address(t, entry, head, row):
    """A pointer to row `row` of (B, H, L, ...)."""
    return t.base + offset(entry, t.batch) + offset(head, t.head) + offset(row, t.row)


@triton.jit
def place(t, entry, head, row):
    """The rows of one head from `row` on."""
    return Line(address(t, entry, head, row), t.row)


@triton.jit
def row_elements(t, entry, head, row, column):
    """The elements of row `row` of (B, H, L, C) from column `column` on; None if t is None."""
    line = t
    if t is not None:
        line = Line(address(t, entry, head, row) + offset(column, t.column), t.column)
    return line


@triton.jit
def column_elements(t, entry, head, row, column):
    """The elements of column `column` of (B, H, L, C) from row `row` on; None if t is None."""
    line = t
    if t is not None:
        line = Line(address(t, entry, head, row) + offset(column, t.column), t.row)
    return line


@triton.jit
def load_keys(k, v, first, count, META: tl.constexpr, MASKED: tl.constexpr):
    """Tiles (N, D) and (N, Dv) of keys and values from row `first` of `count` on."""
    k_tile = load_rows(k, first, count, META.head_dim, META.block_n, META.block_d, MASKED)
    return k_tile, load_rows(v, first, count, META.v_dim, META.block_n, META.block_dv, MASKED)


@triton.jit
def load_queries(q, g, first, count, META: tl.constexpr, MASKED: tl.constexpr):
    """Tiles (M, D) and (M, Dv) of queries and the output's gradient from row `first` of `count` on."""
    q_tile = load_rows(q, first, count, META.head_dim, META.block_m, META.block_d, MASKED)
    return q_tile, load_rows(g, first, count, META.v_dim, META.block_m, META.block_dv, MASKED)


@triton.jit
def store_rows(line, count, tile, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store the first `count` rows of a tile from the line's first on."""
    store_tile(line.base, line.stride, count, tile, WIDTH, ROWS, COLUMNS)


@triton.jit
def rounding_of(tile, t):
    """The rounding error of a float32 tile that is stored to the rows t."""
    lost = tile - tile.to(t.base.dtype.element_ty).to(tl.float32)
    return tl.where(lost - lost == 0.0, lost, 0.0)  # 0 where the output is infinite


@triton.jit
def load_state(state, at, inside):
    """Each row's maximum (-inf: none was subtracted) and the natural logarithm of its sum of weights relative to it."""
    at = state + 2 * at
    return tl.load(at, mask=inside, other=float("-inf")), tl.load(at + 1, mask=inside, other=0.0)


@triton.jit
def store_state(state, at, top, log_sum, inside):
    at = state + 2 * at
    tl.store(at, top, mask=inside)
    tl.store(at + 1, log_sum, mask=inside)


@triton.jit
def load_statistics(state, delta, at, inside):
    """(top, log_sum, delta) of each row: the state that determines its weights, and dO.O."""
    top, log_sum = load_state(state, at, inside)
    return top, log_sum, tl.load(delta + at, mask=inside, other=0.0)


@triton.jit
def two_products(a, b, c, d, PRECISION: tl.constexpr):
    """(a @ b^T, c @ d^T): scores and the weights' gradients."""
    zero = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    return dot(a, tl.trans(b), zero, PRECISION), dot(c, tl.trans(d), zero, PRECISION)


@triton.jit
def add_bias(s, bias, columns, end, count):
    """s (rows, columns) in base 2 plus the bias's elements; bias may be None. Rows that attend no key read nothing."""
    if bias is not None:
        at = bias.base[:, None] + offset(columns, bias.stride)[None, :]
        inside = (end > 0)[:, None] & (columns < count)[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        value2 = value * _LOG2E
        # A finite mask value, such as the dtype's lowest, stays finite: only -inf excludes a pair.
        overflows = (tl.abs(value2) == float("inf")) & (tl.abs(value) != float("inf"))
        s += tl.where(overflows, tl.where(value < 0, -3e38, 3e38), value2)
    return s


@triton.jit
def tile_scores(products, bias, columns, end, count, factors, SHIFTED: tl.constexpr):
    """Scores of products q.k. SHIFTED: the row maximum is subtracted later, and for an exact difference these are the products
    themselves, or with a tensor bias the scores in base e. Otherwise they are in base 2."""
    if factors.cap is not None:
        products, _ = tanh_parts(products, factors.cap)
        products = products * factors.cap.size
    if SHIFTED:
        if bias is not None:
            at = bias.base[:, None] + offset(columns, bias.stride)[None, :]
            inside = (end > 0)[:, None] & (columns < count)[None, :]
            products = products * factors.size + tl.load(at, mask=inside, other=0.0).to(tl.float32)
        return products
    return add_bias(products * factors.scale2 + factors.bias2, bias, columns, end, count)


@triton.jit
def with_shift(factors, key_length, LOG_N: tl.constexpr):
    """The factors with this sequence's constant bias, for a score whose default bias is -log n."""
    bias2 = factors.bias2
    if LOG_N:
        bias2 = -tl.log2(tl.maximum(key_length, 1).to(tl.float32))
    return Factors(factors.scale, factors.size, factors.scale2, bias2, factors.cap)


@triton.jit
def exponent_of(bias, scale2):
    """The factor of a score after its row's maximum is subtracted; with a tensor bias scores are in base e."""
    if bias is not None:
        return _LOG2E
    return scale2


# --- a tile's loop over other tiles ------------------------------------------------------------------------------------


@triton.jit
def over_tiles(state, BODY: tl.constexpr, operands, tiles, classes, SCORE: tl.constexpr, META: tl.constexpr):
    """The state after BODY(state, operands, tile, SCORE, META, MASKED) of each tile. First come the tiles whose pairs are all attended,
    then the tiles on either side, where BODY tests each pair (MASKED). With classes, tiles of class 0
    are skipped, and BODY tests the pairs of all others.

    operands.dense: the dense mask's elements, or None.
    """
    if operands.dense is None and classes is None:
        for tile in range(tiles.full, tiles.full_end):
            state = BODY(state, operands, tile, SCORE, META, False)
    if classes is None:
        left = tiles.full - tiles.begin
        for step in range(0, left + (tiles.end - tiles.full_end)):
            tile = tl.where(step < left, tiles.begin + step, tiles.full_end + step - left)
            state = BODY(state, operands, tile, SCORE, META, True)
    else:
        begin, end = next_attended(classes, tiles.begin, tiles.end)
        while begin < tiles.end:
            for tile in range(begin, end):
                state = BODY(state, operands, tile, SCORE, META, True)
            begin, end = next_attended(classes, end, tiles.end)
    return state


@triton.jit
def fold(
    state,  # (sum of weighted values (M, Dv), running maximum (M,), running normaliser (M,))
    # (M, N) scores: in base 2, or for a shifted score to be multiplied by scale2 after the maximum is subtracted
    s,
    allowed,  # (M, N), when MASKED
    v_tile,  # (N, Dv)
    scale2,
    SCORE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    kept=None,  # (M, N) the weights that dropout keeps; the normaliser sums all weights
):
    """Add one tile of scores and values to a query tile's running state."""
    acc, top, total = state
    if SCORE.shifted:
        if MASKED:
            s = tl.where(allowed, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = SCORE.weight((s - finite[:, None]) * scale2)
        rescale = tl.exp2((top - finite) * scale2)
        total = total * rescale + tl.sum(weight, 1)
        acc = acc * rescale[:, None]
        top = new_top
    else:
        weight = SCORE.weight(s)
        if MASKED:
            weight = tl.where(allowed, weight, 0.0)
        if SCORE.normalised:
            total = total + tl.sum(weight, 1)
    if kept is not None:
        weight = tl.where(kept, weight, 0.0)
    acc = dot(weight.to(v_tile.dtype), v_tile, acc, PRECISION)
    return acc, top, total


class Attended(NamedTuple):
    """The operands of a query tile's loop over its keys."""

    q_tile: tl.tensor  # (M, D)
    k: Line
    v: Line
    bias: Line  # one line a row (M,), or None
    dense: Line  # likewise
    begin: tl.tensor  # (M,) interval of keys
    end: tl.tensor
    count: tl.tensor  # number of keys; padding after them may hold anything and is not read
    factors: Factors
    drawn: Drawn  # or None
    placed: Placed  # a user's function, or None


@triton.jit
def _attend_tile(state, operands, tile, SCORE: tl.constexpr, META: tl.constexpr, MASKED: tl.constexpr):
    """Add one tile of keys to a query tile's running state."""
    begin, end, count, factors = operands.begin, operands.end, operands.count, operands.factors
    first = tile * META.block_n
    keys = first + tl.arange(0, META.block_n)
    k_tile = load_rows(operands.k, first, count, META.head_dim, META.block_n, META.block_d, MASKED)
    s = tl.zeros([META.block_m, META.block_n], tl.float32)
    s = dot(operands.q_tile, tl.trans(k_tile), s, META.precision)
    if operands.placed is not None:
        s = user_scores(
            s, operands.placed, operands.placed.row, (operands.placed.key + keys)[None, :], factors, SCORE
        )
    else:
        s = tile_scores(s, operands.bias, keys, end, count, factors, SCORE.shifted)
    allowed = None
    if MASKED:
        allowed = allowed_pairs(keys, begin, end, operands.dense)
    v_tile = load_rows(operands.v, first, count, META.v_dim, META.block_n, META.block_dv, MASKED)
    kept = None
    if operands.drawn is not None:
        kept = kept_pairs(operands.drawn, first, META.block_n, META.aligned)
    return fold(state, s, allowed, v_tile, factors.scale2, SCORE, MASKED, META.precision, kept)


@triton.jit
def _attend(operands, tiles, classes, SCORE: tl.constexpr, META: tl.constexpr):
    """A query tile over all the keys that it attends: (acc (M, Dv), top (M,), total (M,))."""
    acc = tl.zeros([META.block_m, META.block_dv], tl.float32)
    top = tl.full([META.block_m], float("-inf"), tl.float32)
    total = tl.zeros([META.block_m], tl.float32)
    return over_tiles((acc, top, total), _attend_tile, operands, tiles, classes, SCORE, META)


@triton.jit
def attend(operands, edges, classes, SCORE: tl.constexpr, META: tl.constexpr):
    """`_attend`, but with the weights of the score's limit (softmax for softplus) in rows whose own weights may all have underflowed:
    e^s differs from log(1 + e^s) by half of it at most, and with the maximum off its sum is at least 1.

    classes: the classes of this row of tiles (0: no attended pair), or None.
    """
    tiles = key_passes(edges, operands.dense, META.block_n)
    acc, top, total = _attend(operands, tiles, classes, SCORE, META)
    if SCORE.limit is not None:
        limited = (total < _LIMIT_SUM) & (operands.end > operands.begin)
        if tl.max(limited.to(tl.int32), 0) > 0:
            factors = operands.factors
            exponent = exponent_of(operands.bias, factors.scale2)
            shifted = Attended(
                operands.q_tile, operands.k, operands.v, operands.bias, operands.dense, operands.begin, operands.end,
                operands.count, Factors(factors.scale, factors.size, exponent, factors.bias2, factors.cap), operands.drawn,
                operands.placed,
            )  # fmt: skip
            limit_acc, limit_top, limit_total = _attend(shifted, tiles, classes, SCORE.limit, META)
            acc = tl.where(limited[:, None], limit_acc, acc)
            top = tl.where(limited, limit_top, top)
            total = tl.where(limited, limit_total, total)
    return acc, top, total


@triton.jit
def finish(acc, top, total, scale2, bias2, NORMALISED: tl.constexpr, sink=None, drop=None):
    """(normalised output, natural log-sum-exp, and the two parts of the state that `load_state` reads). A row that attends no key gives 0,
    -inf, and a state whose weights are 0. bias2: the constant bias, which differences to a maximum do not contain. sink: a score in
    base e that joins the normaliser."""
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
        if sink is not None:
            low = tl.minimum(lse, sink, propagate_nan=tl.PropagateNan.ALL)
            high = tl.maximum(lse, sink, propagate_nan=tl.PropagateNan.ALL)
            difference = tl.where(low == float("-inf"), float("-inf"), low - high)
            both = high + tl.log2(1.0 + tl.exp2(difference * _LOG2E)) * _LN2
            acc = tl.where(nothing[:, None], acc, acc * tl.exp2((lse - both) * _LOG2E)[:, None])
            log_sum = tl.where(nothing, log_sum, log_sum + (both - lse))
            lse = both
    if drop is not None:
        acc = acc * drop.scale
    return acc, lse, top, log_sum
