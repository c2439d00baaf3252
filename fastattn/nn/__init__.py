"""Modules built on the ops."""

from .focus import FocusRouter
from .heads import FourierHead, TemperatureNet, spherical_z_loss
from .recurrence import HierarchicalRecurrence
from .recursive import Recursive, TokenChoice, TopK
from .sigma import sigma_reparam
from .streams import ParallelStreams
from .vq_head import VQHead

__all__ = [
    "FocusRouter",
    "FourierHead",
    "HierarchicalRecurrence",
    "ParallelStreams",
    "Recursive",
    "TemperatureNet",
    "TokenChoice",
    "TopK",
    "VQHead",
    "sigma_reparam",
    "spherical_z_loss",
]
