"""The Triton backend for CPU tensors by way of a device, so that tests that make CPU tensors run their kernels there."""

import dataclasses

import torch

from fastattn.runtime import registry as _registry


def moved(value, device):
    """A tensor, or those of a list, on the device with the strides and the surroundings that it has here."""
    if isinstance(value, (list, tuple)):
        values = [moved(v, device) for v in value]
        return type(value)(*values) if hasattr(value, "_fields") else values
    if not isinstance(value, torch.Tensor):
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    # a copy even where the device is this one
    there = whole.to(device, copy=True)
    there = there.as_strided(value.size(), value.stride(), value.storage_offset())
    return torch._neg_view(there) if value.is_neg() else there


def by_way_of(op, backend, device):
    """The backend, taking CPU tensors as well. What the op's schema says is written to is copied back."""
    schema = getattr(torch.ops.fastattn, op.name).default._schema
    written = [
        i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]

    def run(*args):
        there = moved(args, device)
        found = backend.run(*there)
        for i in written:
            args[i].copy_(there[i])
        if isinstance(found, torch.Tensor):
            return found.cpu()
        return None if found is None else tuple(t.cpu() for t in found)

    configure = backend.configure and (lambda *args: backend.configure(*moved(args, device)))
    return dataclasses.replace(backend, run=run, configure=configure, devices=("cuda", "cpu"))


def triton_on(device):
    return _registry.replaced(lambda op, b: by_way_of(op, b, device) if b.name == "triton" else b)
