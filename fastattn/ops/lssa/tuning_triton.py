"""What the Triton softplus kernels can be tuned by: tiles of attention's shape."""

from ..attention.tuning_triton import declare_backward, declare_forward

declare_forward("softplus_attention")
declare_backward("softplus_attention_backward")
