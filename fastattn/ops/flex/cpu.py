"""flex_attention and score_attention on the CPU: the kernels of attention, which run a program on their scores."""

import struct
from collections.abc import Mapping
from functools import lru_cache

import torch

from ...masks import unserved_lists
from ...runtime import native
from ...runtime import tuning as _tuning
from ..attention.cpu import (
    gradient_fields,
    lookup,
    mask_fields,
    outputs,
    plane,
    tile_classes,
    transposed_lists,
    unserved,
    unserved_blocks,
)
from ..attention.scores import SCORES
from .checks import WANTS_TABLES, has_rest
from .prepare import EMPTY, FULL, MIXED, TILE
from .program import HEADER, SECTIONS, read

_SOFTMAX = SCORES["softmax"].code
_GIVEN, _SUMMED = (
    3,
    4,
)  # src/cpu/attention_score.h: a program's weights, as they are and divided by their row sum
_VERSION = 1
_MOST_COPIES = 256 << 20  # bytes of tables' gradients that are summed apart


def refusal(q, k, v, *rest) -> str | None:
    """Why the CPU kernel cannot serve this call, whose mask is the last member, or None."""
    return unserved(q, k, v) or unserved_blocks(rest[-1])


def refusal_backward(grad_out, grad_lse, q, k, v, *rest) -> str | None:
    return refusal(q, k, v, *rest[:-1])


def configure(q, k, v, *_) -> _tuning.Choice:
    return lookup("attention", q, k, v, score="softmax")


def configure_backward(grad_out, grad_lse, q, k, v, *_) -> _tuning.Choice:
    return lookup("attention_backward", q, k, v, score="softmax")


@lru_cache(maxsize=256)
def _words(contents: bytes) -> tuple[torch.Tensor | None, ...]:
    """A program's sections as the kernels take them (src/cpu/score_program.h): int32, constants as bits of float32."""
    words = struct.unpack(f"<{len(contents) // 8}q", contents)
    result: list[torch.Tensor | None] = []
    for offset, section in zip(words[:SECTIONS], read(contents), strict=True):
        if section is None:
            result.append(None)
            continue
        instructions, scalars, vectors, score, slope, loads, floats, integers = words[
            offset : offset + HEADER
        ]
        constants = struct.unpack(f"<{floats}i", struct.pack(f"<{floats}f", *map(_single, section.floats)))
        rest = words[
            offset + HEADER + floats : offset + HEADER + floats + integers + 2 * loads + 5 * instructions
        ]
        header = (_VERSION, instructions, scalars, vectors, score, slope, loads, floats + integers)
        result.append(torch.tensor([*header, *constants, *rest], dtype=torch.int32))
    return tuple(result)


def _single(x: float) -> float:
    """x as float32: infinite where it is too large."""
    return torch.tensor(x, dtype=torch.float64).float().item()


def _coarser(classes: torch.Tensor, axis: int, block: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(least, most) of what tiles of `block` cover of those of TILE along an axis, where MIXED is from 0 to 1."""
    tiles = -(-length // block)
    if not tiles:
        return classes, classes
    numbers = torch.arange(tiles)
    steps = int((((numbers + 1) * block - 1).clamp(max=length - 1) // TILE - numbers * block // TILE).max())
    numbers = torch.arange(tiles, device=classes.device)  # made there: a copy would wait for the device
    first = numbers * block // TILE
    last = ((numbers + 1) * block - 1).clamp(max=length - 1) // TILE
    low = torch.where(classes == FULL, 1, 0).to(torch.uint8)
    high = torch.where(classes == EMPTY, 0, 1).to(torch.uint8)
    least, most = low.index_select(axis, first), high.index_select(axis, first)
    for step in range(1, steps + 1):
        where = torch.minimum(first + step, last)
        least = torch.minimum(least, low.index_select(axis, where))
        most = torch.maximum(most, high.index_select(axis, where))
    return least, most


def kernel_classes(classes: torch.Tensor, config: Mapping[str, int], queries: int, keys: int) -> torch.Tensor:
    """Classes of the kernel's own tiles."""
    for axis, block, length in ((2, config["block_q"], queries), (3, config["block_k"], keys)):
        least, most = _coarser(classes, axis, block, length)
        classes = torch.where(least == 1, FULL, torch.where(most == 0, EMPTY, MIXED)).to(torch.uint8)
    return classes


def _call(
    name: str,
    config: _tuning.Choice,
    gradients: bool,
    q,
    k,
    v,
    tables,
    indices,
    program,
    classes,
    scale,
    mask,
    **tensors,
) -> None:
    fields = mask_fields(q, k, mask)
    sections = _words(program.contiguous().numpy().tobytes())
    full, mixed = sections[2:] if gradients else sections[:2]
    if full is None or (gradients and int(full[5]) == -1):
        what = "with derivatives" if gradients else "of scores"
        raise ValueError(f"fastattn: program has no section {what}")
    shape = (*q.shape[:2], q.shape[2], k.shape[2])
    found = None
    # tiles of packed documents start at each document, and those of lists where blocks do, not where these do
    if mask.cu_seqlens_q is None and mask.list_offsets is None and k.shape[2]:
        if mixed is not None and classes is not None:
            found = kernel_classes(classes, config.values, *shape[2:])
        if mask.dense is not None and mask.dense.numel():
            dense = plane(mask.dense, shape)
            once = dense[tuple(slice(1 if dense.stride(dim) == 0 else None) for dim in (0, 1))]
            of_dense = tile_classes(once, config.values)
            found = of_dense if found is None and mixed is None else _both(found, of_dense)
    if found is not None:
        fields["tile_class"] = found.expand(*shape[:2], *found.shape[2:])
    native.run(
        name,
        q=native.rows(q),
        k=native.rows(k),
        v=native.rows(v),
        program=full,
        masked_program=mixed,
        tables=tables if tables is not None and tables.numel() else None,
        indices=indices if indices is not None and indices.numel() else None,
        scale=scale,
        threads=native.threads(),
        **fields,
        **config.values,
        **tensors,
    )


def _both(classes: torch.Tensor | None, of_dense: torch.Tensor) -> torch.Tensor:
    """Classes of two masks together; None: nothing is known of the first."""
    if classes is None:
        return torch.where(of_dense == EMPTY, EMPTY, MIXED).to(torch.uint8)
    nothing = (classes == EMPTY) | (of_dense == EMPTY)
    everything = (classes == FULL) & (of_dense == FULL)
    return torch.where(nothing, EMPTY, torch.where(everything, FULL, MIXED)).to(torch.uint8)


def flex_attention(*members):
    return flex_attention_leading(4, *members)


def flex_attention_leading(reads, q, k, v, *rest):
    """(out, lse, state, residual), or the first `reads` of them."""
    results, filled = outputs(reads, q, v, _SOFTMAX)
    if results[0].numel():
        _call("attention_forward", configure(q, k, v), False, q, k, v, *rest, **filled)
    return tuple(results)


def flex_attention_backward(grad_out, grad_lse, q, k, v, tables, out, lse, state, residual, *rest):
    *rest, wanted = rest
    decode_rows = configure(q, k, v).values["decode_rows"]
    fields = gradient_fields(grad_out, grad_lse, q, k, v, out, lse, state, residual, decode_rows)
    config = configure_backward(grad_out, grad_lse, q, k, v)
    return _gradients(config, fields, wanted, q, k, v, tables, *rest)


def _gradients(config: _tuning.Choice, fields: dict, wanted: int, q, k, v, tables, *rest):
    """Of q, k, v and the tables, by the kernel whose other tensors are `fields`."""
    copies = None
    if wanted & WANTS_TABLES:
        count = max(1, min(native.threads(), _MOST_COPIES // max(4 * tables.numel(), 1)))
        copies = torch.zeros(count, tables.numel(), dtype=torch.float32)
        fields["grad_tables"] = copies if copies.numel() else None
    fields |= transposed_lists(q, k, rest[-1])
    _call("attention_backward", config, True, q, k, v, tables, *rest, **fields)
    grad_tables = q.new_empty(0) if copies is None else copies.sum(0)
    return fields["grad_q"], fields["grad_k"], fields["grad_v"], grad_tables


# --- weights that are a program's ------------------------------------------------------------------------------------


def refusal_score(q, k, v, *rest) -> str | None:
    return unserved(q, k, v) or unserved_lists(rest[-1])


def refusal_score_backward(grad_out, q, k, v, *rest) -> str | None:
    return refusal_score(q, k, v, *rest[:-1])


def configure_score(q, k, v, *_) -> _tuning.Choice:
    # as those of sigmoid, they need no row statistics
    return lookup("attention", q, k, v, score="sigmoid")


def configure_score_backward(grad_out, q, k, v, *_) -> _tuning.Choice:
    return lookup("attention_backward", q, k, v, score="sigmoid")


def score_attention(*members):
    return score_attention_leading(3, *members)


def score_attention_leading(reads, q, k, v, tables, indices, program, normalised, scale, mask):
    """(out, total, residual), or the first `reads` of them."""
    filled = {"out": q.new_empty(*q.shape[:3], v.shape[3])}
    results = [filled["out"], q.new_empty(0, dtype=torch.float32), q.new_empty(0)]
    if normalised and reads > 1:
        results[1] = filled["lse"] = q.new_empty(q.shape[:3], dtype=torch.float32)
    if has_rest(q.dtype, normalised) and reads > 2:
        results[2] = filled["residual"] = torch.empty_like(filled["out"])
    if filled["out"].numel():
        _call(
            "attention_forward",
            configure_score(q, k, v),
            False,
            q,
            k,
            v,
            tables,
            indices,
            program,
            None,
            scale,
            mask,
            score=_SUMMED if normalised else _GIVEN,
            **filled,
        )
    return tuple(results[:reads])


def score_attention_backward(
    grad_out, q, k, v, tables, out, total, residual, indices, program, normalised, scale, mask, wanted
):  # fmt: skip
    decode_rows = configure_score(q, k, v).values["decode_rows"]
    fields = gradient_fields(grad_out, None, q, k, v, out, total, total, residual, decode_rows)
    fields |= {"lse": total.contiguous() if normalised else None, "state": None}
    fields["score"] = _SUMMED if normalised else _GIVEN
    config = configure_score_backward(grad_out, q, k, v)
    return _gradients(config, fields, wanted, q, k, v, tables, indices, program, None, scale, mask)


def refusal_maximum(q, k, *rest) -> str | None:
    return refusal_score(q, k, k, *rest)


def configure_maximum(q, k, *_) -> _tuning.Choice:
    choice = lookup("attention", q, k, k[..., :1], score="softmax")
    return _tuning.Choice({**choice.values, "decode_rows": 0}, choice.source)  # what is decoded tells no key


def row_maximum(q, k, tables, indices, program, scale, mask):
    """(the largest of what the program gives a row's scores, its first key), by a softmax of them without values."""
    rows = q.shape[:3]
    most = torch.full(rows, -torch.inf)
    key = torch.full(rows, -1)
    if most.numel():
        state = q.new_empty((*rows, 2), dtype=torch.float32)
        ones = k.new_ones(()).expand(*k.shape[:3], 1)
        filled = {"out": q.new_empty(*rows, 1), "state": state, "top_keys": key}
        members = (q, k, ones, tables, indices, program, None, scale, mask)
        _call("attention_forward", configure_maximum(q, k), False, *members, **filled)
        most = torch.where(key < 0, most, state[..., 0])
    return most, key
