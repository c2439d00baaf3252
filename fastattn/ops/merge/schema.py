"""The declaration of torch.ops.fastattn.merge and its backward."""

from typing import NamedTuple

import torch

from ...runtime.backends import reference_backend
from ...runtime.declare import Gradients, declare
from . import checks, reference


class Call(NamedTuple):
    outs: torch.Tensor  # (parts, ..., D)
    lses: torch.Tensor  # (parts, ...), float32 or float64
    sink: torch.Tensor | None  # (H,) of parts (..., H, L, D)


declare(
    "merge",
    Call,
    outputs=("out", "lse"),
    fake=lambda outs, lses, sink: (outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])),
    check=checks.check_merge,
    backends=(reference_backend(reference.merge),),
    gradients=Gradients(
        of=("outs", "lses", "sink"),
        optional=("sink",),
        outputs=("out", "lse"),
        check=checks.check_merge_backward,
        backends=(),
    ),
)
