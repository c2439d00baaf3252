"""Checkpoints of HRM's, TRM's and HRM-Text's own training code: read without running what they hold, written as safetensors."""

import enum
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime import plain_yaml
from ..runtime.files import read_json
from .checkpoint import CONFIG, FOREIGN, CheckpointError, TensorFile, TensorsInMemory
from .hrm import Hrm
from .hrm_config import HrmConfig
from .hrm_text import HrmText, _counted_by_stack
from .hrm_text_config import HrmTextConfig

_STEP = re.compile(r"step_(\d+)")


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    data: str | os.PathLike | None = None,
    seq_len: int | None = None,
    num_puzzles: int | None = None,
) -> list[str]:
    """Writes config.json and model.safetensors into the folder ``output``; returns what there is to say, a line each.

    Args:
        source: a torch.save'd file, a folder with such files (the one of the latest step is taken), a DCP folder, or one with
            safetensors files. Files are read with ``weights_only``.
        config: YAML or JSON file: the arch keys of HRM or TRM, by themselves or under ``arch``, or HrmTextConfig's. Default:
            all_config.yaml or config.json beside the weights.
        data: folder of puzzles that the model was or will be trained on, which gives seq_len and num_puzzles.
        seq_len: cells of a puzzle, where neither the weights nor ``data`` tell.
        num_puzzles: puzzle identifiers of the new model. Where it is not the file's, every puzzle starts at the mean of the
            file's vectors, as in TRM's code.

    Raises:
        CheckpointError: a file that is not there, holds more than tensors, or does not fit.
    """
    path = _weights(Path(source))
    tensors, lines = _read(path), [f"read {path}"]
    values = _config(path if path.is_dir() else path.parent, config)
    tensors, inner = _own(tensors, path)
    if not inner:
        model: Hrm | HrmText = _text(path, tensors, values)
    else:
        model, said = _puzzles(path, tensors, values, data, seq_len, num_puzzles)
        lines += said
    model.save_pretrained(output)
    tokenizer = (path if path.is_dir() else path.parent) / "tokenizer.json"
    if not inner and tokenizer.is_file():
        shutil.copyfile(tokenizer, Path(output) / tokenizer.name)
    count = sum(p.numel() for p in model.parameters())
    return [*lines, f"wrote {output}: {type(model).__name__}, {count:,} parameters"]


def resized(weights: Tensor, count: int) -> Tensor:
    """Vectors for another number of puzzles: each the mean of those there are."""
    return weights.mean(0, keepdim=True).expand(count, -1).contiguous()


def _weights(source: Path) -> Path:
    """The file or folder that holds the weights."""
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder")
    if source.is_file():
        return source
    if (source / ".metadata").exists() or list(source.glob("*.safetensors")):
        return source
    steps = [file for file in source.iterdir() if _STEP.fullmatch(file.stem)]
    found = [*sorted(steps, key=lambda file: int(_STEP.fullmatch(file.stem)[1]))[-1:]]  # type: ignore[index]
    for pattern in FOREIGN[3:] if not found else ():
        found += sorted(source.glob(pattern))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(f"{source}: must hold step_N files, or one file of weights; it holds {names}")
    return _weights(found[0])


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir() and (path / ".metadata").exists():
        return _read_dcp(path)
    if path.is_dir() or path.suffix == ".safetensors":
        file = TensorFile(path)
        return {name: file[name] for name in file}
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"needs {wanted[1]}" if wanted else "is no torch.save'd file, or only half of one"
        raise CheckpointError(
            f"{path}: {what}; only files of tensors are read, as others run code: save model.state_dict() alone"
        ) from None
    except Exception as error:  # of bytes that are no pickle anything comes
        raise CheckpointError(f"{path}: unreadable or only half written: {error!r}") from error
    return _flat(value, path)


def _flat(value: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of nested dicts by their names, joined by dots."""
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; a dict of tensors is needed")
    tensors: dict[str, Tensor] = {}
    for name, item in value.items():
        if isinstance(item, Tensor):
            tensors[str(name)] = item
        elif isinstance(item, Mapping):
            tensors |= {f"{name}.{rest}": tensor for rest, tensor in _flat(item, path).items()}
    return tensors


# What the metadata of a DCP folder is made of; pickle imports nothing else.
_DCP_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


def _enum_member(of: Any, name: Any) -> Any:
    """Stands for the getattr by which Python 3.11.3 and before pickle a member of an enum: it finds nothing else."""
    if isinstance(of, type) and issubclass(of, enum.Enum) and name in of.__members__:
        return of[name]
    raise pickle.UnpicklingError(f"it holds getattr of {name!r}")


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _DCP_NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _read_dcp(path: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(path / ".metadata", "rb") as file:
                return _Metadata(file).load()

    try:
        reader = Reader(str(path))
        entries = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(tensors, storage_reader=reader, no_dist=True)
    except Exception as error:  # DCP wraps what goes wrong in types of its own
        raise CheckpointError(f"{path}: unreadable or only half written: {error}") from error
    return tensors


def _config(folder: Path, given: str | os.PathLike | None) -> dict[str, Any]:
    """The keys of the model's config, or {} where there is no file."""
    if given is None:
        known = [folder / name for name in ("all_config.yaml", CONFIG)]
        path = next((file for file in known if file.is_file()), None)
        if path is None:
            return {}
    else:
        path = Path(given)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
    try:
        values = (
            read_json(path) if path.suffix == ".json" else plain_yaml.parse(path.read_text(encoding="utf-8"))
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold keys and values")
    return values


def _own(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], bool]:
    """(the model's tensors without what wrappers put before their names, whether it is HRM or TRM)."""
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    for end, keep, inner in (
        ("inner.H_init", "model.", True),
        ("model.zL_init", "", False),
        ("model.z_L_init", "", False),
    ):
        names = [name for name in plain if name.endswith(end)]
        if names:
            before = names[0].removesuffix(end)
            return {
                keep + name.removeprefix(before): tensor
                for name, tensor in plain.items()
                if name.startswith(before)
            }, inner
    raise CheckpointError(f"{path}: holds neither HRM or TRM (inner.H_init) nor HRM-Text (model.zL_init)")


def _text(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> HrmText:
    if not values:
        raise CheckpointError(
            f"{path}: {CONFIG} with HrmTextConfig keys is not beside it; name a file of them (config)"
        )
    if "arch" in values:
        raise CheckpointError(
            f"{path}: HRM-Text's own arch keys are not read; name a file of HrmTextConfig keys (config)"
        )
    file = TensorsInMemory(path, tensors)
    try:
        shape = HrmTextConfig.from_dict({"vocab_size": len(tensors["lm_head.weight"])} | values)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return HrmText._from_file(_counted_by_stack(shape, file), file)


def _puzzles(
    path: Path,
    tensors: dict[str, Tensor],
    values: dict[str, Any],
    data: str | os.PathLike | None,
    seq_len: int | None,
    num_puzzles: int | None,
) -> tuple[Hrm, list[str]]:
    arch = values.get("arch", values)
    if not isinstance(arch, dict) or not arch:
        raise CheckpointError(f"{path}: all_config.yaml is not beside it; name a file of arch keys (config)")
    prefix, lines = "model.inner.", []
    arch = dict(arch)
    if f"{prefix}embed_tokens.embedding_weight" in tensors:
        arch["vocab_size"] = len(tensors[f"{prefix}embed_tokens.embedding_weight"])
    vectors = tensors.get(f"{prefix}puzzle_emb.weights")
    folder = _data(values, data)
    if vectors is not None:
        if num_puzzles is None:
            num_puzzles = folder.get("num_puzzle_identifiers") if data is not None else None
        count = len(vectors) if num_puzzles is None else num_puzzles
        if count != len(vectors):
            tensors = tensors | {f"{prefix}puzzle_emb.weights": resized(vectors, count)}
            lines.append(
                f"{count} puzzles in place of {len(vectors)}: each starts at the mean of their vectors"
            )
        arch.pop("num_puzzles", None)
        arch["num_puzzle_identifiers"] = count
    elif num_puzzles is not None:
        raise CheckpointError(f"{path}: has no puzzle vectors, so num_puzzles is not for it")
    arch["seq_len"] = _seq_len(path, arch, tensors, prefix, seq_len, folder)
    try:
        shape = HrmConfig.from_dict(arch)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Hrm._from_file(shape, TensorsInMemory(path, tensors)), lines


def _data(values: dict[str, Any], data: str | os.PathLike | None) -> dict[str, Any]:
    """dataset.json of the folder of puzzles: the one given, else the one that all_config.yaml names, where it is here."""
    if data is not None:
        return dict(read_json(Path(data) / "train" / "dataset.json"))
    named = values.get("data_paths") or values.get("data_path") or []
    for folder in named if isinstance(named, list) else [named]:
        path = Path(str(folder)) / "train" / "dataset.json"
        if path.is_file():
            return dict(read_json(path))
    return {}


def _seq_len(
    path: Path,
    arch: dict[str, Any],
    tensors: dict[str, Tensor],
    prefix: str,
    given: int | None,
    folder: dict[str, Any],
) -> int:
    known = given or arch.get("seq_len") or folder.get("seq_len")
    for name, dim in (("embed_pos.embedding_weight", 0), ("L_level.layers.0.mlp_t.down_proj.weight", 0)):
        tensor = tensors.get(prefix + name)
        if tensor is not None and not known:
            try:
                before = HrmConfig.from_dict({**arch, "seq_len": 1, "mlp_t": False}).puzzle_len
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{path}: {error}") from error
            known = tensor.shape[dim] - before
    if not known:
        raise CheckpointError(
            f"{path}: neither its weights nor its config tell the cells of a puzzle: give seq_len (Sudoku: 81, mazes "
            "and ARC: 900) or the folder of puzzles (data)"
        )
    return known
