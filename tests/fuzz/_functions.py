"""Random score functions as trees: of numbers, integers and conditions, drawn from a seed, built from whatever values are given."""

from __future__ import annotations

import random

import torch

ROWS = 13  # of the table that a function reads
WHOLE = torch.arange(50) * 7 % 13  # integers that it reads

UNARY_F = ("neg", "abs", "tanh", "sigmoid", "relu", "cos", "erf", "square", "logp", "expn", "root", "half")
BINARY_F = ("add", "add", "sub", "mul", "mul", "max", "min", "where", "div")
UNARY_I = ("neg", "abs", "lookup")
BINARY_I = ("add", "sub", "mul", "max", "min", "floordiv", "mod", "and", "or", "xor", "shr", "where")


def whole(rng: random.Random, depth: int):
    if depth <= 0:
        return rng.choice("bhqk") if rng.random() < 0.6 else rng.randint(-9, 40)
    op = rng.choice((*UNARY_I, *BINARY_I))
    if op in UNARY_I:
        return op, whole(rng, depth - 1)
    if op == "where":
        return op, condition(rng, depth - 1), whole(rng, depth - 1), whole(rng, depth - 1)
    if op in ("floordiv", "mod"):
        return op, whole(rng, depth - 1), rng.choice((-7, -2, -1, 1, 2, 3, 8, 10))
    if op == "shr":
        return op, whole(rng, depth - 1), rng.randint(0, 5)
    return op, whole(rng, depth - 1), whole(rng, depth - 2)


def condition(rng: random.Random, depth: int):
    if depth > 0 and rng.random() < 0.5:
        op = rng.choice(("and", "or", "xor", "not"))
        return op, *(condition(rng, depth - 1) for _ in range(1 if op == "not" else 2))
    return rng.choice(("lt", "le", "gt", "ge", "eq", "ne")), whole(rng, depth), whole(rng, depth - 1)


def number(rng: random.Random, depth: int, side: int = 99):
    """side: the most depth of an operand beside the deepest, so that a deep function stays within what kernels take."""
    if depth <= 0:
        leaf = rng.choice(("s", "s", "constant", "table", "i2f"))
        if leaf == "constant":
            return round(rng.uniform(-4, 4), 3)
        return leaf if leaf == "s" else (leaf, whole(rng, 2))
    op = rng.choice((*UNARY_F, *BINARY_F))
    if op in UNARY_F:
        return op, number(rng, depth - 1, side)
    if op == "where":
        other = number(rng, min(depth - 1, side))
        return op, condition(rng, min(2, side)), number(rng, depth - 1, side), other
    return op, number(rng, depth - 1, side), number(rng, min(depth - rng.randint(1, 2), side))


def build(tree, values: dict, table: torch.Tensor):
    """A tree's value; values: of s, b, h, q and k, tensors or what a trace sees."""
    if isinstance(tree, (int, float)):
        return tree
    if isinstance(tree, str):
        return values[tree]
    op, *rest = tree
    args = [build(t, values, table) for t in rest]
    # what only functions of torch take, of a Python number too
    tensors = [values["k"] * 0 + a if isinstance(a, (bool, int, float)) else a for a in args]
    match op:
        case "neg":
            return -args[0]
        case "add":
            return args[0] + args[1]
        case "sub":
            return args[0] - args[1]
        case "mul":
            return args[0] * args[1]
        case "div":
            return args[0] / (1 + abs(args[1]))
        case "half":
            return args[0] * 0.5 - 0.25
        case "lt" | "le" | "gt" | "ge" | "eq" | "ne":
            return getattr(torch, op)(tensors[0], tensors[1])
        case "and":
            return tensors[0] & tensors[1]
        case "or":
            return tensors[0] | tensors[1]
        case "xor":
            return tensors[0] ^ tensors[1]
        case "not":
            return ~tensors[0]
        case "shr":
            return tensors[0] >> args[1]
        case "floordiv":
            return tensors[0] // args[1]
        case "mod":
            return tensors[0] % args[1]
        case "max":
            return torch.maximum(tensors[0], tensors[1])
        case "min":
            return torch.minimum(tensors[0], tensors[1])
        case "where":
            return torch.where(tensors[0], tensors[1], tensors[2])
        case "lookup":
            return WHOLE[tensors[0] % 50]
        case "table":
            return table[tensors[0] % ROWS]
        case "i2f":
            return tensors[0] / 8
        case "square":
            return args[0] * args[0]
        case "root":
            return torch.sqrt(tensors[0].abs() + 1)
        case "logp":
            return torch.log1p(tensors[0].abs())
        case "expn":
            return torch.exp(-tensors[0].abs())
        case "abs":
            return abs(args[0])
        case "tanh" | "sigmoid" | "relu" | "cos" | "erf":
            return getattr(torch, op)(tensors[0])
    raise AssertionError(op)
