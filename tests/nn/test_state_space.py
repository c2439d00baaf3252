"""S5, HiSS and ParaRNN, in float64 against loops over tokens."""

import pytest
import torch
from recurrences import random, same
from torch import nn

import fastattn as fa
from fastattn import testing
from fastattn.nn import S4D, S5, HiSS, ParaGRU, newton_scan, perturbed_hippo


@pytest.mark.parametrize("states", [1, 8, 32])
def test_a_perturbed_hippo_matrix_is_diagonalised(states):
    eigenvalues, vectors = perturbed_hippo(states)
    i = torch.arange(states).double()
    A = -(2 * i[:, None] + 1).sqrt() * (2 * i + 1).sqrt()
    A = A.tril(-1) - torch.diag(i + 1)
    E = vectors @ torch.diag(eigenvalues) @ torch.linalg.inv(vectors) - A
    condition = float(torch.linalg.cond(vectors))
    assert condition < 1e6  # of HiPPO's own vectors at 32 states 6e18
    # rounding of the eigenvectors is multiplied by their condition
    allowed = 4 * condition * 2**-52 * float(torch.linalg.matrix_norm(A, 2))
    assert E.imag.abs().max() < allowed and abs(float(torch.linalg.matrix_norm(E.real, 2)) - 0.1) < allowed
    assert (eigenvalues.real < 0).all()


def test_s5_is_its_recurrence():
    torch.manual_seed(0)
    layer = S5(3, states=4).double()

    def definition(u):
        eigenvalues = torch.complex(-layer.log_decay.exp(), layer.frequency)
        keep = (eigenvalues * layer.log_dt.exp()).exp()
        B = ((keep - 1) / eigenvalues)[:, None] * torch.view_as_complex(layer.B)
        h, out = torch.zeros(u.shape[0], 4, dtype=keep.dtype), []
        for t in range(u.shape[1]):
            h = keep * h + u[:, t].to(keep.dtype) @ B.T
            out.append((h @ torch.view_as_complex(layer.C).T).real + layer.D * u[:, t])
        return torch.stack(out, 1)

    same(layer, definition, (random(2, 11, 3),))
    with torch.no_grad():
        x = random(2, 11, 3)
        whole, last = layer(x, return_state=True)
        first, state = layer(x[:, :5], return_state=True)
        empty, state = layer(x[:, 5:5], state, return_state=True)
        rest = [layer(x[:, 5:6], state, return_state=True)]
        rest.append(layer(x[:, 6:], rest[0][1], return_state=True))
        outs = torch.cat([first, empty, *(r[0] for r in rest)], 1)
    assert testing.max_error(outs, whole) < 1e-12 * (1 + testing.max_finite(whole))
    assert (rest[1][1] - last).abs().max() < 1e-12 * (1 + last.abs().max())
    layer(random(2, 11, 3)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_s5_is_the_dense_state_matrix():
    """Diagonalised, it computes with HiPPO plus the perturbation what the whole matrix does, where all steps are alike."""
    torch.manual_seed(0)
    layer = S5(3, states=8).double()
    with torch.no_grad():
        eigenvalues, vectors = perturbed_hippo(8)
        layer.log_decay.copy_((-eigenvalues.real).log())
        layer.frequency.copy_(eigenvalues.imag)
        layer.log_dt.fill_(-3.0)
        step = torch.tensor(-3.0).double().exp()
        V = vectors
        B, C = (V @ torch.view_as_complex(layer.B)), torch.view_as_complex(layer.C) @ torch.linalg.inv(V)
        A = V @ torch.diag(eigenvalues) @ torch.linalg.inv(V)
        keep = torch.linalg.matrix_exp(A * step)
        given = torch.linalg.solve(A, keep - torch.eye(8)) @ B
        u, h, out = random(1, 9, 3), torch.zeros(8, dtype=V.dtype), []
        for t in range(9):
            h = keep @ h + given @ u[0, t].to(V.dtype)
            out.append((C @ h).real + layer.D * u[0, t])
        expected = torch.stack(out)[None]
        error = testing.max_error(layer(u), expected)
    assert error < 1e3 * float(torch.linalg.cond(V)) * 2**-52 * testing.max_finite(expected)


def test_hiss_feeds_the_last_output_of_each_chunk_to_the_upper_model():
    torch.manual_seed(0)
    low, high = S4D(3, states=4).double(), S5(3, states=4).double()
    layer = HiSS(low, high, chunk=5)

    def definition(x):
        last = [low(x[:, start : start + 5])[:, -1] for start in range(0, x.shape[1], 5)]
        return high(torch.stack(last, 1))

    same(layer, definition, (random(2, 20, 3),))
    # and so do documents of a chunk each, by a scan
    x, a = random(1, 20, 3), torch.rand(3, dtype=torch.float64)
    packed = fa.linear_scan(a, x, cu_seqlens=torch.arange(0, 21, 5))[:, 4::5]

    class Scan(nn.Module):
        def forward(self, x):
            return fa.linear_scan(a, x)

    assert torch.equal(HiSS(Scan(), nn.Identity(), 5)(x), packed)
    with pytest.raises(ValueError, match="length must be a multiple of the chunk of 5, given 21"):
        layer(random(1, 21, 3))


def gru_loop(layer, x, h):
    inputs, out = x @ layer.inputs.weight.T + layer.inputs.bias, []
    for t in range(x.shape[1]):
        of_z, of_r, of_c = inputs[:, t].chunk(3, -1)
        z, r = torch.sigmoid(of_z + layer.own[0] * h), torch.sigmoid(of_r + layer.own[1] * h)
        h = (1 - z) * h + z * torch.tanh(of_c + layer.own[2] * (r * h))
        out.append(h)
    return torch.stack(out, 1)


def test_a_para_gru_is_the_recurrence_and_so_is_its_gradient():
    torch.manual_seed(0)
    layer = ParaGRU(3, hidden=4).double()
    inputs = random(2, 60, 3), random(2, 4, seed=2)
    same(lambda x, h: layer(x, h), lambda x, h: gru_loop(layer, x, h), inputs)
    gradients = []
    for function in (layer, lambda x, h: gru_loop(layer, x, h)):
        layer.zero_grad()
        function(*inputs).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*gradients, strict=True):  # sums over 120 tokens
        assert testing.max_error(a, b) < 1e-11 * (1 + testing.max_finite(b))
    with torch.no_grad():
        x = inputs[0]
        whole, last = layer(x, return_state=True)
        first, state = layer(x[:, :7], return_state=True)
        second, state = layer(x[:, 7:8], state, return_state=True)
        nothing, state = layer(x[:, 8:8], state, return_state=True)
        third, state = layer(x[:, 8:], state, return_state=True)
    assert testing.max_error(torch.cat([first, second, nothing, third], 1), whole) < 1e-12
    assert testing.max_error(state, last) < 1e-12 and layer(x[:, :0]).shape == (2, 0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_iterations_are_enough_where_the_step_is_smooth(dtype):
    torch.manual_seed(0)
    layer, x, calls = ParaGRU(3, hidden=4).to(dtype), testing.random_tensor(2, 500, 3, dtype=dtype), []
    of_z, of_r, of_c = layer.inputs(x).chunk(3, -1)

    def step(h):
        calls.append(None)
        z, r = torch.sigmoid(of_z + layer.own[0] * h), torch.sigmoid(of_r + layer.own[1] * h)
        return torch.lerp(h, torch.tanh(of_c + layer.own[2] * (r * h)), z)

    newton_scan(step, torch.zeros_like(of_z))
    assert 3 < len(calls) < 20


def test_a_step_that_newton_does_not_solve_at_once_is_the_recurrence_all_the_same():
    """A step of slope up to 4, chaotic: each iteration settles at least one more token."""
    x = random(1, 12, 2).detach()

    def step(h):
        return torch.cos(4 * h + x)

    h = newton_scan(step, torch.zeros_like(x), tolerance=0.0)
    state, out = torch.zeros(1, 2, dtype=torch.float64), []
    for t in range(12):
        state = torch.cos(4 * state + x[:, t])
        out.append(state)
    # a rounding grows by 4 a token
    assert testing.max_error(h, torch.stack(out, 1)) < 4.0**12 * 2**-50


def test_fewer_iterations_may_be_asked_for():
    x = random(1, 9, 2).detach()
    calls = []

    def step(h):
        calls.append(None)
        return torch.tanh(0.5 * h + x)

    newton_scan(step, torch.zeros_like(x), iterations=2, tolerance=0.0)
    assert len(calls) == 4  # two iterations, the slope at the end, and the one with a gradient
