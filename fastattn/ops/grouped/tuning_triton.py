"""What the Triton kernels of grouped attention can be tuned by: tiles of attention's shape."""

from ..attention.tuning_triton import declare_backward, declare_forward

declare_forward("grouped_attention")
declare_backward("grouped_attention_backward")
