"""Triton attention of queries aligned with the last key that key_lengths counts, in the interpreter."""

import pytest
import torch

import fastattn as fa
from fastattn import testing

MASKS = {
    "causal": lambda **of: fa.Mask(causal=True, **of),
    "window": lambda **of: fa.Mask(window=(5, 2), **of),
    "prefix": lambda **of: fa.Mask(prefix_lengths=torch.tensor([20, 3]), **of),
}
PACKED = {"cu_seqlens_q": torch.tensor([0, 5, 10]), "cu_seqlens_k": torch.tensor([0, 60, 120])}
ALIGNED = {"key_lengths": torch.tensor([37, 3]), "align": "key_lengths"}


def check(op, inputs):
    testing.check_op(
        lambda *x: op(*x, backend="triton"), lambda *x: op(*x, backend="reference"), inputs, terms=200
    )


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("score", ("softmax", "sigmoid"))
def test_attention(nan_outputs, score, kind, packed):
    shape = (1, 2, 1, 10, 120, 8) if packed else (2, 2, 1, 5, 60, 8)
    mask = MASKS[kind](**ALIGNED, **(PACKED if packed else {}))
    check(
        lambda *x, backend: fa.attention(*x, score=score, mask=mask, backend=backend),
        testing.attention_inputs(*shape),
    )


def test_more_queries_than_keys(nan_outputs):
    """Whole tiles of queries before the first key."""
    mask = fa.Mask(causal=True, **ALIGNED)
    check(
        lambda *x, backend: fa.attention(*x, mask=mask, backend=backend),
        testing.attention_inputs(2, 1, 1, 70, 60, 8),
    )


@pytest.mark.parametrize("power", (None, 3))
def test_lssa(nan_outputs, power):
    mask = fa.Mask(causal=True, **ALIGNED)
    check(
        lambda *x, backend: fa.softplus_attention(*x, power=power, mask=mask, backend=backend),
        testing.attention_inputs(2, 2, 1, 5, 60, 8),
    )


def test_grouped(nan_outputs):
    generator = torch.Generator().manual_seed(1)
    groups, key_groups = (torch.randint(1, 8, (2, n), generator=generator) for n in (5, 60))
    mask = fa.Mask(**ALIGNED)
    check(
        lambda *x, backend: fa.grouped_attention(
            *x, groups, key_groups=key_groups, window=2, mask=mask, backend=backend
        ),
        testing.attention_inputs(2, 2, 1, 5, 60, 8),
    )


def test_gated(nan_outputs):
    mask = fa.Mask(key_lengths=torch.tensor([30, 19]), align="key_lengths")
    a = testing.random_tensor(2, 30, 3).abs().requires_grad_()
    check(
        lambda *x, backend: fa.gated_attention(*x, window=4, sharpness=2.0, mask=mask, backend=backend),
        (*testing.attention_inputs(2, 2, 1, 30, 30, 8), a),
    )
