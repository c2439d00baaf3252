"""Layers of linear attention, in float64 against loops over tokens, or sums over all pairs of them, written from their papers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from recurrences import random, same

import fastattn as fa
from fastattn import testing

WIDTH, HEADS = 16, 2


def rows(x, weight):
    """(B, L, H, D) projections."""
    return (x @ weight.T).unflatten(2, (HEADS, -1))


def parts(layer, x):
    """q, k, v (B, L, H, D) of the joint projection, through its convolution where there is one."""
    mixed = x @ layer.qkv.weight.T
    if layer.conv is not None:
        taps = layer.conv.shape[1]
        padded = F.pad(mixed, (0, 0, taps - 1, 0))
        mixed = F.silu(sum(layer.conv[:, i] * padded[:, i : i + x.shape[1]] for i in range(taps)))
    q, k, v = mixed.split([layer.keys, layer.keys, layer.values], -1)
    return *(t.unflatten(2, (layer.key_heads, -1)) for t in (q, k)), v.unflatten(2, (HEADS, -1))


def unit(t):
    return t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(t, eps=1e-6):
    return t / (t.square().mean(-1, keepdim=True) + eps).sqrt()


def loop(q, k, v, keep, write):
    """o_t = S_t^T q_t of S_t = write(keep_t S_{t-1}, k_t, v_t), each of (B, L, H, D); the state before the decay is given too."""
    S, out = q.new_zeros(q.shape[0], HEADS, k.shape[-1], v.shape[-1]), []
    for t in range(q.shape[1]):
        S = write(t, S * keep[:, t], k[:, t, :, :, None], v[:, t, :, None, :], S)
        out.append((S * q[:, t, :, :, None]).sum(2))
    return torch.stack(out, 1)


def add(t, S, k, v, before):
    return S + k * v


def pairs(scores, v):
    """sum_{i <= t} scores_ti v_i, over their sum; scores (B, H, L, L)."""
    scores = scores.tril()
    return ((scores @ v.transpose(1, 2)) / scores.sum(-1, keepdim=True)).transpose(1, 2)


def lightning(layer, x):
    q, k, v = (F.silu(t) for t in parts(layer, x))
    rate = torch.tensor([2.0 ** (-8 * h / HEADS) for h in (1, 2)], dtype=x.dtype) * layer.share
    keep = (-rate).exp()[None, None, :, None, None].expand(x.shape[0], x.shape[1], -1, 1, 1)
    out = rms(loop(q, k, v, keep, add).flatten(2)) * layer.norm
    return (out * torch.sigmoid(x @ layer.gate.weight.T)) @ layer.out.weight.T


def retention(layer, x):
    q, k, v = parts(layer, x)
    half = q.shape[-1] // 2
    angle = torch.arange(x.shape[1]).double()[:, None] / layer.theta ** (torch.arange(half).double() / half)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]

    def rotated(t):
        z = torch.complex(t[..., :half], t[..., half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    keep = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6]).double()[None, None, :, None, None]
    out = (
        loop(rotated(q), rotated(k), v, keep.expand(x.shape[0], x.shape[1], -1, 1, 1), add)
        / q.shape[-1] ** 0.5
    )
    out = (out - out.mean(-1, keepdim=True)) / (out.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (out.flatten(2) * F.silu(x @ layer.gate.weight.T)) @ layer.out.weight.T


def gated(layer, x):
    q, k, v = parts(layer, x)
    a = torch.sigmoid(layer.decay(x)).unflatten(2, (HEADS, -1)) ** (1 / 16)
    out = rms(loop(q, k, v, a[..., None], add) / q.shape[-1] ** 0.5) * layer.norm
    return (out.flatten(2) * F.silu(layer.gate(x))) @ layer.out.weight.T


def based(layer, x):
    q, k, v = parts(layer, x)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return pairs(1 + s + s**2 / 2, v).flatten(2) @ layer.out.weight.T


def hedgehog(layer, x):
    q, k, v = parts(layer, x)

    def phi(t, weight):
        y = torch.stack([t[:, :, h] @ weight[h] for h in range(HEADS)], 2)
        return F.softmax(torch.cat([y, -y], -1), -1)

    s = torch.einsum("bqhd,bkhd->bhqk", phi(q, layer.of_q), phi(k, layer.of_k))
    return pairs(s, v).flatten(2) @ layer.out.weight.T


def mala(layer, x):
    q, k, v = parts(layer, x)
    s = torch.einsum("bqhd,bkhd->bhqk", F.elu(q) + 1, F.elu(k) + 1).tril()
    total = s.sum(-1, keepdim=True)
    count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
    weights = ((1 + 1 / total) * s - total / count).tril()
    return (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2) @ layer.out.weight.T


def delta_net(layer, x, channels=False):
    q, k, v = parts(layer, x)
    beta = layer.strongest * torch.sigmoid(x @ layer.beta.weight.T)
    if channels:
        rate = F.softplus(layer.decay(x) + layer.dt_bias).unflatten(2, (HEADS, -1))
        keep = (-layer.A_log.exp()[:, None] * rate).exp()[..., None]
    else:
        keep = (-layer.A_log.exp() * F.softplus(layer.decay(x) + layer.dt_bias)).exp()[..., None, None]

    def write(t, S, k, v, before):
        return S + beta[:, t, :, None, None] * k * (v - (S * k).sum(2, keepdim=True))

    q, k = (unit(t).repeat_interleave(HEADS // layer.key_heads, 2) for t in (q, k))
    out = rms(loop(q, k, v, keep, write) / q.shape[-1] ** 0.5) * layer.norm
    gate = layer.gate(x)
    return (out.flatten(2) * (torch.sigmoid(gate) if channels else F.silu(gate))) @ layer.out.weight.T


def titans(layer, x):
    q, k, v = parts(layer, x)
    alpha, theta = torch.sigmoid(layer.alpha(x)), torch.sigmoid(layer.theta(x))

    def write(t, S, k, v, before):
        return S - theta[:, t, :, None, None] * k * ((before * k).sum(2, keepdim=True) - v)

    return loop(unit(q), unit(k), v, (1 - alpha)[..., None, None], write).flatten(2) @ layer.out.weight.T


nn = fa.nn
LAYERS = {
    "lightning": (lambda: nn.Lightning(WIDTH, HEADS, share=0.7), lightning),
    "retention": (lambda: nn.Retention(WIDTH, HEADS), retention),
    "gla": (lambda: nn.GatedLinearAttention(WIDTH, HEADS, rank=4), gated),
    "based": (lambda: nn.Based(WIDTH, HEADS, key_dim=4), based),
    "hedgehog": (lambda: nn.Hedgehog(WIDTH, HEADS), hedgehog),
    "mala": (lambda: nn.MagnitudeAware(WIDTH, HEADS), mala),
    "gated delta": (lambda: nn.GatedDeltaNet(WIDTH, HEADS, key_dim=4, value_dim=6, key_heads=1), delta_net),
    "negative": (lambda: nn.GatedDeltaNet(WIDTH, HEADS, taps=0, negative=True), delta_net),
    "kda": (lambda: nn.KimiDeltaAttention(WIDTH, HEADS, key_dim=4), lambda m, x: delta_net(m, x, True)),
    "titans": (lambda: nn.TitansMemory(WIDTH, HEADS), titans),
    "mamba2": (lambda: nn.Mamba2Block(WIDTH, heads=4, head_dim=6, states=5, groups=2), None),
}
PACKED = [name for name in LAYERS if name != "mala"]


def build(name):
    torch.manual_seed(0)
    return LAYERS[name][0]().double()


@pytest.mark.parametrize("name", [n for n, (_, definition) in LAYERS.items() if definition])
def test_a_layer_is_its_papers_recurrence(name):
    layer, definition = build(name), LAYERS[name][1]
    same(layer, lambda x: definition(layer, x), (random(2, 11, WIDTH),))
    layer.zero_grad()
    gradients = []
    for function in (layer, lambda x: definition(layer, x)):
        function(random(2, 11, WIDTH)).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in layer.named_parameters()})
        layer.zero_grad()
    for parameter, g in gradients[0].items():
        # sums over 22 tokens of what `same` compares
        assert g.any(), parameter
        assert testing.max_error(g, gradients[1][parameter]) < 1e-11 * (1 + testing.max_finite(g)), parameter


@pytest.mark.parametrize("name", LAYERS)
def test_a_state_goes_on_where_it_was_left(name):
    layer, x = build(name), random(2, 12, WIDTH)
    with torch.no_grad():
        whole, last = layer(x, return_state=True)
        outs, state = [], None
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 7), (7, 12)):
            out, state = layer(x[:, start:end], state, return_state=True)
            outs.append(out)
    # the same sums in another order
    assert testing.max_error(torch.cat(outs, 1), whole) < 1e-12 * (1 + testing.max_finite(whole))
    for a, b in zip(state, last, strict=True):
        assert testing.max_error(a.double(), b.double()) < 1e-12 * (1 + testing.max_finite(b.double()))


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_are_layers_calls_of_their_own(name):
    layer, x = build(name), random(1, 12, WIDTH)
    starts = torch.tensor([0, 0, 5, 6, 6, 12])
    with torch.no_grad():
        out, state = layer(x, return_state=True, cu_seqlens=starts)
        more = random(5, 1, WIDTH, seed=3)
        following = layer(more, state)
        for i, (start, end) in enumerate(itertools.pairwise(starts)):
            alone, own = layer(x[:, start:end], return_state=True)
            bound = 1e-12 * (1 + testing.max_finite(out))
            assert testing.max_error(out[:, start:end], alone) < bound if end > start else True
            assert testing.max_error(following[i : i + 1], layer(more[i : i + 1], own)) < bound


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_train_in_their_dtype(name, dtype):
    layer, x = build(name).to(dtype), testing.random_tensor(2, 70, WIDTH, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype and out.isfinite().all()
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    true = build(name).to(dtype).double()(x.double())
    # a layer is some ten products and norms, each rounded; what is large of few terms is off by their square root's multiple
    relative = float((out.detach().double() - true.detach()).norm() / true.detach().norm())
    assert relative < 32 * torch.finfo(dtype).eps


def test_features_of_based_are_the_second_order_expansion():
    q, k = random(3, 5), random(3, 5, seed=2)

    def features(q, k):
        return (nn.taylor_features(q) * nn.taylor_features(k)).sum(-1)

    def expansion(q, k):
        s = (q * k).sum(-1) / math.sqrt(5)
        return 1 + s + s**2 / 2

    same(features, expansion, (q, k))
    assert nn.taylor_features(torch.zeros(2, 16)).shape == (2, 153)


@pytest.mark.parametrize("prefix", [0, 1, 4, 9])
def test_a_prefix_is_read_whole_before_all_tokens(prefix):
    torch.manual_seed(0)
    layer = nn.PrefixLinearAttention(WIDTH, HEADS, key_dim=4).double()

    def kernel(q, k):
        s = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return 1 + s + s**2 / 2

    def definition(x):
        q, k, v = parts(layer, x)
        ke, ve = (x[:, :prefix] @ layer.prefix_kv.weight.T).split([layer.keys, layer.values], -1)
        ke, ve = (t.unflatten(2, (HEADS, -1)) for t in (ke, ve))
        weights = torch.cat([kernel(q, ke), kernel(q, k).tril()], -1)
        values = torch.cat([ve, v], 1).transpose(1, 2)
        out = (weights @ values) / weights.sum(-1, keepdim=True)
        return out.transpose(1, 2).flatten(2) @ layer.out.weight.T

    same(lambda x: layer(x, prefix=prefix), definition, (random(2, 9, WIDTH),))
    x = random(2, 9, WIDTH)
    with torch.no_grad():
        first, state = layer(x[:, :6], prefix=min(prefix, 6), return_state=True)
        if prefix <= 6:
            whole = torch.cat([first, layer(x[:, 6:], state)], 1)
            assert testing.max_error(whole, layer(x, prefix=prefix)) < 1e-12 * (1 + testing.max_finite(whole))


def test_mamba2_block_is_transformers():
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    from transformers import Mamba2Config

    torch.manual_seed(0)
    config = Mamba2Config(
        hidden_size=8,
        num_heads=4,
        head_dim=4,
        state_size=5,
        n_groups=2,
        chunk_size=8,
        num_hidden_layers=1,
        vocab_size=8,
    )
    mixer = modeling.Mamba2Mixer(config, 0).double()
    block = nn.Mamba2Block(
        8, heads=4, head_dim=4, states=5, groups=2, eps=mixer.norm.variance_epsilon
    ).double()
    block.load_state_dict(mixer.state_dict())
    x = testing.random_tensor(2, 20, 8, seed=1).double()
    with torch.no_grad():
        out, expected = block(x), mixer(x)
    # transformers has its scan and its norm in float32 inside
    assert testing.max_error(out, expected) < 64 * 2**-24 * (1 + testing.max_finite(expected))


def test_mamba2_block_is_its_recurrence():
    layer = build("mamba2")

    def definition(x):
        z, mixed, dt = (x @ layer.in_proj.weight.T).split(layer.sizes, -1)
        padded = F.pad(mixed, (0, 0, 3, 0))
        taps = (layer.conv1d.weight[:, 0, i] * padded[:, i : i + x.shape[1]] for i in range(4))
        u, B, C = F.silu(sum(taps) + layer.conv1d.bias).split([24, 10, 10], -1)
        u, dt = u.unflatten(2, (4, 6)), F.softplus(dt + layer.dt_bias)
        B, C = (t.unflatten(2, (2, 5)).repeat_interleave(2, 2) for t in (B, C))
        h, out = x.new_zeros(x.shape[0], 4, 5, 6), []
        for t in range(x.shape[1]):
            keep = (-layer.A_log.exp() * dt[:, t]).exp()[..., None, None]
            h = keep * h + dt[:, t, :, None, None] * B[:, t, :, :, None] * u[:, t, :, None]
            out.append((h * C[:, t, :, :, None]).sum(2) + layer.D[:, None] * u[:, t])
        y = torch.stack(out, 1).flatten(2) * F.silu(z)
        y = rms(y.unflatten(2, (2, 12)), 1e-5).flatten(2) * layer.norm.weight
        return y @ layer.out_proj.weight.T

    same(layer, definition, (random(2, 9, WIDTH),))


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="Lightning: width must be a multiple of heads, given 16 and 3"):
        nn.Lightning(16, 3)
    with pytest.raises(ValueError, match="Mamba2Block: heads must be a multiple of groups, given 4 and 3"):
        nn.Mamba2Block(16, heads=4, groups=3)
