"""Forwards that stand for those of single modules of a model, and the probes that prove them equal.

A replaced forward is an attribute of one instance: classes and modules of Python stay as they are. At every call it looks at the
module again and steps aside, to the forward of the module's class, wherever it is not the same computation: other dtypes, devices
or tensors than those it was proved for, a layer that was exchanged or got a hook, torch.compile (which fuses these itself).
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.blocks import FUSED_ROWS
from ..nn.plain import is_untouched
from ..ops.fused_linear import fused_linear
from ..ops.matvec import MOST_ROWS, matvec
from ..ops.rowwise import rms_norm, swiglu
from ..runtime.registry import needs_grad
from ._functions import with_globals

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
DEVICES = ("cpu", "cuda")
# On a CPU, from where our ops are faster than torch's: a call of an op takes longer than that of a small function of torch's.
FEWEST_PRODUCTS = 1 << 20  # rows x inputs x outputs of a linear layer of half precision
FEWEST_NUMBERS = 1 << 14  # of an MLP's gate, of queries


class Left(Exception):
    """Why a module keeps its own forward."""


class Replaced:
    """The forward of one module. Copied and pickled with it."""

    kind: str
    left: tuple[str, ...] = ()  # what of the module keeps its own computation, and why

    def __init__(self, module: Any) -> None:
        self.module: Any = module

    @property
    def __signature__(self) -> inspect.Signature:
        """transformers reads the names of a model's arguments off its forward."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's class."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Substituted(Replaced):
    """A module's own forward, with other functions for names of its modeling file."""

    def __init__(self, module: Any, names: dict[str, Any]) -> None:
        super().__init__(module)
        self.names = names
        self.code: tuple[Callable, Callable] | None = None  # (the class's forward, the same with our globals)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "code": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.module).forward
        if torch.compiler.is_compiling():
            return forward(self.module, *args, **kwargs)
        if self.code is None or self.code[0] is not forward:
            self.code = forward, with_globals(forward, self.names)
        return self.code[1](self.module, *args, **kwargs)


class Layer(Replaced):
    """The forward of a module of one tensor. A call with more than that is the module's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            x = args[0]
            if not self.is_slower(x) and self.serves(x):
                return self.ours(x)
        return type(self.module).forward(self.module, *args, **kwargs)

    def serves(self, x: Tensor) -> bool:
        """Whether `ours` is what the module computes of x, as the module is now."""
        raise NotImplementedError

    def is_slower(self, x: Tensor) -> bool:
        """Whether the module's own forward is faster, whatever x is."""
        return False

    def ours(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def is_plain(t: Any) -> bool:
    """Whether t is a tensor and nothing more, of a dtype and device that the kernels serve."""
    return type(t) in (Tensor, nn.Parameter) and t.dtype in DTYPES and t.device.type in DEVICES


def is_small(x: Tensor, width: int) -> bool:
    """Whether rows of this width, as many as x has, are few enough for torch's functions on a CPU."""
    return x.device.type == "cpu" and x.numel() // max(1, x.shape[-1]) * width < FEWEST_NUMBERS


# --- linear layers ---------------------------------------------------------------------------------------------------


def plain_layer(layer: Any, like: Tensor) -> bool:
    """Whether calling `layer` is a product with its weight, of like's dtype and device, and nothing else."""
    if not is_untouched(layer, nn.Linear):
        return False
    weight: Any = layer._parameters.get("weight")
    bias: Any = layer._parameters.get("bias", layer)
    return (
        type(weight) in (nn.Parameter, Tensor)
        and (bias is None or (type(bias) in (nn.Parameter, Tensor) and bias.dtype == weight.dtype))
        and weight.dtype == like.dtype
        and weight.device == like.device
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias: torch's product, or ours where the CPU's product of half-precision numbers is far from its speed."""
    if x.device.type == "cpu" and x.dtype in HALF and x.shape[-1] and not torch.is_autocast_enabled("cpu"):
        rows = x.numel() // x.shape[-1]
        if rows >= FUSED_ROWS:
            added = None if bias is None else bias.expand(*x.shape[:-1], -1)
            return fused_linear(x, weight, residual=added)
        if rows <= MOST_ROWS and bias is None and not needs_grad((x, weight)):
            return matvec(x, weight)
    return nn.functional.linear(x, weight, bias)


class Linear(Layer):
    """A linear layer of half-precision weights, whose products on a CPU are ours."""

    kind = "linear"

    def is_slower(self, x: Tensor) -> bool:
        weight = self.module._parameters["weight"]
        return x.numel() * weight.shape[0] < FEWEST_PRODUCTS

    def serves(self, x: Tensor) -> bool:
        weight, bias = (self.module._parameters.get(name) for name in ("weight", "bias"))
        return (
            is_plain(x)
            and is_plain(weight)
            and weight.dtype == x.dtype
            and weight.device == x.device
            and (bias is None or (is_plain(bias) and bias.dtype == weight.dtype))
        )

    def ours(self, x: Tensor) -> Tensor:
        parameters = self.module._parameters
        return product(x, parameters["weight"], parameters.get("bias"))


def linear(module: Any) -> Linear | None:
    """The replaced forward of a torch.nn.Linear of half precision on a CPU; None for other modules."""
    if type(module) is not nn.Linear or module.weight.device.type != "cpu" or module.weight.dtype not in HALF:
        return None
    _check_parameters(module, ("weight", "bias"))
    return Linear(module)


# --- RMSNorm ---------------------------------------------------------------------------------------------------------


class Norm(Layer):
    """x rsqrt(mean(x^2) + eps) (weight + offset) with fastattn.rms_norm."""

    kind = "rms_norm"

    def __init__(self, module: Any, eps: str, offset: float) -> None:
        super().__init__(module)
        self.eps, self.offset = eps, offset

    def serves(self, x: Tensor) -> bool:
        weight = self.module._parameters.get("weight")
        return (
            is_plain(x)
            and x.dim() > 0
            and x.shape[-1] > 0
            and (
                weight is None
                or (
                    type(weight) in (nn.Parameter, Tensor)
                    and weight.dtype == x.dtype
                    and weight.device == x.device
                    and weight.shape == x.shape[-1:]
                )
            )
        )

    def ours(self, x: Tensor) -> Tensor:
        weight = self.module._parameters.get("weight")
        return rms_norm(x, weight=weight, eps=getattr(self.module, self.eps), weight_offset=self.offset)


_EPS = ("variance_epsilon", "eps", "epsilon")


def norm(module: Any) -> Norm | None:
    """The proved replacement of an RMSNorm, with a weight or without; None for a module that is none. Raises Left."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    eps = next((name for name in _EPS if isinstance(getattr(module, name, None), float)), None)
    if eps is None or module._modules or module._buffers or (not own and "Norm" not in type(module).__name__):
        return None
    if set(own) - {"weight"} or (own and own["weight"].dim() != 1):
        return None
    _check_parameters(module, ("weight",))
    device, dtype = (
        (own["weight"].device, own["weight"].dtype) if own else (torch.device("cpu"), torch.float32)
    )
    widths = (own["weight"].shape[0],) if own else (24, 64)
    found = [
        offset
        for offset in (0.0, 1.0)[: 1 + len(own)]
        if all(
            _is_norm(module, eps, offset, w, t, device)
            for w in widths
            for t in dict.fromkeys((torch.float32, dtype))
        )
    ]
    if len(found) != 1:
        raise Left("its output is not that of rms_norm with its weight, nor with 1 + its weight")
    return Norm(module, eps, found[0])


def _is_norm(
    module: Any, eps: str, offset: float, width: int, dtype: torch.dtype, device: torch.device
) -> bool:
    generator = torch.Generator().manual_seed(0)
    size = getattr(module, eps) ** 0.5
    # rows around the size of eps tell whether it is added, where, and whether small rows are treated apart
    sizes = torch.tensor([3.0, 1.0, size, 0.3 * size, 0.0]).unsqueeze(1)
    rows = (torch.randn(5, width, generator=generator) * sizes).to(device, dtype)
    given = module._parameters.get("weight") is not None
    weight = {"weight": torch.randn(width, generator=generator).to(device, dtype)} if given else {}
    probed = _double(module, **weight)
    # a sum of D squares, a root, two products; in half precision a rounding before the weight and one after
    relative = (4 + math.sqrt(width)) * torch.finfo(torch.float32).eps
    relative += 2 * torch.finfo(dtype).eps if dtype in HALF else 0.0
    return _agrees(Norm(probed, eps, offset), probed, rows, relative, elementwise=True)


# --- gated MLPs ------------------------------------------------------------------------------------------------------


class _GateUp(torch.autograd.Function):
    """x gate^T | x up^T side by side, each product written where `swiglu` reads it."""

    @staticmethod
    def forward(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return _gate_up(x, gate, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up = ctx.saved_tensors
        of_gate, of_up = grad.split((gate.shape[0], up.shape[0]), -1)
        wanted = ctx.needs_input_grad
        of_x = torch.addmm(of_gate @ gate, of_up, up) if wanted[0] else None
        return of_x, of_gate.T @ x if wanted[1] else None, of_up.T @ x if wanted[2] else None


def _gate_up(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    both = x.new_empty(x.shape[0], gate.shape[0] + up.shape[0])
    torch.mm(x, gate.T, out=both[:, : gate.shape[0]])
    torch.mm(x, up.T, out=both[:, gate.shape[0] :])
    return both


class GatedMLP(Layer):
    """down(silu(gate(x)) * up(x)) with fastattn.swiglu."""

    kind = "swiglu"

    def __init__(self, module: Any, names: tuple[str, ...]) -> None:
        super().__init__(module)
        self.names = names

    def serves(self, x: Tensor) -> bool:
        children = self.module._modules
        return (
            is_plain(x)
            and x.dim() > 0
            and not torch.is_autocast_enabled(x.device.type)
            and all(plain_layer(children.get(name), x) for name in self.names)
        )

    def is_slower(self, x: Tensor) -> bool:
        if x.device.type != "cpu":
            return False
        numbers = x.numel() * getattr(self.module._modules[self.names[-1]], "in_features", 0)
        if x.dtype in HALF:  # the products decide
            return numbers < FEWEST_PRODUCTS
        return numbers < FEWEST_NUMBERS * x.shape[-1]

    def ours(self, x: Tensor) -> Tensor:
        children = self.module._modules
        *into, down = ((children[name].weight, children[name].bias) for name in self.names)
        if len(into) == 1:
            gate_up = product(x, *into[0])
        elif not (x.device.type == "cpu" and x.dtype in HALF) and into[0][1] is None and into[1][1] is None:
            operands = x.reshape(-1, x.shape[-1]), into[0][0], into[1][0]
            both = _GateUp.apply(*operands) if needs_grad(operands) else _gate_up(*operands)
            gate_up = both.view(*x.shape[:-1], both.shape[-1])
        else:
            gate_up = torch.cat([product(x, *layer) for layer in into], -1)
        return product(swiglu(gate_up), *down)


_MLPS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "down_proj"),
)


def mlp(module: Any) -> GatedMLP | None:
    """The proved replacement of a gated MLP; None for a module that is none. Raises Left."""
    children = module._modules
    names = next((names for names in _MLPS if all(name in children for name in names)), None)
    if names is None:
        return None
    if module._parameters or module._buffers:
        raise Left("it has weights beside its linear layers")
    layers = [children[name] for name in names]
    for layer in layers:
        if not is_untouched(layer, nn.Linear):
            raise Left(f"one of its layers is {type(layer).__name__}, or has hooks or a forward of its own")
        _check_parameters(layer, ("weight", "bias"))
    if any(
        next(c.parameters(), None) is not None
        for n, c in children.items()
        if c is not None and n not in names
    ):
        raise Left("it has more layers with weights")
    first = layers[0].weight
    found = GatedMLP(module, names)
    generator = torch.Generator().manual_seed(0)
    for dtype in dict.fromkeys((torch.float32, first.dtype)):
        inner = 12
        widths = [inner] * 2 if len(names) == 3 else [2 * inner]
        doubles = {}
        for name, layer, (into, out) in zip(
            names, layers, [*((8, w) for w in widths), (inner, 8)], strict=True
        ):
            double = _double(
                layer, weight=torch.randn(out, into, generator=generator).to(first.device, dtype)
            )
            if layer.bias is not None:
                double._parameters["bias"] = nn.Parameter(
                    torch.randn(out, generator=generator).to(first.device, dtype)
                )
            doubles[name] = double
        probed = _double(module)
        probed.__dict__["_modules"] = {**children, **doubles}
        # large rows show a clamp, small ones a constant
        rows = torch.randn(5, 8, generator=generator) * torch.tensor([1.0, 0.1, 3.0, 30.0, 0.0])[:, None]
        # each output adds 12 products of numbers that add 8 each; half precision rounds gate, up, silu, their product, the sum
        bound = 5 * torch.finfo(dtype).eps * math.sqrt(8 * 12) + 16 * torch.finfo(torch.float32).eps
        replacement = GatedMLP(probed, names)
        if not _agrees(replacement, probed, rows.to(first.device, dtype), bound):
            raise Left("its output is not down(silu(gate) * up)")
    return found


# --- probing ---------------------------------------------------------------------------------------------------------


def _check_parameters(module: Any, names: tuple[str, ...]) -> None:
    """Raises Left for weights whose computation may be another than that of plain numbers."""
    for name in names:
        p = module._parameters.get(name)
        if p is None:
            continue
        if type(p) is not nn.Parameter:
            raise Left(f"its {name} is {type(p).__name__}")
        if not p.is_floating_point() or p.dtype not in DTYPES:
            raise Left(f"its {name} is {str(p.dtype).removeprefix('torch.')}")
        if p.device.type not in DEVICES:
            raise Left(f"its {name} is on {p.device.type}")


def _double(module: Any, **weights: Tensor) -> nn.Module:
    """A module of the same class and attributes with other weights. The model's own weights are not touched."""
    double: Any = object.__new__(type(module))
    double.__dict__.update(vars(module))
    double.__dict__["_parameters"] = {
        **dict.fromkeys(module._parameters),
        **{name: nn.Parameter(w, requires_grad=False) for name, w in weights.items()},
    }
    return double


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and the random state afterwards as before."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _agrees(
    replacement: Layer, module: Any, rows: Tensor, relative: float, elementwise: bool = False
) -> bool:
    """Whether both give the same, in training and in evaluation, within `relative` of each number, or of the row's largest."""
    with _undisturbed(rows.device):
        for training in (False, True):
            module.__dict__["training"] = training
            for x in (rows, rows[None]):
                if not replacement.serves(x):
                    return False
                try:
                    expected, actual = type(module).forward(module, x), replacement.ours(x)
                except Exception as error:
                    raise Left(f"its forward does not take rows alone: {type(error).__name__}") from error
                if not isinstance(expected, Tensor) or (expected.shape, expected.dtype) != (
                    actual.shape,
                    actual.dtype,
                ):
                    return False
                size = expected.double().abs()
                bound = relative * (size if elementwise else size.amax(-1, keepdim=True))
                if not bool(((actual.double() - expected.double()).abs() <= bound).all()):
                    return False
    return True
