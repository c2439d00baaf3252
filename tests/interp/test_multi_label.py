"""The loss of rows with several right classes in the interpreter, against the reference."""

import pytest
import torch

import fastattn as fa
from fastattn import testing


@pytest.mark.parametrize("reduction", ("none", "mean"))
@pytest.mark.parametrize("classes", (7, 150))
def test_multi_label(reduction, classes, nan_outputs, monkeypatch):
    from fastattn.ops.cross_entropy import chunked

    monkeypatch.setattr(chunked, "_MIB", 4 * classes * 2)  # two rows of logits a chunk
    h = testing.random_tensor(5, 8, seed=1, requires_grad=True)
    weight = testing.random_tensor(classes, 8, seed=2, requires_grad=True)
    bias = testing.random_tensor(classes, seed=3, requires_grad=True)
    positives = torch.randint(classes, (5, 7), generator=torch.Generator().manual_seed(5))
    positives[:2, 2:] = -100
    positives[3] = -100
    positives[4] = torch.arange(7)  # of 7 classes, every one

    def run(backend):
        def fn(h, weight, bias):
            return fa.multi_label_cross_entropy(
                h, weight, positives, bias=bias, reduction=reduction, backend=backend
            )

        return fn

    testing.check_op(run("triton"), run("reference"), (h, weight, bias), terms=classes)
