"""fastattn inside other libraries; each module is imported when it is first named."""

import importlib


def __getattr__(name: str):
    if name == "transformers":
        return importlib.import_module("fastattn.integrations.transformers")
    raise AttributeError(f"module 'fastattn.integrations' has no attribute {name!r}")
