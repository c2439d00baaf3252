"""The CUDA C++ row kernel between the products of chunked.py."""

import functools

import torch

from ...runtime import cuda
from ...runtime import tuning as _tuning
from . import chunked, tuning  # noqa: F401  declares what the look-up serves

_CHUNK_MIB = 512  # MiB of float32 logits held at once


def refusal(*args) -> str | None:
    for t in args:
        if isinstance(t, torch.Tensor) and t.is_floating_point() and (reason := cuda.unserved_dtype(t)):
            return reason
    return cuda.missing()


def refusal_linear(
    h, weight, bias, target, temperature, class_weight, transform, softcap, z_loss, label_smoothing, *_
) -> str | None:
    if class_weight is not None or label_smoothing or target.is_floating_point():
        return "it serves class indices without class_weight and label_smoothing"
    return refusal(h, weight, bias, temperature)


def refusal_linear_backward(grad, grad_lse, *members) -> str | None:
    if grad_lse is not None:
        return "it serves no gradient of lse"
    return refusal_linear(*members[:6], *members[7:])


def _float(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.float().contiguous()


def _row_kernel(
    x, target, *, bias, temperature, grad, loss, largest, total, grad_temperature, **options
) -> None:
    config = _tuning.lookup(
        "vocab_rows",
        "cuda",
        structural={"transform": "stablemax" if options["stablemax"] else "softmax"},
        sizes={"rows": x.shape[0], "classes": x.shape[1]},
        device=x.device,
    )
    # the kernel always writes these three; where they are known already, it writes to scratch memory
    if loss is None:
        loss, largest, total = x.new_empty(3, x.shape[0])
    cuda.vocab_rows(
        x, _float(bias), target.long(), _float(temperature), grad, loss, largest, total, grad_temperature, **options,
        **config.values,
    )  # fmt: skip


linear_cross_entropy = functools.partial(chunked.linear_cross_entropy, _row_kernel, _CHUNK_MIB)
linear_cross_entropy_backward = functools.partial(
    chunked.linear_cross_entropy_backward, _row_kernel, _CHUNK_MIB
)
