"""What the attention kernels can be tuned by."""

from ...runtime import native
from ...runtime.tuning import Parameter, declare
from . import tuning_triton  # noqa: F401  declares the Triton kernels' parameters

_DEFAULT = native.defaults("attention_forward")

# Rows are rounded up to the kernel's register rows, keys to its panel.
declare(
    "attention",
    "cpu",
    parameters={
        "block_q": Parameter(_DEFAULT["block_q"], (24, 48, 72, 96, 144, 192)),
        "block_k": Parameter(_DEFAULT["block_k"], (32, 64, 128, 192, 256)),
        "pack_kib": Parameter(_DEFAULT["pack_kib"], (4096, 16384, 65536)),
        "decode_rows": Parameter(_DEFAULT["decode_rows"], (0, 4, 8, 16)),
        "chunk_k": Parameter(_DEFAULT["chunk_k"], (64, 256, 512, 1024, 2048)),
    },
    structural=("dtype", "score", "head_dim", "value_dim"),
    sizes=("batch", "heads", "kv_heads", "q_length", "k_length"),
)

declare(
    "attention_backward",
    "cpu",
    parameters={
        "block_q": Parameter(_DEFAULT["block_q"], (24, 48, 72, 96, 144, 192)),
        "block_k": Parameter(96, (32, 64, 96, 128, 192, 256)),
        "pack_kib": Parameter(_DEFAULT["pack_kib"], (4096, 16384, 65536)),
    },
    structural=("dtype", "score", "head_dim", "value_dim"),
    sizes=("batch", "heads", "kv_heads", "q_length", "k_length"),
)
