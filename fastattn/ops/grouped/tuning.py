"""What the kernels of grouped attention can be tuned by."""

from ..focus import declare_tiles
from . import tuning_triton  # noqa: F401  declares the Triton kernels' parameters

declare_tiles("grouped_attention", 48)
