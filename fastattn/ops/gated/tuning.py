"""What the kernels of gated attention can be tuned by."""

from ..focus import declare_tiles
from . import tuning_triton  # noqa: F401  declares the Triton kernels' parameters

declare_tiles("gated_attention", 96)
