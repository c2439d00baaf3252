"""What `import fastattn` means in a clone's root, where the folder `fastattn` is source without its compiled module: the
installed package, so that Python and compiled code are of one build."""

import importlib.util
import os
import sys
from collections.abc import MutableSequence
from importlib.machinery import PathFinder


def _use_installed(package: str, path: MutableSequence[str]) -> None:
    if importlib.util.find_spec(f"{package}._core") is not None:
        return
    here = os.path.realpath(path[0])
    for entry in sys.path:
        folder = os.path.join(entry, package)
        if os.path.realpath(folder) != here and PathFinder.find_spec(f"{package}._core", [folder]):
            path[:] = [os.path.abspath(folder)]
            return
    raise ImportError(
        f"{package}: {here} is source without its compiled module, and {sys.executable} has no installed {package}: "
        f"run `pip install .` in {os.path.dirname(here)}, or the Python of `make demo` and `make test`, .venv/bin/python"
    )


_use_installed(__package__, sys.modules[__package__].__path__)
