"""The definitions of torch.ops.fastattn.flex_attention and score_attention: a program's instructions as torch's own operations,
then softmax, or the weights that they give."""

import torch

from ... import masks
from ...runtime.arithmetic import residual_of, widened
from ..attention.reference import expand_heads
from ..attention.scores import SCORES, has_residual
from .checks import WANTS_TABLES, has_rest
from .evaluate import TORCH
from .plain import softmax, summed
from .program import BY_KEY, INPUTS_OF_ROW, OPS, Section, arity, base, sections

_SOFTMAX = SCORES["softmax"].code


class _Values:
    """The registers of a section, run on every score of a call, (B, H, Lq, Lk) or what broadcasts to it."""

    def __init__(
        self, section: Section, s: torch.Tensor, tables: torch.Tensor | None, indices: torch.Tensor | None
    ) -> None:
        self.section = section
        self.tables = s.new_zeros(1) if tables is None or not tables.numel() else tables.to(s.dtype)
        empty = torch.zeros(1, dtype=torch.int32, device=s.device)
        self.indices = empty if indices is None or not indices.numel() else indices
        counts = [torch.arange(n, dtype=torch.int32, device=s.device) for n in s.shape]
        b, h, q, k = (c.view([-1 if i == axis else 1 for i in range(4)]) for axis, c in enumerate(counts))
        self.k = k
        self.registers: dict[int, torch.Tensor] = {
            0: b,
            1: h,
            2: q,
            section.scalars: s,
            section.scalars + 1: k,
        }
        constants = [s.new_tensor(x) for x in section.floats]
        constants += [torch.tensor(x, dtype=torch.int32, device=s.device) for x in section.integers]
        self.registers |= dict(enumerate(constants, INPUTS_OF_ROW))
        self._float = s.dtype
        for code, result, *operands in section.instructions:
            name = OPS[code]
            self.registers[result] = self._run(name, [self.registers[r] for r in operands[: arity(name)]])

    def _run(self, name: str, args: list[torch.Tensor]) -> torch.Tensor:
        op = base(name)
        if op in ("load", "load_row"):
            table = self.tables if name.endswith("f") else self.indices
            return table[self._clamped(args[0], op == "load_row", table)]
        if op == "select":
            return torch.where(args[0] != 0, args[1], args[2])
        if op == "i2f":
            return args[0].to(self._float)
        if op == "f2i":
            whole = args[0].detach().double().trunc().nan_to_num(0.0, float("inf"), float("-inf"))
            return whole.clamp(-(2**31), 2**31 - 1).to(torch.int32)
        if op == "b2i":
            return -args[0]
        result = TORCH[op](*args)
        # a boolean is 0 or -1, so that and, or and not are those of bits
        return -result.to(torch.int32) if result.dtype == torch.bool else result

    def _clamped(self, index: torch.Tensor, by_key: bool, table: torch.Tensor) -> torch.Tensor:
        index = index.long() + (self.k if by_key else 0)
        return index.clamp(0, table.numel() - 1)

    def gradient_index(self, load: int) -> torch.Tensor:
        register, _ = self.section.loads[load]
        return self._clamped(self.registers[register & ~BY_KEY], bool(register & BY_KEY), self.tables)


def _section(program: torch.Tensor, gradients: bool) -> Section:
    """What every score goes through: the section of mixed tiles, where there is one; tiles only spare what it gives -inf."""
    full, mixed, full_gradients, mixed_gradients = sections(program)
    found = (mixed_gradients or full_gradients) if gradients else (mixed or full)
    if found is None:
        raise ValueError(
            f"fastattn: program has no section {'with derivatives' if gradients else 'of scores'}"
        )
    return found


def _products(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    s = scale * (q @ expand_heads(k, q.shape[1]).transpose(-1, -2))
    return s if s.dtype in (torch.float32, torch.float64) else s.float()


def _scores(values: _Values, s: torch.Tensor, mask: masks.MaskArgs, excluded: float) -> torch.Tensor:
    """What the program gives each score, `excluded` where the mask says no."""
    score = values.registers[values.section.score].to(s.dtype).expand(s.shape)
    allowed = masks.dense_allowed(s.shape[2], s.shape[3], s.device, mask)
    return score.masked_fill(~allowed, excluded)


def flex_attention(q, k, v, tables, indices, program, classes, scale, mask) -> tuple[torch.Tensor, ...]:
    """(out, lse, state, residual), as attention's."""
    wide_q, wide_k, wide_v = widened(q), widened(k), widened(v)
    s = _products(wide_q, wide_k, scale)
    score = _scores(_Values(_section(program, False), s, tables, indices), s, mask, -torch.inf)
    weight, lse, top = softmax(score)
    out = weight.to(wide_v.dtype) @ expand_heads(wide_v, q.shape[1])
    residual = residual_of(out, q) if has_residual(q.dtype, _SOFTMAX) else q.new_empty(0)
    state = torch.stack([top, lse - top], -1)
    state[lse == -torch.inf] = state.new_tensor([0.0, torch.inf])
    return out.to(q.dtype), lse, state, residual


def flex_attention_backward(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    tables,
    out,
    lse,
    state,
    residual,
    indices,
    program,
    classes,
    scale,
    mask,
    wanted,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v and of the tables, from the program's derivatives."""
    wide_q, wide_k, wide_v, grad = widened(q), widened(k), widened(v), widened(grad_out)
    s = _products(wide_q, wide_k, scale)
    values = _Values(_section(program, True), s, tables, indices)
    score = _scores(values, s, mask, -torch.inf)
    empty = lse == -torch.inf
    weight = (
        torch.exp(score - lse.masked_fill(empty, 0.0)[..., None])
        .masked_fill(empty[..., None], 0.0)
        .to(grad.dtype)
    )
    grad_weight = grad @ expand_heads(wide_v, q.shape[1]).transpose(-1, -2)
    delta = (weight * grad_weight).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    grad_score = (weight * (grad_weight - delta)).masked_fill(weight == 0, 0.0).to(s.dtype)
    return _gradients(values, weight, grad_score, grad, q, k, v, tables, scale, wanted)


def _gradients(
    values: _Values,
    weight: torch.Tensor,
    grad_score: torch.Tensor,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: torch.Tensor | None,
    scale: float,
    wanted: int,
) -> tuple[torch.Tensor, ...]:
    """Of q, k, v and the tables, from the weights (B, Hq, Lq, Lk) that values were multiplied by, the gradient of what the program gives,
    and that of the output."""
    wide_q, wide_k = widened(q), widened(k)
    section, size = values.section, weight.shape

    def times(derivative: torch.Tensor) -> torch.Tensor:
        product = grad_score * derivative
        return product.masked_fill(grad_score == 0, 0.0)  # what is masked has any derivative

    if section.slope == -1:
        raise ValueError("fastattn: program has no slope in its section with derivatives")
    grad_s = times(values.registers[section.slope]).to(grad.dtype)
    shape = (k.shape[0], k.shape[1], -1, *size[2:])
    of_heads = grad_s.view(shape)  # (B, Hkv, group, Lq, Lk)
    grad_q = scale * (grad_s @ expand_heads(wide_k, q.shape[1]))
    grad_k = scale * torch.einsum("bhgqk,bhgqd->bhkd", of_heads, wide_q.view(*shape[:3], *q.shape[2:]))
    grad_v = torch.einsum("bhgqk,bhgqd->bhkd", weight.view(shape), grad.view(*shape[:3], *grad.shape[2:]))
    grad_tables = q.new_empty(0)
    if wanted & WANTS_TABLES and tables is not None:
        flat = torch.zeros(tables.shape, dtype=torch.float64, device=q.device)
        for load, (_, register) in enumerate(section.loads):
            index = values.gradient_index(load).expand(size)
            flat.index_add_(
                0, index.reshape(-1), times(values.registers[register]).expand(size).reshape(-1).double()
            )
        grad_tables = flat.to(tables.dtype)
    return grad_q.to(q.dtype).contiguous(), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_tables


def score_attention(q, k, v, tables, indices, program, normalised, scale, mask) -> tuple[torch.Tensor, ...]:
    """(out, total, residual): row sums (B, Hq, Lq) of the weights, 0 where they count as 0; (0,) where nothing is divided by them."""
    wide_q, wide_k, wide_v = widened(q), widened(k), widened(v)
    s = _products(wide_q, wide_k, scale)
    weight = _scores(_Values(_section(program, False), s, tables, indices), s, mask, 0.0)
    total = weight.new_empty(0)
    if normalised:
        weight, total = summed(weight)
    out = weight.to(wide_v.dtype) @ expand_heads(wide_v, q.shape[1])
    return out.to(q.dtype), total, residual_of(out, q) if has_rest(q.dtype, normalised) else q.new_empty(0)


def score_attention_backward(
    grad_out, q, k, v, tables, out, total, residual, indices, program, normalised, scale, mask, wanted
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of q, k, v and of the tables: dw = (dO.v - D) / Z, D = dO.out; undivided D = 0 and Z = 1."""
    wide_q, wide_k, wide_v, grad = widened(q), widened(k), widened(v), widened(grad_out)
    s = _products(wide_q, wide_k, scale)
    values = _Values(_section(program, True), s, tables, indices)
    weight = _scores(values, s, mask, 0.0)
    grad_weight = (grad @ expand_heads(wide_v, q.shape[1]).transpose(-1, -2)).to(s.dtype)
    if normalised:
        nothing = (total == 0)[..., None]
        factor = torch.where(nothing, 0.0, 1 / total[..., None])
        weight = torch.where(nothing, 0.0, weight * factor)
        delta = (weight * grad_weight).sum(-1, keepdim=True)
        grad_weight = (grad_weight - delta) * factor
    allowed = masks.dense_allowed(q.shape[2], k.shape[2], q.device, mask)
    grad_weight = grad_weight.masked_fill(~allowed, 0.0)
    return _gradients(values, weight.to(grad.dtype), grad_weight, grad, q, k, v, tables, scale, wanted)


def row_maximum(q, k, tables, indices, program, scale, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """(the largest of what the program gives a row's scores, its first key), -inf and -1 where none is above -inf."""
    s = _products(widened(q), widened(k), scale)
    score = _scores(_Values(_section(program, False), s, tables, indices), s, mask, -torch.inf)
    if not score.shape[3]:
        return score.new_full(score.shape[:3], -torch.inf), torch.full(score.shape[:3], -1, device=q.device)
    most, key = score.max(-1)
    return most, key.masked_fill(most == -torch.inf, -1)
