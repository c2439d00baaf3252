"""torch's own samples of its functions (the OpInfo tables of the installed torch), run through ours: outputs and gradients against
torch's in float64. It prints how many samples of which table met which verdict. A program of its own, which `test_opinfo.py` starts:
the tables' module changes settings of torch and of hypothesis for its whole process."""

import collections
import json
import math
import sys
import types
import unittest

import torch
import torch.nn.functional as F

import fastattn as fa

# The tables stand beside torch's own test case, whose base class is all that they need of a package that is not installed here.
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
from torch.testing._internal import common_methods_invocations as common  # noqa: E402

EPS = torch.finfo(torch.float32).eps


def samples(info):
    torch.manual_seed(0)
    return info.sample_inputs(
        "cpu", torch.float32, requires_grad=True
    )  # one at a time: later ones change the former's arguments


def leaf(t):
    return t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t


def in_double(t):
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


def differentiated(function, tensors):
    """(outputs, the gradients of their sum times what differs by element), of the tensors that want one."""
    result = function(*tensors)
    outputs = result if isinstance(result, tuple) else (result,)
    leaves = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
    weighed = sum((o * torch.arange(1, o.numel() + 1).view(o.shape).to(o.dtype).sin()).sum() for o in outputs)
    found = torch.autograd.grad(weighed, leaves, allow_unused=True, materialize_grads=True)
    return [o.detach() for o in outputs], list(found)


def verdict(sample, ours, theirs, bound):
    """ "served", or the name of what was raised; a wrong result fails, by more than `bound` of the largest value of each tensor."""
    tensors = [
        sample.input,
        *sample.args,
        *(v for v in sample.kwargs.values() if isinstance(v, torch.Tensor)),
    ]
    names = [k for k, v in sample.kwargs.items() if isinstance(v, torch.Tensor)]
    rest = {k: v for k, v in sample.kwargs.items() if k not in names}
    count = 1 + len(sample.args)

    def call(function):
        return lambda *t: function(*t[:count], **dict(zip(names, t[count:], strict=True)), **rest)

    try:
        found, gradients = differentiated(call(ours), [leaf(t) for t in tensors])
    except (NotImplementedError, ValueError) as error:
        return f"refused: {error}"
    doubles = [in_double(t) if isinstance(t, torch.Tensor) else t for t in tensors]
    truth, true = differentiated(call(theirs), doubles)
    for a, b in zip(found + gradients, truth + true, strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert float((a.double() - b).abs().max()) <= bound * max(1.0, float(b.abs().max()))
    return "served"


def count(pairs, ours, theirs, bound):
    return collections.Counter(verdict(sample, ours, theirs, bound) for sample in pairs)


# --- linear_cross_entropy --------------------------------------------------------------------------------------------


def linear(h, weight, target, *, linear_bias=None, weight_of_classes=None, options=None, **rest):
    """torch's arguments: `weight` there has two meanings, by place and by name. options say how its chunks are cut."""
    return fa.linear_cross_entropy(
        h, weight, target, bias=linear_bias, class_weight=weight_of_classes, **rest
    )


def ours(h, matrix, target, weight=None, **rest):
    return linear(h, matrix, target, weight_of_classes=weight, **rest)


def theirs(h, matrix, target, *, options=None, **rest):
    return F.linear_cross_entropy(h, matrix, target, **rest)


# --- cross_entropy: of logits, which are h where the weight is the identity -------------------------------------------


def logits_loss(logits, target, weight=None, **rest):
    classes = logits.shape[1]
    soft = target.is_floating_point()
    h = logits.movedim(1, -1)
    target = target.movedim(1, -1) if soft else target
    return fa.linear_cross_entropy(h, torch.eye(classes, dtype=h.dtype), target, class_weight=weight, **rest)


# --- rms_norm: over the last dims, which are one after a reshape -------------------------------------------------------


def norm(x, shape, weight=None, eps=None):
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    flat = x.reshape(*x.shape[: x.dim() - len(shape)], math.prod(shape))
    weight = None if weight is None else weight.reshape(-1)
    return fa.rms_norm(flat, weight=weight, eps=eps).reshape(x.shape)


def their_norm(x, shape, weight=None, eps=None):
    return F.rms_norm(x, shape, weight, EPS if eps is None else eps)


# --- scaled_dot_product_attention: what is dropped differs, so those samples are compared without ------------------------------


def attend(*tensors, dropout_p=0.0, **rest):
    dropped = fa.scaled_dot_product_attention(*tensors, dropout_p=dropout_p, **rest)
    assert dropped.isfinite().all() and (dropout_p > 0 or dropped.numel() == 0 or dropped.any())
    return fa.scaled_dot_product_attention(*tensors, **rest)


def their_attention(*tensors, dropout_p=0.0, **rest):
    return F.scaled_dot_product_attention(*tensors, **rest)


# Samples of attention hold numbers up to 9 in 8 features: scores to 9 * 9 * 8 / sqrt(8) = 230, off by 8 eps of them, and so are weights,
# relative to 1; outputs are of values up to 9, gradients of sums of 8 products of these, of a scale and of 9.
# Linear samples have at most 8 features of numbers up to 9: logits to 700, whose float32 sums and differences are off by 8 eps of
# them, and so are probabilities and the losses' gradients, relative to 1, times an operand of 9. Logits of cross_entropy are given:
# a few eps of 9. A norm of few numbers is right to some eps; its gradient divides by rms, which is no less than 0.1 here.
TABLES = {
    "scaled_dot_product_attention": (attend, their_attention, 8 * 230 * EPS * 9 * 9),
    "linear_cross_entropy": (ours, theirs, 8 * 700 * EPS * 9),
    "cross_entropy": (logits_loss, F.cross_entropy, 8 * 9 * EPS),
    "rms_norm": (norm, their_norm, 8 * 9 * EPS * 10),
}

if __name__ == "__main__":
    found = {}
    for name, (our, their, bound) in TABLES.items():
        for info in common.op_db:
            if info.name == f"nn.functional.{name}":
                key = " ".join(filter(None, (name, info.variant_test_name)))
                found[key] = count(samples(info), our, their, bound)
    print(json.dumps(found))
