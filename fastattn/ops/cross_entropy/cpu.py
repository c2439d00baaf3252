"""Losses over dense logits on the CPU: matrix products in chunks, one native row kernel between them.

One pass (gradients in the forward): for a chunk of rows, compute the logits of all classes, overwrite them with their gradient,
and multiply that with weight and h. Tiles (otherwise): the forward keeps a running maximum and sum for each row over tiles of
classes, and the backward computes each tile's gradient from them. A tile of weight's gradient is then one product over all rows, so
nothing of weight's size is held besides the gradient itself.

Logits and sums are float32, never rounded to less. 16-bit inputs are converted to float32 for the products, a block at a time;
bfloat16 inputs are multiplied as bfloat16 where the processor has instructions for it (`cpu_products`).
"""

import torch

from ...runtime import native
from ...runtime import tuning as _tuning
from ...runtime.tuning import Choice
from . import tuning  # noqa: F401  declares what configure looks up
from .cpu_products import Pairs, Widened
from .shares import Shares, Subtracted, unserved

_NEVER = -(2**63)  # an ignore_index that no target has


def refusal(first: torch.Tensor, *_) -> str | None:
    """Why the CPU kernels cannot serve a call with this first member, or None."""
    return native.unserved_dtype(first)


def refusal_linear(
    h, weight, bias, target, temperature, class_weight, transform, softcap, z_loss, label_smoothing, *_
) -> str | None:
    """Why the CPU kernels cannot serve this linear_cross_entropy, or None."""
    return native.unserved_dtype(h) or unserved(target, transform, softcap, label_smoothing)


def refusal_linear_backward(grad, grad_lse, *members) -> str | None:
    *tensors, _statistics = members[:7]
    return refusal_linear(*tensors, *members[7:])


def configure(h, weight, *_) -> Choice:
    return _choose(h, weight)


def _choose(h, weight) -> Choice:
    return _tuning.lookup(
        "linear_cross_entropy",
        "cpu",
        structural={"dtype": str(h.dtype).removeprefix("torch.")},
        sizes={"rows": max(1, h.shape[0]), "classes": weight.shape[0], "width": weight.shape[1]},
        device="cpu",
    )


class Rows:
    """The rows whose target is not ignored. If none is ignored, tensors are used without a copy."""

    def __init__(self, target: torch.Tensor, ignore_index: int) -> None:
        kept = target != ignore_index
        self.index = None if bool(kept.all()) else kept.nonzero()[:, 0]
        self.total = target.shape[0]
        self.count = self.total if self.index is None else self.index.shape[0]
        self.divisor: float = max(1, self.count)  # for "mean"

    def of(self, t: torch.Tensor | None, dim: int = 0) -> torch.Tensor | None:
        return t if t is None or self.index is None else t.index_select(dim, self.index)

    def spread(self, t: torch.Tensor, dtype: torch.dtype | None = None, dim: int = 0) -> torch.Tensor:
        """t with one entry for every row again, zero for ignored rows."""
        t = t.to(dtype or t.dtype)
        if self.index is None:
            return t
        shape = (*t.shape[:dim], self.total, *t.shape[dim + 1 :])
        return t.new_zeros(shape).index_copy_(dim, self.index, t)

    def reduced(self, loss: torch.Tensor, reduction: str) -> torch.Tensor:
        if reduction == "none":
            return self.spread(loss)
        return loss.sum() * self.scale(reduction)

    def scale(self, reduction: str) -> float:
        return 1.0 / self.divisor if reduction == "mean" else 1.0

    def upstream(self, grad: torch.Tensor, reduction: str) -> torch.Tensor:
        """The gradient of each kept row's loss, float32."""
        if reduction == "none":
            return self.of(grad).contiguous()
        return (grad * self.scale(reduction)).expand(self.count).contiguous()


class Statistics:
    """For each row: the largest logit so far, the sum of the weights (see VocabRowsParams), and the target's logit.

    No log-sum-exp is kept: rounded at the logits' magnitude, it would lose the target's distance to the largest logit.
    """

    def __init__(self, like: torch.Tensor) -> None:
        rows = like.shape[0]
        self.largest = like.new_full((rows,), -torch.inf, dtype=torch.float32)
        self.total = like.new_zeros(rows, dtype=torch.float32)
        self.picked = like.new_zeros(rows, dtype=torch.float32)

    def losses(
        self,
        temperature: torch.Tensor | None,
        stablemax: int,
        z_loss: float,
        shares: Shares | None = None,
    ) -> torch.Tensor:
        largest, picked = self.largest, self.picked
        if stablemax:
            largest, picked, temperature = _symlog(largest), _symlog(picked), None
        tau = 1.0 if temperature is None else temperature
        log_total = self.total.log()
        below = (largest - picked) / tau
        if shares is None:
            loss = below + log_total
            return loss + z_loss * (largest / tau + log_total).square() if z_loss else loss
        loss = shares.own * below + shares.mass * log_total
        if z_loss:
            loss += shares.mass * z_loss * (largest / tau + log_total).square()
        return loss if shares.smoothing is None else loss + shares.smoothing.loss(largest, temperature)

    def kept(self) -> torch.Tensor:
        """(2, rows): the largest logit and the sum of the weights, which the gradients need."""
        return torch.stack((self.largest, self.total))


def _symlog(x: torch.Tensor) -> torch.Tensor:
    return x.abs().log1p().copysign(x)


def run_rows(
    x: torch.Tensor,
    target: torch.Tensor,
    begin: int,
    end: int,
    *,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    log_count: torch.Tensor | None = None,
    statistics: Statistics | None = None,
    kept: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
    mass: torch.Tensor | None = None,
    grad_temperature: torch.Tensor | None = None,
    ignore_index: int = _NEVER,
    **options,
) -> None:
    """The row kernel on rows begin .. end of the per-row tensors; x (end - begin, C) is overwritten unless `out` is given.

    It adds the columns to `statistics`, or reads `kept`, the statistics of all columns.
    """
    if begin == end:
        return

    def part(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t[begin:end]

    if statistics is not None:
        fields = {
            "row_max": part(statistics.largest),
            "row_sum": part(statistics.total),
            "picked": part(statistics.picked),
        }
    else:
        fields = {"row_max": part(kept[0]), "row_sum": part(kept[1])}
    native.run(
        "vocab_rows",
        x=x,
        out=x if out is None else out,
        bias=bias,
        target=part(target),
        temperature=part(temperature),
        log_count=log_count,
        grad=part(grad),
        mass=part(mass),
        grad_temperature=part(grad_temperature),
        statistics=int(statistics is not None),
        gradient=int(grad is not None),
        ignore_index=ignore_index,
        threads=native.threads(),
        **fields,
        **options,
    )


def _run_gradients(x, g, target, begin, end, dbias, **fields) -> None:
    """The row kernel on logits x. It writes their gradients to g, which may be x, and adds the gradients' sum over rows to `dbias`."""
    if dbias is None:
        run_rows(x, target, begin, end, out=g, **fields)
        return
    run_rows(x, target, begin, end, **fields)
    dbias += x.sum(0)
    if g is not x:
        g.copy_(x)


def _one_pass(
    products: Widened | Pairs, classes, bias, target, temperature, options, grad, mass, subtracted: Subtracted | None, wanted, chunk_mib
):  # fmt: skip
    """Statistics and the gradients of h, weight, bias and temperature, from whole rows of logits."""
    h = products.h
    count = h.shape[0]
    statistics = Statistics(h)
    strip, rows = products.rows(classes, chunk_mib)
    logits = h.new_empty(strip, classes, dtype=torch.float32)
    gradients = products.gradients(logits, rows)
    dh = h.new_empty(h.shape, dtype=h.dtype if subtracted is None else torch.float32) if wanted & 1 else None
    dweight = (
        products.weight_gradient(classes, whole=rows >= count and subtracted is None) if wanted & 2 else None
    )
    if dweight is not None and count == 0:
        dweight.zero_()
    dbias = h.new_zeros(classes, dtype=torch.float32) if wanted & 4 else None
    dtemperature = h.new_zeros(count, dtype=torch.float32)
    for begin in range(0, count, rows):
        end = min(count, begin + rows)
        forward = products.blocks()
        for first in range(begin, end, strip):
            last = min(end, first + strip)
            x = logits[: last - first]
            for c0, c1, block in forward:
                products.logits(x[:, c0:c1], first, last, block)
            _run_gradients(
                x,
                x if gradients is logits else gradients[first - begin : last - begin],
                target,
                first,
                last,
                dbias,
                bias=bias,
                temperature=temperature,
                statistics=statistics,
                grad=grad,
                mass=mass,
                grad_temperature=dtemperature,
                **options,
            )
        del forward
        g = gradients[: end - begin]
        for c0, c1, block in products.blocks() if dh is not None else ():
            products.toward_h(dh[begin:end], g[:, c0:c1], block, first=c0 == 0)
        if dweight is not None:
            products.toward_weight(dweight, g, begin, end, first=begin == 0)
    if subtracted is not None:
        if dh is not None:
            subtracted.off_h(dh, 0, count)
        if dweight is not None:
            subtracted.off_weight(dweight, 0, classes)
        if dbias is not None:
            subtracted.off_bias(dbias)
    return statistics, (dh, dweight, dbias, dtemperature if wanted & 8 else None)


def _tile_statistics(
    products: Widened | Pairs, classes, bias, target, temperature, options, tile_mib
) -> Statistics:
    count = products.h.shape[0]
    statistics = Statistics(products.h)
    rows, columns = products.tile(classes, tile_mib)
    buffer = products.h.new_empty(rows * columns, dtype=torch.float32)
    for c0, c1, block in products.blocks(columns):
        for begin in range(0, count, rows):
            end = min(count, begin + rows)
            x = buffer[: (end - begin) * (c1 - c0)].view(end - begin, c1 - c0)
            products.logits(x, begin, end, block)
            run_rows(
                x,
                target,
                begin,
                end,
                first=c0,
                bias=None if bias is None else bias[c0:c1],
                temperature=temperature,
                statistics=statistics,
                **options,
            )
    return statistics


def _tile_gradients(
    products: Widened | Pairs, weight, bias, target, temperature, kept, grad, mass, subtracted: Subtracted | None, options, wanted, tile_mib
):  # fmt: skip
    """The gradients of h, weight (in its own dtype), bias and temperature, from each row's `grad` and `mass`."""
    count, width = products.h.shape
    classes = weight.shape[0]
    rows, columns = products.tile(classes, tile_mib)
    buffer = products.h.new_empty(rows * columns, dtype=torch.float32)
    gradients = products.gradients(buffer, rows * columns)
    dh = products.h.new_empty(count, width, dtype=torch.float32) if wanted & 1 else None
    dweight = None
    if wanted & 2:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        if count == 0:
            dweight.zero_()
    dbias = products.h.new_zeros(classes, dtype=torch.float32) if wanted & 4 else None
    dtemperature = products.h.new_zeros(count, dtype=torch.float32)
    for c0, c1, block in products.blocks(columns):
        if dweight is not None:
            tile = dweight[c0:c1]
            if dweight.dtype != torch.float32:
                tile = torch.empty_like(tile, dtype=torch.float32)
        for begin in range(0, count, rows):
            end = min(count, begin + rows)
            x, g = (t[: (end - begin) * (c1 - c0)].view(end - begin, c1 - c0) for t in (buffer, gradients))
            products.logits(x, begin, end, block)
            _run_gradients(
                x,
                x if gradients is buffer else g,
                target,
                begin,
                end,
                None if dbias is None else dbias[c0:c1],
                first=c0,
                bias=None if bias is None else bias[c0:c1],
                temperature=temperature,
                kept=kept,
                grad=grad,
                mass=mass,
                grad_temperature=dtemperature,
                **options,
            )
            if dh is not None:
                products.toward_h(dh[begin:end], g, block, first=c0 == 0)
            if dweight is not None:
                products.toward_weight(tile, g, begin, end, first=begin == 0)
        if dweight is not None and count:
            if subtracted is not None:
                subtracted.off_weight(tile, c0, c1)
            if dweight.dtype != torch.float32:
                dweight[c0:c1] = tile
    if subtracted is not None:
        if dh is not None:
            subtracted.off_h(dh, 0, count)
        if dbias is not None:
            subtracted.off_bias(dbias)
    return dh, dweight, dbias, dtemperature if wanted & 8 else None


class _Call:
    """The arguments of a call or its backward, prepared for the row kernel."""

    def __init__(
        self, h, weight, bias, target, temperature, class_weight, label_smoothing, ignore_index
    ) -> None:
        self.config = _choose(h, weight).values
        self.rows = rows = Rows(target, ignore_index)
        self.bias = None if bias is None else bias.float().contiguous()
        self.products = (Pairs if self.config["product"] == "native" else Widened)(rows.of(h), weight)
        self.target = rows.of(target).contiguous()
        self.temperature = None if temperature is None else rows.of(temperature).contiguous()
        self.shares = Shares.of(
            self.products.h, weight, self.bias, self.target, class_weight, label_smoothing
        )
        if class_weight is not None:
            rows.divisor = float(class_weight.float().index_select(0, self.target).sum()) or 1.0

    def by_row(self, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, Subtracted | None]:
        """From the gradients of the rows' losses: grad and mass of the row kernel, and the gradients that smoothing subtracts."""
        shares = self.shares
        if shares is None:
            return upstream, None, None
        subtracted = None
        if shares.smoothing is not None:
            subtracted = shares.smoothing.subtracted(upstream, self.products.h, self.temperature)
        return upstream * shares.own, upstream * shares.mass, subtracted

    def finish_temperature(self, dtemperature, upstream, largest) -> None:
        if dtemperature is not None and self.shares is not None and self.shares.smoothing is not None:
            self.shares.smoothing.off_temperature(dtemperature, upstream, largest, self.temperature)


def _options(transform: int, softcap: float, z_loss: float) -> dict:
    return {"stablemax": int(transform == 1), "softcap": softcap, "z_loss": z_loss}


def _returned(rows: Rows, gradients, h, weight, bias, temperature) -> tuple[torch.Tensor, ...]:
    dh, dweight, dbias, dtemperature = gradients
    return (
        h.new_empty(0) if dh is None else rows.spread(dh, h.dtype),
        h.new_empty(0) if dweight is None else dweight.to(weight.dtype),
        h.new_empty(0) if dbias is None else dbias.to(bias.dtype),
        h.new_empty(0) if dtemperature is None else rows.spread(dtemperature, temperature.dtype),
        h.new_empty(0),  # target: class indices have no gradient
    )


def linear_cross_entropy(
    h, weight, bias, target, temperature, class_weight, transform, softcap, z_loss, label_smoothing, ignore_index, reduction,
    return_lse, gradients,
):  # fmt: skip
    c = _Call(h, weight, bias, target, temperature, class_weight, label_smoothing, ignore_index)
    options = _options(transform, softcap, z_loss)
    operands = (c.products, weight.shape[0], c.bias, c.target, c.temperature, options)
    grads: tuple = (None,) * 4
    if gradients:
        upstream = c.products.h.new_full((c.rows.count,), c.rows.scale(reduction), dtype=torch.float32)
        statistics, grads = _one_pass(*operands, *c.by_row(upstream), gradients, c.config["chunk_mib"])
        c.finish_temperature(grads[3], upstream, statistics.largest)
    else:
        statistics = _tile_statistics(*operands, c.config["tile_mib"])
    loss = statistics.losses(c.temperature, options["stablemax"], z_loss, c.shares)
    kept = statistics.kept()
    lse = kept.new_empty(0)
    if return_lse:
        lse = c.rows.spread(sum(_lse_parts(kept, c.temperature, options["stablemax"])))
    return (
        c.rows.reduced(loss, reduction),
        c.rows.spread(kept, dim=1),
        lse,
        *_returned(c.rows, grads, h, weight, bias, temperature),
    )


def _lse_parts(kept, temperature, stablemax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two terms of lse: (logarithm of the largest weight, logarithm of the sum of the weights relative to it)."""
    largest, total = kept
    if stablemax:
        return _symlog(largest), total.log()
    return largest if temperature is None else largest / temperature, total.log()


def linear_cross_entropy_backward(
    grad, grad_lse, h, weight, bias, target, temperature, class_weight, statistics, transform, softcap, z_loss,
    label_smoothing, ignore_index, reduction, wanted,
):  # fmt: skip
    c = _Call(h, weight, bias, target, temperature, class_weight, label_smoothing, ignore_index)
    kept = c.rows.of(statistics, dim=1)
    upstream = c.rows.upstream(grad, reduction)
    own, mass, subtracted = c.by_row(upstream)
    excess = None
    # with grad_lse, the gradient of z_loss is added here instead of in the row kernel
    if grad_lse is not None:
        top, log_total = _lse_parts(kept, c.temperature, int(transform == 1))
        mass = own if mass is None else mass
        excess = c.rows.of(grad_lse) + mass * (2 * z_loss) * (top + log_total)
        mass, z_loss = mass + excess, 0.0
    options = _options(transform, softcap, z_loss)
    operands = (c.products, weight, c.bias, c.target, c.temperature, kept)
    grads = _tile_gradients(*operands, own, mass, subtracted, options, wanted, c.config["tile_mib"])
    c.finish_temperature(grads[3], upstream, kept[0])
    if excess is not None and grads[3] is not None and transform != 1:
        grads[3].sub_(excess * top / c.temperature)
    return _returned(c.rows, grads, h, weight, bias, temperature)


# --- stablemax_cross_entropy -----------------------------------------------------------------------------------------


def stablemax_cross_entropy(logits, target, ignore_index):
    statistics = Statistics(logits)
    run_rows(
        native.rows(logits),
        target,
        0,
        logits.shape[0],
        statistics=statistics,
        stablemax=1,
        ignore_index=ignore_index,
    )
    loss = statistics.losses(None, 1, 0.0).masked_fill_(target == ignore_index, 0)
    return loss, statistics.kept()


def stablemax_cross_entropy_backward(grad_out, logits, statistics, target, ignore_index):
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    run_rows(
        native.rows(logits),
        target,
        0,
        logits.shape[0],
        out=out,
        kept=statistics,
        grad=grad_out.contiguous(),
        stablemax=1,
        ignore_index=ignore_index,
    )
    return out
