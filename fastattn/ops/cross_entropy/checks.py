"""The checks of the cross-entropies' arguments, run for every caller."""

from ...runtime import checks
from ..vocabulary import (
    REDUCTIONS,
    check_by_token,
    check_loss,
    check_loss_gradient,
    check_products,
    check_rows,
    check_target,
    check_targets,
    check_wanted,
)

TRANSFORMS = (None, "stablemax")  # by code
LEAST_SOFTCAP = 2.0**-100  # kernels take its reciprocal in float32


# --- linear_cross_entropy --------------------------------------------------------------------------------------------


def check_class_weight(op: str, class_weight, h, classes: int) -> None:
    checks.check_floating(op, class_weight=class_weight)
    checks.check_shape(op, "class_weight", class_weight, (classes,), "one a class")
    checks.check_same_device(op, h=h, class_weight=class_weight)


def _check_linear(
    op: str, h, weight, bias, target, temperature, class_weight, transform, softcap, z_loss, label_smoothing, ignore_index,
    reduction,
) -> None:  # fmt: skip
    check_products(op, "h", h, "weight", weight, "V")
    check_by_token(op, "bias", bias, (weight.shape[0],), h, "one a class")
    if class_weight is not None:
        check_class_weight(op, class_weight, h, weight.shape[0])
    checks.check_tensor(op, "target", target)
    if target.is_floating_point():
        check_by_token(op, "target", target, (h.shape[0], weight.shape[0]), h, "a probability a class")
        checks.check_choice(op, "reduction", reduction, REDUCTIONS)
    else:
        check_loss(op, target, h, ignore_index, reduction)
    if not 0 <= transform < len(TRANSFORMS):
        known = ", ".join(f"{code} ({name})" for code, name in enumerate(TRANSFORMS))
        raise ValueError(f"fastattn.{op}: transform must be one of {known}, given {transform}")
    checks.check_positive(op, "softcap", softcap, zero=True)
    if 0 < softcap < LEAST_SOFTCAP:
        raise ValueError(
            f"fastattn.{op}: softcap must be 0 (none) or at least {LEAST_SOFTCAP}, given {softcap}"
        )
    checks.check_positive(op, "z_loss", z_loss, zero=True)
    if not 0 <= checks.as_number(op, "label_smoothing", label_smoothing) <= 1:
        raise ValueError(f"fastattn.{op}: label_smoothing must lie in [0, 1], given {label_smoothing!r}")
    if temperature is not None:
        statistics = checks.statistics_dtype(h)
        checks.check_exact(op, "temperature", temperature, (h.shape[0],), statistics, h.device, "one a row")


def check_linear_cross_entropy(h, weight, bias, target, temperature, class_weight, *options) -> None:
    *options, _, gradients = options
    op = "linear_cross_entropy"
    _check_linear(op, h, weight, bias, target, temperature, class_weight, *options)
    check_wanted(op, "gradients", gradients, _differentiable(h, weight, bias, temperature, target))


def check_linear_cross_entropy_backward(
    grad, grad_lse, h, weight, bias, target, temperature, class_weight, statistics, *options
) -> None:
    *options, wanted = options
    op = "linear_cross_entropy_backward"
    _check_linear(op, h, weight, bias, target, temperature, class_weight, *options)
    check_loss_gradient(op, grad, statistics, h, options[-1])
    if grad_lse is not None:
        dtype = checks.statistics_dtype(h)
        checks.check_exact(op, "grad_lse", grad_lse, (h.shape[0],), dtype, h.device, "one a row")
    check_wanted(op, "wanted", wanted, _differentiable(h, weight, bias, temperature, target))


def _differentiable(h, weight, bias, temperature, target) -> tuple:
    return h, weight, bias, temperature, target if target.is_floating_point() else None


def _linear_contents(op: str, weight, target, temperature, ignore_index) -> None:
    if not target.is_floating_point():
        check_targets(op, target, weight.shape[0], ignore_index)
    if temperature is None or temperature.device.type != "cpu" or temperature.numel() == 0:
        return
    if not bool((temperature > 0).all()):
        raise ValueError(
            f"fastattn.{op}: temperature must be more than zero everywhere, given {temperature.min().item()!r}"
        )


def check_linear_cross_entropy_contents(h, weight, bias, target, temperature, class_weight, *options) -> None:
    _linear_contents("linear_cross_entropy", weight, target, temperature, options[4])


def check_linear_cross_entropy_backward_contents(
    grad, grad_lse, h, weight, bias, target, temperature, class_weight, statistics, *options
) -> None:
    _linear_contents("linear_cross_entropy_backward", weight, target, temperature, options[4])


# --- stablemax_cross_entropy -----------------------------------------------------------------------------------------


def _check_stablemax(op: str, logits, target, ignore_index) -> None:
    checks.check_tensor(op, "logits", logits, dims=2)
    check_rows(op, "logits", logits)
    check_target(op, target, (logits.shape[0],), ignore_index)
    checks.check_same_device(op, logits=logits, target=target)


def check_stablemax_cross_entropy(logits, target, ignore_index) -> None:
    _check_stablemax("stablemax_cross_entropy", logits, target, ignore_index)


def check_stablemax_cross_entropy_contents(logits, target, ignore_index) -> None:
    check_targets("stablemax_cross_entropy", target, logits.shape[1], ignore_index)


def check_stablemax_cross_entropy_backward(grad_out, logits, statistics, target, ignore_index) -> None:
    op = "stablemax_cross_entropy_backward"
    _check_stablemax(op, logits, target, ignore_index)
    check_loss_gradient(op, grad_out, statistics, logits, "none", "grad_out")


def check_stablemax_cross_entropy_backward_contents(
    grad_out, logits, statistics, target, ignore_index
) -> None:
    check_targets("stablemax_cross_entropy_backward", target, logits.shape[1], ignore_index)
