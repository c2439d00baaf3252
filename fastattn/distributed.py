"""Ranks of one job launch with the same configurations."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

import torch
import torch.distributed as dist

from fastattn.runtime import device as _device
from fastattn.runtime import tables, tuning

logger = logging.getLogger("fastattn")


def sync_tables(group: Any = None, device: torch.device | str | None = None) -> bool:
    """Make every rank of a process group use the same tuned table; returns whether they already did.

    All ranks of the group (default: the world) call this once, after init_process_group and before the first
    kernel, whatever their caches hold. One all-gather compares hashes of the table that is in effect for
    `device` (default: the current GPU, else the CPU). Where they differ, the table of the group's first rank is
    broadcast, and every rank uses it in place of its files until the process ends. A rank that differed logs it.

    Raises RuntimeError where torch.distributed is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "fastattn.distributed.sync_tables: call torch.distributed.init_process_group first"
        )
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    target = _device.target(device)
    text = json.dumps(tables.effective(target), sort_keys=True).encode()
    carrier = _carrier(group)
    digest = torch.frombuffer(bytearray(hashlib.sha256(text).digest()), dtype=torch.uint8)  # (32,)
    record = torch.cat([digest, _bytes_of(len(text))]).to(carrier)  # (40,): hash, then length
    every = [torch.empty_like(record) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, record, group=group)
    rows = [row.cpu() for row in every]
    if all(torch.equal(row[:32], rows[0][:32]) for row in rows):
        return True

    length = int(rows[0][32:].view(torch.int64))
    first = dist.get_group_rank(group, dist.get_rank()) == 0 if group is not None else dist.get_rank() == 0
    data = torch.empty(length, dtype=torch.uint8, device=carrier)
    if first:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(carrier)
    source = dist.get_global_rank(group, 0) if group is not None else 0
    dist.broadcast(data, src=source, group=group)
    table = json.loads(bytes(data.cpu().numpy()).decode())
    if not torch.equal(rows[0][:32], digest):
        logger.warning("tuned tables differ between ranks: using rank %d's", source)
    tuning.install(target, table)
    return False


def _carrier(group: Any) -> torch.device:
    """Where a group's collectives take their tensors."""
    backend = dist.get_backend(group)
    if "gloo" in backend or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _bytes_of(number: int) -> torch.Tensor:
    return torch.tensor([number], dtype=torch.int64).view(torch.uint8)
