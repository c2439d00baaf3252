"""fastattn inside other libraries; each module is imported when it is first named."""

import importlib
from typing import TYPE_CHECKING

__all__ = ["transformers"]

if TYPE_CHECKING:
    from . import transformers
else:  # a type checker would take any name from it

    def __getattr__(name):
        if name == "transformers":
            return importlib.import_module("fastattn.integrations.transformers")
        raise AttributeError(f"module 'fastattn.integrations' has no attribute {name!r}")
