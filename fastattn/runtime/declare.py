"""How an op is declared: once, from its `Call`.

`declare` defines `torch.ops.fastattn.<name>` (schema, fake, backends, autograd) and, where the op has gradients, the op
`<name>_backward`. The backward's schema, its fake, what autograd keeps and returns, and the reference's vector-Jacobian
products follow from the declaration and from the names in `Gradients`.
"""

import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import torch_private
from .registry import NUMBERS, OPS, TRACED, Backend, Op, dispatch, dispatch_values
from .schema import flat_fields, is_group, schema_of, type_of

_LIBRARY = torch.library.Library("fastattn", "FRAGMENT")


@dataclass(frozen=True)
class Gradients:
    """How an op is differentiated: by the op `<name>_backward`. Its members, in order: the gradients of `outputs`, the inputs up to
    the last one in `of`, the outputs in `saved`, the remaining inputs, and an integer `wanted` if there are `optional` inputs.

    of: the inputs that have a gradient, in order; the backward returns one for each.
    check, check_contents, backends: as in `declare`, for the backward. If no backend is named "reference", one is added: it
        recomputes the definition and returns its vector-Jacobian products.
    outputs: the differentiable outputs. If there are several, None stands for a gradient that is zero.
    saved: the outputs that the backward reads.
    optional: the inputs of `of` whose gradient is computed on request only. `wanted` has one bit for each, in this order. A
        gradient that is not wanted has shape (0,), and so has the gradient of an input that is None.
    """

    of: tuple[str, ...]
    check: Callable[..., None]
    backends: Sequence[Backend]
    outputs: tuple[str, ...] = ("out",)
    saved: tuple[str, ...] = ()
    check_contents: Callable[..., None] | None = None
    optional: tuple[str, ...] = ()

    def is_wanted(self, name: str, wanted: int) -> bool:
        return name not in self.optional or bool(wanted >> self.optional.index(name) & 1)


@dataclass(frozen=True)
class Autograd:
    """An op's own autograd functions, as torch.library.register_autograd takes them, where `Gradients` does not suffice.

    twice: whether the backward consists of differentiable operations. If not, create_graph raises NotImplementedError.
    """

    setup: Callable
    backward: Callable
    twice: bool = False


def declare(
    name: str,
    call: type,
    *,
    outputs: tuple[str, ...] = ("out",),
    fake: Callable,
    check: Callable[..., None],
    backends: Sequence[Backend],
    check_contents: Callable[..., None] | None = None,
    gradients: Gradients | Autograd | None = None,
    describe: Callable[..., str] | None = None,
) -> None:
    """Define `torch.ops.fastattn.<name>`.

    call: a NamedTuple of the op's members in the schema's order. Their types: Tensor, Tensor | None, list[Tensor], `Written` for a
        tensor that the op writes to, bool, str, float, float | None, int for a constant of a compiled graph, Size for any other
        integer. A member that is itself a NamedTuple is flattened in the schema. The schema gets a last argument, `str backend`.
    fake, check, check_contents: they take the members as positional arguments.
    fake: outputs of the right shapes, dtypes and strides, for tracing.
    check: raises ValueError, TypeError or NotImplementedError unless ranks, sizes, dtypes, devices and numbers are what the
        backends rely on. It runs before every call (from a public function, a compiled graph or torch.ops) and while tracing, so
        it must take a microsecond or two and read no tensor's contents.
    check_contents: the same for the elements of index tensors, before a call that computes.
    describe: what a call with these members computes, as lines that `explain` prints, if the members alone do not show it.
    """
    fields = typing.get_type_hints(call, include_extras=True)
    kept: tuple[str, ...] = ()
    if isinstance(gradients, Gradients):
        _declare_backward(name, fields, fake, outputs, backends, gradients)
        kept = tuple(n for n in gradients.saved if n not in gradients.outputs)
        gradients = _autograd(name, fields, outputs, gradients)
    _define(name, fields, outputs, fake, check, check_contents, backends, gradients, kept, describe)


# --- definition -----------------------------------------------------------------------------------------------------

# A float in a schema is a constant of a compiled graph, so every number would need its own graph. An op with floats therefore has
# two more overloads. A graph of Dynamo calls `traced`, which takes a symbolic number as it is. Below Dynamo the symbol becomes a
# 0-dim float64 CPU tensor, an input of the graph, and the graph calls `numbers`, which takes numbers as such tensors.
_FLOAT = re.compile(r"\bfloat(\??) ")


def _define(
    name: str,
    fields: dict[str, Any],
    outputs: tuple[str, ...],
    fake: Callable,
    check: Callable,
    check_contents: Callable | None,
    backends: Sequence[Backend],
    autograd: Autograd | None,
    kept: tuple[str, ...] = (),
    describe: Callable[..., str] | None = None,
) -> None:
    schema = schema_of(fields, len(outputs))
    group = next(((i, kind) for i, kind in enumerate(fields.values()) if is_group(kind)), None)
    kinds = [None if is_group(kind) else type_of(kind).rstrip("?") for kind in fields.values()]

    def members_of(*types: str) -> tuple[tuple[int, str], ...]:
        return tuple((i, n) for i, (n, kind) in enumerate(zip(fields, kinds, strict=True)) if kind in types)

    op = Op(
        name,
        fake,
        tuple(backends),
        check,
        check_contents,
        members_of("float"),
        members_of("int", "SymInt"),
        group,
        writes="!" in schema,
        outputs=outputs,
        kept=kept,
        describe=describe,
    )
    OPS[name] = op
    floats = {i for i, _ in op.numbers}  # their indices in the members and, before the group, in the schema
    if group is not None and any(i > group[0] for i in floats):
        raise ValueError(f"{name}: float members must stand before {list(fields)[group[0]]}")

    def run(*values):
        members = op.members(values[:-1])
        check(*members)
        if autograd is not None:
            return op.run(members, values[-1])
        with torch.no_grad():
            return op.run(members, values[-1])

    def run_numbers(*values):
        return run(*(float(a) if i in floats and a is not None else a for i, a in enumerate(values)))

    def run_fake(*values):
        members = op.members(values[:-1])
        # a number that became a tensor was checked before it did
        check(*(1.0 if i in floats and isinstance(a, torch.Tensor) else a for i, a in enumerate(members)))
        return fake(*members)

    overloads = {name: (schema, run)}
    if floats:
        overloads[f"{name}.{NUMBERS}"] = (_FLOAT.sub(r"Tensor\1 ", schema), run_numbers)
        _LIBRARY.define(f"{name}.{TRACED}" + _FLOAT.sub(r"Scalar\1 ", schema))
        _LIBRARY.impl(f"{name}.{TRACED}", partial(dispatch_values, name), "CompositeImplicitAutograd")
    for overload, (signature, implementation) in overloads.items():
        _LIBRARY.define(overload + signature)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(overload, implementation, key)
        torch.library.register_fake(f"fastattn::{overload}", run_fake, lib=_LIBRARY)
        if autograd is not None:
            torch.library.register_autograd(
                f"fastattn::{overload}",
                autograd.backward if autograd.twice else _differentiable_once(name, autograd.backward),
                setup_context=autograd.setup,
                lib=_LIBRARY,
            )


# --- gradients -------------------------------------------------------------------------------------------------------


def _differentiable_once(name: str, backward: Callable) -> Callable:
    def run(ctx, *grads):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"fastattn.{name}: create_graph is not supported, the op is differentiable once"
            )
        return backward(ctx, *grads)

    return run


def save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """Save tensors for the backward. Inference tensors are copied, because autograd cannot save them."""
    ctx.save_for_backward(*(t.clone() if t is not None and t.is_inference() else t for t in tensors))


def gradient_like(t: torch.Tensor | None, of: torch.Tensor, wanted: bool = True) -> torch.Tensor:
    """An uninitialised contiguous gradient of t; of shape (0,), like `of`, if t is None or its gradient is not wanted."""
    if t is None or not wanted:
        return of.new_empty(0)
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def bits(flags: Sequence[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def _cut(fields: dict[str, Any], of: tuple[str, ...]) -> int:
    """The number of inputs before the saved outputs in a backward's members."""
    return 1 + max(list(fields).index(name) for name in of)


def _autograd(name: str, fields: dict[str, Any], outputs: tuple[str, ...], g: Gradients) -> Autograd:
    flat = list(flat_fields(fields))
    places = {n: flat.index(n) for n in g.of}
    kept = [outputs.index(n) for n in g.saved]
    incoming = [outputs.index(n) for n in g.outputs]
    constant = [i for i in range(len(outputs)) if i not in incoming]
    # the inputs before `cut` include no group, so values and members have them at the same indices
    cut = _cut(fields, g.of)

    def setup(ctx, inputs, output):
        results = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*(results[i] for i in constant))
        ctx.where = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
        ctx.inputs = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        save(ctx, *(inputs[i] for i in ctx.where), *(results[i] for i in kept))
        first = results[incoming[0]]
        # for a zero gradient, where only later outputs have one
        ctx.first = (first.shape, first.dtype, first.device)
        ctx.set_materialize_grads(False)

    def backward(ctx, *grads):
        result = [None] * (len(flat) + 1)
        grads = [grads[i] for i in incoming]
        if all(grad is None for grad in grads):
            return tuple(result)
        # read ctx.saved_tensors once: under activation checkpointing every read recomputes them
        values, tensors = list(ctx.inputs), ctx.saved_tensors
        for i, t in zip(ctx.where, tensors, strict=False):
            values[i] = t
        saved = tensors[len(ctx.where) :]
        if grads[0] is None:
            shape, dtype, device = ctx.first
            grads[0] = torch.zeros(shape, dtype=dtype, device=device)
        *remaining, backend = values[cut:]
        needed = {n: values[i] is not None and ctx.needs_input_grad[i] for n, i in places.items()}
        remaining += [bits([needed[n] for n in g.optional])] if g.optional else []
        results = dispatch_values(f"{name}_backward", *grads, *values[:cut], *saved, *remaining, backend)
        for n, gradient in zip(g.of, results if isinstance(results, tuple) else (results,), strict=True):
            if needed[n]:
                result[places[n]] = gradient
        return tuple(result)

    return Autograd(setup, backward)


def _declare_backward(
    name: str,
    fields: dict[str, Any],
    fake: Callable,
    outputs: tuple[str, ...],
    backends: Sequence[Backend],
    g: Gradients,
) -> None:
    optional = torch.Tensor | None
    cut, inputs = _cut(fields, g.of), list(fields.items())
    members: dict[str, Any] = {f"grad_{n}": optional if i else torch.Tensor for i, n in enumerate(g.outputs)}
    num_grads, num_saved = len(members), len(g.saved)
    members |= dict(inputs[:cut]) | dict.fromkeys(g.saved, torch.Tensor) | dict(inputs[cut:])
    members |= {"wanted": int} if g.optional else {}
    places = {n: list(fields).index(n) for n in g.of}

    def inputs_of(args: Sequence[Any]) -> list:
        """The forward's members from the backward's."""
        end = len(args) - bool(g.optional)
        start = num_grads + cut
        return [*args[num_grads:start], *args[start + num_saved : end]]

    def fake_backward(*args):
        forward = inputs_of(args)
        like = next(t for t in forward if isinstance(t, torch.Tensor))
        return _one_or_all(
            [gradient_like(forward[i], like, g.is_wanted(n, args[-1])) for n, i in places.items()]
        )

    def reference(*args):
        forward = inputs_of(args)
        wrt = [i for n, i in places.items() if g.is_wanted(n, args[-1])]
        products = dict(zip(wrt, pull(definition, args[:num_grads], forward, wrt), strict=True))
        like = next(t for t in forward if isinstance(t, torch.Tensor))
        return _one_or_all(
            [like.new_empty(0) if products.get(i) is None else products[i] for i in places.values()]
        )

    definition = next(b.run for b in backends if b.name == "reference")
    implementations = list(g.backends)
    if not any(b.name == "reference" for b in implementations):
        implementations.append(Backend("reference", reference))
    _define(
        f"{name}_backward",
        members,
        tuple(f"grad_{n}" for n in g.of),
        fake_backward,
        g.check,
        g.check_contents,
        implementations,
        None,
    )


def _one_or_all(results: list[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    return results[0] if len(results) == 1 else tuple(results)


def pull(
    definition: Callable, grads: Sequence[torch.Tensor | None], members: Sequence[Any], wrt: Sequence[int]
) -> list[torch.Tensor | None]:
    """Vector-Jacobian products of a definition by recomputation: the gradient of each member numbered in `wrt`, contiguous.

    grads: the gradients of the definition's first outputs, None for a zero one. The result has None for a member that is None.
    """
    present = [i for i in wrt if members[i] is not None]
    if not present:
        return [None] * len(wrt)
    full = list(members)
    with torch_private.autograd_inside_an_op():
        for i in present:
            full[i] = members[i].detach().requires_grad_()
        result = definition(*full)
        result = result if isinstance(result, tuple) else (result,)
        pairs = [(r, g) for r, g in zip(result, grads, strict=False) if g is not None and r.requires_grad]
        gradients = torch.autograd.grad(
            [r for r, _ in pairs],
            [full[i] for i in present],
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    by_place = {i: g.contiguous() for i, g in zip(present, gradients, strict=True)}
    return [by_place.get(i) for i in wrt]


__all__ = [
    "Autograd",
    "Backend",
    "Gradients",
    "bits",
    "declare",
    "dispatch",
    "gradient_like",
    "pull",
    "save",
]
