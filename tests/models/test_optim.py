"""AdamATan2 against its formula, averages, masters, and saving its state."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastattn.models.checkpoint import save_tensors
from fastattn.optim import AdamATan2, load_state_tensors, state_tensors


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 3, generator=generator).to(model.weight.dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_equals_the_formula():
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = AdamATan2([p], lr=0.1, betas=(0.9, 0.95), weight_decay=0.3, ema=0.75)
    expected, m, v, average = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0], [1.0, -2.0]
    for t in range(1, 6):
        grad = [0.5 * t, -1.0 / t]
        p.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(grad):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.95 * v[i] + 0.05 * g * g
            expected[i] *= 1 - 0.1 * 0.3
            expected[i] -= 0.1 / (1 - 0.9**t) * math.atan2(m[i], math.sqrt(v[i]) / math.sqrt(1 - 0.95**t))
            average[i] = 0.75 * average[i] + 0.25 * expected[i]
    torch.testing.assert_close(p.tolist(), expected, rtol=1e-13, atol=0)
    before = p.detach().clone()
    with optimizer.averaged():
        torch.testing.assert_close(p.tolist(), average, rtol=1e-13, atol=0)
    assert torch.equal(p, before)


def test_a_parameter_without_gradient_is_left_alone():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamATan2([a, b], lr=0.1)
    a.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(b, torch.ones(2)) and not torch.equal(a, torch.ones(2))
    assert (optimizer.state[a]["step"], optimizer.state[b]["step"]) == (1, 0)


def test_a_parameter_unfrozen_later_starts_with_its_first_gradient():
    late, fresh = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    other = nn.Parameter(torch.ones(2))
    late.requires_grad_(False)
    optimizer = AdamATan2([other, late], lr=0.1, ema=0.5)
    other.grad = torch.ones(2)
    optimizer.step()
    late.requires_grad_(True)
    expected = AdamATan2([fresh], lr=0.1, ema=0.5)
    for _ in range(2):
        late.grad = fresh.grad = torch.tensor([0.5, -1.0])
        optimizer.step()
        expected.step()
    assert torch.equal(late, fresh) and optimizer.state[late]["step"] == 2
    with optimizer.averaged(), expected.averaged():
        assert torch.equal(late, fresh)


def test_a_closure_computes_the_gradients():
    models = [nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(4, 3)
    losses = []
    for model, as_closure in zip(models, (True, False), strict=True):
        optimizer = AdamATan2(model.parameters(), lr=0.1)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        if as_closure:
            losses.append(optimizer.step(closure))
        else:
            losses.append(closure())
            assert optimizer.step() is None
    assert losses[0] == losses[1]
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.mark.parametrize("before", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_state_follows_the_model_to_another_dtype(before, after):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to(before)
    optimizer = AdamATan2(model.parameters(), lr=0.01, ema=0.5)
    train(model, optimizer, 2)
    model.to(after)
    moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
    train(model, optimizer, 1, seed=1)
    full = torch.float64 if after == torch.float64 else torch.float32
    for p, m in zip(model.parameters(), moments, strict=True):
        state = optimizer.state[p]
        assert {v.dtype for v in state.values() if isinstance(v, torch.Tensor)} == {full}
        assert ("master" in state) == (after in (torch.bfloat16, torch.float16))
        assert state["step"] == 3 and p.dtype == after
        expected = m.to(full).lerp(p.grad.to(full), 1 - 0.9)
        torch.testing.assert_close(state["exp_avg"], expected, rtol=1e-6, atol=0)
    with optimizer.averaged():
        assert model.weight.isfinite().all()


def test_sparse_gradients_are_refused_by_name():
    table, dense = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2))
    named = [("dense", dense), ("table.weight", table.weight)]
    for params, name in ((named, "table.weight"), ([p for _, p in named], "1 of group 0")):
        optimizer = AdamATan2(params)
        dense.grad = torch.ones(2)
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(
            NotImplementedError, match=f"parameter {name} has a gradient of layout torch.sparse_coo"
        ):
            optimizer.step()
        assert torch.equal(dense, torch.ones(2))


def test_low_precision_parameters_have_masters():
    torch.manual_seed(0)
    low = nn.Linear(3, 2, bias=False).bfloat16()
    full = nn.Linear(3, 2, bias=False)
    full.weight.data = low.weight.data.float()
    fast, slow = AdamATan2(low.parameters(), lr=1e-5), AdamATan2(full.parameters(), lr=1e-5)
    for _ in range(50):
        grad = torch.randn(2, 3).bfloat16()
        low.weight.grad, full.weight.grad = grad, grad.float()
        fast.step()
        slow.step()
    assert torch.equal(fast.state[low.weight]["master"], full.weight)
    assert torch.equal(low.weight, full.weight.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_state_dict_keeps_masters(dtype):
    model = nn.Linear(3, 2).to(dtype)
    optimizer = AdamATan2(model.parameters(), lr=1e-4, ema=0.9)
    train(model, optimizer, 3)
    again = AdamATan2(model.parameters(), lr=1.0, ema=0.9)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 1e-4
    for p, q in zip(model.parameters(), again.param_groups[0]["params"], strict=True):
        assert again.state[q].keys() == optimizer.state[p].keys()
        for entry, value in optimizer.state[p].items():
            other = again.state[q][entry]
            if isinstance(value, torch.Tensor):
                assert other.dtype == torch.float32 and torch.equal(other, value) and other is not value
            else:
                assert other == value == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_from_a_file_is_exact(dtype, tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Linear(3, 2).to(dtype)
        return model, AdamATan2(model.parameters(), lr=0.01, ema=0.9)

    straight, optimizer = make()
    train(straight, optimizer, 3)
    save_tensors(tmp_path / "weights.safetensors", straight.state_dict())
    save_tensors(tmp_path / "state.safetensors", state_tensors(optimizer, straight))
    train(straight, optimizer, 3, seed=1)

    resumed, optimizer = make()
    resumed.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    load_state_tensors(optimizer, resumed, load_file(tmp_path / "state.safetensors"))
    train(resumed, optimizer, 3, seed=1)
    assert torch.equal(straight.weight, resumed.weight) and torch.equal(straight.bias, resumed.bias)


def test_bad_state():
    model = nn.Linear(3, 2)
    optimizer = AdamATan2(model.parameters())
    state = state_tensors(optimizer, model)
    with pytest.raises(ValueError, match=r"missing or unexpected: bias.exp_avg, surplus"):
        load_state_tensors(
            optimizer,
            model,
            {k: v for k, v in state.items() if k != "bias.exp_avg"} | {"surplus": state["bias.step"]},
        )
    with pytest.raises(ValueError, match=r"bias.exp_avg has shape \(3,\)"):
        load_state_tensors(optimizer, model, state | {"bias.exp_avg": torch.zeros(3)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"ema": 1.0}, "ema is 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AdamATan2([nn.Parameter(torch.ones(1))], **options)
