"""Functions of other modules with some names meaning something else. The functions and their modules stay as they are."""

import inspect
import types
from typing import Any


def with_globals(function: Any, names: dict[str, Any], constants: dict[str, str] | None = None) -> Any:
    """A copy of `function`, and of what it wraps, with other globals for `names` and other string constants."""
    copied: dict[Any, types.FunctionType] = {}

    def copy(f: types.FunctionType) -> types.FunctionType:
        if f not in copied:
            inner = inspect.unwrap(f, stop=lambda g: g is not f)
            closure = f.__closure__
            if inner is not f and closure is not None:
                cells = ((c, c.cell_contents) for c in closure)
                closure = tuple(types.CellType(copy(x)) if x is inner else c for c, x in cells)
            scope = f.__globals__
            if any(name in f.__code__.co_names for name in names):
                scope = {**scope, **names}
            code = f.__code__
            if constants:
                code = code.replace(
                    co_consts=tuple(constants.get(c, c) if isinstance(c, str) else c for c in code.co_consts)
                )
            made = types.FunctionType(code, scope, f.__name__, f.__defaults__, closure)
            made.__kwdefaults__ = f.__kwdefaults__
            copied[f] = made
        return copied[f]

    return copy(function)
