"""The tunable parameters of LSSA's and LSSAR's kernels."""

from ...runtime import native
from ...runtime.tuning import Parameter, declare
from . import tuning_triton  # noqa: F401  declares the Triton kernels' parameters

_DEFAULT = native.defaults("lssa_forward")

_KEY = {
    "structural": ("dtype", "head_dim", "value_dim"),
    "sizes": ("batch", "heads", "kv_heads", "q_length", "k_length"),
}

# A block has block_q rows, or fewer if a row of scores is long.
declare(
    "softplus_attention",
    "cpu",
    parameters={
        "block_q": Parameter(_DEFAULT["block_q"], (24, 48, 72, 96, 144, 192)),
        "block_k": Parameter(64, (32, 64, 128, 192, 256)),
        "pack_kib": Parameter(_DEFAULT["pack_kib"], (4096, 16384, 65536)),
    },
    **_KEY,
)
declare(
    "softplus_attention_backward",
    "cpu",
    parameters={"block_q": Parameter(48, (24, 48, 72, 96, 144, 192))},
    **_KEY,
)
