"""The codebook ops in Triton: products with the K codes and row kernels. Sums over codes and tokens have a fixed order, no atomics."""

import torch
import triton
import triton.language as tl

from ...runtime import triton as _triton
from ...runtime.triton import offset
from ..cross_entropy.chunked import (
    chunked_rows,
    chunks,
    empty_statistics,
    product,
    reduced,
    returned,
    upstream,
)
from ..cross_entropy.triton import configure, refusal, row_kernel
from ..vocabulary import inverse

__all__ = ["configure", "refusal"]

_IGNORED = -1
_SUM_BLOCK = 128


@triton.jit
def _segment_sum_kernel(
    values, weights, order, offsets, out, columns, value_stride, BLOCK: tl.constexpr, WEIGHED: tl.constexpr
):
    """out[s] = sum of weights[t] values[t] over the rows t of segment s, in order."""
    segment = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(offsets + segment), tl.load(offsets + segment + 1)):
        row = tl.load(order + i)
        value = tl.load(values + offset(row, value_stride) + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHED:
            value *= tl.load(weights + row)
        acc += value
    tl.store(out + offset(segment, columns) + column, acc, mask=inside)


@triton.jit
def _code_bias_kernel(bias, order, offsets, beta, largest, best, inverse_temperature, BLOCK: tl.constexpr):
    """For the tokens of one code: the largest bias, the first token that has it, and the logsumexp of (bias - largest) /
    temperature."""
    code = tl.program_id(0)
    begin = tl.load(offsets + code)
    end = tl.load(offsets + code + 1)
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    first = tl.full([BLOCK], 1 << 62, tl.int64)
    for base in range(begin, end, BLOCK):
        inside = base + lane < end
        token = tl.load(order + base + lane, mask=inside, other=0)
        value = tl.where(inside, 0.0, float("-inf"))
        if bias is not None:
            value = tl.load(bias + token, mask=inside, other=float("-inf")).to(tl.float32)
        # the tokens of a code are in rising order, so the first largest has the lowest id
        better = inside & ((value > top) | (first == 1 << 62))
        first = tl.where(better, token, first)
        top = tl.maximum(top, value)
    top_bias = tl.max(top, 0)
    finite = tl.where(top_bias == float("-inf"), 0.0, top_bias)
    total = tl.zeros([BLOCK], tl.float32)
    for base in range(begin, end, BLOCK):
        inside = base + lane < end
        value = tl.where(inside, 0.0, float("-inf"))
        if bias is not None:
            token = tl.load(order + base + lane, mask=inside, other=0)
            value = tl.load(bias + token, mask=inside, other=float("-inf")).to(tl.float32)
        total += tl.exp((value - finite) * inverse_temperature)
    tl.store(beta + code, tl.log(tl.sum(total, 0)))
    tl.store(largest + code, top_bias)
    first_token = tl.min(tl.where(top == top_bias, first, 1 << 62), 0)
    # if the maximum is NaN, which equals nothing, take the code's first token
    tl.store(best + code, tl.where(first_token == 1 << 62, tl.min(first, 0), first_token))


@triton.jit
def _expand_kernel(scores, codes, bias, out, classes, tokens, BLOCK: tl.constexpr):
    """logits[n, i] = scores[n, codes[i]] + bias[i]."""
    row = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    code = tl.load(codes + token, mask=inside, other=0)
    value = tl.load(scores + offset(row, classes) + code, mask=inside, other=0.0)
    if bias is not None:
        value += tl.load(bias + token, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offset(row, tokens) + token, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _best_kernel(
    scores, x, codebook, offsets, ids, norms, out, classes, width, x_row, codebook_row, slack, spread,
    BLOCK: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The id of one row's largest score + offset, the lowest among equals. Scores within rounding of the largest are computed again
    in float64."""
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_W)
    score_row = scores + offset(row, classes)
    top = tl.full([BLOCK], float("-inf"), tl.float64)
    for first in range(0, classes, BLOCK):
        inside = first + lane < classes
        value = tl.load(score_row + first + lane, mask=inside, other=float("-inf")).to(tl.float64)
        top = tl.maximum(top, value + tl.load(offsets + first + lane, mask=inside, other=float("-inf")))
    highest = tl.max(top, 0)
    reach = 2.0 * (slack * tl.load(norms + row) + tl.load(spread))
    # with a NaN, or products that overflow float32, no order is sure: compare every code
    floor = tl.where((highest < float("inf")) & (reach < float("inf")), highest - reach, float("-inf"))
    best = tl.full([], float("-inf"), tl.float64)
    best_id = tl.full([], 1 << 62, tl.int64)
    for first in range(0, classes, BLOCK):
        inside = first + lane < classes
        value = tl.load(score_row + first + lane, mask=inside, other=float("-inf")).to(tl.float64)
        value += tl.load(offsets + first + lane, mask=inside, other=float("-inf"))
        near = inside & ~(value < floor)
        code = tl.min(tl.where(near, first + lane, classes), 0)
        while code < classes:
            exact = tl.zeros([BLOCK_W], tl.float64)
            for begin in range(0, width, BLOCK_W):
                within = begin + columns < width
                a = tl.load(x + offset(row, x_row) + begin + columns, mask=within, other=0.0)
                b = tl.load(codebook + offset(code, codebook_row) + begin + columns, mask=within, other=0.0)
                exact += a.to(tl.float64) * b.to(tl.float64)
            sum64 = tl.sum(exact, 0) + tl.load(offsets + code)
            token = code.to(tl.int64)
            if ids is not None:
                token = tl.load(ids + code)
            better = (sum64 > best) | ((sum64 == best) & (token < best_id))
            best_id = tl.where(better, token, best_id)
            best = tl.where(better, sum64, best)
            code = tl.min(tl.where(near & (first + lane > code), first + lane, classes), 0)
    if best_id == 1 << 62:  # no score is above -inf: take the lowest id
        for first in range(0, classes, BLOCK):
            token = (first + lane).to(tl.int64)
            if ids is not None:
                token = tl.load(ids + first + lane, mask=first + lane < classes, other=1 << 62)
            best_id = tl.minimum(best_id, tl.min(token, 0))
    tl.store(out + row, best_id)


@triton.jit
def _weights(base, other, extra, index, end, factor, shift):
    """exp((base + other - shift) * factor + extra) at the indices `index`, 0 from `end` on, in float64."""
    inside = index < end
    value = tl.load(base + index, mask=inside, other=float("-inf"))
    if other is not None:
        value += tl.load(other + index, mask=inside, other=float("-inf"))
    value = (value - shift) * factor
    if extra is not None:
        value += tl.load(extra + index, mask=inside, other=float("-inf"))
    return tl.where(inside, tl.exp(value), 0.0).to(tl.float64)


@triton.jit
def _draw(base, other, extra, begin, end, factor, shift, uniform, BLOCK: tl.constexpr):
    """The first index of [begin, end) whose cumulative weight exceeds uniform times the total. If rounding leaves none, the last index
    with a weight; if no weight is a number, `begin`."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        total += _weights(base, other, extra, first + lane, end, factor, shift)
    goal = uniform * tl.sum(total, 0)
    before = tl.zeros([], tl.float64)
    drawn = tl.full([], 1 << 62, tl.int64)
    last = tl.zeros([], tl.int64) + begin
    for first in range(begin, end, BLOCK):
        weight = _weights(base, other, extra, first + lane, end, factor, shift)
        index = (first + lane).to(tl.int64)
        over = (weight > 0.0) & (before + tl.cumsum(weight, 0) > goal)
        drawn = tl.minimum(drawn, tl.min(tl.where(over, index, 1 << 62), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0.0, index, 0), 0))
        before += tl.sum(weight, 0)
    return tl.where(drawn < 1 << 62, drawn, last)


@triton.jit
def _sample_kernel(
    scores,
    uniform,
    largest,
    beta,
    bias,
    order,
    offsets,
    out,
    classes,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """Draw a code by the row's first uniform, then one of its tokens by the second. `bias` is sorted as `order`."""
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    score_row = scores + offset(row, classes)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, classes, BLOCK):
        inside = first + lane < classes
        value = tl.load(score_row + first + lane, mask=inside, other=float("-inf"))
        top = tl.maximum(top, value + tl.load(largest + first + lane, mask=inside, other=float("-inf")))
    # differences to the best token, so that a small temperature does not make two infinities
    code = _draw(
        score_row,
        largest,
        beta,
        0,
        classes,
        inverse_temperature,
        tl.max(top, 0),
        tl.load(uniform + offset(row, 2)),
        BLOCK,
    )
    begin = tl.load(offsets + code)
    end = tl.load(offsets + code + 1)
    second = tl.load(uniform + offset(row, 2) + 1)
    if bias is not None:
        chosen = _draw(
            bias, None, None, begin, end, inverse_temperature, tl.load(largest + code), second, BLOCK
        )
    else:
        chosen = begin + tl.minimum((second * (end - begin).to(tl.float64)).to(tl.int64), end - begin - 1)
    # a row of NaN can select a code without tokens
    tl.store(out + row, tl.load(order + chosen, mask=end > begin, other=0))


def _segments(keys: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order (N,): the rows sorted by key, earlier rows first; offsets (count + 1,) of each key's rows in it). Other keys are left out."""
    ordered, order = keys.long().sort(stable=True)
    bounds = torch.arange(count + 1, device=keys.device)
    return order, torch.searchsorted(ordered, bounds)


def _segment_sum(values, weights, keys, count: int) -> torch.Tensor:
    """(count, C) float32: the rows of values (N, C), times weights (N,), summed by key."""
    order, offsets = _segments(keys, count)
    columns = values.shape[1]
    out = values.new_empty(count, columns, dtype=torch.float32)
    values = _triton.last_dim_contiguous(values)
    block = min(_SUM_BLOCK, _triton.block(columns))
    _triton.launch(
        _segment_sum_kernel, (count, triton.cdiv(columns, block)), values, weights, order, offsets, out, columns,
        values.stride(0), BLOCK=block, WEIGHED=weights is not None, num_warps=1,
    )  # fmt: skip
    return out


def _code_statistics(
    codes, bias, order, offsets, inverse_temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For the tokens of each code: (logsumexp of (bias - largest) / temperature; the largest bias; the first token that has it)."""
    count = offsets.shape[0] - 1
    beta, largest = torch.empty(2, count, dtype=torch.float32, device=codes.device)
    best = torch.empty(count, dtype=torch.int64, device=codes.device)
    _triton.launch(
        _code_bias_kernel, (count,), bias, order, offsets, beta, largest, best, inverse_temperature, BLOCK=128, num_warps=1
    )  # fmt: skip
    return beta, largest, best


def _below(own: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """largest - own, 0 where both are -inf."""
    return torch.where(own == largest, 0.0, largest - own)


def _shares(codes, bias, largest, beta) -> torch.Tensor:
    """(V,): the probability of a token given its code."""
    below = beta[codes] if bias is None else _below(bias.float(), largest[codes]) + beta[codes]
    return torch.where(below == -torch.inf, 0.0, (-below).exp())  # all tokens of the code have a bias of -inf


def _loss(h, codebook, codes, bias, target, ignore_index, *, grad=None, loss=None, statistics, wanted=0):
    """The gradients of h, codebook, bias and shadow. If `loss` is given, the row losses and their statistics are filled too.

    A code's logit is its likeliest token's. The other tokens enter the code's weight as the separate term beta, because a sum with the
    logit would be rounded at the logit's magnitude."""
    codes = codes.long()
    bias = None if bias is None else bias.contiguous()
    beta, largest, _ = _code_statistics(codes, bias, *_segments(codes, codebook.shape[0]))
    counted = target != ignore_index
    token = target.long().masked_fill(~counted, 0)
    code = codes[token].masked_fill(~counted, _IGNORED)
    # shadow needs the codebook's gradient too, and bias the sums over rows
    inner = (wanted & 1) | (2 if wanted & 10 else 0) | (wanted & 4)
    options = {"stablemax": False, "softcap": 0.0, "z_loss": 0.0, "ignore_index": _IGNORED}
    mib = configure(h, codebook).values["chunk_mib"]
    dh, dcodebook, mass, _ = chunked_rows(
        row_kernel,
        mib,
        h,
        codebook,
        largest,
        code,
        None,
        options,
        log_count=beta,
        grad=grad,
        loss=loss,
        statistics=statistics,
        wanted=inner,
    )
    if loss is not None and bias is not None:
        loss += _below(bias.float()[token], largest[code.clamp(min=0)]).masked_fill(~counted, 0.0)
    dbias = dshadow = None
    if wanted & 12:
        count, tokens = codebook.shape[0], codes.shape[0]
        label = token.masked_fill(~counted, _IGNORED)
        share = _shares(codes, bias, largest, beta)
    if wanted & 4:
        column = grad[:, None]
        # add back what the one-hot target subtracted
        mass = mass + _segment_sum(column, None, code, count)[:, 0]
        dbias = share * mass[codes] - _segment_sum(column, None, label, tokens)[:, 0]
    if wanted & 8:
        whole = dcodebook + _segment_sum(h, grad, code, count)  # P^T h
        dshadow = share[:, None] * whole[codes] - _segment_sum(h, grad, label, tokens)
    return dh, dcodebook if wanted & 2 else None, dbias, dshadow


def vq_cross_entropy(h, codebook, codes, bias, shadow, target, ignore_index, reduction, gradients):
    loss, statistics = empty_statistics(h)
    one = h.new_ones((h.shape[0],) if reduction == "none" else (), dtype=torch.float32)
    grad = upstream(one, target, ignore_index, reduction) if gradients else None
    grads = _loss(
        h,
        codebook,
        codes,
        bias,
        target,
        ignore_index,
        grad=grad,
        loss=loss,
        statistics=statistics,
        wanted=gradients,
    )
    loss = reduced(loss, target, ignore_index, reduction)
    return loss, statistics, *returned(grads, (h, codebook, bias, shadow))


def vq_cross_entropy_backward(
    grad, h, codebook, codes, bias, shadow, target, statistics, ignore_index, reduction, wanted
):
    grad = upstream(grad, target, ignore_index, reduction)
    grads = _loss(
        h, codebook, codes, bias, target, ignore_index, grad=grad, statistics=statistics, wanted=wanted
    )
    return returned(grads, (h, codebook, bias, shadow))


def vq_logits(h, codebook, codes, bias):
    logits = h.new_empty(h.shape[0], codes.shape[0])
    codes, bias = codes.contiguous(), None if bias is None else bias.contiguous()
    classes, tokens = codebook.shape[0], codes.shape[0]
    for begin, end in chunks(h.shape[0], classes, configure(h, codebook).values["chunk_mib"]):
        scores = product(h[begin:end], codebook.T)
        _triton.launch(
            _expand_kernel, (end - begin, triton.cdiv(tokens, 1024)), scores, codes, bias, logits[begin:end], classes,
            tokens, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return logits


def vq_logits_backward(grad, h, codebook, codes, bias, wanted):
    classes = codebook.shape[0]
    dh = torch.empty_like(h, memory_format=torch.contiguous_format) if wanted & 1 else None
    dcodebook = codebook.new_zeros(codebook.shape, dtype=torch.float32) if wanted & 2 else None
    for begin, end in chunks(h.shape[0], classes, configure(h, codebook).values["chunk_mib"]):
        if not wanted & 3:
            break
        part = h[begin:end]
        # gradients summed over the tokens of a code, for every row: (K, rows), rounded to h's dtype for the products
        collected = _segment_sum(grad[begin:end].T.contiguous(), None, codes, classes).to(h.dtype)
        if dh is not None:
            dh[begin:end] = product(collected.T, codebook).to(h.dtype)
        if dcodebook is not None:
            dcodebook += product(collected, part)
    dbias = grad.sum(0, dtype=torch.float32) if wanted & 4 else None
    return returned((dh, dcodebook, dbias), (h, codebook, bias))


def _best(x, codebook, offsets, ids) -> torch.Tensor:
    """The id of the largest x . codebook_k + offsets_k (float64), the lowest among equals.

    Products of d terms are within (d + 4) eps/2 |x| |c| of the exact ones in any order; the factor 1.01 covers the norms' own rounding.
    A product below 2^-126 may underflow to 0.
    """
    result = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    x, codebook = _triton.last_dim_contiguous(x), _triton.last_dim_contiguous(codebook)
    classes, width = codebook.shape
    largest = torch.linalg.vector_norm(codebook.float(), dim=1).amax()
    # with TF32, if torch's settings allow it, each factor is rounded to 2^-11
    unit = 2.0**-9 if x.dtype == torch.float32 and _triton.tf32_allowed() else 2.0**-23
    norms = torch.linalg.vector_norm(x.float(), dim=1).double() * largest
    spread = offsets.masked_fill(~offsets.isfinite(), 0.0).abs().amax() * 2.0**-52 + (width + 4) * 2.0**-125
    for begin, end in chunks(x.shape[0], classes, configure(x, codebook).values["chunk_mib"]):
        part = x[begin:end]
        _triton.launch(
            _best_kernel, (end - begin,), product(part, codebook.T), part, codebook, offsets, ids, norms[begin:end],
            result[begin:end], classes, width, part.stride(0), codebook.stride(0), 1.01 * (width + 4) * unit, spread,
            BLOCK=min(1024, _triton.block(classes)), BLOCK_W=min(256, _triton.block(width)), num_warps=4,
        )  # fmt: skip
    return result


def vq_argmax(h, codebook, codes, bias):
    bias = None if bias is None else bias.contiguous()
    _, largest, best = _code_statistics(codes, bias, *_segments(codes, codebook.shape[0]))
    return _best(h, codebook, largest.double(), best)


def nearest_codes(x, codebook):
    return _best(x, codebook, codebook.double().square().sum(1) / -2, None)


def refusal_sample(h, codebook, codes, bias, uniform, temperature) -> str | None:
    return refusal(h, codebook, bias)


def vq_sample(h, codebook, codes, bias, uniform, temperature):
    classes, inverse_temperature = codebook.shape[0], inverse(temperature)
    order, offsets = _segments(codes, classes)
    bias = None if bias is None else bias.float().contiguous()
    beta, largest, _ = _code_statistics(codes, bias, order, offsets, inverse_temperature)
    sorted_bias = None if bias is None else bias[order]
    uniform = uniform.contiguous()
    result = torch.empty(h.shape[0], dtype=torch.int64, device=h.device)
    for begin, end in chunks(h.shape[0], classes, configure(h, codebook).values["chunk_mib"]):
        _triton.launch(
            _sample_kernel, (end - begin,), product(h[begin:end], codebook.T), uniform[begin:end], largest, beta,
            sorted_bias, order, offsets, result[begin:end], classes, inverse_temperature, BLOCK=min(1024, _triton.block(classes)), num_warps=4,
        )  # fmt: skip
    return result
