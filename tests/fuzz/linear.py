"""Random calls of linear_attention and linear_attention_step: decays of every kind, the delta rule, normalisers, documents, states,
views and gradients of any inputs, by the output, the state or both. Bounds are those of `_chunks.py`, chunk after chunk as the
kernels go; what is around the chunks, norms of queries and keys and the normaliser, is written in `Product` operation by operation.
"""

from __future__ import annotations

import itertools
import random
from functools import partial

import torch
from _chunks import Chunk, factors
from _recurrences import (
    DTYPES,
    LAYOUTS,
    LENGTHS,
    Product,
    Unknown,
    check_call,
    cut,
    joined,
    kernels,
    known,
    laid_out,
    magnitude,
    negative,
    normal,
    one_thread,
    over,
    product,
    share,
    wide,
    within,
)
from _steps import Off, U, given, number

import fastattn as fa

CHUNK = 64
NAMES = ("q", "k", "v", "decay", "beta", "initial_state")
KINDS = ("plain", "plain", "delta", "delta", "delta", "normalize", "all", "all normalized")
DECAYS = ("none", "head", "token", "token", "channel", "channel")
STRENGTHS = (
    "mild",
    "mild",
    "zero",
    "tiny",
    "strong",
    "-300",
    "growing",
    "first",
    "middle",
    "last",
    "some",
    "every",
)


def draw(rng: random.Random) -> dict:
    pick = rng.choice
    step = rng.random() < 0.2
    packed = not step and rng.random() < 0.3
    kind = pick(KINDS[:6] if step else KINDS)
    decay = "none" if kind.startswith("all") else pick(DECAYS)
    key_heads = 0 if rng.random() < 0.01 else pick((1, 1, 2, 3))
    size = (1.0, 1.0, 1.0, 1.0, 1e-3, 30.0, 1e-18, 1e4)
    sizes = [pick(size) for _ in range(4)]
    if "norm" in kind and rng.random() < 0.05:  # divisors among the subnormal numbers
        sizes[:2] = [1e-20, 1e-20]
    return {
        "step": step,
        "kind": kind,
        "dtype": pick(("float32", "float32", "bfloat16", "float16")),
        "gates": pick(("float32", "same")),
        "batch": 1 if packed else pick((1, 1, 2, 3, 0 if rng.random() < 0.1 else 2)),
        "heads": [key_heads, key_heads * pick((1, 1, 2, 3, 4))],
        "length": pick(LENGTHS),
        "documents": [pick((0, 1, 2, 15, 16, 63, 64, 65, 100)) for _ in range(rng.randint(0, 4))]
        if packed
        else None,
        "dk": pick((1, 2, 5, 8, 16, 17, 20, 33) if decay == "channel" else (1, 2, 5, 8, 16, 17, 33, 64, 70)),
        "dv": pick((1, 2, 3, 8, 16, 17, 24, 33, 72)),
        "decay": decay,
        "strength": pick(STRENGTHS),
        "beta": None if kind.startswith("all") else pick((None, "random", "random", 0.0, 1.0, 2.0, "some")),
        "keys": pick(("random", "random", "random", "equal", "zeros", "positive")),
        "qk_norm": rng.random() < 0.4,
        "scale": pick((None, None, 1.0, 0.3)),
        "state": rng.random() < 0.6,
        "sizes": sizes,
        "grad_size": pick(size[2:]),
        "layouts": [pick((0, 0, *range(LAYOUTS))) for _ in range(6)],
        "grad_layout": pick((0, 0, *range(LAYOUTS))),
        "wanted": rng.randrange(64),
        "pulled": pick((1, 2, 3, 3)),
        "seed": rng.randrange(1 << 24) * 100,
        "threads": pick((1, 2, 5)),
        "isa": rng.randrange(4),
    }


# --- inputs -----------------------------------------------------------------------------------------------------------


def _decay(case: dict, heads: int, batch: int, length: int) -> torch.Tensor | None:
    if case["decay"] == "none":
        return None
    seed, strength = case["seed"] + 10, case["strength"]
    tokens = {"head": (), "token": (length,), "channel": (length, case["dk"])}[case["decay"]]
    shape = (heads,) if case["decay"] == "head" else (batch, heads, *tokens)
    x = -normal(seed, *shape).abs()
    x = x * {"mild": 0.3, "zero": 0.0, "tiny": 1e-6, "strong": 8.0, "growing": -0.02}.get(strength, 0.3)
    x = torch.full_like(x, -300.0) if strength == "-300" else x
    if strength == "some":
        chosen = normal(seed + 1, *shape)
        x = torch.where(chosen > 1.2, -torch.inf, torch.where(chosen < -1.2, 0.0, x))
    if strength == "every":
        x = torch.full_like(x, -torch.inf)
    if strength in ("first", "middle", "last") and length and case["decay"] != "head":
        x[:, :, {"first": 0, "middle": length // 2, "last": length - 1}[strength]] = -torch.inf
    return x


def _beta(case: dict, heads: int, batch: int, length: int) -> torch.Tensor | None:
    kind, shape = case["beta"], (batch, heads, length)
    if kind is None:
        return None
    if isinstance(kind, float):
        return torch.full(shape, kind)
    x = torch.sigmoid(normal(case["seed"] + 12, *shape)) * (2 if case["qk_norm"] else 1)
    chosen = normal(case["seed"] + 13, *shape)
    return torch.where(chosen > 0.5, 0.0, x) if kind == "some" else x


def _inputs(case: dict, length: int) -> dict:
    """The tensors of a call by name, absent ones left out."""
    dtype, batch, (key_heads, heads) = DTYPES[case["dtype"]], case["batch"], case["heads"]
    dk, dv, seed, kind = case["dk"], case["dv"], case["seed"], case["kind"]
    sizes = [min(max(s, 1e-3), 30.0) if dtype == torch.float16 else s for s in case["sizes"]]
    if kind == "delta":  # more than this grows without end
        sizes[1] = min(sizes[1], 1.0)
    q = normal(seed, batch, key_heads, length, dk, size=sizes[0] * dk**-0.5)
    k = normal(seed + 1, batch, key_heads, length, dk, size=sizes[1] * dk**-0.5)
    if kind == "delta" and not case["qk_norm"]:
        k = k / k.norm(dim=-1, keepdim=True).clamp(min=1.0)
    if case["keys"] == "equal" and length:
        k = k[:, :, :1].expand_as(k)
    if case["keys"] == "zeros":
        q, k = (
            torch.where(normal(seed + 2 + i, *x.shape[:3], 1) > 0.7, 0.0, x) for i, x in enumerate((q, k))
        )
    if case["keys"] == "positive" or ("norm" in kind and case["keys"] == "random"):
        q, k = q.abs(), k.abs()
    v = normal(seed + 4, batch, heads, length, dv, size=sizes[2])
    gates = dtype if case["gates"] == "same" else torch.float32
    tensors = {"q": q, "k": k, "v": v}
    tensors = {n: t.to(dtype) for n, t in tensors.items()}
    for name, t in (
        ("decay", _decay(case, heads, batch, length)),
        ("beta", _beta(case, heads, batch, length)),
    ):
        if t is not None:
            tensors[name] = t.to(gates)
    if case["state"] or case["step"]:
        sequences = batch if case["documents"] is None else len(case["documents"])
        columns = dv + ("norm" in kind)
        state = normal(seed + 6, sequences, heads, dk, columns, size=sizes[3])
        tensors["initial_state"] = state.abs() if "norm" in kind else state
    # a step's state is written, and has to have a place for each element
    layouts = [
        h if n != "initial_state" or not case["step"] else min(h, 4)
        for n, h in zip(NAMES, case["layouts"], strict=True)
    ]
    return {n: laid_out(t, layouts[NAMES.index(n)]) for n, t in tensors.items()}


def _options(case: dict) -> dict:
    kind = case["kind"]
    return {
        "delta_rule": kind == "delta",
        "normalize": "norm" in kind,
        "qk_norm": case["qk_norm"],
        "scale": case["dk"] ** -0.5 if case["scale"] is None else case["scale"],
    }


# --- around the chunks ------------------------------------------------------------------------------------------------


def _root(x: Off, qk_norm: bool) -> Off | None:
    """1 / sqrt(sum x^2 + 1e-6) of rows."""
    if not qk_norm:
        return None
    return ((x * x).sum(-1) + number(1e-6)).reciprocal_root()


def _of_norm(grad: Product, x: Off, root: Off | None) -> Product:
    """The gradient of rows whose norms were taken, from that of x, the rows with it: root (grad - x (x . grad)), of any parts of grad."""
    if root is None:
        return grad

    def along(g: torch.Tensor, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return r * x * (x * g).sum(-1, keepdim=True)

    few = x.value.shape[-1] + 8
    across = product(torch.mul, grad, root, roundings=few)
    taken = product(along, grad, x, root, roundings=few)
    size = grad.size * magnitude(root) + along(grad.size, magnitude(x), magnitude(root))
    return Product(across.value - taken.value, across.off + taken.off + share(few) * size, size)


def _divided(sums: Product, normalize: bool) -> tuple[Off, Off | None]:
    """(the sums over their last column, one over that): 0 where it is 0, and unknown where it may be."""
    if not normalize:
        return sums, None
    columns = sums.value.shape[-1] - 1
    x, d = cut(sums, -1, 0, columns), cut(sums, -1, columns, columns + 1)
    zero = (d.value == 0) & (d.off == 0)
    least = d.value.abs() - d.off
    one = torch.where(zero, 1.0, d.value)
    reciprocal = torch.where(zero, 0.0, 1 / one)
    off = torch.where(least > 0, reciprocal.abs() * (d.off / least + 2 * U), torch.inf)
    inverse = Off(reciprocal, torch.where(zero, 0.0, off))
    value = x.value * reciprocal
    value_off = magnitude(x) * inverse.off + x.off * reciprocal.abs() + U * value.abs() + 2.0**-149
    return Off(value, torch.where(zero, 0.0, value_off)), inverse


def _of_division(grad: Off, out: Off, inverse: Off | None) -> Off:
    """The gradient of the sums and their divisor."""
    if inverse is None:
        return grad
    few = grad.value.shape[-1] + 4
    by_sums = product(torch.mul, grad, inverse, roundings=2)
    by_divisor = product(lambda g, o, r: (g * o).sum(-1, keepdim=True) * r, grad, out, inverse, roundings=few)
    return joined([by_sums, negative(by_divisor)], -1)


def _heads(x: Off, group: int) -> Off:
    return Off(x.value.repeat_interleave(group, 1), x.off.repeat_interleave(group, 1))


def _nothing(x: torch.Tensor) -> Product:
    return Product(x, torch.zeros_like(x), torch.zeros_like(x))


class _Document:
    """Tokens of one sequence, forward and back."""

    def __init__(self, case: dict, rows: dict, state: Off):
        self.case, self.rows, self.first = case, rows, state
        self.scale = number(_options(case)["scale"])
        self.length = rows["q"].value.shape[-2]

    def forward(self) -> tuple[Off, Off]:
        self.chunks, self.inverses = [], []
        state = self.first
        if self.case["kind"].startswith("all"):
            return self._forward_of_all()
        parts = []
        for first in range(0, self.length, CHUNK):
            rows = {n: cut(x, -2, first, min(first + CHUNK, self.length)) for n, x in self.rows.items()}
            delta = self.case["kind"] == "delta"
            b = rows["b"].value
            self.chunks.append(Chunk(rows["q"], rows["k"], rows["v"], rows["a"], b, self.scale, delta, state))
            parts.append(self.chunks[-1].outputs())
            state = self.chunks[-1].after()
        sums = joined(parts, -2) if parts else _nothing(self.rows["v"].value)
        self.out, self.inverse = _divided(sums, "norm" in self.case["kind"])
        return self.out, state

    def _forward_of_all(self) -> tuple[Off, Off]:
        q, k, v = (self.rows[n] for n in "qkv")
        self.last = self.first
        if self.length:
            written = product(lambda k, v: k.mT @ v, k, v, roundings=self.length + 4)
            size = written.size + magnitude(self.first)
            off = written.off + self.first.off + share(self.length + 4) * size
            self.last = Product(written.value + self.first.value, off, size)
        sums = product(lambda q, s, c: q @ s * c, q, self.last, self.scale, roundings=q.value.shape[-1] + 4)
        known(self.last, sums)
        self.out, self.inverse = _divided(sums, "norm" in self.case["kind"])
        return self.out, self.last

    def back(self, grad: Off, after: Off) -> dict[str, Product]:
        grad = _of_division(grad, self.out, self.inverse)
        # where a divisor may be 0 nothing is known of any gradient
        known(grad)
        if self.case["kind"].startswith("all"):
            return self._back_of_all(grad, after)
        parts = {}
        for i in reversed(range(len(self.chunks))):
            first = i * CHUNK
            rows = cut(grad, -2, first, min(first + CHUNK, self.length))
            parts[i] = self.chunks[i].back(rows, after)
            after = parts[i]["state"]
        found = {"state": after}
        for name in ("q", "k", "v", "decay", "beta"):
            of = {"q": "q", "k": "k", "v": "v", "decay": "a", "beta": "b"}[name]
            each = [parts[i][name] for i in range(len(self.chunks))]
            found[name] = joined(each, -2) if each else _nothing(self.rows[of].value)
        return found

    def _back_of_all(self, grad: Off, after: Off) -> dict[str, Product]:
        q, k, v = (self.rows[n] for n in "qkv")
        dk, columns = q.value.shape[-1], v.value.shape[-1]
        of_state = after
        if self.length:
            read = product(lambda q, g, c: q.mT @ g * c, q, grad, self.scale, roundings=self.length + 6)
            size = read.size + magnitude(after)
            off = read.off + after.off + share(self.length + 4) * size
            of_state = Product(read.value + after.value, off, size)
        known(of_state)
        return {
            "state": of_state,
            "q": product(lambda g, s, c: g @ s.mT * c, grad, self.last, self.scale, roundings=columns + 8),
            "k": product(lambda v, s: v @ s.mT, v, of_state, roundings=columns + 8),
            "v": product(torch.matmul, k, of_state, roundings=dk + 4),
            "decay": _nothing(self.rows["a"].value),
            "beta": _nothing(self.rows["b"].value),
        }


def _rows(case: dict, inputs: dict) -> tuple[dict, dict]:
    """What chunks take, of all tokens and value heads, and the roots of qk_norm."""
    v = inputs["v"].double()
    group = v.shape[1] // max(inputs["q"].shape[1], 1)
    rows, roots = {}, {}
    for name in ("q", "k"):
        x = given(inputs[name])
        roots[name] = _root(x, case["qk_norm"])
        x = x if roots[name] is None else x * roots[name]
        rows[name] = _heads(x, group)
        roots[name] = None if roots[name] is None else _heads(roots[name], group)
    one = torch.ones(*v.shape[:3], 1, dtype=torch.float64)
    rows["v"] = given(torch.cat([v, one], -1) if "norm" in case["kind"] else v)
    rows["b"] = given(inputs["beta"][..., None] if "beta" in inputs else one)
    decay = inputs.get("decay")
    if decay is None:
        rows["a"] = given(one)
    else:
        a = factors(decay)
        shape = (*v.shape[:3], decay.shape[-1] if decay.dim() == 4 else 1)
        if decay.dim() < 4:
            a = Off(*(x[:, None, None] if decay.dim() == 1 else x[..., None] for x in (a.value, a.off)))
        rows["a"] = Off(a.value.expand(shape), a.off.expand(shape))
    return rows, roots


def _bounds(case: dict, inputs: dict, grads: list) -> tuple[list, dict | None]:
    rows, roots = _rows(case, inputs)
    v, heads = inputs["v"], case["heads"][1]
    columns = case["dv"] + ("norm" in case["kind"])
    batch, length = v.shape[0], v.shape[2]
    lengths = [length] if case["documents"] is None else case["documents"]
    spans = list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))
    sequences = batch if case["documents"] is None else len(lengths)
    first = torch.zeros(sequences, heads, case["dk"], columns, dtype=torch.float64)
    first = inputs.get("initial_state", first).double()

    def own(i: int) -> slice:
        return slice(None) if case["documents"] is None else slice(i, i + 1)

    def tokens(parts: list, like: torch.Tensor) -> Product:
        return joined([*parts, _nothing(torch.zeros_like(like[:, :, sum(lengths) :]).double())], 2)

    documents = [
        _Document(case, {n: cut(x, -2, *span) for n, x in rows.items()}, given(first[own(i)]))
        for i, span in enumerate(spans)
    ]
    forward = [document.forward() for document in documents]
    states = [state for _, state in forward]
    results = [tokens([out for out, _ in forward], v), joined(states, 0) if states else _nothing(first)]
    if all(g is None for g in grads):
        return results, {}
    of_out = torch.zeros(v.shape, dtype=torch.float64) if grads[0] is None else grads[0]
    of_state = torch.zeros_like(first) if grads[1] is None else grads[1]
    try:
        backs = [
            document.back(given(of_out[:, :, begin:end]), given(of_state[own(i)]))
            for i, (document, (begin, end)) in enumerate(zip(documents, spans, strict=True))
        ]
    except Unknown:
        return results, None
    of_rows = {
        name: tokens([b[name] for b in backs], rows[row].value)
        for name, row in (("q", "q"), ("k", "k"), ("v", "v"), ("decay", "a"), ("beta", "b"))
    }
    of_first = joined([b["state"] for b in backs], 0) if backs else _nothing(first)
    return results, _gradients(case, rows, roots, of_rows) | {"initial_state": of_first}


def _gradients(case: dict, rows: dict, roots: dict, found: dict[str, Product]) -> dict[str, Product]:
    """Of the tensors that rows were made from: without their norms, ones and heads that share a key head."""
    key_heads, heads = case["heads"]
    found = found | {"v": cut(found["v"], -1, 0, case["dv"]), "beta": over(found["beta"], -1)}
    for name in ("q", "k"):
        grad = _of_norm(found[name], rows[name], roots[name])
        if key_heads:
            groups = [
                getattr(grad, x).unflatten(1, (key_heads, heads // key_heads))
                for x in ("value", "off", "size")
            ]
            grad = over(Product(*groups), 2)
        found[name] = grad
    if case["decay"] == "head":
        found["decay"] = over(found["decay"], 0, 2, 3)
    elif case["decay"] == "token":
        found["decay"] = over(found["decay"], -1)
    return found


# --- checks -----------------------------------------------------------------------------------------------------------


def check(case: dict) -> None:
    with one_thread():
        (_check_step if case["step"] else _check_whole)(case)


def _check_whole(case: dict) -> None:
    documents = case["documents"]
    length = case["length"] if documents is None else sum(documents) + case["length"] % 4
    inputs = _inputs(case, length)
    wanted = [n for i, n in enumerate(NAMES) if case["wanted"] >> i & 1 and n in inputs]
    options = _options(case) | {"causal": not case["kind"].startswith("all")}
    if documents is not None:
        options["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(documents)])
    op = partial(fa.linear_attention, return_state=True)
    check_call(case, op, inputs | options, wanted, lambda grads: _bounds(case, inputs, grads))


def _check_step(case: dict) -> None:
    """Tokens one by one, each from the state that the kernel left."""
    inputs = _inputs(case, 3)
    state, options = inputs["initial_state"], _options(case)
    for t in range(3):
        token = {n: x if x.dim() == 1 else x[:, :, t] for n, x in inputs.items() if n != "initial_state"}
        before = state.clone()
        true_state = before.double()
        true = fa.linear_attention_step(
            **{n: wide(x) for n, x in token.items()}, state=true_state, **options, backend="reference"
        )
        with kernels(case["isa"], case["threads"]), torch.no_grad():
            out = fa.linear_attention_step(**token, state=state, **options, backend="cpu")
        one = {n: x if x.dim() == 1 else x.unsqueeze(2) for n, x in token.items()} | {"initial_state": before}
        expected = _step_bounds(case, one)
        if expected is None:
            return
        within("result", out, true, expected[0])
        within("state", state, true_state, expected[1])


def _step_bounds(case: dict, inputs: dict) -> tuple[Off, Off] | None:
    """One token is a chunk of one: the kernel's sums are other ones, S^T q and q . k apart, of the same terms."""
    try:
        (out, state), _ = _bounds(case | {"documents": None}, inputs, [None, None])
    except Unknown:
        return None
    return Off(out.value.squeeze(2), out.off.squeeze(2)), state
