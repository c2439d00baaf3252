"""Triton LSSA and LSSAR in the interpreter, against the reference: outputs and gradients."""

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


def check(inputs, power, mask, terms=31):
    def run(backend):
        return lambda q, k, v: fa.softplus_attention(q, k, v, power=power, mask=mask, backend=backend)

    testing.check_op(run("triton"), run("reference"), inputs, terms=terms, names=("q", "k", "v"))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("power", (None, 3, 15))
def test_masks(power, kind, nan_outputs):
    check(testing.attention_inputs(1, 2, 1, 31, 31, 24, 12, layout="odd"), power, MASKS[kind]())


@pytest.mark.parametrize("power", (None, 3))
def test_float16(power, nan_outputs):
    check(testing.attention_inputs(1, 1, 1, 20, 35, 16, dtype=torch.float16), power, Mask(causal=True), 35)


def test_equal_scores_give_nothing():
    q, k, v = torch.ones(1, 1, 6, 4), torch.ones(1, 1, 6, 4), testing.random_tensor(1, 1, 6, 4)
    out = fa.softplus_attention(q, k, v, power=3, backend="triton")
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("power", (None, 3.0))
def test_what_is_no_number_stays(power, bad):
    """In a query it takes its row, in a key the rows that attend it."""
    for which, rows in ((0, [4]), (1, range(4, 9))):
        qkv = [testing.random_tensor(1, 2, 9, 8, seed=i) for i in range(3)]
        qkv[which][0, :, 4, 1] = bad
        expected = torch.tensor([row in rows for row in range(9)]).expand(1, 2, 9)
        for backend in ("triton", "reference"):
            found = fa.softplus_attention(*qkv, power=power, mask=Mask(causal=True), backend=backend)
            assert torch.equal(found.isnan().all(-1), expected) and torch.equal(
                found.isnan().any(-1), expected
            )


def test_lse_and_its_gradient(nan_outputs):
    mask = fa.Mask(
        cu_seqlens_q=torch.tensor([0, 9, 9, 35]), causal=True
    )  # the last rows belong to no document
    inputs = testing.attention_inputs(1, 2, 1, 37, 37, 16)

    def run(backend):
        return lambda *x: fa.lssa_attention(*x, mask=mask, return_lse=True, backend=backend)

    testing.check_op(run("triton"), run("reference"), inputs, terms=64, names=("q", "k", "v"))
    _, lse = run("triton")(*inputs)
    assert (lse[..., 35:] == -torch.inf).all()
