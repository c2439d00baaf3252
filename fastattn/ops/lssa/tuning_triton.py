"""The tunable parameters of the Triton kernels of LSSA and LSSAR: tiles as in attention."""

from ..attention.tuning_triton import declare_backward, declare_forward

declare_forward("softplus_attention")
declare_backward("softplus_attention_backward")
