"""Linear-time layers that call functions of their modeling file.

The functions are globals of that file, shared by all its models, and stay as they are. A replaced forward is the same code with a
dictionary of globals of its own, in which these names are ours.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import native
from ._linear_time import KINDS, UNSERVED, Draw, Function, documents
from ._replaced import DTYPES, HALF, Left, Substituted, _undisturbed

EPS = torch.finfo(torch.float32).eps


class Recurrent(Substituted):
    """The forward of a linear-time layer. Documents packed in its batch of one, which it is told of by `cu_seq_lens_q` or `seq_idx`, are
    sequences of their own in all functions that it calls, also in those that it does not tell."""

    def __init__(self, module: Any, kind: str, names: dict[str, Any]) -> None:
        super().__init__(module, names)
        self.kind = kind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        packed = not torch.compiler.is_compiling()
        offsets = offsets_of(kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")) if packed else None
        if offsets is None:
            return super().__call__(*args, **kwargs)
        token = documents.set(offsets)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            documents.reset(token)


def offsets_of(offsets: Any, indices: Any) -> Tensor | None:
    """Where documents begin, and the last one's end; indices: (1, L), each token's document. None for tensors of other devices."""
    if isinstance(offsets, Tensor):
        return offsets if offsets.device.type == "cpu" else None
    if not isinstance(indices, Tensor) or indices.device.type != "cpu":
        return None
    if indices.dim() != 2 or indices.shape[0] != 1:
        raise NotImplementedError(
            f"fastattn: accelerate: seq_idx is served for a batch of one, (1, L), given {tuple(indices.shape)}"
        )
    row = indices[0]
    starts = (row[1:] != row[:-1]).nonzero()[:, 0] + 1
    return F.pad(F.pad(starts, (1, 0)), (0, 1), value=row.shape[0])


def recurrent(module: Any, known: dict[Any, str | None]) -> Recurrent | None:
    """The forward of a linear-time layer, whose proved functions are ours; None for a module that calls none. Raises Left."""
    forward = inspect.unwrap(type(module).forward)
    called = getattr(getattr(forward, "__code__", None), "co_names", ())
    makers = {n: make for names in KINDS.values() for n, make in names.items() if n in called}
    makers = {n: make for n, make in makers.items() if callable(forward.__globals__.get(n))}
    if not makers:
        return None
    if not native.cpu_isas():
        raise Left("this installation has no compiled kernels")
    if "forward" in vars(module):
        raise Left("it has a forward of its own")
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None or weight.device.type != "cpu" or weight.dtype not in DTYPES:
        given = (
            "absent"
            if weight is None
            else f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
        )
        raise Left(f"its weights are {given}: kernels take float32, bfloat16 and float16 of a CPU")
    names, left = {}, []
    for name, make in makers.items():
        function = make(forward.__globals__[name])
        key = function.function, weight.dtype
        if key not in known:
            known[key] = _difference(function, weight.dtype)
        if known[key] is None:
            names[name] = function
        else:
            left.append(f"its {name} {known[key]}")
    if not names:
        raise Left("; ".join(left))
    kind = next(kind for kind, members in KINDS.items() if any(n in names for n in members))
    found = Recurrent(module, kind, names)
    found.left = tuple(left)
    return found


def _difference(function: Function, dtype: torch.dtype) -> str | None:
    """How a function of transformers differs from ours; None where they agree within roundings, in float32 and in dtype."""
    original = inspect.unwrap(function.function)
    with _undisturbed(torch.device("cpu")):
        for probed in dict.fromkeys((torch.float32, dtype)):
            # factors of 64 tokens are exponentials of sums of 64 numbers there, and 64 products here; each sum has as many terms
            relative = 2 * 64 * EPS
            if probed in HALF:
                relative += function.roundings * torch.finfo(probed).eps
            for args, options in function.probes(Draw(probed)):
                ours, theirs = ([a.clone() if isinstance(a, Tensor) else a for a in args] for _ in range(2))
                try:
                    expected = original(
                        *(_expanded_as(a, b) for a, b in zip(theirs, args, strict=True)), **options
                    )
                except Exception as error:
                    return f"does not take the arguments that are known: {type(error).__name__}"
                actual = function.ours(
                    *(_expanded_as(a, b) for a, b in zip(ours, args, strict=True)), **options
                )
                # what it returns, and the state that it writes
                pairs = [*_flat(actual, expected), *_flat(ours[:2], theirs[:2])]
                if actual is UNSERVED or not all(_close(a, b, relative) for a, b in pairs):
                    return "is not the function that is known by this name"
    return None


def _expanded_as(t: Any, like: Any) -> Any:
    """A clone with the zero strides of its original."""
    if not isinstance(t, Tensor) or 0 not in like.stride():
        return t
    first = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in like.stride())
    return like[first].expand(like.shape)


def _flat(actual: Any, expected: Any) -> list[tuple[Any, Any]]:
    if not isinstance(expected, (tuple, list)):
        return [(actual, expected)]
    same = isinstance(actual, (tuple, list)) and len(actual) == len(expected)
    return list(zip(actual, expected, strict=True)) if same else [(None, expected)]


def _close(actual: Any, expected: Any, relative: float) -> bool:
    if not isinstance(expected, Tensor):
        return actual is expected
    if not isinstance(actual, Tensor) or (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return False
    bound = relative * expected.double().abs().max()
    return bool((actual.double() - expected.double()).abs().max() <= bound)
