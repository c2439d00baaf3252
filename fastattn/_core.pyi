# The compiled module (bindings/module.cpp). Only runtime/native.py calls it, by the names of kernels and their structs.
from typing import Any

def __getattr__(name: str) -> Any: ...
