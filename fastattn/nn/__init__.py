"""Modules built on the ops."""

from .focus import FocusRouter
from .recurrence import HierarchicalRecurrence
from .vq_head import VQHead

__all__ = ["FocusRouter", "HierarchicalRecurrence", "VQHead"]
