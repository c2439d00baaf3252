"""Triton LSSA and LSSAR forward in the interpreter, against the reference."""

import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.masks import Mask

MASKS = {
    "full": lambda: None,
    "causal": lambda: Mask(causal=True),
    "window": lambda: Mask(window=(9, 4), key_lengths=torch.tensor([20])),
    "packed_prefix": lambda: Mask(
        cu_seqlens_q=torch.tensor([0, 9, 9, 30]), prefix_lengths=torch.tensor([4, 0, 12])
    ),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("power", (None, 3, 15))
def test_forward(power, kind, nan_outputs):
    inputs = testing.attention_inputs(1, 2, 1, 31, 31, 24, 12, layout="odd", requires_grad=False)
    mask = MASKS[kind]()

    def run(backend):
        return lambda q, k, v: fa.softplus_attention(q, k, v, power=power, mask=mask, backend=backend)

    testing.assert_within_budget(run("triton")(*inputs), run("reference"), inputs, terms=31)


def test_equal_scores_give_nothing():
    q, k, v = torch.ones(1, 1, 6, 4), torch.ones(1, 1, 6, 4), testing.random_tensor(1, 1, 6, 4)
    out = fa.softplus_attention(q, k, v, power=3, backend="triton")
    assert torch.equal(out, torch.zeros_like(out))
