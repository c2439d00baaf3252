"""Training by several processes: FSDP2 around the model, DCP for the state, each batch split among the ranks."""

import hashlib
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastattn.models import HrmText
from fastattn.train.data.packing import IGNORED, Batch
from fastattn.train.state import FORMAT, STATE, check_state, read_state

_META = "meta"  # the state's JSON, as bytes, among its tensors


def launched() -> bool:
    """Whether this process is one that torchrun started."""
    return dist.is_available() and dist.is_torchelastic_launched()


def start() -> None:
    """Joins the other processes of torchrun, with the same tuned tables."""
    from fastattn.distributed import sync_tables

    dist.init_process_group("gloo")
    sync_tables(device="cpu")


def first() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return dist.get_rank() == 0


def leave() -> None:
    """Parts from the other processes once all have come here: the model is written then."""
    dist.barrier()
    dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """Ends this process at once: gloo's threads live on, and one that is busy aborts an interpreter that finalises."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def shard(model: nn.Module) -> None:
    """Splits the parameters among the ranks; gradients are summed over them.

    One group for the whole model: a stack is called many times a step, and a group of its own would be reduced
    after each of those calls. Gathered once a step, kept from forward to backward.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), reshard_after_forward=False)
    model.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    model.set_gradient_divide_factor(1.0)


def split(batch: Batch) -> Batch:
    """This rank's samples of a packed batch. Every rank has to run: one without a sample gets the first, its labels
    ignored."""
    ends = batch.cu_seqlens.tolist()
    count = len(ends) - 1
    mine = range(dist.get_rank(), count, dist.get_world_size())
    chosen = list(mine) or [0]
    rows = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in chosen])
    lengths = torch.tensor([0] + [ends[i + 1] - ends[i] for i in chosen])
    labels = batch.labels[:, rows]
    return Batch(
        input_ids=batch.input_ids[:, rows],
        labels=labels if mine else torch.full_like(labels, IGNORED),
        cu_seqlens=lengths.cumsum(0).int(),
        prompt_lengths=batch.prompt_lengths[chosen],
    )


def check_same(text: str, what: str) -> None:
    """ValueError on every rank unless all give the same text."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    highest, lowest = torch.tensor(number), torch.tensor(-number)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    dist.all_reduce(lowest, dist.ReduceOp.MAX)
    if highest != -lowest:
        raise ValueError(f"train: the processes were given different {what}")


def summed(value: Tensor) -> Tensor:
    """The sum over the ranks."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def all_rows(value: Tensor) -> Tensor:
    """The rows of every rank, which tensor_split gave them; every rank has to call it."""
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(value)))
    longest = max(int(count) for count in counts)
    padded = value.new_zeros(longest, *value.shape[1:])
    padded[: len(value)] = value
    every = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(every, padded)
    return torch.cat([rows[: int(count)] for rows, count in zip(every, counts, strict=True)])


def any_rank(flag: bool) -> bool:
    """Whether it holds on some rank."""
    return bool(summed(torch.tensor(float(flag))) > 0)


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors of sharded ones; every rank has to call it."""
    from torch.distributed.tensor import DTensor

    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def save_whole(model: HrmText, folder: Path) -> None:
    """The first rank writes the whole model; every rank has to call it."""
    whole = full(model.state_dict())
    if first():
        with torch.device("meta"):
            plain = HrmText(model.config)
        plain.load_state_dict(whole, assign=True)
        plain.save_pretrained(folder)


def write_sharded_state(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Each rank writes its shards, as safetensors; the folder ``training-<step>.dcp`` appears once they are complete,
    and other states go."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    path = folder / f"training-{meta['step']}.dcp"
    if path.exists():
        return
    temporary = folder / f".{path.name}.tmp"
    header = torch.frombuffer(bytearray(json.dumps({"format": FORMAT, **meta}).encode()), dtype=torch.uint8)
    ready = {name: tensor.detach() for name, tensor in tensors.items()} | {_META: header}
    if first():
        shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted save left
    dist.barrier()
    save(ready, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    if first():
        temporary.rename(path)
        drop_states(folder, keep=path)


def read_sharded_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The whole tensors, whatever number of ranks wrote them, and the meta data."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    reader = HuggingFaceStorageReader(str(path))
    try:
        known = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in known.items()
        }
        for name, entry in known.items():
            if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
                raise ValueError(f"a part of {name} is missing")
        with warnings.catch_warnings():
            # each process reads the whole state for itself
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(tensors, storage_reader=reader, no_dist=True)
        meta = json.loads(bytes(tensors.pop(_META).numpy()))
    except Exception as error:  # DCP wraps what goes wrong in types of its own
        raise ValueError(f"{path}: unreadable or only half written: {error}") from error
    check_state(path, tensors, meta)
    return tensors, meta


def newest_state(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The furthest state in the folder, from one process or several: (its path, whole tensors, meta)."""
    found = [(path, *read_sharded_state(path)) for path in _sharded_states(folder)[-1:]]
    if (folder / STATE).exists() or not found:
        found.append((folder / STATE, *read_state(folder / STATE)))
    return max(found, key=lambda state: state[2]["step"])


def has_state(folder: Path) -> bool:
    """Whether a run can be resumed from the folder."""
    return (folder / STATE).exists() or bool(_sharded_states(folder))


def drop_states(folder: Path, keep: Path) -> None:
    """Removes the states of other steps and of the other kind."""
    for path in {folder / STATE, *folder.glob("training-*.dcp")} - {keep}:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sharded_states(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("training-*.dcp"), key=lambda path: int(path.stem.partition("-")[2]))
