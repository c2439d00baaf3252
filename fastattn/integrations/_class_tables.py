"""Families that choose an attention class from a table in their modeling file: `register` adds "fastattn" to the tables.

The class it adds is that of "sdpa", whose forward calls `fastattn.scaled_dot_product_attention` in place of torch's: the same code with
globals of its own. Tables without an "sdpa" class (git, superglue, gpt_neo, bark) stay as they are.
"""

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from ..ops.sdpa import scaled_dot_product_attention
from ._functions import with_globals

TABLES = {  # modeling file: table
    "sam.modeling_sam": "SAM_VISION_ATTENTION_CLASSES",
    "sam_hq.modeling_sam_hq": "SAM_HQ_VISION_ATTENTION_CLASSES",
    "data2vec.modeling_data2vec_vision": "DATA2VEC_VISION_SELF_ATTENTION_CLASSES",
    "unlimited_ocr.modeling_unlimited_ocr": "UNLIMITED_OCR_SAM_VISION_ATTENTION_CLASSES",
    "deepseek_ocr2.modeling_deepseek_ocr2": "DEEPSEEK_OCR2_SAM_VISION_ATTENTION_CLASSES",
    "falcon.modeling_falcon": "FALCON_ATTENTION_CLASSES",
}
_classes: dict[str, type] = {}


def extend(name: str) -> None:
    """Add `name` to the tables of the installed transformers. May be called again."""
    for path, table in TABLES.items():
        try:
            classes = getattr(importlib.import_module(f"transformers.models.{path}"), table)
        except (ImportError, AttributeError):  # another version: it calls the interface, or is not there
            continue
        if name not in classes and "sdpa" in classes:
            made = _attention_class(classes["sdpa"], name)
            classes[name] = _classes[made.__name__] = made


def extended(model: type) -> bool:
    """Whether a model's modeling file has a table with our class."""
    table = TABLES.get(model.__module__.removeprefix("transformers.models."), "")
    classes: dict[str, type] = getattr(sys.modules.get(model.__module__), table, {})
    return any(c.__name__ in _classes for c in classes.values())


def __getattr__(name: str) -> Any:
    """The classes, which pickled models name."""
    from .transformers import register

    if name not in _classes and not name.startswith("_"):
        register()
    if name in _classes:
        return _classes[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _attention_class(sdpa: Any, name: str) -> type:
    forward = with_globals(sdpa.forward, {"torch": _torch()}, {"sdpa": name})
    signature = inspect.signature(sdpa.forward)

    def served(self: Any, *args: Any, **kwargs: Any) -> Any:
        if signature.bind(self, *args, **kwargs).arguments.get("output_attentions"):
            raise NotImplementedError(
                "fastattn: output_attentions is not served, the weights are never formed; use attn_implementation='eager'"
            )
        rate = getattr(self, "dropout", 0.0)  # of SAM's layers, whose sdpa forward leaves it out
        if self.training and isinstance(rate, float) and rate > 0:
            raise NotImplementedError(
                f"fastattn: {type(self).__name__} drops no attention weights, and attention_dropout is {rate}; use "
                "attn_implementation='eager'"
            )
        return forward(self, *args, **kwargs)

    return type(f"Fastattn{sdpa.__name__}", (sdpa,), {"forward": served, "__module__": __name__})


def _torch() -> types.ModuleType:
    """The module torch, with one function of torch.nn.functional replaced."""

    def copied(module: types.ModuleType, **replaced: Any) -> types.ModuleType:
        made = types.ModuleType(module.__name__)
        made.__dict__.update(vars(module), **replaced)
        return made

    function: Callable = scaled_dot_product_attention
    functional = copied(torch.nn.functional, scaled_dot_product_attention=function)
    return copied(torch, nn=copied(torch.nn, functional=functional))
