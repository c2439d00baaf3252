"""Modules built on the ops."""

from .focus import FocusRouter
from .heads import FourierHead, TemperatureNet, spherical_z_loss
from .recurrence import HierarchicalRecurrence
from .recursive import Recursive, TokenChoice, TopK
from .scans import S4D, MambaBlock, aaren, dechunk
from .sigma import sigma_reparam
from .streams import ParallelStreams
from .vq_head import VQHead

__all__ = [
    "S4D",
    "FocusRouter",
    "FourierHead",
    "HierarchicalRecurrence",
    "MambaBlock",
    "ParallelStreams",
    "Recursive",
    "TemperatureNet",
    "TokenChoice",
    "TopK",
    "VQHead",
    "aaren",
    "dechunk",
    "sigma_reparam",
    "spherical_z_loss",
]
