"""The CPU's product with a packed operand, shared by several ops."""

from collections.abc import Mapping

import torch

from ...runtime import device, native
from ...runtime.tuning import Value
from . import tuning


def pack(source: torch.Tensor, *, transposed: bool = False, parts: int = 1) -> torch.Tensor:
    """Pack source (columns, steps), or (steps, columns) when transposed, into the kernel's layout. Products contract steps."""
    options = {
        "source": source,
        "transposed": int(transposed),
        "parts": parts,
        "threads": native.threads(),
    }
    size = torch.zeros(1, dtype=torch.int64)
    native.run("pack", bytes=size, **options)
    packed = torch.empty(int(size), dtype=torch.uint8)
    native.run("pack", packed=packed, **options)
    return packed


def run(
    blocks: Mapping[str, Value], x: torch.Tensor, packed: torch.Tensor, out: torch.Tensor, **fields: object
) -> None:
    """Run the kernel with these block sizes; x and `fields` are as in LinearParams of src/cpu/params.h."""
    native.run("linear", x=x, packed=packed, out=out, threads=native.threads(), **blocks, **fields)


def product(
    out: torch.Tensor, a: torch.Tensor, packed: torch.Tensor, *, transposed: bool = False, add: bool = False
) -> None:
    """out (M, N) = a B, or out += a B: a (M, K), or (K, M) when transposed; out has a's dtype or is float32."""
    blocks = tuning.default_blocks(str(a.dtype).removeprefix("torch."), device.target("cpu"))
    a = native.rows(a) if transposed else native.rows(a)[:, None]
    run(blocks, a, packed, out, transposed=int(transposed), residual=out if add else None)
