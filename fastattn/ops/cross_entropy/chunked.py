"""Losses over dense logits on a GPU: library matrix products in chunks of rows, one row kernel of a backend between them.

Ignored rows take part in the products with a gradient of zero: leaving them out would make the call wait for the device.
Products of 16-bit inputs have 16-bit operands and float32 results; logits are never rounded to less than float32.
"""

import torch

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
    grad=None,
    loss=None,
    statistics,
    wanted=0,
):
    """The row losses and their statistics (where `loss` is given) and, where `grad` is, the `wanted` gradients of h (its dtype),
    weight, bias and temperature (float32) by chunks of rows.

    row_kernel(x, target, **rows and options): loss, largest, total, and the loss's gradient in place of the logits x."""
    largest, total = statistics
    columns = {"bias": bias} | ({} if log_count is None else {"log_count": log_count})
    temperature = None if temperature is None else temperature.contiguous()
    dh = torch.empty_like(h, memory_format=torch.contiguous_format) if wanted & 1 else None
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32) if wanted & 2 else None
    dbias = h.new_zeros(weight.shape[0], dtype=torch.float32) if wanted & 4 else None
    dtemperature = h.new_zeros(h.shape[0], dtype=torch.float32) if wanted & 8 else None
    for begin, end in chunks(h.shape[0], weight.shape[0], mib):
        part = h[begin:end]
        x = product(part, weight.T)
        rows = {
            name: None if t is None else t[begin:end]
            for name, t in (
                ("temperature", temperature), ("grad", grad), ("loss", loss), ("largest", largest), ("total", total),
                ("grad_temperature", dtemperature),
            )
        }  # fmt: skip
        row_kernel(x, target[begin:end], **columns, **rows, **options)
        if wanted & 3:
            g = x.to(h.dtype)
        if wanted & 1:
            dh[begin:end] = product(g, weight).to(h.dtype)
        if dweight is not None:
            dweight += product(g.T, part)
        if dbias is not None:
            dbias += x.sum(0)
    return dh, dweight, dbias, dtemperature


def returned(found, tensors) -> tuple[torch.Tensor, ...]:
    """Gradients in their tensors' dtypes, (0,) for those that are None."""
    h = tensors[0]
    return tuple(h.new_empty(0) if g is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True))


def _options(transform: int, softcap: float, z_loss: float, ignore_index: int) -> dict:
    return {"stablemax": transform == 1, "softcap": softcap, "z_loss": z_loss, "ignore_index": ignore_index}


def valid_rows(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """How many rows count, at least 1: on the device."""
    return (target != ignore_index).sum().clamp(min=1).float()


def upstream(grad, target, ignore_index: int, reduction: str) -> torch.Tensor:
    """The gradient of each row's loss, (N,) float32."""
    if reduction == "none":
        return grad.float().contiguous()
    scale = grad.float() / valid_rows(target, ignore_index) if reduction == "mean" else grad.float()
    return scale.expand(target.shape[0]).contiguous()


def empty_statistics(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (N,), statistics (2, N): the largest logit and the sum of the weights), not yet filled."""
    return tuple(h.new_empty(*shape, h.shape[0], dtype=torch.float32) for shape in ((), (2,)))


def linear_cross_entropy(
    row_kernel, mib, h, weight, bias, target, temperature, transform, softcap, z_loss, ignore_index, reduction, gradients
):  # fmt: skip
    loss, statistics = empty_statistics(h)
    one = h.new_ones((h.shape[0],) if reduction == "none" else (), dtype=torch.float32)
    grad = upstream(one, target, ignore_index, reduction) if gradients else None
    found = chunked_rows(
        row_kernel, mib, h, weight, None if bias is None else bias.contiguous(), target.contiguous(), temperature,
        _options(transform, softcap, z_loss, ignore_index), loss=loss, statistics=statistics, grad=grad, wanted=gradients,
    )  # fmt: skip
    loss = reduced(loss, target, ignore_index, reduction)
    return loss, statistics, *returned(found, (h, weight, bias, temperature))


def reduced(loss, target, ignore_index: int, reduction: str) -> torch.Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / valid_rows(target, ignore_index) if reduction == "mean" else loss.sum()


def linear_cross_entropy_backward(
    row_kernel, mib, grad, h, weight, bias, target, temperature, statistics, transform, softcap, z_loss, ignore_index,
    reduction, wanted,
):  # fmt: skip
    found = chunked_rows(
        row_kernel, mib, h, weight, None if bias is None else bias.contiguous(), target.contiguous(), temperature,
        _options(transform, softcap, z_loss, ignore_index), statistics=statistics,
        grad=upstream(grad, target, ignore_index, reduction), wanted=wanted,
    )  # fmt: skip
    return returned(found, (h, weight, bias, temperature))
