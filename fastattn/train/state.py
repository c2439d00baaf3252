"""The one file a run resumes from: safetensors, with what is not a tensor as JSON in its header."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fastattn.runtime import files
from fastattn.train.data.tokenizer import Sample

STATE = "training.safetensors"
FORMAT = 1
_KEYS = {
    "step": int,
    "epoch": int,
    "position": int,
    "config": dict,
    "model": dict,
    "data": str,
    "threads": int,
}


def write_state(path: str | os.PathLike, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Writes the state, whole or not at all: an interrupted save leaves the last one."""
    files.write_tensors(path, tensors, {"fastattn_training": json.dumps({"format": FORMAT, **meta})})


def read_state(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, what is not a tensor); FileNotFoundError or ValueError saying what is wrong with the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; there is no run to resume")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("fastattn_training")
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: unreadable or only half written: {error}") from error
    if header is None:
        raise ValueError(f"{path}: is a safetensors file, but not the state of a training run")
    try:
        meta = files.parse_json(header)
    except ValueError as error:
        raise ValueError(f"{path}: its header is not JSON: {error}") from error
    check_state(path, tensors, meta)
    return tensors, meta


def check_state(path: Path, tensors: dict[str, torch.Tensor], meta: Any) -> None:
    """ValueError unless this version reads it and nothing of it is missing."""
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: its header is no JSON object")
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path}: has format {meta.get('format')}; this version reads {FORMAT}")
    for key, kind in _KEYS.items():
        if not isinstance(meta.get(key), kind):
            raise ValueError(f"{path}: its header lacks {key!r}")
    if "rng" not in tensors:
        raise ValueError(f"{path}: the tensor 'rng' is missing")


@contextlib.contextmanager
def read_from(path: Path) -> Iterator[None]:
    """A run is put together inside from what `path` holds: what does not fit is a ValueError that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: holds what no run writes: {error}") from error


def fingerprint(samples: list[Sample]) -> str:
    """A digest of the tokens, by which a resumed run knows its data again."""
    digest = hashlib.sha256()
    for tokens, prefix in samples:
        digest.update(np.array([len(tokens), prefix, *tokens], dtype=np.int64).tobytes())
    return digest.hexdigest()
