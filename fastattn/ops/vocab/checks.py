"""What the vocabulary ops ask of their arguments, whoever calls them. Rows are (N, d) here; public functions take (..., d)."""

import torch

from ...runtime import checks as _checks

REDUCTIONS = ("none", "sum", "mean")
TRANSFORMS = (None, "stablemax")  # by code
LEAST_SOFTCAP = 2.0**-100  # kernels take its reciprocal in float32


def check_rows(op: str, name: str, t: torch.Tensor, columns: int | None = None) -> None:
    """(..., d), floating, with d of 1 or more, and `columns` when given."""
    _checks.check_floating(op, **{name: t})
    if t.dim() < 1 or t.shape[-1] < 1:
        raise ValueError(
            f"fastattn.{op}: {name} must have a last dim of 1 or more, given {_checks.describe(t)}"
        )
    if columns is not None and t.shape[-1] != columns:
        raise ValueError(
            f"fastattn.{op}: {name} must have a last dim of {columns}, given {_checks.describe(t)}"
        )


def check_matrix(op: str, name: str, t: torch.Tensor, rows: str) -> None:
    """(rows, d), neither empty."""
    _checks.check_tensor(op, name, t, dims=2)
    if t.shape[0] < 1 or t.shape[1] < 1:
        raise ValueError(f"fastattn.{op}: {name} must be ({rows}, d), none 0, given {_checks.describe(t)}")


def check_wide(op: str, name: str, t: torch.Tensor, like: torch.Tensor) -> None:
    """Of like's dtype or float32, which a low-precision op may take for a term that needs it."""
    _checks.check_tensor(op, name, t)
    if t.dtype != like.dtype and not (t.dtype == torch.float32 and like.dtype != torch.float64):
        wanted = str(like.dtype).removeprefix("torch.")
        allowed = wanted if like.dtype in (torch.float32, torch.float64) else f"{wanted} or float32"
        raise TypeError(f"fastattn.{op}: {name} must be {allowed}, given {_checks.describe(t)}")


def check_target(op: str, target: torch.Tensor, shape: tuple[int, ...], ignore_index: int) -> None:
    """Everything but the contents."""
    _checks.check_integer(op, "target", target)
    _checks.check_shape(op, "target", target, shape, "one class a row")
    if _checks.as_integer(ignore_index) is None:
        raise TypeError(f"fastattn.{op}: ignore_index must be an int, given {_checks.describe(ignore_index)}")


def _check_products(op: str, name: str, rows: torch.Tensor, of: str, matrix: torch.Tensor, size: str) -> None:
    """`rows` (N, d) and `matrix` (size, d) can be multiplied."""
    _checks.check_tensor(op, name, rows, dims=2)
    check_matrix(op, of, matrix, size)
    check_rows(op, name, rows, matrix.shape[1])
    _checks.check_floating(op, **{name: rows, of: matrix})


def _check_by_token(op: str, name: str, t: torch.Tensor | None, shape: tuple[int, ...], h, why: str) -> None:
    if t is not None:
        check_wide(op, name, t, h)
        _checks.check_shape(op, name, t, shape, why)
        _checks.check_same_device(op, h=h, **{name: t})


def _check_wanted(op: str, name: str, wanted: int, tensors: tuple) -> None:
    """Bits of the tensors whose gradients are asked for."""
    there = sum(1 << i for i, t in enumerate(tensors) if t is not None)
    if not 0 <= wanted < 1 << len(tensors) or wanted & ~there:
        raise ValueError(
            f"fastattn.{op}: {name} must be a sum of bits of {there}, those of the tensors given, given {wanted}"
        )


def _check_loss(op: str, target, h, ignore_index, reduction) -> None:
    check_target(op, target, (h.shape[0],), ignore_index)
    _checks.check_same_device(op, h=h, target=target)
    _checks.check_choice(op, "reduction", reduction, REDUCTIONS)


def _check_loss_gradient(op: str, grad, statistics, h, reduction: str, name: str = "grad") -> None:
    dtype, rows = _checks.statistics_dtype(h), h.shape[0]
    shape = (rows,) if reduction == "none" else ()
    _checks.check_exact(op, name, grad, shape, dtype, h.device, "the loss's")
    _checks.check_exact(op, "statistics", statistics, (2, rows), dtype, h.device, "two a row")


def _check_targets(op: str, target: torch.Tensor, classes: int, ignore_index: int) -> None:
    _checks.check_range(op, "target", target, 0, classes, also=ignore_index)


# --- linear_cross_entropy --------------------------------------------------------------------------------------------


def _check_linear(
    op: str, h, weight, bias, target, temperature, transform, softcap, z_loss, ignore_index, reduction
) -> None:
    _check_products(op, "h", h, "weight", weight, "V")
    _check_by_token(op, "bias", bias, (weight.shape[0],), h, "one a class")
    _check_loss(op, target, h, ignore_index, reduction)
    if not 0 <= transform < len(TRANSFORMS):
        known = ", ".join(f"{code} ({name})" for code, name in enumerate(TRANSFORMS))
        raise ValueError(f"fastattn.{op}: transform must be one of {known}, given {transform}")
    _checks.check_positive(op, "softcap", softcap, zero=True)
    if 0 < softcap < LEAST_SOFTCAP:
        raise ValueError(
            f"fastattn.{op}: softcap must be 0, for none, or at least {LEAST_SOFTCAP}, given {softcap}"
        )
    _checks.check_positive(op, "z_loss", z_loss, zero=True)
    if temperature is not None:
        statistics = _checks.statistics_dtype(h)
        _checks.check_exact(op, "temperature", temperature, (h.shape[0],), statistics, h.device, "one a row")


def check_linear_cross_entropy(h, weight, bias, target, temperature, *options) -> None:
    *options, gradients = options
    op = "linear_cross_entropy"
    _check_linear(op, h, weight, bias, target, temperature, *options)
    _check_wanted(op, "gradients", gradients, (h, weight, bias, temperature))


def check_linear_cross_entropy_backward(
    grad, h, weight, bias, target, temperature, statistics, *options
) -> None:
    *options, wanted = options
    op = "linear_cross_entropy_backward"
    _check_linear(op, h, weight, bias, target, temperature, *options)
    _check_loss_gradient(op, grad, statistics, h, options[-1])
    _check_wanted(op, "wanted", wanted, (h, weight, bias, temperature))


def _linear_contents(op: str, weight, target, temperature, ignore_index) -> None:
    _check_targets(op, target, weight.shape[0], ignore_index)
    if temperature is None or temperature.device.type != "cpu" or temperature.numel() == 0:
        return
    if not bool((temperature > 0).all()):
        raise ValueError(
            f"fastattn.{op}: temperature must be more than zero everywhere, given {temperature.min().item()!r}"
        )


def check_linear_cross_entropy_contents(h, weight, bias, target, temperature, *options) -> None:
    _linear_contents("linear_cross_entropy", weight, target, temperature, options[3])


def check_linear_cross_entropy_backward_contents(
    grad, h, weight, bias, target, temperature, statistics, *options
) -> None:
    _linear_contents("linear_cross_entropy_backward", weight, target, temperature, options[3])


# --- stablemax_cross_entropy -----------------------------------------------------------------------------------------


def _check_stablemax(op: str, logits, target, ignore_index) -> None:
    _checks.check_tensor(op, "logits", logits, dims=2)
    check_rows(op, "logits", logits)
    check_target(op, target, (logits.shape[0],), ignore_index)
    _checks.check_same_device(op, logits=logits, target=target)


def check_stablemax_cross_entropy(logits, target, ignore_index) -> None:
    _check_stablemax("stablemax_cross_entropy", logits, target, ignore_index)


def check_stablemax_cross_entropy_contents(logits, target, ignore_index) -> None:
    _check_targets("stablemax_cross_entropy", target, logits.shape[1], ignore_index)


def check_stablemax_cross_entropy_backward(grad_out, logits, statistics, target, ignore_index) -> None:
    op = "stablemax_cross_entropy_backward"
    _check_stablemax(op, logits, target, ignore_index)
    _check_loss_gradient(op, grad_out, statistics, logits, "none", "grad_out")


def check_stablemax_cross_entropy_backward_contents(
    grad_out, logits, statistics, target, ignore_index
) -> None:
    _check_targets("stablemax_cross_entropy_backward", target, logits.shape[1], ignore_index)


# --- heads of shared rows --------------------------------------------------------------------------------------------


def _check_head(op: str, h, codebook, codes, bias) -> None:
    _check_products(op, "h", h, "codebook", codebook, "K")
    _checks.check_integer(op, "codes", codes, dims=1)
    if not 1 <= codes.shape[0] < 1 << 31:
        raise ValueError(
            f"fastattn.{op}: codes must name a code for 1 token or more, below 2**31, given {codes.shape[0]}"
        )
    _checks.check_same_device(op, h=h, codes=codes)
    _check_by_token(op, "bias", bias, (codes.shape[0],), h, "one a token of codes")


def check_codes(op: str, codes: torch.Tensor, codebook: torch.Tensor) -> None:
    _checks.check_range(op, "codes", codes, 0, codebook.shape[0])


def head_checks(op: str):
    """(check, check_contents) of an op that takes h, codebook, codes and bias alone."""

    def check(h, codebook, codes, bias) -> None:
        _check_head(op, h, codebook, codes, bias)

    def contents(h, codebook, codes, bias) -> None:
        check_codes(op, codes, codebook)

    return check, contents


def check_vq_logits_backward(grad_out, h, codebook, codes, bias, wanted) -> None:
    op = "vq_logits_backward"
    _check_head(op, h, codebook, codes, bias)
    _checks.check_exact(
        op, "grad_out", grad_out, (h.shape[0], codes.shape[0]), h.dtype, h.device, "the logits'"
    )
    _check_wanted(op, "wanted", wanted, (h, codebook, bias))


def check_vq_logits_backward_contents(grad_out, h, codebook, codes, bias, wanted) -> None:
    check_codes("vq_logits_backward", codes, codebook)


def check_vq_sample(h, codebook, codes, bias, uniform, temperature) -> None:
    op = "vq_sample"
    _check_head(op, h, codebook, codes, bias)
    _checks.check_positive(op, "temperature", temperature)
    _checks.check_exact(op, "uniform", uniform, (h.shape[0], 2), torch.float64, h.device, "two a row")


def check_vq_sample_contents(h, codebook, codes, *_) -> None:
    check_codes("vq_sample", codes, codebook)


def check_nearest_codes(x, codebook) -> None:
    _check_products("nearest_codes", "x", x, "codebook", codebook, "K")


def _check_vq_loss(op: str, h, codebook, codes, bias, shadow, target, ignore_index, reduction) -> None:
    _check_head(op, h, codebook, codes, bias)
    _check_by_token(op, "shadow", shadow, (codes.shape[0], h.shape[1]), h, "a row a token of codes")
    _check_loss(op, target, h, ignore_index, reduction)


def check_vq_cross_entropy(
    h, codebook, codes, bias, shadow, target, ignore_index, reduction, gradients
) -> None:
    op = "vq_cross_entropy"
    _check_vq_loss(op, h, codebook, codes, bias, shadow, target, ignore_index, reduction)
    _check_wanted(op, "gradients", gradients, (h, codebook, bias, shadow))


def check_vq_cross_entropy_contents(h, codebook, codes, bias, shadow, target, ignore_index, *_) -> None:
    op = "vq_cross_entropy"
    check_codes(op, codes, codebook)
    _check_targets(op, target, codes.shape[0], ignore_index)


def check_vq_cross_entropy_backward(
    grad, h, codebook, codes, bias, shadow, target, statistics, ignore_index, reduction, wanted
) -> None:
    op = "vq_cross_entropy_backward"
    _check_vq_loss(op, h, codebook, codes, bias, shadow, target, ignore_index, reduction)
    _check_loss_gradient(op, grad, statistics, h, reduction)
    _check_wanted(op, "wanted", wanted, (h, codebook, bias, shadow))


def check_vq_cross_entropy_backward_contents(
    grad, h, codebook, codes, bias, shadow, target, statistics, ignore_index, *_
) -> None:
    op = "vq_cross_entropy_backward"
    check_codes(op, codes, codebook)
    _check_targets(op, target, codes.shape[0], ignore_index)
