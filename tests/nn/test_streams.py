"""ParallelStreams: equal to each stream alone with its prefix before the keys, in float64, with gradients; it does not leak."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn.nn import ParallelStreams
from fastattn.nn.blocks import PostNormBlock, PostNormStack, PreNormBlock, PreNormStack, Routing

D, H = 8, 2


def streams(P, prefix=3, layers=2, smoothing=0.1):
    torch.manual_seed(0)
    stack = PreNormStack(
        [PreNormBlock(D, H, D // H, 12, rope_theta=1e4, eps=1e-6) for _ in range(layers)], eps=1e-6
    )
    module = ParallelStreams(stack, P, prefix_length=prefix, smoothing=smoothing).double()
    torch.nn.init.normal_(module.prefixes)
    return module


def alone(module, x, routing, stream):
    """A stream written out: weights of the pre-norm blocks, attention as matrices, the prefix's keys first."""

    def rms(x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    def rotated(t):
        half = t.shape[-1] // 2
        frequencies = 1e4 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = routing.positions.double()[..., None] * frequencies
        angles = angles[:, None] if angles.dim() == 3 else angles
        a, b = t.split(half, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    B, L, _ = x.shape
    for layer, (keys, values) in zip(module.stack.layers, module.prefixes, strict=True):
        gate, q, k, v = (
            (rms(x) @ layer.attn.gqkv_proj.weight.T).view(B, L, 4, H, D // H).permute(2, 0, 3, 1, 4)
        )
        q, k = rotated(q), rotated(k)
        k = torch.cat([keys[stream].expand(B, -1, -1, -1), k], 2)
        v = torch.cat([values[stream].expand(B, -1, -1, -1), v], 2)
        scores = q @ k.transpose(-1, -2) / math.sqrt(D // H)
        if routing.mask is not None and routing.mask.causal:
            seen = torch.arange(k.shape[2])[None] <= torch.arange(L)[:, None] + keys.shape[2]
            scores = scores.masked_fill(~seen, -math.inf)
        out = (scores.softmax(-1) @ v) * torch.sigmoid(gate)
        x = x + out.transpose(1, 2).reshape(B, L, D) @ layer.attn.o_proj.weight.T
        g, u = (rms(x) @ layer.mlp.gate_up_proj.weight.T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(g) * u) @ layer.mlp.down_proj.weight.T
    return rms(x)


def definition(module, x, routing):
    P = module.streams
    h = [alone(module, x, routing, stream) for stream in range(P)]
    first, _, last = module.aggregate
    hidden = torch.nn.functional.silu(torch.cat(h, -1) @ first.weight.T + first.bias)
    w = (hidden @ last.weight.T + last.bias).softmax(-1)
    w = (1 - module.smoothing) * w + module.smoothing / P
    return sum(w[..., p : p + 1] * h[p] for p in range(P))


@settings(max_examples=15)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.booleans(), st.booleans(), st.integers(1, 4)
)
def test_is_each_stream_alone_with_its_prefix(P, B, L, causal, batched, prefix):
    module = streams(P, prefix)
    x = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    positions = torch.arange(L) + 2
    if batched:
        positions = positions + torch.arange(B)[:, None]
    routing = Routing(fa.Mask(causal=True) if causal else None, positions)
    got, want = module(x, routing), definition(module, x, routing)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    leaves = [x, *module.parameters()]
    probe = torch.cos(torch.arange(got.numel(), dtype=torch.float64)).view_as(got)
    names = ["x", *dict(module.named_parameters())]
    grads = (torch.autograd.grad((out * probe).sum(), leaves) for out in (got, want))
    for name, a, b in zip(names, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_no_token_sees_a_later_one():
    module = streams(3)
    x = torch.randn(2, 9, D, dtype=torch.float64)
    other = x.clone()
    other[:, 6:] += 3
    routing = Routing(fa.Mask(causal=True), torch.arange(9))
    with torch.no_grad():
        a, b = module(x, routing), module(other, routing)
    torch.testing.assert_close(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


def test_compiles_whole():
    module = streams(2).float()
    x, routing = torch.randn(2, 6, D), Routing(fa.Mask(causal=True), torch.arange(6))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, routing), module(x, routing), rtol=1e-5, atol=1e-5)


def test_bad_arguments():
    module = streams(2)
    x = torch.randn(1, 4, D, dtype=torch.float64)
    for name, mask in {
        "prefix_lengths": fa.Mask(prefix_lengths=torch.tensor([2])),
        "cu_seqlens_q": fa.Mask(causal=True, cu_seqlens_q=torch.tensor([0, 4])),
        "key_lengths": fa.Mask(key_lengths=torch.tensor([2])),
        "dense": fa.Mask(dense=torch.ones(4, 4, dtype=torch.bool)),
        "window": fa.Mask(window=(1, 1)),
    }.items():
        with pytest.raises(NotImplementedError, match=f"the mask has {name}"):
            module(x, Routing(mask, torch.arange(4)))
    with pytest.raises(ValueError, match=r"x has shape \(4, 8\)"):
        module(x[0], Routing(None, torch.arange(4)))
    for options, message in (
        ({"streams": 0}, "streams is 0"),
        ({"prefix_length": 0}, "prefix_length is 0"),
        ({"smoothing": 2}, "smoothing is 2; it must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ParallelStreams(module.stack, **{"streams": 2} | options)
    with pytest.raises(TypeError, match="stack is a Linear; it must have layers"):
        ParallelStreams(torch.nn.Linear(2, 2), 2)


def test_a_stack_without_a_cache_is_refused():
    block = PostNormBlock(D, H, D // H, 12, rope_theta=1e4, eps=1e-6)
    with pytest.raises(TypeError, match="layers' attn"):
        ParallelStreams(PostNormStack([block]), 2)
