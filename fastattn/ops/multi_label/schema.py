"""The declaration of torch.ops.fastattn.multi_label_cross_entropy and its backward."""

from typing import TYPE_CHECKING, NamedTuple

import torch

from ...runtime.backends import Lazy, cpu_backend, reference_backend, triton_backend
from ...runtime.declare import Gradients, declare
from ..vocabulary import fake_statistics
from . import checks, cpu, reference

if TYPE_CHECKING:
    from . import triton
else:
    triton = Lazy(f"{__package__}.triton")


class Call(NamedTuple):
    h: torch.Tensor  # (N, d)
    weight: torch.Tensor  # (V, d)
    bias: torch.Tensor | None  # (V,)
    positives: torch.Tensor  # (N, P)


declare(
    "multi_label_cross_entropy",
    Call,
    outputs=("loss", "statistics"),
    fake=lambda h, *_: fake_statistics(h, "none"),
    check=checks.check_multi_label_cross_entropy,
    check_contents=checks.check_contents,
    backends=(
        cpu_backend(cpu.multi_label_cross_entropy, cpu.refusal, cpu.configure),
        triton_backend(triton.multi_label_cross_entropy, triton.refusal, triton.configure),
        reference_backend(reference.multi_label_cross_entropy),
    ),
    gradients=Gradients(
        of=("h", "weight", "bias"),
        outputs=("loss",),
        saved=("statistics",),
        optional=("h", "weight", "bias"),
        check=checks.check_multi_label_cross_entropy_backward,
        check_contents=checks.check_backward_contents,
        backends=(
            cpu_backend(cpu.multi_label_cross_entropy_backward, cpu.refusal_backward),
            triton_backend(triton.multi_label_cross_entropy_backward, triton.refusal_backward),
        ),
    ),
)
