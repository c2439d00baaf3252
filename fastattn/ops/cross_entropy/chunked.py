"""Losses over dense logits on a GPU: library matrix products in chunks of rows, one row kernel of a backend between them.

Ignored rows take part in the products with a gradient of zero, because dropping them would make the call wait for the device.
Products of 16-bit inputs have 16-bit operands and float32 results; logits are never rounded to less than float32.
"""

import torch

from .shares import Shares, Subtracted

_MIB = 1 << 20


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in float32, from operands of one dtype."""
    if a.dtype == torch.float32 or a.device.type == "meta":
        return torch.mm(a, b)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def chunks(rows: int, classes: int, mib: int) -> list[tuple[int, int]]:
    step = max(1, mib * _MIB // (4 * classes))
    return [(begin, min(rows, begin + step)) for begin in range(0, rows, step)]


def chunked_rows(
    row_kernel,
    mib,
    h,
    weight,
    bias,
    target,
    temperature,
    options,
    *,
    log_count=None,
    shares=None,
    subtracted: Subtracted | None = None,
    grad=None,
    loss=None,
    statistics,
    wanted=0,
):
    """In chunks of rows: fill the row losses and their statistics if `loss` is given, and if `grad` is given return the `wanted`
    gradients of h (its dtype), weight, bias and temperature (float32), minus `subtracted`. shares: (N, 3), an argument of the row kernel.

    row_kernel(x, target, **rows, **options) fills loss, largest and total, and overwrites the logits x with the loss's gradient."""
    largest, total = statistics
    columns = {"bias": bias} | ({} if log_count is None else {"log_count": log_count})
    temperature = None if temperature is None else temperature.contiguous()
    dh = torch.empty_like(h, memory_format=torch.contiguous_format) if wanted & 1 else None
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32) if wanted & 2 else None
    dbias = h.new_zeros(weight.shape[0], dtype=torch.float32) if wanted & 4 else None
    dtemperature = h.new_zeros(h.shape[0], dtype=torch.float32) if wanted & 8 else None
    optional = {} if shares is None else {"shares": shares}
    for begin, end in chunks(h.shape[0], weight.shape[0], mib):
        part = h[begin:end]
        x = product(part, weight.T)
        rows = {
            name: None if t is None else t[begin:end]
            for name, t in (
                ("temperature", temperature), ("grad", grad), ("loss", loss), ("largest", largest), ("total", total),
                ("grad_temperature", dtemperature), *optional.items(),
            )
        }  # fmt: skip
        row_kernel(x, target[begin:end], **columns, **rows, **options)
        if wanted & 3:
            g = x.to(h.dtype)
        if wanted & 1:
            part_dh = product(g, weight)
            if subtracted is not None:
                subtracted.off_h(part_dh, begin, end)
            dh[begin:end] = part_dh.to(h.dtype)
        if dweight is not None:
            dweight += product(g.T, part)
        if dbias is not None:
            dbias += x.sum(0)
    if subtracted is not None:
        if dweight is not None:
            subtracted.off_weight(dweight, 0, weight.shape[0])
        if dbias is not None:
            subtracted.off_bias(dbias)
    return dh, dweight, dbias, dtemperature


def returned(gradients, tensors) -> tuple[torch.Tensor, ...]:
    """Gradients in their tensors' dtypes, (0,) for those that are None."""
    h = tensors[0]
    return tuple(
        h.new_empty(0) if g is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)
    )


def _options(transform: int, softcap: float, z_loss: float, ignore_index: int) -> dict:
    return {"stablemax": transform == 1, "softcap": softcap, "z_loss": z_loss, "ignore_index": ignore_index}


def divisor(
    target: torch.Tensor, ignore_index: int, class_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """The divisor of a mean, on the device: the number of counted rows, or the sum of their class weights; 1 in place of 0."""
    counted = target != ignore_index
    if class_weight is None:
        return counted.sum().clamp(min=1).float()
    weights = class_weight.float()[target.long().clamp(0, class_weight.shape[0] - 1)]
    total = weights.masked_fill(~counted, 0).sum()
    return total.masked_fill(total == 0, 1)


def upstream(grad, target, ignore_index: int, reduction: str, class_weight=None) -> torch.Tensor:
    """The gradient of each row's loss, (N,) float32."""
    if reduction == "none":
        return grad.float().contiguous()
    scale = grad.float()
    if reduction == "mean":
        scale = scale / divisor(target, ignore_index, class_weight)
    return scale.expand(target.shape[0]).contiguous()


def empty_statistics(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised (loss (N,), statistics (2, N)); the statistics are the largest logit and the sum of the weights."""
    return tuple(h.new_empty(*shape, h.shape[0], dtype=torch.float32) for shape in ((), (2,)))


class _Call:
    """The arguments of a call or its backward, prepared for the row kernel."""

    def __init__(
        self, h, weight, bias, target, temperature, class_weight, label_smoothing, ignore_index
    ) -> None:
        self.h, self.weight, self.temperature = h, weight, temperature
        self.bias = None if bias is None else bias.contiguous()
        self.target = target.contiguous()
        self.shares = Shares.of(h, weight, bias, target, class_weight, label_smoothing)
        self.smoothing = None if self.shares is None else self.shares.smoothing
        self.ignored = None if self.smoothing is None else target == ignore_index

    def run(self, row_kernel, mib, options, *, grad, statistics, wanted, grad_lse=None, loss=None):
        """`chunked_rows` for this call."""
        subtracted = None
        if self.smoothing is not None and wanted:
            rows = grad.masked_fill(self.ignored, 0)
            subtracted = self.smoothing.subtracted(rows, self.h, self.temperature)
        gradients = chunked_rows(
            row_kernel, mib, self.h, self.weight, self.bias, self.target, self.temperature, options,
            shares=self._columns(grad_lse), subtracted=subtracted, grad=grad, loss=loss, statistics=statistics, wanted=wanted,
        )  # fmt: skip
        if subtracted is not None and gradients[3] is not None:
            self.smoothing.off_temperature(gradients[3], rows, statistics[0], self.temperature)
        return gradients

    def _columns(self, grad_lse: torch.Tensor | None) -> torch.Tensor | None:
        if self.shares is None and grad_lse is None:
            return None
        ones = self.h.new_ones(self.h.shape[0], dtype=torch.float32)
        own, mass = (ones, ones) if self.shares is None else self.shares[:2]
        return torch.stack((own, mass, torch.zeros_like(ones) if grad_lse is None else grad_lse), 1)


def _lse(statistics, temperature, stablemax: bool, ignored) -> torch.Tensor:
    largest, total = statistics
    if stablemax:
        largest = largest.abs().log1p().copysign(largest)
    elif temperature is not None:
        largest = largest / temperature
    return (largest + total.log()).masked_fill(ignored, 0)


def linear_cross_entropy(
    row_kernel, mib, h, weight, bias, target, temperature, class_weight, transform, softcap, z_loss, label_smoothing,
    ignore_index, reduction, return_lse, gradients,
):  # fmt: skip
    c = _Call(h, weight, bias, target, temperature, class_weight, label_smoothing, ignore_index)
    loss, statistics = empty_statistics(h)
    one = h.new_ones((h.shape[0],) if reduction == "none" else (), dtype=torch.float32)
    grad = upstream(one, target, ignore_index, reduction, class_weight) if gradients else None
    options = _options(transform, softcap, z_loss, ignore_index)
    grads = c.run(row_kernel, mib, options, grad=grad, loss=loss, statistics=statistics, wanted=gradients)
    if c.smoothing is not None:
        loss += c.smoothing.loss(statistics[0], temperature).masked_fill(c.ignored, 0)
    lse = loss.new_empty(0)
    if return_lse:
        lse = _lse(statistics, temperature, transform == 1, target == ignore_index)
    loss = reduced(loss, target, ignore_index, reduction, class_weight)
    return loss, statistics, lse, *returned(grads, (h, weight, bias, temperature)), h.new_empty(0)


def reduced(loss, target, ignore_index: int, reduction: str, class_weight=None) -> torch.Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / divisor(target, ignore_index, class_weight) if reduction == "mean" else loss.sum()


def linear_cross_entropy_backward(
    row_kernel, mib, grad, grad_lse, h, weight, bias, target, temperature, class_weight, statistics, transform, softcap,
    z_loss, label_smoothing, ignore_index, reduction, wanted,
):  # fmt: skip
    c = _Call(h, weight, bias, target, temperature, class_weight, label_smoothing, ignore_index)
    grad = upstream(grad, target, ignore_index, reduction, class_weight)
    options = _options(transform, softcap, z_loss, ignore_index)
    grads = c.run(
        row_kernel, mib, options, grad=grad, grad_lse=grad_lse, statistics=statistics, wanted=wanted
    )
    return *returned(grads, (h, weight, bias, temperature)), h.new_empty(0)
