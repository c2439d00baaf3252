"""The tunable parameters of grouped attention's Triton kernels: tiles as in attention."""

from ..attention.tuning_triton import declare_backward, declare_forward

declare_forward("grouped_attention")
declare_backward("grouped_attention_backward")
