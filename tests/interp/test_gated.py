"""Triton gated attention in the interpreter, against the reference: outputs and every gradient."""

import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.masks import Mask

MASKS = {
    "none": lambda: None,
    "narrowed": lambda: Mask(window=(25, None), key_lengths=torch.tensor([30])),
    "packed": lambda: Mask(cu_seqlens_q=torch.tensor([0, 9, 9, 35])),
    "prefix": lambda: Mask(prefix_lengths=torch.tensor([22])),
    "narrowed_prefix": lambda: Mask(
        prefix_lengths=torch.tensor([35]), window=(25, 9), key_lengths=torch.tensor([30])
    ),
    "packed_prefixes": lambda: Mask(
        cu_seqlens_q=torch.tensor([0, 9, 9, 35]), prefix_lengths=torch.tensor([9, 0, 20])
    ),
    "dense": lambda: Mask(dense=torch.rand(1, 1, 37, 37, generator=torch.Generator().manual_seed(3)) > 0.4),
}


def check(inputs, gate, window, mask=None, groups=5):
    length = inputs[0].shape[2]
    a = testing.random_tensor(1, length, groups, seed=4, dtype=inputs[0].dtype, requires_grad=True)
    sharpness = torch.tensor(0.7, requires_grad=True)

    def run(backend):
        return lambda q, k, v, a, s: fa.gated_attention(
            q, k, v, a, window=window, sharpness=s, gate=gate, mask=mask, backend=backend
        )

    names = ("q", "k", "v", "assignment", "sharpness")
    testing.check_op(run("triton"), run("reference"), (*inputs, a, sharpness), terms=1024, names=names)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("gate", ("multiply", "log"))
def test_is_the_equation(gate, kind, nan_outputs):
    check(testing.attention_inputs(1, 2, 1, 37, 37, 24, 12, layout="odd"), gate, 4, MASKS[kind]())


@pytest.mark.parametrize("gate", ("multiply", "log"))
def test_float16(gate, nan_outputs):
    check(testing.attention_inputs(1, 2, 2, 33, 33, 16, dtype=torch.float16), gate, 0, groups=20)


@pytest.mark.parametrize("gate", ("multiply", "log"))
def test_lse_and_its_gradient(gate, nan_outputs):
    a = testing.random_tensor(1, 37, 5, seed=4, requires_grad=True)
    sharpness, mask = torch.tensor(0.7, requires_grad=True), MASKS["narrowed_prefix"]()

    def run(backend):
        return lambda q, k, v, a, s: fa.gated_attention(
            q, k, v, a, window=4, sharpness=s, gate=gate, mask=mask, return_lse=True, backend=backend
        )

    inputs = (*testing.attention_inputs(1, 2, 1, 37, 37, 16), a, sharpness)
    names = ("q", "k", "v", "assignment", "sharpness")
    testing.check_op(run("triton"), run("reference"), inputs, terms=1024, names=names)
