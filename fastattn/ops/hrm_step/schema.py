"""torch.ops.fastattn.decode_step: schema, fake, backends. It has no gradients."""

import importlib

import torch

from ...runtime.registry import Backend, cpu_backend, reference_backend, register_op
from .checks import check_decode_step, check_decode_step_contents


def _cuda():
    return importlib.import_module(f"{__package__}.cuda")


register_op(
    "decode_step",
    "(Tensor z_h, Tensor z_l, Tensor[] weights, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? positions, SymInt position, "
    "int h_cycles, int l_cycles, float theta, float eps, str backend) -> Tensor",
    fake=lambda z_h, *_: torch.empty_like(z_h, memory_format=torch.contiguous_format),
    check=check_decode_step,
    check_contents=check_decode_step_contents,
    backends=(
        Backend(
            "cuda",
            lambda: _cuda().decode_step,
            lambda *args: _cuda().refusal(*args),
            lambda *args: _cuda().configure(*args),
            devices=("cuda",),
        ),
        cpu_backend(__package__, "decode_step"),
        reference_backend(__package__, "decode_step"),
    ),
)
