"""flex_attention in Triton: published functions, forward and back, against autograd in float64."""

import pytest
import torch
from flex_mods import BATCH, HEADS, MASKS, SCORES

import fastattn as fa
from fastattn import testing

LENGTH = 40


def inputs(dtype=torch.float32, length=LENGTH, keys=None, dim=16, kv_heads=2, batch=BATCH):
    return testing.attention_inputs(batch, HEADS, kv_heads, length, keys or length, dim, dtype=dtype)


def run(score_mod, mask, captured, qkv, **options):
    """(out, lse and the gradients of q, k, v and of what is captured), as tensors of one list. score_mod: of what is captured."""
    leaves = [t.detach().requires_grad_() for t in qkv]
    captured = [t.detach().requires_grad_(t.is_floating_point()) for t in captured]
    function = None if score_mod is None else score_mod(*captured)
    out, lse = fa.flex_attention(*leaves, function, mask, enable_gqa=True, return_lse=True, **options)
    of_rows = torch.arange(lse.numel(), dtype=lse.dtype).view(lse.shape).sin()
    weights = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).cos().to(out.dtype)
    loss = (out * weights).float().sum() + (lse.masked_fill(lse.isinf(), 0.0) * of_rows).sum()
    loss.backward()
    floating = [t for t in captured if t.is_floating_point()]
    # a function without its score gives q and k no gradient
    return [out, lse, *(torch.zeros_like(t) if t.grad is None else t.grad for t in (*leaves, *floating))]


def check(score_mod, mask, captured, qkv):
    """The kernels' results against float64, by what eager torch in the same dtype is off by (testing.budget)."""
    low = [t.float() if t.is_floating_point() else t for t in captured]
    truth = run(score_mod, mask, [t.double() if t.is_floating_point() else t for t in low], [t.double() for t in qkv])
    eager = run(score_mod, mask, low, qkv, backend="reference")
    found = run(score_mod, mask, low, qkv, backend="triton")
    keys = max(qkv[0].shape[2], qkv[1].shape[2])
    for i, (mine, true, plain) in enumerate(zip(found, truth, eager, strict=True)):
        # a captured tensor's gradient is a sum over as many scores as read an element
        terms = keys if i < 5 else qkv[0].shape[0] * HEADS * keys * keys
        testing.assert_close_to_truth(mine, true, plain, factor=2.0 if i < 2 else 3.0, terms=terms, name=f"result {i}")


@pytest.mark.parametrize("score", SCORES)
def test_scores(score, nan_outputs):
    captured, score_mod = SCORES[score]
    check(score_mod, None, captured(LENGTH), inputs())


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, nan_outputs):
    captured, score_mod = SCORES["alibi"]
    check(score_mod, MASKS[mask](LENGTH), captured(LENGTH), inputs())
