"""examples/versatile_ffn.py: equal to the paper's formulas written token by token, with gradients."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # not installed

from versatile_ffn import VersatileFFN

D, HIDDEN = 6, 20


@pytest.fixture
def ffn():
    torch.manual_seed(0)
    return VersatileFFN(D, HIDDEN, experts=4, top_k=2, expert_size=3, loops=3).double()


def layer(ffn, h, neurons):
    normed = h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    gate, up = ffn.gate_up.weight[:HIDDEN][neurons], ffn.gate_up.weight[HIDDEN:][neurons]
    return h + (F.silu(normed @ gate.T) * (normed @ up.T)) @ ffn.down.weight[:, neurons].T


def definition(ffn, rows, soft, weights):
    """Equations 3 to 13, a token at a time."""
    results = []
    for h, p, q in zip(rows, soft, weights, strict=True):
        scores = (h @ ffn.router.weight.T).softmax(-1)
        width = torch.zeros(D, dtype=h.dtype)
        for k in scores.topk(2).indices.tolist():
            start = math.floor(k * (HIDDEN - 3) / 3)
            width = width + scores[k] * layer(ffn, h, list(range(start, start + 3)))
        state, depth = h, torch.zeros(D, dtype=h.dtype)
        for loop in range(3):
            state = layer(ffn, state, list(range(HIDDEN)))
            depth = depth + q[loop] * state
        share = (3 - (p * torch.arange(1, 4)).sum()) / 3
        results.append(share * width + (1 - share) * depth)
    return torch.stack(results)


@pytest.mark.parametrize("training", [False, True])
def test_is_the_paper_s_formulas(ffn, training):
    ffn.train(training)
    ffn.temperature = 0.7
    h = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    got = ffn(h)
    rows = h.view(-1, D)
    logits = rows @ ffn.looper.weight.T
    if training:
        torch.manual_seed(5)
        logits = (logits - torch.empty_like(logits).exponential_().log()) / 0.7
    soft = logits.softmax(-1)
    hard = F.one_hot(soft.argmax(-1), 3).double()
    want = definition(ffn, rows, soft, hard + soft - soft.detach() if training else hard).view(h.shape)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    leaves = [h, *ffn.parameters()]
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_no_token_sees_another(ffn):
    ffn.eval()
    h = torch.randn(1, 6, D, dtype=torch.float64)
    other = h.clone()
    other[:, 3:] += 2
    torch.testing.assert_close(ffn(h)[:, :3], ffn(other)[:, :3])


def test_experts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="8 experts of 3 neurons do not fit into 20"):
        VersatileFFN(D, HIDDEN, expert_size=3)
