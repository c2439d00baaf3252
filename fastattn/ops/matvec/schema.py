"""torch.ops.fastattn.matvec: schema, fake, autograd, backends."""

import importlib
import math

from ... import _native
from ..._registry import Backend, register_op, save
from .checks import check_matvec

MOST_ROWS = _native.limits.matvec_rows


def _load(module: str):
    return lambda: importlib.import_module(f"{__package__}.{module}").matvec


def _refusal(*args):
    from . import cpu

    return cpu.refusal(*args)


def _configure(*args):
    from . import cpu

    return cpu.configure(*args)


def _fake(x, weight):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx, inputs, output):
    x, weight, _ = inputs
    save(ctx, x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x = grad @ weight if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.needs_input_grad[1]:
        rows = math.prod(x.shape[:-1])
        grad_weight = grad.reshape(rows, grad.shape[-1]).T @ x.reshape(rows, x.shape[-1])
    return grad_x, grad_weight, None


register_op(
    "matvec",
    "(Tensor x, Tensor weight, str backend) -> Tensor",
    fake=_fake,
    check=check_matvec,
    backends=(
        Backend("cpu", _load("cpu"), _refusal, _configure, devices=("cpu",)),
        Backend("reference", _load("reference")),
    ),
    backward=_backward,
    setup_context=_setup,
    twice=True,
)
