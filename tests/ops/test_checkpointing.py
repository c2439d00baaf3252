"""Every op's gradients survive torch's activation checkpointing, which lets saved tensors be read only once."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastattn as fa
from fastattn import testing

Q = testing.random_tensor(1, 2, 20, 8, seed=1)
ROWS, WEIGHT, CODEBOOK = (testing.random_tensor(*size, seed=2) for size in ((8, 16), (32, 16), (4, 16)))
INDICES = torch.arange(32)
GROUPS = 1 << INDICES[None, :20] % 4
SCORES = testing.random_tensor(1, 20, 4, seed=3)

OPS = {
    "attention": (Q, lambda q: fa.attention(q, q, q)),
    "softplus_attention": (Q, lambda q: fa.softplus_attention(q, q, q, power=3)),
    "grouped_attention": (Q, lambda q: fa.grouped_attention(q, q, q, GROUPS, window=2)),
    "gated_attention": (SCORES, lambda s: fa.gated_attention(Q, Q, Q, s.softmax(-1), window=2)),
    "sinkhorn": (SCORES, fa.sinkhorn),
    "causal_conv1d": (SCORES, lambda x: fa.causal_conv1d(x, SCORES[0].T[:, :3], return_state=True)),
    "linear_scan": (SCORES, lambda x: fa.linear_scan(x, x + 1)),
    "selective_scan": (SCORES, lambda x: fa.selective_scan(x, x, -SCORES[0, :4], x, x, return_state=True)),
    "rms_norm": (Q, lambda x: fa.rms_norm(x, residual=x)),
    "swiglu": (ROWS, fa.swiglu),
    "gated": (Q, lambda x: fa.gated(x, x)),
    "rotary": (Q, lambda q: fa.rotary(q, q, INDICES[:20])),
    "fused_linear": (ROWS, lambda x: fa.fused_linear(x, WEIGHT, norm_eps=1e-6, swiglu=True)),
    "linear_cross_entropy": (ROWS, lambda h: fa.linear_cross_entropy(h, WEIGHT, INDICES[:8])),
    "stablemax_cross_entropy": (ROWS, lambda x: fa.stablemax_cross_entropy(x, INDICES[:8])),
    "vq_cross_entropy": (ROWS, lambda h: fa.vq_cross_entropy(h, CODEBOOK, INDICES % 4, INDICES[:8])),
    "vq_logits": (ROWS, lambda h: fa.vq_logits(h, CODEBOOK, INDICES % 4)),
}


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("name", OPS)
def test_gradients_are_those_without_it(name, backend):
    inputs, op = OPS[name]

    def total(x):
        return sum(t.sum() for t in testing.as_tuple(op(x)))

    grads = []
    with fa.set_backend(backend):
        for run in (total, lambda x: checkpoint(total, x, use_reentrant=False)):
            x = inputs.clone().requires_grad_(True)
            run(x).backward()
            grads.append(x.grad)
    assert grads[0].any() and torch.equal(*grads)
