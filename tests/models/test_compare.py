"""The report's comparison: plain torch's step is the step that fastattn computes, and the patches do not outlive it."""

import copy

import pytest
import tiny
import torch

from fastattn.models import HrmText
from fastattn.nn import blocks
from fastattn.train import compare


@pytest.mark.parametrize("attend", [compare.eager, compare.sdpa])
def test_plain_torch_computes_the_same_loss_and_gradients(attend):
    torch.manual_seed(0)
    model = HrmText(tiny.config()).double()
    ids = torch.randint(0, 40, (1, 12))
    packed = {
        "prefix_lengths": torch.tensor([3, 2]),
        "cu_seqlens": torch.tensor([0, 7, 12]),
        "labels": ids.masked_fill(torch.arange(12) % 4 == 0, -100),
    }
    results = []
    for way in (None, attend):
        one = copy.deepcopy(model)
        if way is None:
            loss = one(ids, **packed).loss
        else:
            with compare.plain(way):
                loss = one(ids, **packed).loss
        loss.backward()
        results.append((loss.detach(), *(p.grad for p in one.parameters())))
    for ours, plain in zip(*results, strict=True):
        # the angles of both are rounded: to float32, whose unit is 6e-8, at positions of up to 12; a few hundred of them add up
        torch.testing.assert_close(plain, ours.to(plain.dtype), rtol=1e-5, atol=1e-6)


def test_nothing_stays_patched():
    before = {name: getattr(blocks, name) for name in ("_fuses", "rms_norm", "swiglu", "gated")}
    attended = blocks.Attention._attended
    with pytest.raises(RuntimeError, match="stop"), compare.plain(compare.eager):
        assert blocks.rms_norm is not before["rms_norm"]
        raise RuntimeError("stop")
    assert {name: getattr(blocks, name) for name in before} == before
    assert blocks.Attention._attended is attended
