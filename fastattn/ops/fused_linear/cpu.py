"""Fused products on the CPU: our kernel on packed weights, or torch's product between row kernels."""

from collections.abc import Mapping

import torch

from ...runtime import device, native
from ...runtime import tuning as _tuning
from ...runtime.contents import ContentsCache
from ..rowwise import cpu as rows
from . import (
    library,
    packed,
    tuning,  # noqa: F401  declares what `_tuning.lookup` serves
)

# a quarter of the memory; a recurrence whose weights do not fit packs each of them again in every call
_packed = ContentsCache(entries=4096, capacity=max(1 << 29, device.memory_bytes() // 4))


def refusal(first: torch.Tensor, *_) -> str | None:
    """Why the CPU kernels cannot serve a call with this first member, or None."""
    return native.unserved_dtype(first)


def configure(x, weight, *_) -> _tuning.Choice:
    return _lookup("fused_linear", x, weight)


def configure_backward(grad, x, weight, *_) -> _tuning.Choice:
    return _lookup("fused_linear_backward", x, weight)


def _lookup(name: str, x: torch.Tensor, weight: torch.Tensor) -> _tuning.Choice:
    return _tuning.lookup(
        name,
        "cpu",
        structural={"dtype": str(x.dtype).removeprefix("torch.")},
        sizes={
            "rows": x.numel() // weight.shape[1],
            "inputs": weight.shape[1],
            "outputs": weight.shape[0],
        },
        device="cpu",
    )


def _packed_weight(weight: torch.Tensor, *, transposed: bool, parts: int = 1) -> torch.Tensor:
    if not weight.is_contiguous():
        return packed.pack(weight.contiguous(), transposed=transposed, parts=parts)
    key = (transposed, parts, native.cpu_isa())
    return _packed.get(weight, key, lambda: packed.pack(weight, transposed=transposed, parts=parts))


def _run(
    config: Mapping[str, int | str], x: torch.Tensor, operand: torch.Tensor, out: torch.Tensor, **fields
):
    packed.run(
        {name: value for name, value in config.items() if name != "product"}, x, operand, out, **fields
    )


def fused_linear(x, weight, gate, residual, eps, swiglu, save):
    lead = x.shape[:-1] if gate is None else x.shape[:-2]
    columns = weight.shape[0]
    out = x.new_empty(*lead, columns // 2 if swiglu else columns)
    product = x.new_empty((*lead, columns) if swiglu and save else (0,))
    config = _lookup("fused_linear", x, weight).values
    if out.numel() == 0:
        return out, product, x.new_empty(lead if eps is not None else (0,), dtype=torch.float32)
    if config["product"] == "library":
        return library.forward(rows, x, weight, gate, residual, eps, swiglu, save, out, product)
    rstd = x.new_empty(lead if eps is not None else (0,), dtype=torch.float32)
    split = x.dim() <= 4 and gate is not None
    rows4 = (
        native.rows(x)
        if split
        else library.flat(x if gate is None else rows.gated(x, gate).flatten(-2))[:, None]
    )
    _run(
        config,
        rows4,
        _packed_weight(weight, transposed=False, parts=2 if swiglu else 1),
        library.flat(out),
        gate=native.rows(gate) if split else None,
        residual=None if residual is None else library.flat(residual),
        product=library.flat(product) if product.numel() else None,
        rstd=rstd.view(-1) if eps is not None else None,
        eps=eps,
        norm=int(eps is not None),
        gated_up=int(swiglu),
    )
    return out, product, rstd


def fused_linear_backward(grad, x, weight, *options):
    config = _lookup("fused_linear_backward", x, weight).values

    def weight_gradient(grad, a, out):
        _run(config, grad, packed.pack(a, transposed=True), out, transposed=1)

    def operand_gradient(grad, weight, out):
        _run(config, grad[:, None], _packed_weight(weight, transposed=True), out)

    products = () if config["product"] == "library" else (weight_gradient, operand_gradient)
    return library.backward(rows, grad, x, weight, *options, *products)
