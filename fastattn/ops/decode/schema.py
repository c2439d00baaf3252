"""torch.ops.fastattn.decode_step: schema, fake, backends. It has no gradients."""

import torch

from ..._registry import reference_backend, register_op

register_op(
    "decode_step",
    "(Tensor z_h, Tensor z_l, Tensor[] weights, Tensor(a!) k_cache, Tensor(b!) v_cache, int position, int h_cycles, "
    "int l_cycles, float theta, float eps, str backend) -> Tensor",
    fake=lambda z_h, *_: torch.empty_like(z_h, memory_format=torch.contiguous_format),
    backends=(reference_backend(__package__, "decode_step"),),
)
