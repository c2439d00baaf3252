"""Printed functions as files in the user's cache folder, from which Triton compiles them.

A file's name is a digest of its text: it is written once, whole, and never changed. What is there is compared with the text before it is
imported.
"""

import hashlib
import tempfile
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from ...runtime.files import write_text
from ...runtime.tables import cache_dir
from ...runtime.triton import Constants, constants
from ..attention.scores import SCORES
from ..attention.triton_problem import score_values
from .printer import printed
from .program import OPS, read

_modules: dict[tuple[Path, str], ModuleType] = {}  # safe: found by all their text


class Functions(NamedTuple):
    """What the kernels run of one section, and the constants that it takes."""

    path: Path
    score: Constants  # SCORE of the kernels: softmax's, with the user's functions
    scatters: bool  # whether anything captured has a gradient
    numbers: tuple[float, ...]
    counts: tuple[int, ...]
    gathers: int  # loads of an element for each score
    reads_floats: bool
    reads_integers: bool


def functions(program: torch.Tensor, differentiated: bool) -> Functions:
    """Those of a program's score, or of its score and derivatives: where it has a mask, of every pair with the mask."""
    return _of_contents(
        program.detach().cpu().contiguous().numpy().tobytes(), differentiated, cache_dir() / "flex"
    )


@lru_cache(maxsize=256)
def _of_contents(contents: bytes, differentiated: bool, folder: Path) -> Functions:
    full, mixed, full_gradients, mixed_gradients = read(contents)
    section = (mixed_gradients or full_gradients) if differentiated else (mixed or full)
    if section is None or (section.slope == -1) is differentiated:
        what = "with derivatives" if differentiated else "of scores"
        raise ValueError(f"fastattn.flex_attention: program has no section {what}")
    made = printed(section)
    path, module = _imported(folder, made.text)
    user = {name: getattr(module, name, None) for name in ("user_score", "user_slope", "user_scatter")}
    score = constants(**score_values(SCORES["softmax"].code, False), **user)
    scatters = differentiated and bool(section.loads)
    names = {OPS[code] for code, *_ in section.instructions}
    reads = (not names.isdisjoint({f"load_{kind}", f"load_row_{kind}"}) for kind in "fi")
    return Functions(path, score, scatters, made.numbers, made.counts, made.gathers, *reads)


def _imported(folder: Path, text: str) -> tuple[Path, ModuleType]:
    digest = hashlib.sha256(text.encode()).hexdigest()[:24]
    path = _written(folder, digest, text)
    module = _modules.get((path, text))
    if module is None:
        module = ModuleType(f"fastattn_flex_{digest}")
        module.__file__ = str(path)
        exec(compile(text, str(path), "exec"), vars(module))  # this text; Triton reads the file for it too
        _modules[path, text] = module
    return path, module


def _written(folder: Path, digest: str, text: str) -> Path:
    path = folder / f"{digest}.py"
    if not _holds(path, text):
        try:
            write_text(path, text)
        except OSError:  # a folder that nothing can be written to
            path = _own_folder() / path.name
            write_text(path, text)
    return path


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


@lru_cache(maxsize=1)
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fastattn-flex-"))
