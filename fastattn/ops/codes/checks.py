"""The checks of the codebook ops' arguments, run for every caller."""

import torch

from ...runtime import checks
from ..vocabulary import (
    check_by_token,
    check_loss,
    check_loss_gradient,
    check_products,
    check_targets,
    check_wanted,
)


def _check_head(op: str, h, codebook, codes, bias) -> None:
    check_products(op, "h", h, "codebook", codebook, "K")
    checks.check_integer(op, "codes", codes, dims=1)
    if not 1 <= codes.shape[0] < 1 << 31:
        raise ValueError(
            f"fastattn.{op}: codes must have one element a token, V in [1, 2**31), given {codes.shape[0]}"
        )
    checks.check_same_device(op, h=h, codes=codes)
    check_by_token(op, "bias", bias, (codes.shape[0],), h, "one a token of codes")


def check_codes(op: str, codes: torch.Tensor, codebook: torch.Tensor) -> None:
    checks.check_range(op, "codes", codes, 0, codebook.shape[0])


def head_checks(op: str):
    """(check, check_contents) of an op whose only members are h, codebook, codes and bias."""

    def check(h, codebook, codes, bias) -> None:
        _check_head(op, h, codebook, codes, bias)

    def contents(h, codebook, codes, bias) -> None:
        check_codes(op, codes, codebook)

    return check, contents


def check_vq_logits_backward(grad_out, h, codebook, codes, bias, wanted) -> None:
    op = "vq_logits_backward"
    _check_head(op, h, codebook, codes, bias)
    checks.check_exact(
        op, "grad_out", grad_out, (h.shape[0], codes.shape[0]), h.dtype, h.device, "the logits'"
    )
    check_wanted(op, "wanted", wanted, (h, codebook, bias))


def check_vq_logits_backward_contents(grad_out, h, codebook, codes, bias, wanted) -> None:
    check_codes("vq_logits_backward", codes, codebook)


def check_vq_sample(h, codebook, codes, bias, uniform, temperature) -> None:
    op = "vq_sample"
    _check_head(op, h, codebook, codes, bias)
    checks.check_positive(op, "temperature", temperature)
    checks.check_exact(op, "uniform", uniform, (h.shape[0], 2), torch.float64, h.device, "two a row")


def check_vq_sample_contents(h, codebook, codes, *_) -> None:
    check_codes("vq_sample", codes, codebook)


def check_nearest_codes(x, codebook) -> None:
    check_products("nearest_codes", "x", x, "codebook", codebook, "K")


def _check_vq_loss(op: str, h, codebook, codes, bias, shadow, target, ignore_index, reduction) -> None:
    _check_head(op, h, codebook, codes, bias)
    check_by_token(op, "shadow", shadow, (codes.shape[0], h.shape[1]), h, "a row a token of codes")
    check_loss(op, target, h, ignore_index, reduction)


def check_vq_cross_entropy(
    h, codebook, codes, bias, shadow, target, ignore_index, reduction, gradients
) -> None:
    op = "vq_cross_entropy"
    _check_vq_loss(op, h, codebook, codes, bias, shadow, target, ignore_index, reduction)
    check_wanted(op, "gradients", gradients, (h, codebook, bias, shadow))


def check_vq_cross_entropy_contents(h, codebook, codes, bias, shadow, target, ignore_index, *_) -> None:
    op = "vq_cross_entropy"
    check_codes(op, codes, codebook)
    check_targets(op, target, codes.shape[0], ignore_index)


def check_vq_cross_entropy_backward(
    grad, h, codebook, codes, bias, shadow, target, statistics, ignore_index, reduction, wanted
) -> None:
    op = "vq_cross_entropy_backward"
    _check_vq_loss(op, h, codebook, codes, bias, shadow, target, ignore_index, reduction)
    check_loss_gradient(op, grad, statistics, h, reduction)
    check_wanted(op, "wanted", wanted, (h, codebook, bias, shadow))


def check_vq_cross_entropy_backward_contents(
    grad, h, codebook, codes, bias, shadow, target, statistics, ignore_index, *_
) -> None:
    op = "vq_cross_entropy_backward"
    check_codes(op, codes, codebook)
    check_targets(op, target, codes.shape[0], ignore_index)
