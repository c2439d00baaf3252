"""The error budgets catch what they are there to catch."""

import math

import pytest
import torch

from fastattn import testing


def square_sum(x, y):
    return (x * x).sum(-1), x * y


def test_check_op_accepts_a_correct_op_and_rejects_wrong_values_and_gradients():
    inputs = [testing.random_tensor(4, 9, dtype=torch.bfloat16, seed=i, requires_grad=True) for i in (1, 2)]
    testing.check_op(lambda x, y: square_sum(x, y), square_sum, inputs, terms=9)
    with pytest.raises(AssertionError, match="output 1"):
        testing.check_op(lambda x, y: ((x * x).sum(-1), x * y * 1.02), square_sum, inputs, terms=9)
    with pytest.raises(AssertionError, match="gradient of x"):
        testing.check_op(
            lambda x, y: ((x * x).sum(-1), x.detach() * y), square_sum, inputs, terms=9, names="xy"
        )


def test_a_nan_or_a_wrong_infinity_is_an_infinite_error():
    truth = torch.tensor([1.0, -math.inf])
    assert testing.max_error(torch.tensor([1.0, -math.inf]), truth) == 0
    assert testing.max_error(torch.tensor([1.0, math.inf]), truth) == math.inf
    assert testing.max_error(torch.tensor([math.nan, -math.inf]), truth) == math.inf
    with pytest.raises(AssertionError):
        testing.assert_close_to_truth(torch.tensor([math.nan]), torch.tensor([1.0]), None)
    with pytest.raises(AssertionError, match="shape"):
        testing.max_error(torch.zeros(2), torch.zeros(2, 1))


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES, ids=str)
def test_uninitialised_memory_is_nan(nan_outputs, dtype):
    x = torch.zeros(3, 5, dtype=dtype)
    for empty in (torch.empty_like(x), x.new_empty(4), torch.empty(2, dtype=dtype), torch.empty_like(x.t())):
        assert empty.isnan().all()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts_hold_the_same_values_with_a_contiguous_last_dim(layout):
    x = testing.random_tensor(2, 3, 4, 5, layout=layout, seed=3)
    assert x.stride(-1) == 1
    assert torch.equal(x, testing.random_tensor(2, 3, 4, 5, seed=3))
    assert x.is_contiguous() == (layout == "contiguous")
