"""Modules built on the ops."""

from .focus import FocusRouter
from .recurrence import HierarchicalRecurrence

__all__ = ["FocusRouter", "HierarchicalRecurrence"]
