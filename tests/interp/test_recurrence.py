"""Triton recurrence pieces in the interpreter, against the reference."""

import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.ops.recurrence import reference

SHAPES = [(33,), (3, 40), (2, 3, 130), (1, 2, 2, 2, 9)]


@pytest.fixture(autouse=True)
def on_triton(nan_outputs):
    with fa.set_backend("triton"):
        yield


def made(*shape, seed, dtype=torch.float32, layout="odd"):
    return testing.random_tensor(*shape, seed=seed, dtype=dtype, layout=layout, requires_grad=True)


def reference_norm(x, residual, weight):
    normed, total, _ = reference.rms_norm(x, residual, weight, 1e-6)
    return normed if residual is None else (normed, total)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("weight", (False, True))
def test_rms_norm(shape, residual, weight):
    inputs = (
        made(*shape, seed=1),
        made(*shape, seed=2) if residual else None,
        made(shape[-1], seed=3, layout="contiguous") if weight else None,
    )
    testing.check_op(lambda x, r, w: fa.rms_norm(x, residual=r, weight=w), reference_norm, inputs, terms=130)


def test_rms_norm_of_rows_longer_than_a_tile(monkeypatch):
    from fastattn.ops.recurrence import triton as kernels

    monkeypatch.setattr(kernels, "_MOST_COLUMNS", 32)
    inputs = (made(3, 70, seed=1), made(3, 70, seed=2), made(70, seed=3, layout="contiguous"))
    testing.check_op(lambda x, r, w: fa.rms_norm(x, residual=r, weight=w), reference_norm, inputs, terms=70)


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4)])
def test_swiglu_and_gate(shape, dtype):
    doubled = (*shape[:-1], 2 * shape[-1])
    testing.check_op(fa.swiglu, reference.swiglu, (made(*doubled, seed=1, dtype=dtype),))
    testing.check_op(
        fa.gated, reference.gated, (made(*shape, seed=1, dtype=dtype), made(*shape, seed=2, dtype=dtype))
    )


@pytest.mark.parametrize("layout", ("odd", "swapped"))
@pytest.mark.parametrize("positions", [torch.tensor([3, 0, 70000]), torch.tensor([[1, 2, 3], [9, 9, 0]])])
def test_rotary(positions, layout):
    q = made(2, 4, 3, 20, seed=1, layout=layout)
    k = made(2, 1, 3, 20, seed=2, layout=layout)
    testing.check_op(
        lambda q, k: fa.rotary(q, k, positions),
        lambda q, k: reference.rotary(q, k, positions, 10000.0, False),
        (q, k),
        # Angles are formed in float32: one of 70000 radians is known to eps/2 of itself, 0.004, as in the eager run.
        terms=4,
    )


def test_empty_tensors():
    assert fa.rms_norm(torch.empty(0, 8)).shape == (0, 8)
    assert (
        fa.rotary(torch.empty(1, 2, 0, 8), torch.empty(1, 1, 0, 8), torch.empty(0, dtype=torch.int64))[
            0
        ].numel()
        == 0
    )
