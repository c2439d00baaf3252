"""flex_attention in Triton: the kernels of attention, with a program's functions as their score."""

import warnings
from typing import Any

import torch

from ...masks import MaskArgs
from ...runtime import triton as _triton
from ...runtime import tuning as _tuning
from ...runtime.triton import LOG2E
from ..attention import triton as forward_kernels
from ..attention import triton_backward as backward_kernels
from ..attention import triton_decode, triton_problem
from ..attention.scores import SCORES
from ..attention.triton_placed import Captured
from ..attention.triton_problem import Problem
from ..attention.tuning_triton import backward_bytes, forward_bytes
from .checks import WANTS_TABLES
from .cpu import kernel_classes
from .prepare import EMPTY
from .triton_files import Functions, functions

_SOFTMAX = SCORES["softmax"].code
_DECODE_ROWS = 64
_LEAST = {"num_stages": 1, "block_n": 16}
_NOTHING = 0  # of WANTS of attention's backward: neither a bias nor a sink


def refusal(q, k, v, *rest) -> str | None:
    """Why the Triton kernels cannot serve this call, whose mask is the last member, or None."""
    return triton_problem.refusal(q, k, v, None, rest[-1])


def refusal_backward(grad_out, grad_lse, q, k, v, *rest) -> str | None:
    return refusal(q, k, v, *rest[:-1]) or _triton.refusal(grad_out)


class _Problem(Problem):
    """A call with a user's function, whose scores are in base e."""

    def __init__(
        self, q, k, v, tables, indices, program, classes, scale: float, mask: MaskArgs, *, gradients: torch.Tensor | None = None, differentiated: bool = False
    ) -> None:  # fmt: skip
        super().__init__(q, k, v, None, _SOFTMAX, scale, 0.0, mask)
        self.scale2 = LOG2E
        self.user = functions(program, differentiated)
        self.user_classes = classes
        self.captured = _captured(q, tables, indices, self.user, gradients)

    def choose(self, op: str) -> _tuning.Choice:
        """Attention's tiles, made smaller where what is gathered for each score, float32 on its way, leaves no room for them."""
        choice, target = super().choose(op), _triton.target(self.q.device)
        if not self.user.gathers or target.kind == "cpu":
            return choice
        values, key = dict(choice.values), self.structure()
        of_tiles = backward_bytes if op == "attention_backward" else forward_bytes

        def bytes_of(values) -> int:
            with_rows = {"block_m": _DECODE_ROWS} | values
            flying = max(values["num_stages"] - 1, target.kind == "hip")
            pairs = with_rows["block_m"] * values["block_n"] * self.user.gathers
            return of_tiles(with_rows, key, target) + 4 * pairs * flying

        while bytes_of(values) > target.shared:
            name = "num_stages" if values["num_stages"] > 1 else "block_n"
            if values[name] <= _LEAST[name]:
                break
            values[name] = values[name] - 1 if name == "num_stages" else values[name] // 2
        if values == choice.values:
            return choice
        return _tuning.Choice(values, f"{choice.source}, smaller for what the function loads")

    def values(self) -> dict[str, Any]:
        return super().values() | {"captured": self.captured, "SCORE": self.user.score}

    def tile_classes(self, block_m: int, block_n: int) -> torch.Tensor | None:
        of_dense = super().tile_classes(block_m, block_n)
        # tiles of packed documents start at each document, not where these do
        if self.user_classes is None or self.packed:
            return of_dense
        config = {"block_q": block_m, "block_k": block_n}
        found = kernel_classes(self.user_classes, config, self.length_q, self.length_k) != EMPTY
        if of_dense is not None:
            found = found & (of_dense != 0)
        return found.to(torch.uint8).expand(self.batch, self.heads, -1, -1)


def _captured(
    q: torch.Tensor,
    tables: torch.Tensor | None,
    indices: torch.Tensor | None,
    user: Functions,
    gradients: torch.Tensor | None,
) -> Captured:
    def table(t: torch.Tensor | None, dtype: torch.dtype, read: bool) -> tuple[torch.Tensor | None, int]:
        """(one element at least, the last one's number); None where nothing is read."""
        if t is None and not read:
            return None, 0
        t = q.new_zeros(1, dtype=dtype) if t is None or not t.numel() else t.contiguous()
        return t, t.numel() - 1

    return Captured(
        *table(tables, torch.float32, user.reads_floats),
        *table(indices, torch.int32, user.reads_integers),
        user.numbers or None,
        user.counts or None,
        gradients if user.scatters else None,
    )


def configure(*members) -> _tuning.Choice:
    problem = _Problem(*members)
    return problem.choose("attention_decode" if triton_decode.fits(problem) else "attention")


def describe(q, k, v, tables, indices, program, *_) -> str:
    """The file that the score is compiled from."""
    return f"printed to {functions(program, False).path}"


def flex_attention(*members):
    """(out, lse, state, residual)."""
    return forward_kernels.forward(_Problem(*members))


def configure_backward(
    grad_out, grad_lse, q, k, v, tables, out, lse, state, residual, *rest
) -> _tuning.Choice:
    return _Problem(q, k, v, tables, *rest[:-1], differentiated=True).choose("attention_backward")


def flex_attention_backward(grad_out, grad_lse, q, k, v, tables, out, lse, state, residual, *rest):
    *rest, wanted = rest
    sums = None
    if wanted & WANTS_TABLES and tables.numel():
        _refuse_if_deterministic()
        sums = torch.zeros_like(tables, dtype=torch.float32, memory_format=torch.contiguous_format)
    p = _Problem(q, k, v, tables, *rest, gradients=sums, differentiated=True)
    dq, dk, dv, *_ = backward_kernels.backward(
        p, grad_out, grad_lse, q, k, v, None, None, out, lse, state, residual, _NOTHING
    )
    if sums is None:
        sums = torch.zeros_like(tables) if wanted & WANTS_TABLES else q.new_empty(0)
    return dq, dk, dv, sums


def _refuse_if_deterministic() -> None:
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        "fastattn.flex_attention: the triton backend adds up gradients of captured tensors in any order, which "
        'torch.use_deterministic_algorithms forbids; backend="reference" adds them in one order'
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise NotImplementedError(message)
    warnings.warn(message, stacklevel=2)
