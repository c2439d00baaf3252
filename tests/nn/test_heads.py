"""FourierHead, TemperatureNet, spherical_z_loss and sigma_reparam: their definitions in float64, with gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import fastattn as fa
from fastattn.nn import FourierHead, TemperatureNet, sigma_reparam, spherical_z_loss


def randn(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_fourier_head_is_the_density_of_its_autocorrelation(frequencies, more, seed):
    torch.manual_seed(seed)
    bins = frequencies + more
    head = FourierHead(5, bins, frequencies).double()
    h = randn(2, 3, 5, seed=seed)
    got = head(h)
    u, v = (h @ head.coefficients.weight.T + head.coefficients.bias).chunk(2, -1)
    a = torch.complex(u, v)
    c = [(a[..., : frequencies + 1 - k].conj() * a[..., k:]).sum(-1) for k in range(frequencies + 1)]
    centres = -1 + (2 * torch.arange(bins, dtype=torch.float64) + 1) / bins
    density = 0.5 + sum(
        ((c[k] / c[0].real)[..., None] * torch.exp(1j * math.pi * k * centres)).real
        for k in range(1, frequencies + 1)
    )
    # waves were rounded to float32 where the layer was made in float32
    torch.testing.assert_close(got.exp(), density * 2 / bins, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda h: head(h).exp(), h)


def test_fourier_head_learns_a_peak_compiles_and_takes_bfloat16():
    torch.manual_seed(0)
    head = FourierHead(4, 20, 5)
    h, target = torch.randn(64, 4), torch.full((64,), 7)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(60):
        loss = F.nll_loss(head(h), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (head(h).argmax(-1) == 7).all() and loss < math.log(20) - 1
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), head(h), rtol=1e-5, atol=1e-5)
    assert head.bfloat16()(h.bfloat16()).dtype == torch.float32


def z_loss(h, weight, target, a, b):
    o = h @ weight.T
    z = (o.gather(-1, target[..., None])[..., 0] - o.mean(-1)) / o.std(-1, correction=0)
    return F.softplus(a * (b - z)) / a


@settings(max_examples=30)
@given(
    st.integers(1, 5),
    st.integers(2, 20),
    st.integers(1, 7),
    st.floats(0.1, 3),
    st.floats(-2, 5),
    st.integers(0, 99),
)
def test_spherical_z_loss_is_its_formula(N, V, d, a, b, seed):
    h, weight = randn(N, d, seed=seed), randn(V, d, seed=seed + 1)
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    got = spherical_z_loss(h, weight, target, a=a, b=b, reduction="none")
    want = z_loss(h, weight, target, a, b)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for x, y in zip(*(torch.autograd.grad(out.sum(), [h, weight]) for out in (got, want)), strict=True):
        # two classes: z is +-1 whatever the logits are, and both gradients are rounding
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    total = spherical_z_loss(h, weight, target, a=a, b=b, reduction="sum")
    torch.testing.assert_close(total, want.sum())
    torch.testing.assert_close(spherical_z_loss(h, weight, target, a=a, b=b), want.mean())


def test_spherical_z_loss_is_invariant_and_loses_no_digits_to_a_mean():
    h, weight, target = randn(6, 8), randn(30, 8, seed=1), torch.arange(6)
    want = spherical_z_loss(h, weight, target, a=1, b=2)
    shifted = (weight + 100 * torch.ones(8) / 8).float()  # every logit moves by about 100 sum(h) / 8
    got = spherical_z_loss(h.float(), shifted, target, a=1, b=2)
    assert got.dtype == torch.float32
    # the weights at 12 are rounded at 12 * 2^-24 = 7e-7 each, of which a logit sums 8
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(spherical_z_loss(3 * h, weight, target, a=1, b=2), want)


def test_spherical_z_loss_ignores_rows_and_flat_logits():
    h, weight = randn(4, 3), randn(7, 3, seed=1)
    target = torch.tensor([2, -100, 5, -100])
    got = spherical_z_loss(h, weight, target, a=1, b=2)
    torch.testing.assert_close(got, z_loss(h[[0, 2]], weight, target[[0, 2]], 1, 2).mean())
    (grad,) = torch.autograd.grad(got, h)
    assert (grad[[1, 3]] == 0).all() and (grad[[0, 2]] != 0).any(1).all()
    flat = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    loss = spherical_z_loss(flat, weight, torch.tensor([0, 1]), a=1, b=2)
    torch.testing.assert_close(loss, F.softplus(torch.tensor(2.0, dtype=torch.float64)))
    assert torch.autograd.grad(loss, flat)[0].eq(0).all()
    assert spherical_z_loss(h, weight, torch.full((4,), -100), a=1, b=2) == 0
    compiled = torch.compile(spherical_z_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h, weight, target, a=1, b=2), got)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": 0}, ValueError, "a is 0; it must be over 0"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target is .* it must be int64, \(4,\)"),
        ({"target": torch.zeros(4)}, ValueError, "target is torch.float32"),
        ({"weight": torch.zeros(7, 3)}, TypeError, "h is torch.float64 and weight torch.float32"),
        ({"weight": torch.zeros(7, 2, dtype=torch.float64)}, ValueError, r"weight \(7, 2\)"),
    ],
)
def test_bad_z_losses(changes, error, message):
    given = {
        "h": randn(4, 3),
        "weight": randn(7, 3),
        "target": torch.zeros(4, dtype=torch.int64),
        "a": 1,
        "b": 2,
    }
    given |= changes
    with pytest.raises(error, match=message):
        spherical_z_loss(given.pop("h"), given.pop("weight"), given.pop("target"), **given)


def test_temperature_net_is_its_formula_and_its_loss_the_robust_one():
    torch.manual_seed(0)
    net = TemperatureNet(6, 9, low=0.3, high=2).double().eval()
    with torch.no_grad():
        net.log_scale.fill_(0.4)
        net.score.bias.fill_(0.2)
    x, h, weight = randn(2, 5, 6), randn(2, 5, 7, seed=1), randn(11, 7, seed=2)
    target = torch.randint(11, (2, 5))
    target[0, 1] = -100
    first, _, _, second = net.project
    z = (
        torch.sigmoid(x / x.norm(dim=-1, keepdim=True) @ first.weight.T + first.bias) @ second.weight.T
        + second.bias
    )
    score = ((torch.softmax(z / net.log_scale.exp(), -1) - 1 / 9) * z) @ net.score.weight[0] + net.score.bias
    tau = 0.3 + 1.7 * torch.sigmoid(score)
    torch.testing.assert_close(net(x), tau)
    o = h @ weight.T
    rows = tau * (torch.logsumexp(o / tau[..., None], -1) - math.log(11)) + 0.1 * tau
    rows = rows - o.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    want = rows[target != -100].mean()
    got = net.loss(x, h, weight, target, rho=0.1)
    torch.testing.assert_close(got, want)
    leaves = [x, h, weight, *net.parameters()]
    for a, b in zip(*(torch.autograd.grad(out, leaves) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert net.loss(x, h, weight, torch.full((2, 5), -100)) == 0
    assert ((net.low <= net(100 * x)) & (net(100 * x) <= net.high)).all()


def test_sigma_reparam_makes_gamma_the_largest_singular_value():
    torch.manual_seed(0)
    linear = nn.Linear(4, 6).double()
    W = linear.weight.detach().clone()
    assert sigma_reparam(linear) is linear
    torch.testing.assert_close(
        torch.linalg.matrix_norm(linear.weight, 2), torch.ones((), dtype=torch.float64)
    )
    gamma = linear.parametrizations.weight[0].gamma
    with torch.no_grad():
        gamma.fill_(1.7)
    G = randn(6, 4, seed=5).detach()
    grads = torch.autograd.grad((linear.weight * G).sum(), [linear.parametrizations.weight.original, gamma])
    W.requires_grad_()
    sigma = torch.linalg.svdvals(W)[0]
    factor = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad((factor / sigma * W * G).sum(), [W, factor])
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_sigma_reparam_keeps_a_layer_and_follows_its_weight():
    torch.manual_seed(0)
    linear = nn.Linear(5, 5).double()
    x = randn(3, 5)
    before = linear(x)
    sigma_reparam(linear, keep=True)
    torch.testing.assert_close(linear(x), before)
    with torch.no_grad():
        linear.parametrizations.weight.original.copy_(randn(5, 5, seed=9))
    linear.eval()
    stale = torch.linalg.matrix_norm(linear.weight, 2)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(linear.weight, 2), stale
    )  # a read in eval moves nothing
    linear.train()
    for _ in range(200):
        linear(x)
    gamma = linear.parametrizations.weight[0].gamma.detach()
    torch.testing.assert_close(
        torch.linalg.matrix_norm(linear.weight, 2).detach(), gamma, rtol=1e-6, atol=1e-6
    )
    again = sigma_reparam(nn.Linear(5, 5).double())
    again.load_state_dict(linear.state_dict())
    again.eval(), linear.eval()
    torch.testing.assert_close(again(x), linear(x))
    parametrize.remove_parametrizations(linear, "weight")
    torch.testing.assert_close(linear(x), again(x))


def test_sigma_reparam_in_a_recurrence_and_in_a_compiled_graph():
    """A layer that is called twice: each call's backward has its own u and v."""
    torch.manual_seed(0)
    linear = sigma_reparam(nn.Linear(4, 4, bias=False))
    x = torch.randn(3, 4)
    linear(linear(x).tanh()).sum().backward()
    grad = linear.parametrizations.weight.original.grad
    assert grad is not None and torch.isfinite(grad).all() and grad.any()
    linear.eval()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), linear(x))
    block = fa.nn.blocks.PostNormBlock(8, 2, 4, 12, rope_theta=1e4, eps=1e-6)
    sigma_reparam(block.mlp.down_proj)
    routing = fa.nn.blocks.Routing(None, torch.arange(5))
    plain = fa.nn.blocks.PostNormBlock(8, 2, 4, 12, rope_theta=1e4, eps=1e-6)
    block.eval()
    with torch.no_grad():
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            plain.get_submodule(name).weight.copy_(block.get_submodule(name).weight)
    y = torch.randn(2, 5, 8)
    torch.testing.assert_close(block(y, routing), plain(y, routing))


def test_bad_arguments():
    linear = sigma_reparam(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="reparametrised already"):
        sigma_reparam(linear)
    with pytest.raises(TypeError, match="ReLU has no weight of two dimensions"):
        sigma_reparam(nn.ReLU())
    with pytest.raises(ValueError, match="frequencies is 5; it must be under the 5 bins"):
        FourierHead(2, 5, 5)
    with pytest.raises(ValueError, match="bins is 0"):
        FourierHead(2, 0, 1)
    with pytest.raises(ValueError, match="hidden is 0"):
        TemperatureNet(2, 0)
    with pytest.raises(ValueError, match="low and high are 2 and 1; they must be over 0, rising"):
        TemperatureNet(2, low=2, high=1)
