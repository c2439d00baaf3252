"""Hostile calls of torch.ops.fastattn, for a process of its own: `hostile.py SEED FIRST LAST [OP...]`.

Each call starts from a valid one and has one to three of its arguments changed: ranks, sizes, dtypes, strides, contents,
numbers. Half of the tensors end or begin at a page that may not be touched, so that a kernel that leaves them ends the
process. A line with the call is written before it runs, and one of what is wrong after it; a call must either raise a
clear error or give what the reference gives.
"""

import ctypes
import faulthandler
import math
import mmap
import os
import random
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn as fa
from fastattn import testing
from fastattn.ops.hrm_step import decode_step
from fastattn.ops.matvec import matvec
from fastattn.ops.rowwise import rotary_append
from fastattn.runtime import registry as _registry

PAGE = mmap.PAGESIZE
SECONDS = 30  # of one call, before it counts as hanging
CLEAR = (ValueError, TypeError, NotImplementedError)
# torch's own words for an argument that does not fit the schema, and for one that it has no kernel for
DISPATCHER = (
    "fastattn::",
    "Overloaded torch operator",
    "Could not run",
    "Overflow when unpacking",
    "Tensor is unallocated",
    "cloned_mutable_input",  # a negated view where the op writes
    "meta",
)


def followed(name: str) -> tuple[int, ...]:
    """Which of an op's results follow from its arguments alone, by its declaration: all, but those that a backend keeps for its own
    backward, and all of a backward that takes what its forward gave, which need not be of the other arguments here. An op that
    writes to an argument is called with another one the second time.
    """
    op, forward = _registry.OPS[name], _registry.OPS.get(name.removesuffix("_backward"))
    given = {a.name for a in getattr(torch.ops.fastattn, name).default._schema.arguments}
    if op.writes or (forward is not op and forward is not None and given & set(forward.outputs)):
        return ()
    return tuple(i for i, n in enumerate(op.outputs) if n not in op.kept)


# --- valid calls -----------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: dict[str, list[tuple]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastattn":
            self.calls.setdefault(func._opname, []).append(_copied(args))
        return func(*args, **(kwargs or {}))


def _copied(args):
    def copy(x):
        if isinstance(x, torch.Tensor):
            return x.detach().clone()
        return [copy(i) for i in x] if isinstance(x, list | tuple) else x

    return tuple(copy(a) for a in args)


def _further_calls():
    """Calls whose ops or arguments the examples of every op with gradients leave out."""

    def make(*shape, dtype=torch.float32):
        return testing.random_tensor(*shape, dtype=dtype, seed=sum(shape))

    def whole(*values):
        return torch.tensor(values)

    q, k, v = make(2, 4, 9, 8), make(2, 2, 12, 8), make(2, 2, 12, 6)
    packed = make(1, 4, 12, 8), make(1, 2, 12, 8), make(1, 2, 12, 8)
    half = tuple(t.bfloat16() for t in packed)
    offsets = whole(0, 5, 5, 11)
    masks = {
        "prefix": (fa.Mask(prefix_lengths=whole(3, 0)), (q, k, v)),
        "keys": (fa.Mask(key_lengths=whole(12, 4), window=(3, 2)), (q, k, v)),
        "dense": (fa.Mask(dense=torch.rand(2, 1, 9, 12) > 0.4), (q, k, v)),
        "packed": (fa.Mask(causal=True, cu_seqlens_q=offsets, key_lengths=whole(5, 0, 2)), packed),
        "half": (fa.Mask(causal=True, cu_seqlens_q=offsets, prefix_lengths=whole(1, 0, 2)), half),
    }
    for mask, inputs in masks.values():
        yield lambda *t, mask=mask: fa.attention(*t, mask=mask, return_lse=True), inputs
        yield lambda *t, mask=mask: fa.sigmoid_attention(*t, mask=mask), inputs
        yield lambda *t, mask=mask: fa.softplus_attention(*t, mask=mask, power=3.0), inputs
    groups, assignment = torch.arange(12)[None] % 7, make(1, 12, 3).softmax(-1)
    for mask, inputs in (masks["packed"], (fa.Mask(dense=torch.ones(12, 12).tril() > 0), half)):
        yield lambda *t, mask=mask: fa.grouped_attention(*t, groups, window=2, mask=mask), inputs
        yield (
            lambda *t, mask=mask: fa.gated_attention(*t, window=2, gate="log", mask=mask),
            (*inputs, assignment),
        )
    yield lambda q, k, v, b: fa.attention(q, k, v, bias=b), (q, k, v, make(1, 4, 9, 12))
    yield fa.sinkhorn, (make(2, 300, 5),)
    yield lambda s: fa.sinkhorn(s, lengths=whole(4, 7)), (make(2, 9, 5),)
    for causal in (False, True):
        yield (
            lambda s, c=causal: fa.sinkhorn(s, cu_seqlens=offsets, lengths=whole(5, 0, 2), causal=c),
            (make(1, 12, 3, dtype=torch.bfloat16),),
        )
    yield (
        lambda x, w, b, s: fa.causal_conv1d(
            x, w, bias=b, initial_state=s, activation="silu", return_state=True
        ),
        (make(2, 9, 8).transpose(1, 2).contiguous().transpose(1, 2), make(8, 4), make(8), make(2, 3, 8)),
    )
    yield (
        lambda x, w, s: fa.causal_conv1d(x, w, initial_state=s, cu_seqlens=offsets, return_state=True),
        (make(1, 12, 8, dtype=torch.bfloat16), make(8, 4), make(3, 3, 8, dtype=torch.bfloat16)),
    )
    yield (
        lambda a, b, h: fa.linear_scan(a, b, initial=h, log_a=True),
        (make(2, 9, 1), make(2, 9, 8), make(2, 8)),
    )
    yield (
        lambda a, b, h: fa.linear_scan(a, b, initial=h, cu_seqlens=offsets, reverse=True),
        (make(8), make(1, 12, 8, dtype=torch.bfloat16), make(3, 8)),
    )
    state = -make(8, 5).abs()
    yield (
        lambda u, dt, B, C, D, z, b, h: fa.selective_scan(
            u, dt, state, B, C, D=D, z=z, dt_bias=b, initial_state=h, return_state=True
        ),
        (
            *(make(2, 9, 8) for _ in range(2)),
            make(2, 9, 5),
            make(2, 9, 5),
            make(8),
            make(2, 9, 8),
            make(8),
            make(2, 8, 5),
        ),
    )
    yield (
        lambda *t: fa.selective_scan(*t, cu_seqlens=offsets, dt_softplus=False, return_state=True),
        (make(1, 12, 8), make(1, 12, 8), state, make(1, 12, 5), make(1, 12, 5)),
    )
    h, weight, codebook = make(6, 8), make(20, 8), make(5, 8)
    target, codes = whole(0, 3, -100, 19, 7, 7), torch.arange(20) % 5
    for reduction in ("mean", "none"):
        yield (
            lambda h, w, t, r=reduction: fa.linear_cross_entropy(
                h, w, target, temperature=t, softcap=3.0, z_loss=0.1, reduction=r
            ),
            (h, weight, make(6).abs() + 0.5),
        )
        yield (
            lambda h, c, b, s, r=reduction: fa.vq_cross_entropy(
                h, c, codes, target, bias=b, shadow=s, reduction=r
            ),
            (h, codebook, make(20), make(20, 8)),
        )
    yield lambda h, w: fa.linear_cross_entropy(h, w, target), (h.bfloat16(), weight.bfloat16())
    yield (
        lambda h, w: fa.linear_cross_entropy(
            h, w, target, class_weight=make(20).abs(), label_smoothing=0.1, return_lse=True
        ),
        (h, weight),
    )
    yield (
        lambda h, w, t: fa.linear_cross_entropy(h, w, t, class_weight=make(20).abs(), label_smoothing=0.1),
        (h, weight, make(6, 20).softmax(-1)),
    )
    yield lambda h, c, b: fa.vq_logits(h, c, codes.int(), bias=b), (h[:2], codebook, make(20))
    for rows in (h, h[:2]):
        yield lambda rows=rows: fa.vq_argmax(rows, codebook, codes), ()
        yield lambda rows=rows: fa.vq_sample(rows, codebook, codes.int(), bias=make(20)), ()
        yield lambda rows=rows: fa.nearest_codes(rows, codebook), ()
    yield fa.rms_norm, (make(2, 3, 4, 5),)
    yield lambda *t: fa.rms_norm(t[0], residual=t[1], weight=t[2]), (make(3, 40), make(3, 40), make(40))
    yield matvec, (make(2, 24), make(7, 24))
    yield lambda x, w, g: fa.fused_linear(x, w, gate=g), (make(2, 5, 2, 4), weight, make(2, 5, 2, 4))
    yield lambda *t: fa.fused_linear(t[0], t[1], swiglu=True, residual=t[2]), (h, weight, make(6, 10))
    yield lambda q, k: fa.rotary(q, k, torch.arange(9).expand(2, -1)), (q, make(2, 2, 9, 8))

    def append():
        caches = [torch.zeros(2, 2, 20, 8) for _ in range(2)]
        slots = torch.arange(9).expand(2, -1)
        rotary_append(q, make(2, 2, 9, 8), make(2, 2, 9, 8), torch.arange(9), slots, *caches)

    def decode(position):
        sizes = ((64, 12), (12, 16), (20, 12), (12, 10))  # two heads of eight, hidden 12, inner 10
        weights = [make(*size) for _ in range(2) for size in sizes]
        caches = [make(6, 1, 2, 2, 5, 8) for _ in range(2)]
        decode_step(make(2, 12), make(2, 12), weights, *caches, position, h_cycles=2, l_cycles=2)

    def step(**gates):
        fa.linear_attention_step(
            make(2, 2, 8), make(2, 2, 8), make(2, 4, 6), make(2, 4, 8, 6), qk_norm=True, **gates
        )

    yield append, ()
    yield lambda: step(beta=make(2, 4).sigmoid(), decay=-make(2, 4, 8).abs()), ()
    yield lambda: step(decay=-make(4).abs()), ()
    yield lambda: decode(3), ()
    yield lambda: decode(whole(1, 4)), ()


def valid_calls() -> dict[str, list[tuple]]:
    """{op: arguments of calls that are served}, of every op that the examples reach, backwards included."""
    import test_every_op

    recorder = _Recorder()
    for fn, inputs in (*test_every_op.CALLS.values(), *_further_calls()):
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        with recorder, torch.set_grad_enabled(bool(inputs)):
            outputs = fn(*inputs)
            if inputs:
                sum(o.square().sum() for o in testing.as_tuple(outputs) if o.requires_grad).backward()
    return recorder.calls


# --- changes ---------------------------------------------------------------------------------------------------------

INTEGERS = (
    0,
    1,
    2,
    3,
    5,
    16,
    63,
    64,
    65,
    127,
    -1,
    -2,
    -100,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    -(1 << 31),
    1 << 40,
)
INTEGERS += ((1 << 63) - 1, -(1 << 63), (1 << 62) + 1)
NUMBERS = (0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-300, 1e300, 1e-45, 3.4e38, 1e-4, 2.5)
STRINGS = ("", "reference", "cpu", "triton", "cuda", "CPU", "mean", "sum", "none", "nothing", "x" * 300)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (
    *FLOATS,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.bool,
    torch.complex64,
)


def _resized(t, dim, size):
    """t with another size of a dim: cut, or begun again."""
    if t.shape[dim] == 0:
        shape = list(t.shape)
        shape[dim] = size
        return t.new_zeros(shape)
    index = torch.arange(size) % t.shape[dim]
    return t.index_select(dim, index)


def _change_size(t, r):
    if t.dim() == 0:
        return t[None]
    dim = r.randrange(t.dim())
    size = t.shape[dim]
    return _resized(t, dim, r.choice((0, 1, max(0, size - 1), size + 1, 2 * size, 2 * size + 1, 65)))


def _change_rank(t, r):
    kind = r.randrange(5)
    if kind == 0 or t.dim() == 0:
        return t[None]
    if kind == 1:
        return t.unsqueeze(-1)
    if kind == 2:
        return t.select(0, 0) if t.shape[0] else t.reshape(0)
    if kind == 3:
        return t.reshape(-1)
    return t.reshape(-1)[0] if t.numel() else t.new_empty(())


def _change_order(t, r):
    dims = list(range(t.dim()))
    r.shuffle(dims)
    return t.permute(dims)


def _change_dtype(t, r):
    return t.to(r.choice(DTYPES))


def _change_strides(t, r):
    kind = r.randrange(4)
    if t.dim() == 0 or not t.numel():
        return t
    if kind == 0:  # another dim's elements lie side by side
        dim = r.randrange(t.dim())
        return t.transpose(dim, -1).contiguous().transpose(dim, -1)
    if kind == 1:
        return torch.stack((t, t), -1)[..., 0]
    if kind == 2:
        return t.select(dim := r.randrange(t.dim()), 0).unsqueeze(dim).expand(t.shape)
    return torch.cat((t, t), -1)[..., t.shape[-1] :]


def _change_contents(t, r):
    t = t.contiguous().clone()
    flat = t.view(-1)
    if not flat.numel():
        return t
    if t.dtype == torch.bool:
        return t.fill_(r.random() < 0.5)
    if t.is_complex():
        return t
    if t.is_floating_point():
        values = (math.nan, math.inf, -math.inf, 0.0, -0.0, 65000.0, 1e-40, -1.0)
    else:
        low, high = torch.iinfo(t.dtype).min, torch.iinfo(t.dtype).max
        values = (low, high, 0, *(i for i in INTEGERS if low <= i <= high))
    kind = r.randrange(4)
    if kind == 0:
        return t.fill_(r.choice(values))
    if kind == 1:
        return flat.flip(0).view(t.shape)
    at = r.randrange(flat.numel())
    if kind == 2:
        flat[at] = r.choice(values)
    elif t.is_floating_point():
        flat[at:] = r.choice(values)
    else:
        flat[at] = max(low, min(high, int(flat[at]) + r.choice((1, -1, 7, 40))))
    return t


def _change_kind(t, r):
    kind = r.randrange(4)
    if kind == 0:
        return t.to("meta")
    if kind == 1:
        return t.new_empty(0)
    if kind == 2:
        return t.clone().requires_grad_() if t.is_floating_point() else t
    return torch._neg_view(t) if t.is_floating_point() else t.expand_as(t)


_CHANGES = (
    (_change_size, 6),
    (_change_rank, 3),
    (_change_order, 1),
    (_change_dtype, 3),
    (_change_strides, 3),
    (_change_contents, 6),
    (_change_kind, 1),
)


def _changed_tensor(t, r):
    change = r.choices([c for c, _ in _CHANGES], [w for _, w in _CHANGES])[0]
    return change(t, r)


def _changed(value, kind: str, r, args):
    """Another value of a schema's type."""
    if r.random() < 0.02:
        return r.choice((None, "text", 1.5, [], 7, object()))
    if "List[" in kind:
        values = list(value)
        at = r.randrange(len(values))
        if r.random() < 0.2:
            return values[:at] if r.random() < 0.5 else values + values[:1]
        values[at] = _changed_tensor(values[at], r)
        return values
    if "Tensor" in kind:
        others = [a for a in args if isinstance(a, torch.Tensor)]
        if value is None or r.random() < 0.05:
            return _changed_tensor(r.choice(others), r) if others and r.random() < 0.7 else None
        return _changed_tensor(value, r)
    if "int" in kind:
        return r.choice(INTEGERS)
    if "float" in kind:
        return None if "Optional" in kind and r.random() < 0.1 else r.choice(NUMBERS)
    if "bool" in kind:
        return not value
    return r.choice(STRINGS)


# --- memory that ends at a page which may not be touched ---------------------------------------------------------------

_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _guarded(t: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of t, its strides kept, whose memory ends (or begins) where a page begins (or ends) that may not be read."""
    if t.device.type != "cpu" or not t.numel() or t.is_neg() or t.is_complex() or t.requires_grad:
        return t
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    size = extent * t.element_size()
    room = -(-size // PAGE) * PAGE
    space = mmap.mmap(-1, room + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(space))
    for page in (address, address + PAGE + room):
        assert _mprotect(page, PAGE, 0) == 0
    offset = PAGE + (room - size if at_end else 0)
    memory = torch.frombuffer(space, dtype=t.dtype, count=extent, offset=offset)
    memory.copy_(t.as_strided((extent,), (1,), t.storage_offset()))
    return memory.as_strided(t.shape, t.stride())


# --- one call ----------------------------------------------------------------------------------------------------------


def _described(value) -> str:
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        text = f"{kind}{list(value.shape)}"
        if not value.is_contiguous():
            text += f"/{list(value.stride())}"
        if value.is_meta:
            return text + "meta"
        if not value.is_floating_point() and value.numel() <= 6:
            text += str(value.tolist())
        return text
    if isinstance(value, list):
        return f"[{', '.join(map(_described, value))}]"
    return repr(value)


class Case:
    def __init__(self, name: str, calls: list[tuple], r: random.Random) -> None:
        self.name = name
        args = list(r.choice(calls))
        arguments = getattr(torch.ops.fastattn, name).default._schema.arguments
        where = r.sample(range(len(args) - 1), min(len(args) - 1, r.choice((1, 1, 1, 2, 2, 3))))
        for i in where:
            args[i] = _changed(args[i], str(arguments[i].type), r, args)
        args[-1] = r.choice(("", "", "", "", "", "cpu", "reference", r.choice(STRINGS)))
        for i, a in enumerate(args):
            if isinstance(a, torch.Tensor) and r.random() < 0.5:
                args[i] = _guarded(a, r.random() < 0.7)
        self.args = args
        self.where = [arguments[i].name for i in where]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(_described, self.args))}), changed: {', '.join(self.where)}"

    def wrong(self) -> str | None:
        """What is wrong with the call's result or its error, or None."""
        try:
            found = self.run(self.args)
        except CLEAR as error:
            text = str(error)
            clear = "fastattn" in text or any(word in text for word in DISPATCHER)
            return None if clear else f"{type(error).__name__} without a name: {text.splitlines()[0]}"
        except RuntimeError as error:
            text = str(error)
            dispatcher = any(text.startswith(word) for word in DISPATCHER)
            return None if dispatcher else f"RuntimeError: {text.splitlines()[0]}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return self.differs(found)

    def run(self, args):
        return testing.as_tuple(getattr(torch.ops.fastattn, self.name)(*args))

    def differs(self, found) -> str | None:
        """How the result is another than the reference's, or None."""
        if self.args[-1] == "reference" or any(o.is_meta for o in found):
            return None
        try:
            args = testing.to_float64(self.args) if self.name.startswith("sinkhorn") else self.args
            expected = self.run([*args[:-1], "reference"])
        except Exception as error:
            return f"served, but the reference raises {type(error).__name__}: {str(error).splitlines()[0]}"
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            if a.shape != b.shape:
                return f"result {i} has shape {list(a.shape)}, the reference's has {list(b.shape)}"
            if a.dtype != b.dtype and args is self.args:
                return f"result {i} is {a.dtype}, the reference's is {b.dtype}"
            # of an integer, a choice, nothing is close
            if i in followed(self.name) and a.is_floating_point() and not self.close(a, b):
                return f"result {i} is another than the reference's: {a.flatten()[:6]} and {b.flatten()[:6]}"
        return None

    def close(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether a is b to within a few roundings of the widest number, where that is finite; no test of accuracy."""
        finite = b.isfinite() & a.isfinite()
        a, b = a[finite].double(), b[finite].double()
        if not b.numel() or b.abs().max() > 1e4:
            return True
        low = any(isinstance(t, torch.Tensor) and t.dtype in FLOATS[1:3] for t in self.args)
        relative, size = 0.1 if low else 0.01, 1 + float(b.abs().max())
        if self.name.startswith("sinkhorn"):
            # A share is e^(x + u + v). With X the largest |x|, potentials are within 2 X of 0, apart from logarithms of lengths.
            # An iteration rounds x + u and x + v (3 X each), u and v (2 X each); its two log-sum-exps move no further than
            # what they are of, so errors add up. x itself is rounded twice, the last sum twice (3 X, X).
            scores, _, _, _, temperature, iterations = self.args[-8:-2]
            relative += (10 * iterations + 6) * 2**-24 * testing.max_finite(scores) / temperature
            if self.name == "sinkhorn_backward":
                # a gradient is a sum of shares times such sums, two more an iteration, of all the sequence's tokens at most
                terms = scores.shape[1] * (2 * iterations + 2)
                size += terms * testing.max_finite(self.args[0]) / temperature
        return bool(((a - b).abs() <= relative * size).all())


def main() -> None:
    seed, first, last, *names = sys.argv[1:]
    faulthandler.enable()
    torch.set_num_threads(2)
    calls = valid_calls()
    missing = sorted(set(_registry.OPS) - set(calls))
    if missing:
        sys.exit(f"no valid call of {', '.join(missing)}: add one to hostile.py")
    names = names or sorted(calls)
    for number in range(int(first), int(last)):
        case = Case(
            names[number % len(names)], calls[names[number % len(names)]], random.Random(f"{seed} {number}")
        )
        os.write(1, f"{number} {case}\n".encode())
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        wrong = case.wrong()
        faulthandler.cancel_dump_traceback_later()
        if wrong:
            os.write(1, f"wrong {wrong}\n".encode())
    os.write(1, b"done\n")


if __name__ == "__main__":
    main()
