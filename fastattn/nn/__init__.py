"""Modules built on the ops."""

from .focus import FocusRouter
from .heads import FourierHead, TemperatureNet, spherical_z_loss
from .linear import (
    Based,
    GatedDeltaNet,
    GatedLinearAttention,
    Hedgehog,
    KimiDeltaAttention,
    Lightning,
    LinearMixer,
    MagnitudeAware,
    Mamba2Block,
    PrefixLinearAttention,
    Retention,
    TitansMemory,
    taylor_features,
)
from .recurrence import HierarchicalRecurrence
from .recursive import Recursive, TokenChoice, TopK
from .scans import S4D, MambaBlock, aaren, dechunk
from .sigma import sigma_reparam
from .state_space import S5, HiSS, ParaGRU, newton_scan, perturbed_hippo
from .streams import ParallelStreams
from .vq_head import VQHead

__all__ = [
    "S4D",
    "S5",
    "Based",
    "FocusRouter",
    "FourierHead",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "Hedgehog",
    "HiSS",
    "HierarchicalRecurrence",
    "KimiDeltaAttention",
    "Lightning",
    "LinearMixer",
    "MagnitudeAware",
    "Mamba2Block",
    "MambaBlock",
    "ParaGRU",
    "ParallelStreams",
    "PrefixLinearAttention",
    "Recursive",
    "Retention",
    "TemperatureNet",
    "TitansMemory",
    "TokenChoice",
    "TopK",
    "VQHead",
    "aaren",
    "dechunk",
    "newton_scan",
    "perturbed_hippo",
    "sigma_reparam",
    "spherical_z_loss",
    "taylor_features",
]
