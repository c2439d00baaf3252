"""The checks of multi_label_cross_entropy's arguments, run for every caller."""

from ...runtime import checks
from ..vocabulary import check_by_token, check_loss_gradient, check_products, check_wanted

PADDING = -100  # pads a row's list of classes


def _check(op: str, h, weight, bias, positives) -> None:
    check_products(op, "h", h, "weight", weight, "V")
    check_by_token(op, "bias", bias, (weight.shape[0],), h, "one a class")
    checks.check_integer(op, "positives", positives, dims=2)
    checks.check_shape(op, "positives", positives, (h.shape[0], positives.shape[1]), "h's rows, by P classes")
    checks.check_same_device(op, h=h, positives=positives)


def check_multi_label_cross_entropy(h, weight, bias, positives) -> None:
    _check("multi_label_cross_entropy", h, weight, bias, positives)


def check_multi_label_cross_entropy_backward(
    grad_loss, h, weight, bias, statistics, positives, wanted
) -> None:
    op = "multi_label_cross_entropy_backward"
    _check(op, h, weight, bias, positives)
    check_loss_gradient(op, grad_loss, statistics, h, "none", "grad_loss")
    check_wanted(op, "wanted", wanted, (h, weight, bias))


def check_contents(h, weight, bias, positives) -> None:
    op = "multi_label_cross_entropy"
    checks.check_range(op, "positives", positives, 0, weight.shape[0], also=PADDING)


def check_backward_contents(grad_loss, h, weight, bias, statistics, positives, wanted) -> None:
    op = "multi_label_cross_entropy_backward"
    checks.check_range(op, "positives", positives, 0, weight.shape[0], also=PADDING)
