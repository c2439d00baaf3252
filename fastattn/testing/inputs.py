"""Makers of inputs: tensors of every layout, attention problems, and what kernels leave unwritten made visible."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..blocks import Blocks
from ..masks import Mask

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def nan_filled_outputs() -> Iterator[None]:
    """torch.empty and its relatives give NaN (the largest integer), so that an unwritten output shows.

    Needs torch's deterministic mode, which is on inside with warnings only.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


def random_tensor(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 1.0,
    layout: str = "contiguous",
    requires_grad: bool = False,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Normal values times `scale`. Every layout has a contiguous last dim:

    contiguous: as torch.randn; odd: gaps of NaN between rows, heads and batches, so that a kernel that reads
    past its strides shows; swapped (3 or more dims): the two dims before the last are stored in the other
    order, as (B, L, H, D) projections are after a transpose.
    """
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator) * scale).to(dtype)
    if layout == "odd":
        storage = torch.full(
            [n + 1 + (i == len(shape) - 1) * 2 for i, n in enumerate(shape)], math.nan, dtype=dtype
        )
        view = storage[tuple(slice(1, 1 + n) for n in shape)]
        view.copy_(values)
        values = view
    elif layout == "swapped":
        if len(shape) < 3:
            raise ValueError(f"random_tensor: layout 'swapped' needs 3 dims, got shape {shape}")
        values = values.transpose(-2, -3).contiguous().transpose(-2, -3)
    elif layout != "contiguous":
        raise ValueError(f"random_tensor: layout is {layout!r}, allowed are contiguous, odd, swapped")
    if torch.device(device).type != "cpu":
        values = values.to(device)
    return values.requires_grad_(requires_grad)


LAYOUTS = ("contiguous", "odd", "swapped")


def attention_inputs(
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    q_len: int = 33,
    k_len: int | None = None,
    head_dim: int = 16,
    v_dim: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 1.0,
    layout: str = "contiguous",
    requires_grad: bool = True,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, Hq, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv)."""
    kv_heads = heads if kv_heads is None else kv_heads
    k_len = q_len if k_len is None else k_len
    v_dim = head_dim if v_dim is None else v_dim
    options: dict[str, Any] = {
        "dtype": dtype,
        "scale": scale,
        "layout": layout,
        "requires_grad": requires_grad,
        "device": device,
    }
    return (
        random_tensor(batch, heads, q_len, head_dim, seed=seed * 3 + 1, **options),
        random_tensor(batch, kv_heads, k_len, head_dim, seed=seed * 3 + 2, **options),
        random_tensor(batch, kv_heads, k_len, v_dim, seed=seed * 3 + 3, **options),
    )


def far_attention_inputs(size: float, *, exact: bool = False, **options: Any) -> tuple[torch.Tensor, ...]:
    """`attention_inputs` whose scores lie about `size`, within a few units of each other in a row: what tells weights apart is in
    the last bits. exact: products are exact in float32 up to some 10^6, so that nothing but the weights is rounded."""
    q, k, v = (t.detach() for t in attention_inputs(**options))
    # one direction has `size`, the same for every query and key; the others have what tells keys apart
    head_dim = q.shape[-1]
    base = 4.0
    q[..., 0], k[..., 0] = base, size * math.sqrt(head_dim) / base
    if exact:
        q, k = ((t * 4).round() / 4 for t in (q, k))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def isas() -> tuple[str, ...]:
    """Instruction sets this machine can run, best last."""
    import fastattn

    return tuple(fastattn.cpu_isas())


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """Shapes and a mask, printable and buildable: what hypothesis draws for an attention op."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    v_dim: int
    layout: str
    mask_options: (
        dict  # Mask's keywords; index tensors as lists, dense as a shape and a density; blocks: block,
    )
    # batch, heads and density
    seed: int = 0

    def inputs(self, dtype: torch.dtype = torch.float32, **options: Any) -> tuple:
        return attention_inputs(
            self.batch,
            self.heads,
            self.kv_heads,
            self.q_len,
            self.k_len,
            self.head_dim,
            self.v_dim,
            dtype=dtype,
            seed=self.seed,
            layout=self.layout,
            **options,
        )

    def mask(self, device: torch.device | str = "cpu") -> Mask | None:
        """The fastattn.Mask, or None where the problem has none."""
        options: dict[str, Any] = {}
        for name, value in self.mask_options.items():
            if name == "dense":
                shape, density = value
                generator = torch.Generator().manual_seed(self.seed)
                value = (torch.rand(shape, generator=generator) < density).to(device)
            elif name == "blocks":
                value = self.blocks(*value).to(device)
            elif isinstance(value, list):
                value = torch.tensor(value, dtype=torch.int32, device=device)
            options[name] = value
        return Mask(**options) if options else None

    def blocks(self, block: tuple[int, int], batch: int, heads: int, density: float) -> Blocks:
        """Random lists of this problem's lengths."""
        counts = (-(-n // size) for n, size in zip((self.q_len, self.k_len), block, strict=True))
        generator = torch.Generator().manual_seed(self.seed)
        table = torch.rand(batch, heads, *counts, generator=generator) < density
        return Blocks.from_dense(table, block=block, q_length=self.q_len, k_length=self.k_len)


MASK_KINDS = ("full", "causal", "window", "prefix", "packed", "key_lengths", "dense")


def attention_problems(
    kinds: Sequence[str] = MASK_KINDS,
    *,
    max_len: int = 70,
    head_dims: Sequence[int] = (1, 3, 8, 16, 17, 32, 64),
    max_heads: int = 4,
    combine: bool = True,
    block_sizes: Sequence[int] = (1, 3, 16, 32, 100),
) -> SearchStrategy[AttentionProblem]:
    """A hypothesis strategy of AttentionProblem: small odd shapes, empty lengths, each kind of mask.

    With `combine`, causal, window, key lengths and a dense mask are also drawn on top of the chosen kind. A kind that is in none of
    the defaults is "blocks", block lists: alone, or of packed documents.
    """
    from hypothesis import strategies as st

    window = st.tuples(*[st.none() | st.integers(0, max_len)] * 2)

    def cuts(draw: Any, documents: int, total_max: int) -> list[int]:
        lengths = [draw(st.integers(0, max(total_max // documents, 1))) for _ in range(documents)]
        return [0, *itertools.accumulate(lengths)]

    @st.composite
    def problems(draw: Any) -> AttentionProblem:
        kind = draw(st.sampled_from(list(kinds)))
        kv_heads = draw(st.integers(1, max(1, max_heads // 2)))
        heads = kv_heads * draw(st.integers(1, max(1, max_heads // kv_heads)))
        batch = 1 if kind == "packed" else draw(st.integers(1, 2))
        q_len, k_len = draw(st.integers(0, max_len)), draw(st.integers(0, max_len))
        extra = combine and draw(st.booleans())
        options: dict = {}
        if kind == "prefix" or (kind == "causal" and draw(st.booleans())):
            q_len = k_len
        if kind == "causal":
            options["causal"] = True
        elif kind == "window":
            options["window"] = draw(window)
        elif kind == "prefix":
            options["prefix_lengths"] = [draw(st.integers(0, k_len)) for _ in range(batch)]
        elif kind == "packed":
            documents = draw(st.integers(1, 4))
            k_cuts = cuts(draw, documents, max_len)
            q_cuts = k_cuts if draw(st.booleans()) else cuts(draw, documents, max_len)
            q_len, k_len = q_cuts[-1], k_cuts[-1]
            options["cu_seqlens_q"], options["cu_seqlens_k"] = q_cuts, k_cuts
            inner = draw(st.sampled_from(["full", "causal", "window", "prefix"]))
            if inner == "causal":
                options["causal"] = True
            elif inner == "window":
                options["window"] = draw(window)
            elif inner == "prefix" and q_cuts == k_cuts:
                options["prefix_lengths"] = [
                    draw(st.integers(0, b - a)) for a, b in itertools.pairwise(k_cuts)
                ]
        elif kind == "blocks":
            if batch == 1 and draw(st.booleans()):
                cut = draw(st.integers(0, min(q_len, k_len)))
                options["cu_seqlens_q"], options["cu_seqlens_k"] = [0, cut, q_len], [0, cut, k_len]
                extra = False
            sizes = st.sampled_from(block_sizes)
            options["causal"] = draw(st.booleans())
            options["blocks"] = (
                (draw(sizes), draw(sizes)),
                draw(st.sampled_from(sorted({1, batch}))),
                draw(st.sampled_from(sorted({1, kv_heads, heads}))),
                draw(st.sampled_from((0.0, 0.3, 0.6, 1.0))),
            )
        if kind == "key_lengths" or (extra and kind != "packed" and draw(st.booleans())):
            options["key_lengths"] = [draw(st.integers(0, k_len)) for _ in range(batch)]
        if kind == "dense" or (extra and draw(st.booleans())):
            shape = (
                draw(st.sampled_from(sorted({1, batch}))),
                draw(st.sampled_from(sorted({1, heads}))),
                q_len,
                k_len,
            )
            options["dense"] = (shape, draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])))
        if extra and "prefix_lengths" not in options and draw(st.booleans()):
            options.setdefault("causal", True)
        if extra and draw(st.booleans()):
            options.setdefault("window", draw(window))
        return AttentionProblem(
            batch,
            heads,
            kv_heads,
            q_len,
            k_len,
            draw(st.sampled_from(list(head_dims))),
            draw(st.sampled_from(list(head_dims))),
            draw(st.sampled_from(LAYOUTS)),
            options,
            draw(st.integers(0, 99)),
        )

    return problems()
