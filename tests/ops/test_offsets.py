"""Offsets past 2**31 elements, in address space that is reserved but, but for the tensors' own pages, never touched."""

import mmap

import pytest
import torch

import fastattn as fa

FAR = (1 << 31) + 64  # elements between two batches
ROW = (1 << 30) + 8  # and between two of three rows


@pytest.fixture(scope="module")
def space():
    """A bfloat16 tensor of 3 * 2**30 elements."""
    elements = 3 << 30
    no_reserve = 0x4000  # Linux's MAP_NORESERVE
    buffer = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(buffer, dtype=torch.bfloat16, count=elements)


def place(space, shape, strides, offset=0):
    """Random values of `shape` there."""
    t = space.as_strided(shape, strides, offset)
    return t.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(offset)))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "softplus"])
def test_attention(space, isa, score):
    far = [
        place(space, (2, 2, length, d), (FAR, 4096, 64, 1), i << 20)
        for i, (length, d) in enumerate(((5, 64), (7, 64), (7, 33)))
    ]
    found = []
    for tensors in (far, [t.clone() for t in far]):
        inputs = [t.detach().requires_grad_() for t in tensors]
        out = fa.attention(*inputs, score=score, mask=fa.Mask(causal=True))
        found.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "op",
    [
        fa.rms_norm,
        fa.swiglu,
        lambda x: fa.gated(x, x),
        lambda x: fa.rotary(x[None, None], x[None, None], torch.arange(3))[0],
        lambda x: fa.attention(*[x[None, None]] * 3),
        lambda x: fa.linear_cross_entropy(x, x.new_ones(50, 64), torch.arange(3)),
    ],
    ids=["rms_norm", "swiglu", "gated", "rotary", "attention", "linear_cross_entropy"],
)
def test_rows_far_apart(space, isa, op):
    x = place(space, (3, 64), (ROW, 1))
    assert torch.equal(op(x), op(x.clone()))
