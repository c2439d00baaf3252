"""Every op's Triton kernels compute its definition on the typical calls that its examples are."""

import pytest
import torch

from fastattn import testing
from fastattn.runtime.examples import examples


@pytest.mark.filterwarnings(
    "ignore:divide by zero encountered:RuntimeWarning"
)  # log 0 of a row with nothing to attend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", examples())
def test_kernels_compute_the_definition(name, dtype, nan_outputs):
    example = examples(dtype)[name]
    if example.refusal("triton") is not None:
        pytest.skip(example.refusal("triton"))
    testing.check_example(example, "triton")
