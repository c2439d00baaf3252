"""The codebook ops on the CPU: matrix products with the K codes in chunks, native kernels over codes and tokens."""

import torch

from ...runtime import native
from ...runtime import tuning as _tuning
from ...runtime.tuning import Choice
from ..cross_entropy.cpu import Rows, Statistics, run_rows
from ..cross_entropy.cpu_products import product
from ..vocabulary import inverse
from . import tuning  # noqa: F401  declares what configure looks up

_MIB = 1 << 20
# up to this many rows are multiplied by a native kernel, in one pass over the codebook in its own dtype
_FEW = 4


def refusal(first: torch.Tensor, *_) -> str | None:
    """Why the CPU kernels cannot serve a call with this first member, or None."""
    return native.unserved_dtype(first)


def configure(h, codebook, *_) -> Choice:
    return _choose(h, codebook)


def _choose(h, codebook) -> Choice:
    return _tuning.lookup(
        "vq_cross_entropy",
        "cpu",
        structural={"dtype": str(h.dtype).removeprefix("torch.")},
        sizes={"rows": max(1, h.shape[0]), "codes": codebook.shape[0], "width": codebook.shape[1]},
        device="cpu",
    )


def _float(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float().contiguous()


def _code_bias(codes, bias, count: int, inverse_temperature: float = 1.0):
    """For each code, (K,): the largest bias of its tokens, and the logsumexp of their (bias - largest) / temperature."""
    largest, beta = torch.empty(2, count, dtype=torch.float32)
    native.run(
        "vocab_code_bias",
        codes=codes,
        bias=bias,
        beta=beta,
        sums=torch.empty(count, dtype=torch.float64),
        largest=largest,
        inverse_temperature=inverse_temperature,
    )
    return largest, beta


def _chunks(rows: int, columns: int, mib: int):
    """[(begin, end)] of chunks of rows whose (rows, columns) float32 scores fit in `mib`."""
    step = max(1, mib * _MIB // (4 * columns))
    return [(begin, min(rows, begin + step)) for begin in range(0, rows, step)]


def _scores(
    x: torch.Tensor,
    codebook: torch.Tensor,
    wide: torch.Tensor | None,
    buffer: torch.Tensor,
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """x codebook^T in float32, in the first rows of `buffer`. All chunks share it, because large chunks that are freed and allocated
    again pile up in the allocator. wide: the codebook in float32, or None for few rows.

    If wide is None, the same pass fills `squares` (K,) with the squared norms of the codebook's rows.
    """
    out = buffer[: x.shape[0]]
    if wide is not None:
        return torch.mm(x.float(), wide.T, out=out)
    if x.shape[0]:
        native.run(
            "vocab_dots",
            x=native.rows(x),
            codebook=native.rows(codebook),
            out=out,
            squares=squares,
            threads=native.threads(),
        )
    return out


def _buffer(chunks: list[tuple[int, int]], columns: int) -> torch.Tensor:
    """A buffer for the scores of any chunk; the first chunk is the longest."""
    return torch.empty(chunks[0][1] if chunks else 0, columns, dtype=torch.float32)


def _wide(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor | None:
    return codebook.float() if x.shape[0] > _FEW else None


# --- vq_cross_entropy ------------------------------------------------------------------------------------------------


def _loss(h, codebook, codes, bias, target, *, scale=None, kept=None, grad=None, wanted=0, mib=16):
    """(losses, statistics, gradients of h, codebook, bias and shadow); h and codebook are float32. With `kept` statistics, no losses.

    A code's logit is its likeliest token's. The other tokens enter the code's weight as the separate term beta, because a sum with the
    logit would be rounded at the logit's magnitude.
    """
    count, width = h.shape
    classes = codebook.shape[0]
    largest, beta = _code_bias(codes, bias, classes)  # (K,)
    code_of = codes[target.long()].contiguous()  # (rows,)
    statistics = Statistics(h) if kept is None else None
    if scale is not None:
        grad = h.new_full((count,), scale)
    dh = h.new_empty(count, width) if wanted & 1 else None
    dcodebook = (h.new_empty if count else h.new_zeros)(classes, width) if wanted & 10 else None
    mass = h.new_zeros(classes) if wanted & 4 else None
    chunks = _chunks(count, classes, mib)
    scores = h.new_empty(chunks[0][1] if chunks else 0, classes)
    for begin, end in chunks:
        x, part = scores[: end - begin], h[begin:end]
        torch.mm(part, codebook.T, out=x)
        run_rows(
            x, code_of, begin, end, bias=largest, log_count=beta, statistics=statistics, kept=kept, grad=grad
        )
        if dh is not None:
            torch.mm(x, codebook, out=dh[begin:end])
        if dcodebook is not None:
            product(dcodebook, x.T, part, first=begin == 0)
        if mass is not None:
            mass += x.sum(0)
    losses = None
    if statistics is not None:
        losses = statistics.losses(None, 0, 0.0)
        if bias is not None:  # how far the token's bias is below its code's largest; both may be -inf
            own, top = bias[target.long()], largest[code_of.long()]
            losses += torch.where(own == top, 0.0, top - own)
    gradients = _token_gradients(
        h, codes, bias, target, code_of, largest, beta, grad, wanted, (dh, dcodebook, mass)
    )
    return losses, statistics, gradients


def _token_gradients(h, codes, bias, target, code_of, largest, beta, grad, wanted, code_gradients):
    """(dh, dcodebook, dbias, dshadow) from the gradients over codes. A token's share of its code is exp(bias - largest - beta)."""
    dh, dcodebook, mass = code_gradients
    dbias = dshadow = None
    if wanted & 4:
        mass.index_add_(0, code_of.long(), grad)  # add back what the one-hot target subtracted
        dbias = _shares(codes, bias, largest, beta, mass).index_add_(0, target.long(), grad, alpha=-1)
    if wanted & 8:
        weighted = h * grad[:, None]
        whole = dcodebook.index_add(0, code_of.long(), weighted)  # P^T h
        dshadow = whole.index_select(0, codes.long())
        dshadow *= _shares(codes, bias, largest, beta, torch.ones_like(beta))[:, None]
        dshadow.index_add_(0, target.long(), weighted, alpha=-1)
    return dh, dcodebook if wanted & 2 else None, dbias, dshadow


def _shares(codes, bias, largest, beta, mass) -> torch.Tensor:
    """(V,): exp(bias - largest - beta) * mass, the last three of the token's code."""
    out = torch.empty(codes.shape[0], dtype=torch.float32)
    native.run(
        "vocab_bias_gradient",
        codes=codes,
        bias=bias,
        largest=largest,
        beta=beta,
        mass=mass,
        out=out,
    )
    return out


def _returned(rows: Rows, gradients, tensors) -> tuple[torch.Tensor, ...]:
    dh, *others = gradients
    h, *likes = tensors
    return (
        h.new_empty(0) if dh is None else rows.spread(dh, h.dtype),
        *(h.new_empty(0) if g is None else g.to(like.dtype) for g, like in zip(others, likes, strict=True)),
    )


def vq_cross_entropy(h, codebook, codes, bias, shadow, target, ignore_index, reduction, gradients):
    rows = Rows(target, ignore_index)
    losses, statistics, grads = _loss(
        rows.of(h).float(),
        codebook.float(),
        codes.contiguous(),
        _float(bias),
        rows.of(target),
        scale=rows.scale(reduction) if gradients else None,
        wanted=gradients,
        mib=_choose(h, codebook).values["chunk_mib"],
    )
    loss = rows.reduced(losses, reduction)
    return loss, rows.spread(statistics.kept(), dim=1), *_returned(rows, grads, (h, codebook, bias, shadow))


def vq_cross_entropy_backward(
    grad, h, codebook, codes, bias, shadow, target, statistics, ignore_index, reduction, wanted
):
    rows = Rows(target, ignore_index)
    _, _, grads = _loss(
        rows.of(h).float(),
        codebook.float(),
        codes.contiguous(),
        _float(bias),
        rows.of(target),
        kept=rows.of(statistics, dim=1),
        grad=rows.upstream(grad, reduction),
        wanted=wanted,
        mib=_choose(h, codebook).values["chunk_mib"],
    )
    return _returned(rows, grads, (h, codebook, bias, shadow))


# --- vq_logits -------------------------------------------------------------------------------------------------------


def _expand(name: str, scores, codes, bias, logits) -> None:
    native.run(
        name,
        scores=scores,
        codes=codes,
        bias=bias,
        logits=logits,
        threads=native.threads(),
    )


def vq_logits(h, codebook, codes, bias):
    logits = h.new_empty(h.shape[0], codes.shape[0])
    codes, bias, wide = codes.contiguous(), _float(bias), _wide(h, codebook)
    chunks = _chunks(h.shape[0], codebook.shape[0], _choose(h, codebook).values["chunk_mib"])
    buffer = _buffer(chunks, codebook.shape[0])
    for begin, end in chunks:
        _expand("vocab_expand", _scores(h[begin:end], codebook, wide, buffer), codes, bias, logits[begin:end])
    return logits


def vq_logits_backward(grad, h, codebook, codes, bias, wanted):
    count, classes = h.shape[0], codebook.shape[0]
    grad, codes, wide = native.rows(grad), codes.contiguous(), codebook.float()
    dh = torch.empty_like(h, memory_format=torch.contiguous_format) if wanted & 1 else h.new_empty(0)
    dcodebook = wide.new_zeros(wide.shape) if wanted & 2 else None
    for begin, end in _chunks(count, classes, _choose(h, codebook).values["chunk_mib"]) if wanted & 3 else ():
        x = wide.new_empty(end - begin, classes)
        _expand("vocab_collect", x, codes, None, grad[begin:end])
        if wanted & 1:
            dh[begin:end] = x @ wide
        if wanted & 2:
            dcodebook.addmm_(x.T, h[begin:end].float())
    dbias = grad.sum(0, dtype=torch.float32).to(bias.dtype) if wanted & 4 else h.new_empty(0)
    return dh, h.new_empty(0) if dcodebook is None else dcodebook.to(codebook.dtype), dbias


# --- choices of a token or a code ------------------------------------------------------------------------------------


def _rounds_products() -> bool:
    """Whether torch's settings allow rounding the factors of float32 products, and the machine has instructions for it."""
    # torch.get_float32_matmul_precision raises if the setting was made in another way
    allowed = torch.backends.mkldnn.matmul.fp32_precision in ("tf32", "bf16")
    return allowed and torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def _best(x, codebook, offset, ids, mib: int) -> torch.Tensor:
    """The id of the largest x . codebook_k + offset_k (float64), the lowest among equals.

    The float32 products of d terms are within (d + 4) eps/2 |x| |c| of the exact ones in any order of summation, and adding offsets in
    float64 keeps that bound. Two scores are surely in order if they differ by twice the bound. The norms are float32 sums, hence the
    factor 1.01. A product below 2^-126 may underflow to 0.
    """
    result = torch.empty(x.shape[0], dtype=torch.int64)
    x, codebook, wide = native.rows(x), native.rows(codebook), _wide(x, codebook)
    squares = torch.empty(codebook.shape[0], dtype=torch.float32)
    if wide is not None:
        torch.linalg.vecdot(wide, wide, out=squares)
    finite = offset[offset.isfinite()].abs()
    spread = float(finite.max()) * torch.finfo(torch.float64).eps if finite.numel() else 0.0
    unit = (x.shape[1] + 4) * torch.finfo(torch.float32).eps
    if wide is not None and _rounds_products():
        unit += 2.0**-7  # both factors in bfloat16: 2^-9 of a term each, and twice as in unit
    chunks = _chunks(x.shape[0], codebook.shape[0], mib)
    buffer = _buffer(chunks, codebook.shape[0])
    for begin, end in chunks:
        scores = _scores(x[begin:end], codebook, wide, buffer, squares)
        norm = float(squares.max()) ** 0.5
        native.run(
            "vocab_best",
            scores=scores,
            x=x[begin:end],
            codebook=codebook,
            offset=offset,
            ids=ids,
            out=result[begin:end],
            slack=1.01 * unit * norm,
            offset_slack=spread + (x.shape[1] + 4) * 2.0**-125,
            threads=native.threads(),
        )
    return result


def vq_argmax(h, codebook, codes, bias):
    count = codebook.shape[0]
    largest = torch.empty(count, dtype=torch.float32)
    best = torch.empty(count, dtype=torch.int64)
    native.run(
        "vocab_best_tokens",
        codes=codes.contiguous(),
        bias=_float(bias),
        beta=largest,
        best=best,
    )
    return _best(h, codebook, largest.double(), best, _choose(h, codebook).values["chunk_mib"])


def nearest_codes(x, codebook):
    half_squares = codebook.double().square().sum(1).div_(-2)
    return _best(x, codebook, half_squares, None, _choose(x, codebook).values["chunk_mib"])


def vq_sample(h, codebook, codes, bias, uniform, temperature):
    count = codebook.shape[0]
    codes, bias, wide = codes.contiguous(), _float(bias), _wide(h, codebook)
    order = torch.empty(codes.shape[0], dtype=torch.int32)
    offsets = torch.empty(count + 1, dtype=torch.int64)
    native.run("vocab_group", codes=codes, order=order, offsets=offsets)
    inverse_temperature = inverse(temperature)
    largest, beta = _code_bias(codes, bias, count, inverse_temperature)
    result = torch.empty(h.shape[0], dtype=torch.int64)
    uniform = uniform.contiguous()
    chunks = _chunks(h.shape[0], count, _choose(h, codebook).values["chunk_mib"])
    buffer = _buffer(chunks, count)
    for begin, end in chunks:
        native.run(
            "vocab_sample",
            scores=_scores(h[begin:end], codebook, wide, buffer),
            uniform=uniform[begin:end],
            largest=largest,
            beta=beta,
            bias=bias,
            order=order,
            offsets=offsets,
            out=result[begin:end],
            inverse_temperature=inverse_temperature,
            threads=native.threads(),
        )
    return result
