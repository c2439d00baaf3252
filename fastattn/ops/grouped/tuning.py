"""The tunable parameters of grouped attention's kernels."""

from ..focus import declare_tiles
from . import tuning_triton  # noqa: F401  declares the Triton kernels' parameters

declare_tiles("grouped_attention", 48)
