"""Tiled attention in Triton: the forward kernel and its launch. One launch serves every mask, packed PrefixLM included."""

import torch
import triton
import triton.language as tl

from ... import _config, _triton
from ..._triton import LOG2E, load_tile, offset, store_tile
from ...scores import BY_CODE
from . import triton_decode, tuning_triton  # noqa: F401  the latter declares what is looked up
from .triton_classes import tile_classes
from .triton_tiles import attend, finish, key_interval, score_shift, sequence


@triton.jit(do_not_specialize=["length_q", "length_k", "window_left", "window_right"])
def _attention_forward_kernel(
    q, k, v, bias, dense, classes, out, lse,
    prefix_lengths, offsets_q, offsets_k, key_lengths,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, out_b, out_h, out_l,
    bias_b, bias_h, bias_q, bias_k, dense_b, dense_h, dense_q, dense_k, classes_b, classes_h, classes_q,
    heads, tiles, length_q, length_k, window_left, window_right, scale2, bias2,
    WEIGHT: tl.constexpr, SHIFTED: tl.constexpr, NORMALISED: tl.constexpr, LOG_N: tl.constexpr,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    # Under a causal mask the last tiles have most to do: they start first.
    tile = tiles - 1 - program % tiles
    head = (program // tiles) % heads
    batch = program // tiles // heads  # a batch entry, or a packed document
    start_q, start_k, lq, lk, prefix, key_length = sequence(
        batch, prefix_lengths, offsets_q, offsets_k, key_lengths, length_q, length_k
    )
    first = tile * BLOCK_M
    if first >= lq:
        return
    entry = batch
    if offsets_q is not None:
        entry = batch * 0
    rows = first + tl.arange(0, BLOCK_M)
    begin, end = key_interval(rows, lq, lk, prefix, key_length, window_left, window_right, CAUSAL)
    end = tl.where(rows < lq, end, 0)
    last = tl.minimum(first + BLOCK_M, lq) - 1
    first_begin, first_end = key_interval(
        first, lq, lk, prefix, key_length, window_left, window_right, CAUSAL
    )
    last_begin, last_end = key_interval(last, lq, lk, prefix, key_length, window_left, window_right, CAUSAL)

    q_base = q + offset(entry, q_b) + offset(head, q_h) + offset(start_q + first, q_l)
    k_base = k + offset(entry, k_b) + offset(head // GROUP, k_h) + offset(start_k, k_l)
    v_base = v + offset(entry, v_b) + offset(head // GROUP, v_h) + offset(start_k, v_l)
    bias_rows = None
    if bias is not None:
        bias_rows = (
            bias
            + offset(entry, bias_b)
            + offset(head, bias_h)
            + offset(start_k, bias_k)
            + offset(start_q + rows, bias_q)
        )
    dense_rows = None
    if dense is not None:
        dense_rows = (
            dense
            + offset(entry, dense_b)
            + offset(head, dense_h)
            + offset(start_k, dense_k)
            + offset(start_q + rows, dense_q)
        )
    class_row = None
    if classes is not None:
        class_row = classes + offset(entry, classes_b) + offset(head, classes_h) + offset(tile, classes_q)

    q_tile = load_tile(q_base, q_l, lq - first, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    acc, top, total = attend(
        q_tile, k_base, v_base, k_l, v_l, bias_rows, bias_k, dense_rows, dense_k, class_row, begin, end,
        first_begin, first_end, last_begin, last_end, lk, scale2, score_shift(bias2, key_length, LOG_N),
        WEIGHT, SHIFTED, NORMALISED, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip
    acc, row_lse = finish(acc, top, total, SHIFTED, NORMALISED)
    out_base = out + offset(entry, out_b) + offset(head, out_h) + offset(start_q + first, out_l)
    store_tile(out_base, out_l, lq - first, acc, V_DIM, BLOCK_M, BLOCK_DV)
    if NORMALISED:
        lse_base = lse + offset(entry * heads + head, length_q) + start_q
        tl.store(lse_base + rows, row_lse, mask=rows < lq)


class Problem:
    """One call's arguments as the kernels take them: the operands with strides, the mask, and the constants."""

    def __init__(self, q, k, v, bias, score, scale, bias_value, causal, window_left, window_right, prefix_lengths,
                 cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_lengths, dense):  # fmt: skip
        self.q, self.k, self.v = (_triton.last_dim_contiguous(t) for t in (q, k, v))
        self.score = BY_CODE[score]
        self.batch, self.heads, self.length_q, self.head_dim = q.shape
        self.kv_heads, self.length_k, self.v_dim = k.shape[1], k.shape[2], v.shape[3]
        full = (self.batch, self.heads, self.length_q, self.length_k)
        self.bias = None if bias is None else bias.expand(full)
        self.dense_mask = dense
        self.dense = None if dense is None else dense.expand(full)
        self.packed = cu_seqlens_q is not None
        self.sequences = cu_seqlens_q.numel() - 1 if self.packed else self.batch
        self.longest_q, self.longest_k = max_seqlen_q, max_seqlen_k
        self.indices = (prefix_lengths, cu_seqlens_q, cu_seqlens_k, key_lengths)
        self.window = tuple(
            _triton.NO_LIMIT if w < 0 else min(w, _triton.LONGEST) for w in (window_left, window_right)
        )
        self.scale = scale
        self.scale2 = scale * LOG2E
        self.log_n = self.score.log_n_bias and bias_value is None and bias is None
        self.bias2 = (bias_value or 0.0) * LOG2E
        self.causal = causal
        self.group = self.heads // max(1, self.kv_heads)
        self.mask_kind = (
            "dense" if dense is not None
            else "packed" if self.packed
            else "window" if window_left >= 0 or window_right >= 0
            else "causal" if causal
            else "full"
        )  # fmt: skip

    def choose(self, op: str) -> _config.Choice:
        return _config.lookup(
            op,
            "triton",
            structural={
                "dtype": str(self.q.dtype).removeprefix("torch."),
                "score": self.score.name,
                "head_dim": self.head_dim,
                "value_dim": self.v_dim,
                "mask": self.mask_kind,
            },
            sizes={
                "batch": max(1, self.sequences),
                "heads": self.heads,
                "kv_heads": self.kv_heads,
                "q_length": max(1, self.longest_q),
                "k_length": max(1, self.longest_k),
            },
            device=_triton.target(self.q.device),
        )

    def strides(self, t: torch.Tensor | None, dims: int) -> tuple[int, ...]:
        return (0,) * dims if t is None else t.stride()[:dims]

    def constants(self) -> dict:
        """The compile-time constants that every attention kernel has."""
        weight, _ = self.score.triton
        return {
            "WEIGHT": weight,
            "SHIFTED": self.score.shifted,
            "NORMALISED": self.score.normalised,
            "LOG_N": self.log_n,
            "CAUSAL": self.causal,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "V_DIM": self.v_dim,
            "BLOCK_D": _triton.block(self.head_dim),
            "BLOCK_DV": _triton.block(self.v_dim),
            "PRECISION": _triton.precision(self.q.dtype),
        }

    def statistics(self) -> torch.Tensor:
        """lse before any kernel: -inf where packed rows may belong to no document."""
        shape = self.q.shape[:3] if self.score.normalised else (0,)
        if self.packed:
            return self.q.new_full(shape, -torch.inf, dtype=torch.float32)
        return self.q.new_empty(shape, dtype=torch.float32)

    def output(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An output that a kernel fills; rows past the last packed document stay zero."""
        new = self.q.new_zeros if self.packed else self.q.new_empty
        return new(shape, dtype=dtype or self.q.dtype)


def refusal(q, k, v, bias, *options) -> str | None:
    """Why the Triton kernels cannot serve this forward call, or None."""
    if not 1 <= q.shape[3] <= 256 or not 1 <= v.shape[3] <= 256:
        return f"it serves head dims 1 to 256, not {q.shape[3]} and {v.shape[3]}"
    if max(q.shape[2], k.shape[2]) > _triton.LONGEST:
        return f"it serves at most {_triton.LONGEST} tokens"
    return _triton.refusal(q, k, v, bias)


def configure(*args) -> _config.Choice:
    problem = Problem(*args)
    return problem.choose("attention_decode" if triton_decode.fits(problem) else "attention")


def attention(*args) -> tuple[torch.Tensor, torch.Tensor]:
    p = Problem(*args)
    if triton_decode.fits(p):
        return triton_decode.attention(p)
    out, lse = p.output(*p.q.shape[:3], p.v_dim), p.statistics()
    if out.numel() == 0:
        return out, lse
    config = p.choose("attention").values
    block_m, block_n = config["block_m"], config["block_n"]
    classes = tile_classes(p, block_m, block_n)
    tiles = triton.cdiv(p.longest_q, block_m)
    _triton.launch(
        _attention_forward_kernel, (tiles * p.heads * p.sequences,),
        p.q, p.k, p.v, p.bias, p.dense, classes, out, lse, *p.indices,
        *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *out.stride()[:3],
        *p.strides(p.bias, 4), *p.strides(p.dense, 4), *p.strides(classes, 3),
        p.heads, tiles, p.length_q, p.length_k, *p.window, p.scale2, p.bias2,
        **p.constants(), BLOCK_M=block_m, BLOCK_N=block_n,
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
    return out, lse
