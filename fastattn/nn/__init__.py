"""Modules built on the ops."""

from .recurrence import HierarchicalRecurrence

__all__ = ["HierarchicalRecurrence"]
