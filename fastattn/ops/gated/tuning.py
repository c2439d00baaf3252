"""The tunable parameters of gated attention's kernels."""

from ..focus import declare_tiles
from . import tuning_triton  # noqa: F401  declares the Triton kernels' parameters

declare_tiles("gated_attention", 96)
