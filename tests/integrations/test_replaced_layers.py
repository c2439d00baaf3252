"""Layers that `accelerate` replaces: what has one of our formulas gives the same numbers and gradients, what has another is left alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastattn as fa
from fastattn import testing
from fastattn.integrations import _replaced, _rotary


class Norm(nn.Module):
    def __init__(self, width=24, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class EpsOutside(Norm):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


class Clamped(Norm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=self.eps))


class Centred(Norm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Sum(Norm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps)


class Noisy(Norm):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.01, self.training)


class Absolute(Norm):
    def forward(self, x):
        return self.weight.abs() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Rows(Norm):
    def forward(self, x):
        return super().forward(x) * len(x)


@pytest.mark.parametrize("kind", [EpsOutside, Clamped, Centred, Sum, Noisy, Absolute, Rows])
def test_norms_with_another_formula_are_left_alone(kind):
    assert isinstance(_replaced.norm(Norm()), _replaced.Norm)
    assert isinstance(_replaced.norm(Norm(eps=1e-2)), _replaced.Norm)
    with pytest.raises(_replaced.Left, match="not that of rms_norm"):
        _replaced.norm(kind())


class Gated(nn.Module):
    def __init__(self, act=nn.functional.silu, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 40, bias=bias), nn.Linear(16, 40, bias=bias)
        self.down_proj, self.act = nn.Linear(40, 16, bias=bias), act

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Limited(Gated):
    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))


class Swapped(Gated):
    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)) * self.gate_proj(x))


class Dropping(Gated):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.01, self.training)


class Residual(Gated):
    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Gated(nn.functional.gelu),
        lambda: Gated(lambda x: nn.functional.gelu(x, approximate="tanh")),
        lambda: Gated(lambda x: x * torch.sigmoid(1.02 * x)),
        lambda: Gated(nn.functional.mish),
        lambda: Gated(torch.relu),
        Limited,
        Swapped,
        Dropping,
        Residual,
    ],
)
def test_mlps_with_another_formula_are_left_alone(made):
    assert isinstance(_replaced.mlp(Gated()), _replaced.GatedMLP)
    assert isinstance(_replaced.mlp(Gated(bias=True)), _replaced.GatedMLP)
    with pytest.raises(_replaced.Left, match=r"its output is not down"):
        _replaced.mlp(made())


def test_a_probe_is_of_our_forward_and_small_inputs_run_the_modules(monkeypatch):
    monkeypatch.setattr(_replaced, "FEWEST_NUMBERS", 1 << 14)
    with pytest.raises(_replaced.Left):
        _replaced.mlp(Gated(nn.functional.gelu))
    module = Gated()
    replaced = _replaced.mlp(module)
    called = []
    monkeypatch.setattr(_replaced, "swiglu", lambda x: called.append(len(x)) or fa.swiglu(x))
    for rows in (409, 410):  # of 40 numbers
        replaced(torch.randn(rows, 16))
    assert called == [410]


def test_probing_leaves_the_random_state_and_the_module_alone():
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    made = Dropping()
    torch.manual_seed(3)
    with pytest.raises(_replaced.Left):
        _replaced.mlp(made)
    assert torch.equal(torch.randn(4), expected) and made.training
    assert all(type(p) is nn.Parameter and p.requires_grad for p in made.parameters())


def same_with_gradients(ours, own, inputs, parameters, terms):
    """Both give the same outputs and gradients, within roundings of sums of `terms` numbers, in float32."""
    results = []
    for call in (ours, own):
        out = testing.as_tuple(call(*inputs))
        loss = sum((o * torch.arange(o.numel()).view(o.shape).sin()).sum() for o in out)
        results.append(
            [
                *out,
                *torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True, materialize_grads=True),
            ]
        )
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        bound = (8 + terms) * testing.EPS32 * testing.max_finite(expected)
        assert testing.max_error(actual, expected) <= bound


@given(data=st.data())
def test_layers_of_any_shape_and_strides(data):
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    module = data.draw(st.sampled_from([Norm, lambda: Gated(bias=False), lambda: Gated(bias=True)]))()
    width = 24 if isinstance(module, Norm) else 16
    replaced = (_replaced.norm if isinstance(module, Norm) else _replaced.mlp)(module)
    x = torch.randn(*shape, width)
    if data.draw(st.booleans()):
        x = torch.randn(*shape[::-1], 2 * width)[..., ::2].permute(*reversed(range(len(shape))), len(shape))
    x = x.detach().requires_grad_()
    assert replaced.serves(x)
    # gradients of weights add over rows, and outputs over at most 40 numbers
    same_with_gradients(
        replaced.ours, module, [x], list(module.parameters()), terms=40 + 2 * x.numel() // width
    )


def halves(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def pairs(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def rotates(turn, table=lambda t: t):
    def apply(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = table(cos).unsqueeze(unsqueeze_dim), table(sin).unsqueeze(unsqueeze_dim)
        width = cos.shape[-1]
        turned = (
            torch.cat([x[..., :width] * cos + turn(x[..., :width]) * sin, x[..., width:]], -1) for x in (q, k)
        )
        return tuple(turned)

    return apply


ROTATIONS = {
    (False, "full"): rotates(halves),
    (True, "full"): rotates(pairs),
    (True, "first half"): rotates(pairs, lambda t: t[..., : t.shape[-1] // 2].repeat_interleave(2, -1)),
    (False, "compact"): rotates(halves, lambda t: torch.cat([t, t], -1)),
    (True, "compact"): rotates(pairs, lambda t: t.repeat_interleave(2, -1)),
}


@given(data=st.data())
def test_rotary_functions_of_every_form(data):
    form = data.draw(st.sampled_from(sorted(ROTATIONS)))
    function = ROTATIONS[form]
    rotation = _rotary._rotation(function, torch.device("cpu"), torch.float32)
    assert (rotation.interleaved, rotation.tables, rotation.partial) == (*form, True)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    batch, length = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5))
    width, rest = 4 * data.draw(st.integers(1, 4)), 2 * data.draw(st.integers(0, 2))
    q, k = (torch.randn(batch, length, h, width + rest).transpose(1, 2).requires_grad_() for h in (3, 1))
    numbers = width // 2 if form[1] == "compact" else width
    cos, sin = (torch.randn(data.draw(st.sampled_from([1, batch])), length, numbers) for _ in range(2))
    if rotation.serves(q, k, cos, sin):
        same_with_gradients(
            lambda q, k: rotation.ours(q, k, cos, sin),
            lambda q, k: function(q, k, cos, sin),
            [q, k],
            [],
            terms=2,
        )
    # q of another layout, and tables in front of its heads: the function itself
    turned = [x.transpose(1, 2) for x in (q, k)]
    for a, b in zip(
        rotation(*turned, cos, sin, unsqueeze_dim=2), function(*turned, cos, sin, 2), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, cos, sin: (q, k),
        lambda q, k, cos, sin: ROTATIONS[False, "full"](q, k, cos, -sin),
        lambda q, k, cos, sin: ROTATIONS[False, "full"](k.expand_as(q), k, cos, sin),
        lambda q, k, cos, sin: ROTATIONS[False, "full"](q, k, cos, sin.flip(1)),
        lambda q, k, positions: (q, k),
    ],
)
def test_rotary_functions_of_other_forms_are_left_alone(function):
    with pytest.raises(_replaced.Left, match="is not rotary_tables"):
        _rotary._rotation(function, torch.device("cpu"), torch.float32)


class WithGate(Norm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * nn.functional.silu(gate))


def test_a_call_with_more_than_was_proved_is_the_modules_own():
    module, x = WithGate(), torch.randn(5, 24)
    expected = module(x, x + 1), module(x, gate=x + 1), module(x=x)
    module.forward = _replaced.norm(module)
    actual = module(x, x + 1), module(x, gate=x + 1), module(x=x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert not torch.equal(module(x), module(x, x + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_are_no_rows(dtype):
    for module in (Norm(), Gated(), Gated(bias=True)):
        module.to(dtype)
        replaced = (_replaced.norm if isinstance(module, Norm) else _replaced.mlp)(module)
        x = torch.zeros(2, 0, 24 if isinstance(module, Norm) else 16, dtype=dtype, requires_grad=True)
        assert replaced.ours(x).shape == module(x).shape
        replaced.ours(x).sum().backward()
        assert x.grad.shape == x.shape
