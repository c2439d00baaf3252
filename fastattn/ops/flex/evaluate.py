"""A graph's meaning in plain torch: each op of a graph or of a program as torch computes it."""

from collections.abc import Callable, Mapping, Sequence

import torch

from .graph import Graph


def _shift(op: Callable, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return op(x, by & 31)


def _integer_division(op: Callable, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Division by 0 gives 0: a program never stops."""
    safe = torch.where(y == 0, torch.ones_like(y), y)
    return torch.where(y == 0, torch.zeros_like(y), op(x, safe))


TORCH: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "abs": torch.abs,
    "min": torch.minimum,
    "max": torch.maximum,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "log": torch.log,
    "log1p": torch.log1p,
    "expm1": torch.expm1,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "floor": torch.floor,
    "sign": torch.sign,
    "pow": torch.pow,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
    "floordiv": lambda x, y: _integer_division(torch.floor_divide, x, y),
    "mod": lambda x, y: _integer_division(torch.remainder, x, y),
    "shl": lambda x, y: _shift(torch.bitwise_left_shift, x, y),
    "shr": lambda x, y: _shift(torch.bitwise_right_shift, x, y),
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "not": torch.bitwise_not,
    "select": torch.where,
    "i2f": lambda x: x.double(),
    "f2i": lambda x: x.trunc().long(),
    "b2i": lambda x: x.long(),
}


def evaluate(graph: Graph, outs: Sequence[int], inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The nodes `outs` in float64 and int64, `inputs` broadcast against each other; loads out of range raise IndexError."""
    values: dict[int, torch.Tensor] = {}
    device = next(iter(inputs.values())).device
    dtypes = {"f": torch.float64, "i": torch.int64, "b": torch.bool}
    for place in graph.reach(outs):
        node = graph.nodes[place]
        args = [values[a] for a in node.args]
        if node.op == "constant":
            values[place] = torch.tensor(node.value, dtype=dtypes[node.type], device=device)
        elif node.op == "input":
            values[place] = inputs[node.value]
        elif node.op == "load":
            tensor = graph.tensors[node.value].to(device, dtypes[node.type])
            values[place] = tensor[tuple(args)] if args else tensor
        else:
            values[place] = TORCH[node.op](*args)
    return [values[n] for n in outs]
