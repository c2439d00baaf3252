"""Weights as safetensors and configs as JSON: files are written whole, and errors in reading name what is wrong."""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..runtime.files import read_json, write_tensors, write_text

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# Names of files that other code saves a model in
FOREIGN = ("all_config.yaml", "step_*", "*.distcp", "*.pt", "*.pth", "*.bin")


_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CheckpointError(ValueError):
    """A checkpoint that is missing, unreadable, or does not fit the model."""


def save_json(path: str | os.PathLike, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_text(path, text)


def load_json(path: str | os.PathLike) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; a JSON object is needed")
    return value


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors to one safetensors file, see `files.write_tensors`."""
    write_tensors(path, tensors, {"format": "pt"})


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file, or the shards that an index beside it names, read one tensor at a time.

    Each read maps the file, copies one tensor and unmaps it, so that no more than the tensors asked for
    stays in memory.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """``path``: a file, or a folder with ``model.safetensors`` or its sharded form."""
        path = Path(path)
        self.path = path
        if path.is_dir():
            index = path / INDEX
            if (path / WEIGHTS).exists() or not index.exists():
                shards = [path / WEIGHTS]
            else:
                weight_map = load_json(index).get("weight_map")
                if not isinstance(weight_map, dict) or not all(
                    isinstance(f, str) for f in weight_map.values()
                ):
                    raise CheckpointError(f"{index}: weight_map must name a file for each tensor")
                shards = [path / name for name in sorted(set(weight_map.values()))]
        else:
            shards = [path]
        self._file_of = {
            name: shard for shard in shards for name in self._open(shard, lambda file: file.keys())
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, Tensor.clone)

    def read(self, name: str, use: Callable[[Tensor], Any]) -> Any:
        """`use` of the tensor as it lies in the file; it must keep no part of it."""
        return self._open(self._file_of[name], lambda file: use(file.get_tensor(name)))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self._file_of[name], lambda file: file.get_slice(name).get_shape()))

    @staticmethod
    def _open(path: Path, read: Callable[[Any], Any]) -> Any:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                return read(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: unreadable or only half written: {error}") from error


class TensorsInMemory(TensorFile):
    """Tensors that were read from ``path`` in another way."""

    def __init__(self, path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
        self.path = Path(path)
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, name: str, use: Callable[[Tensor], Any]) -> Any:
        return use(self._tensors[name])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)


def check_converted(directory: str | os.PathLike) -> None:
    """CheckpointError that says what to do with what a model's own training code saved."""
    path = Path(directory)
    if path.is_file():
        found = [path]
    elif (path / CONFIG).exists():
        return
    else:
        found = [file for pattern in FOREIGN for file in sorted(path.glob(pattern))]
    if found:
        raise CheckpointError(
            f"{path}: is no folder with {CONFIG} and {WEIGHTS}, but holds {found[0].name}: `fastattn convert {path} "
            "FOLDER` makes one of what HRM's, TRM's and HRM-Text's own code saves"
        )


Model = TypeVar("Model", bound=nn.Module)
Source = tuple[str, ...]  # names of the file's tensors; concatenated along dim 0 they are one of the model's


def resolve(
    wanted: Mapping[str, Sequence[Source]],
    file: TensorFile,
    ignored: Callable[[str], bool] = lambda name: False,
) -> dict[str, Source]:
    """Finds each of the model's tensors in a file.

    Args:
        wanted: for each name of the model, the layouts it may have in a file, the usual one first.
        ignored: tensors that the model has no use for; all other surplus names are an error.

    ``_orig_mod.`` (left by ``torch.compile``) is dropped from the file's names before they are compared.
    """
    in_file = {name.replace("_orig_mod.", ""): name for name in file}
    sources: dict[str, Source] = {}
    missing: list[str] = []
    for name, layouts in wanted.items():
        layout = next((layout for layout in layouts if all(part in in_file for part in layout)), None)
        if layout is None:
            missing += layouts[0]
        else:
            sources[name] = tuple(in_file[part] for part in layout)
    used = {part for source in sources.values() for part in source}
    unexpected = [name for plain, name in in_file.items() if name not in used and not ignored(plain)]
    if missing or unexpected:
        lists = [
            f"{len(names)} {title}: {', '.join(sorted(names))}"
            for title, names in (("missing", set(missing)), ("unexpected", set(unexpected)))
            if names
        ]
        raise CheckpointError(f"{file.path}: the tensors do not fit the model; {'; '.join(lists)}")
    return sources


def on_meta(make: Callable[[], Model], layers: int, file: TensorFile) -> Model:
    """The model that `make` builds, on the meta device.

    Raises CheckpointError where no model can have the shape of its config, and where the config has more `layers` than the file
    has tensors, as such a model would take long to build.
    """
    if layers > len(file):
        raise CheckpointError(
            f"{file.path}: the tensors do not fit the model; its config has {layers} layers, the file {len(file)} tensors"
        )
    try:
        with torch.device("meta"):
            return make()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file.path}: no model can have the shape of its config: {error}") from error


def fill(
    model: nn.Module,
    file: TensorFile,
    sources: Mapping[str, Source],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Puts the file's tensors in the place of the model's (which may be on ``meta``), one at a time.

    ``sources``: from :func:`resolve`, by names of the state dict. ``dtype`` None keeps the file's.
    """
    if dtype is not None and dtype not in _FLOATING:
        raise TypeError(f"from_pretrained: dtype is {dtype!r}; it must be None or one of {_FLOATING}")
    for name, expected in model.state_dict().items():
        tensor = _joined(file, sources[name])
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"{file.path}: {' + '.join(sources[name])} has shape {tuple(tensor.shape)}; "
                f"the config makes it {tuple(expected.shape)}"
            )
        floating = expected.is_floating_point()
        if tensor.is_floating_point() != floating or (floating and (dtype or tensor.dtype) not in _FLOATING):
            raise CheckpointError(
                f"{file.path}: {' + '.join(sources[name])} is {tensor.dtype}, which the model does not compute in"
            )
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        parameter = module._parameters.get(leaf)
        if parameter is not None:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        else:
            module._buffers[leaf] = tensor


def check_one_dtype(model: nn.Module, directory: str | os.PathLike) -> None:
    """The weights that were read are of one dtype."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{directory}: the weights mix {sorted(map(str, dtypes))}; give dtype= to convert them to one"
        )


def _joined(file: TensorFile, names: Source) -> Tensor:
    """The file's tensors, concatenated along dim 0; each is copied once."""
    if len(names) == 1:
        return file[names[0]]
    shapes = [file.shape(name) for name in names]
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        raise CheckpointError(
            f"{file.path}: {' + '.join(names)} have shapes {shapes}; they must fit together along dim 0"
        )
    ends = list(itertools.accumulate(shape[0] for shape in shapes))
    joined = file.read(names[0], lambda first: first.new_empty(ends[-1], *shapes[0][1:]))
    for name, begin, end in zip(names, [0, *ends[:-1]], ends, strict=True):
        rows = joined[begin:end]

        def copy(part: Tensor, name: str = name, rows: Tensor = rows) -> None:
            if part.dtype != rows.dtype:
                raise CheckpointError(f"{file.path}: {names[0]} is {rows.dtype}, {name} {part.dtype}")
            rows.copy_(part)

        file.read(name, copy)
    return joined
