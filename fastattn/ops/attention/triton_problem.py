"""One attention call for the Triton kernels: operands, mask, constants, tile sizes, launches."""

from collections.abc import Mapping
from functools import cache

import torch
import triton

from ...masks import MaskArgs, unserved_lists
from ...runtime import triton as _triton
from ...runtime import tuning
from ...runtime.triton import LOG2E, Constants, constants, encoded_count, pairs, rows
from . import tuning_triton  # noqa: F401  declares what is looked up
from .checks import ALL_DROPPED
from .scores import BY_CODE, SCORES, has_residual
from .triton_classes import tile_classes
from .triton_options import Cap, Drop
from .triton_tiles import Factors, MaskOperand


@cache
def _score_constants(code: int, log_n: bool) -> Constants:
    """The kernels' SCORE. limit: for a normalised score without a subtracted maximum, the score that its weights tend to as they
    underflow."""
    return constants(**score_values(code, log_n))


def score_values(code: int, log_n: bool) -> dict:
    """The fields of SCORE for one of attention's own scores."""
    score = BY_CODE[code]
    weight, derivative = score.triton
    limited = score.normalised and not score.shifted
    return {
        "weight": weight,
        "derivative": derivative,
        "shifted": score.shifted,
        "normalised": score.normalised,
        "log_n": log_n,
        "limit": _score_constants(SCORES["softmax"].code, False) if limited else None,
    }


def _mask_operand(mask: MaskArgs) -> MaskOperand:
    def side(keys: int) -> int:
        return encoded_count(_triton.NO_LIMIT if keys < 0 else min(keys, _triton.LONGEST))

    _, _, *tensors = MaskOperand._fields
    indices = (getattr(mask, name) for name in tensors)
    return MaskOperand(
        side(mask.window_left),
        side(mask.window_right),
        *(None if t is None else t.contiguous() for t in indices),
    )


class Problem:
    """One call's arguments for the kernels: the operands with strides, the mask and the constants.

    For a normalised score q is multiplied by the scale's sign, so that differences to a row's maximum have a positive factor.
    """

    @classmethod
    def of(
        cls, q, k, v, bias, sink, score, scale, bias_value, softcap, dropped, rng, mask: MaskArgs
    ) -> "Problem":
        """A call of attention itself."""
        options = {"sink": sink, "softcap": softcap, "dropped": dropped, "rng": rng}
        return cls(q, k, v, bias, score, scale, bias_value, mask, **options)

    def __init__(
        self, q, k, v, bias, score, scale, bias_value, mask: MaskArgs, *, sink=None, softcap=None, dropped=0, rng=None
    ):  # fmt: skip
        self.score = BY_CODE[score]
        self.scale, self.size = scale, abs(scale)
        if self.score.normalised and scale <= 0:
            q, self.size = q * (-1 if scale < 0 else 0), abs(scale) or 1.0
        self.q, self.k, self.v = (_triton.last_dim_contiguous(t) for t in (q, k, v))
        self.batch, self.heads, self.length_q, self.head_dim = q.shape
        self.kv_heads, self.length_k, self.v_dim = k.shape[1], k.shape[2], v.shape[3]
        full = (self.batch, self.heads, self.length_q, self.length_k)
        self.bias = None if bias is None else bias.expand(full)
        self.dense_mask = mask.dense
        self.dense = None if mask.dense is None else mask.dense.expand(full)
        self.packed = mask.cu_seqlens_q is not None
        self.sequences = mask.cu_seqlens_q.numel() - 1 if self.packed else self.batch
        # -1: no documents, or documents of unknown lengths; each may then have all tokens
        self.longest_q = self.length_q if mask.max_seqlen_q < 0 else mask.max_seqlen_q
        self.longest_k = self.length_k if mask.max_seqlen_k < 0 else mask.max_seqlen_k
        self.mask = _mask_operand(mask)
        self.offsets = self.mask.cu_seqlens_q, self.mask.cu_seqlens_k
        factor = self.size if self.score.normalised else scale
        in_base_e = softcap is not None or (self.score.shifted and bias is not None)
        self.scale2 = (1.0 if in_base_e else factor) * LOG2E
        self.cap = None
        if softcap is not None:
            self.cap, self.size = Cap(factor / softcap, softcap), 1.0
        self.sink = None if sink is None else sink.float().contiguous()
        self.drop = None
        if dropped:
            share = dropped / ALL_DROPPED
            self.drop = Drop(rng.contiguous(), float(dropped), 1 / (1 - share) if share < 1 else 0.0)
        self.log_n = self.score.log_n_bias and bias_value is None and bias is None
        self.bias2 = (bias_value or 0.0) * LOG2E
        self.causal = mask.causal
        self.group = self.heads // max(1, self.kv_heads)
        self.mask_kind = (
            "dense" if mask.dense is not None or bias is not None  # kernels read an element for every pair
            else "packed" if self.packed
            else "window" if mask.window_left >= 0 or mask.window_right >= 0
            else "causal" if mask.causal
            else "full"
        )  # fmt: skip

    def tile_classes(self, block_m: int, block_n: int) -> torch.Tensor | None:
        """(B, H, query tiles, key tiles) uint8, 0 where a tile has nothing to attend; None where nothing is known."""
        return tile_classes(self, block_m, block_n)

    def structure(self) -> dict[str, str | int]:
        """What tile sizes are looked up by, lengths aside."""
        return {
            "dtype": str(self.q.dtype).removeprefix("torch."),
            "score": self.score.name,
            "head_dim": self.head_dim,
            "value_dim": self.v_dim,
            "mask": self.mask_kind,
        }

    def choose(self, op: str) -> tuning.Choice:
        return tuning.lookup(
            op,
            "triton",
            structural=self.structure(),
            sizes={
                "batch": max(1, self.sequences),
                "heads": self.heads,
                "kv_heads": self.kv_heads,
                "q_length": max(1, self.longest_q),
                "k_length": max(1, self.longest_k),
            },
            device=_triton.target(self.q.device),
        )

    def values(self) -> dict:
        """Every value of the call that a kernel's parameters may name, except tile sizes."""
        return {
            "q": rows(self.q),
            "k": rows(self.k),
            "v": rows(self.v),
            "bias": pairs(self.bias),
            "dense": pairs(self.dense),
            "mask": self.mask,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "length_q": self.length_q,
            "length_k": self.length_k,
            "sink": self.sink,
            "drop": self.drop,
            "captured": None,
            "factors": Factors(self.scale, self.size, self.scale2, self.bias2, self.cap),
            "SCORE": _score_constants(self.score.code, self.log_n),
        }

    def constants(self, block_m: int, block_n: int, **more) -> Constants:
        """The kernels' META; more: constants of this kernel only."""
        return constants(
            head_dim=self.head_dim,
            v_dim=self.v_dim,
            block_m=block_m,
            block_n=block_n,
            block_d=_triton.block(self.head_dim),
            block_dv=_triton.block(self.v_dim),
            group=self.group,
            causal=self.causal,
            aligned=not self.packed,
            precision=_triton.precision(self.q.dtype),
            **more,
        )

    def launch(self, kernel, config, *, over: str, meta: Mapping | None = None, **more) -> None:
        """Start `kernel` with one program for each tile of `over` ("queries" or "keys"), head and sequence.

        config: tile sizes and options. meta and more: constants and values besides those of the call.
        """
        block_m, block_n = config["block_m"], config["block_n"]
        if over == "queries":
            tiles, heads = triton.cdiv(self.longest_q, block_m), self.heads
        else:
            tiles, heads = triton.cdiv(self.longest_k, block_n), self.kv_heads
        values = self.values()
        if over == "keys" and self.score.normalised:  # q has the scale's sign already
            values["factors"] = values["factors"]._replace(scale=abs(self.scale))
        _triton.start(
            kernel,
            (tiles * heads * self.sequences,),
            values | {"tiles": tiles, "META": self.constants(block_m, block_n, **(meta or {}))} | more,
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(lse, state) for a kernel to fill. When packed they start as an empty row's, for rows that belong to no document."""
        shape = self.q.shape[:3] if self.score.normalised else (0,)
        state = (*shape, 2) if self.score.normalised else (0,)
        if self.packed:
            empty = self.q.new_tensor((0.0, torch.inf), dtype=torch.float32)
            state = empty.expand(state).clone() if self.score.normalised else empty[:0]
            lse = self.q.new_full(shape, -torch.inf, dtype=torch.float32)
            return lse if self.sink is None else lse.copy_(self.sink[None, :, None]), state
        return tuple(self.q.new_empty(s, dtype=torch.float32) for s in (shape, state))

    def residual(self) -> torch.Tensor:
        """The output for the rounding error: (0,) if none is kept."""
        kept = has_residual(self.q.dtype, self.score.code)
        return self.output(*self.q.shape[:3], self.v_dim) if kept else self.q.new_empty(0)

    def output(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An output for a kernel to fill; when packed it starts as zeros, for rows after the last document."""
        new = self.q.new_zeros if self.packed else self.q.new_empty
        return new(shape, dtype=dtype or self.q.dtype)


def turned(config: Mapping[str, int]) -> dict[str, int]:
    """A backward's configuration for its second kernel. In both kernels a program's own tile has block_n rows, and the tiles it loops
    over have block_m: wide products need the longer side on the accumulator.
    """
    return {**config, "block_m": config["block_n"], "block_n": config["block_m"]}


def refusal(q, k, v, bias, *rest) -> str | None:
    """Why the Triton kernels cannot serve this forward call, whose mask is the last member, or None."""
    if (reason := unserved_lists(rest[-1])) is not None:
        return reason
    if not 1 <= q.shape[3] <= 256 or not 1 <= v.shape[3] <= 256:
        return f"it serves head dims 1 to 256, not {q.shape[3]} and {v.shape[3]}"
    if max(q.shape[2], k.shape[2]) > _triton.LONGEST:
        return f"it serves at most {_triton.LONGEST} tokens"
    if bias is not None and bias.dim() == 2:
        return "it serves no distance table as bias"
    return _triton.refusal(q, k, v, bias)
