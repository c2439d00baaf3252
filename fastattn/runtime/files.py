"""Files that appear whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on leaving without an error that file takes `path`'s place.

    Until then, and after any error, an earlier file at `path` is untouched. The bytes are on disk before the
    rename, so a power cut leaves the old file or the new one.
    """
    path = Path(path)
    # a rename would replace the device by a file
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{path}: is a device or a pipe; a file is needed")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(path: str | os.PathLike) -> None:
    """Make the folder `path` if it does not exist. Raises ValueError if no file can be created in it."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; a folder is needed")
    if not is_unicode(str(path)):
        raise ValueError(f"{path}: is not UTF-8; safetensors could not read files in it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{path}: nothing can be written there: {error.strerror}") from error


def parse_json(text: str | bytes) -> Any:
    """json.loads, which raises ValueError for every bad text, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: str | os.PathLike) -> Any:
    """The value in a UTF-8 JSON file. Raises FileNotFoundError, or ValueError naming the file."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_char_device() or path.is_block_device():  # may have no end
        raise ValueError(f"{path}: is a device; a file is needed")
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8. False for lone surrogates, which come from JSON escapes or undecodable bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as UTF-8 to `path`, whole or not at all. Lone surrogates, as in a file name that is not UTF-8, are written as escapes."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, whole or not at all. Equal tensors give equal bytes; tensors that share memory are written
    separately. Raises OSError if the file cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        memory = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    with replacing(path) as temporary:
        try:
            save_file(ready, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error


def _umask() -> int:
    value = os.umask(0)  # the only way to read it is to set it
    os.umask(value)
    return value
