"""HierarchicalRecurrence: order of calls, credit, caches, and what torch.compile sees."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastattn.models import HrmText, HrmTextConfig
from fastattn.nn import HierarchicalRecurrence
from fastattn.optim import AdamATan2


class Logged(nn.Module):
    """A stack that notes its calls and computes factor * (state + injection)."""

    def __init__(self, name, factor, log):
        super().__init__()
        self.name, self.log = name, log
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, state, injection, cache=None, extra=None):
        self.log.append((self.name, torch.is_grad_enabled(), cache, extra))
        return self.factor * (state + injection)


@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_calls_run_in_order_with_their_cache_and_credit(H_cycles, L_cycles, data):
    log = []
    module = HierarchicalRecurrence(Logged("L", 0.5, log), Logged("H", 0.25, log), H_cycles, L_cycles)
    flags = data.draw(st.lists(st.booleans(), min_size=module.calls, max_size=module.calls))
    inject = data.draw(st.sampled_from([None, torch.tensor([3.0])]))
    zH, zL = torch.tensor([1.0]), torch.tensor([2.0])
    got = module(zH, zL, inject=inject, gradient_calls=flags, cache=range(100, 200), extra="x")
    names = (["L"] * L_cycles + ["H"]) * H_cycles
    assert log == [
        (name, flag, 100 + i, "x") for i, (name, flag) in enumerate(zip(names, flags, strict=True))
    ]
    for name in names:
        if name == "L":
            zL = 0.5 * (zL + zH + (0 if inject is None else inject))
        else:
            zH = 0.25 * (zH + zL)
    torch.testing.assert_close(got, (zH, zL))


class Mix(nn.Module):
    """A stack that is no sum of its inputs."""

    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(seed)))

    def forward(self, state, injection, cache=None):
        return torch.tanh(state @ self.weight[0] + injection @ self.weight[1])


@pytest.mark.parametrize("injected", [False, True])
def test_two_levels_equal_the_nested_loops_bit_for_bit(injected):
    L, H = Mix(0), Mix(1)
    zH, zL, inject = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(2)).unbind()
    inject = inject if injected else None
    results = []
    for module in (
        HierarchicalRecurrence(L, H, 2, 3),
        HierarchicalRecurrence([L, H], [3, 2]),
        HierarchicalRecurrence(stacks=nn.ModuleList([L, H]), cycles=(3, 2)),
        None,
    ):
        flags = HierarchicalRecurrence(L, H, 2, 3).gradient_calls(4)
        if module is not None:
            assert list(module.state_dict()) == ["L_stack.weight", "H_stack.weight"]
            h, l = module(zH, zL, inject=inject, gradient_calls=flags)
        else:
            h, l, call = zH, zL, 0
            for _ in range(2):
                for _ in range(3):
                    with torch.set_grad_enabled(flags[call]):
                        l = L(l, h if inject is None else h + inject)
                    call += 1
                with torch.set_grad_enabled(flags[call]):
                    h = H(h, l)
                call += 1
        results.append((h, l, *torch.autograd.grad((h * l).sum(), (L.weight, H.weight))))
    for other in results[:-1]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[-1], strict=True))


def unrolled(stacks, cycles, states, inject, live):
    """The definition, call by call; the last `live` calls carry gradients. States the slowest first."""
    z = list(reversed(states))
    order = []

    def cycle(level):
        for _ in range(cycles[level]):
            if level:
                cycle(level - 1)
            order.append(level)

    cycle(len(cycles) - 1)
    for call, level in enumerate(order):
        neighbours = [z[i] for i in (level - 1, level + 1) if 0 <= i < len(z)]
        if level == 0 and inject is not None:
            neighbours.append(inject)
        new = stacks[level](z[level], sum(neighbours) if neighbours else torch.zeros_like(z[0]))
        z[level] = new if call >= len(order) - live else new.detach()
    return [*reversed(z)], len(order)


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("cycles", [(3,), (2, 3), (2, 1, 3), (1, 2, 2, 2)])
def test_any_number_of_levels_equals_the_unrolled_definition(cycles, injected):
    stacks = [Mix(level).double() for level in range(len(cycles))]
    module = HierarchicalRecurrence(stacks, cycles)
    generator = torch.Generator().manual_seed(9)
    states = torch.randn(len(cycles), 2, 5, 4, generator=generator, dtype=torch.float64).unbind()
    inject = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) if injected else None
    for live in (1, 3, module.calls):
        got = module(
            *states, inject=inject, gradient_calls=[i >= module.calls - live for i in range(module.calls)]
        )
        expected, calls = unrolled(stacks, cycles, states, inject, live)
        assert calls == module.calls == len(module.schedule)
        torch.testing.assert_close(list(got), expected, rtol=0, atol=1e-14)
        weights = [stack.weight for stack in stacks]
        grads = [
            torch.autograd.grad(sum(z.square().sum() for z in out), weights, allow_unused=True)
            for out in (got, expected)
        ]
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_credit_of_three_levels():
    module = HierarchicalRecurrence([nn.Identity() for _ in range(3)], (2, 2, 2))
    assert module.schedule == (0, 0, 1, 0, 0, 1, 2) * 2
    for bp_steps in (2, 3, 7, 14):
        assert module.gradient_calls(bp_steps) == (False,) * (14 - bp_steps) + (True,) * bp_steps
    flags = module.credit(1, 2, 3)  # the slowest first
    for level, count in enumerate((3, 2, 1)):
        own = [flag for flag, of in zip(flags, module.schedule, strict=True) if of == level]
        assert own == [False] * (len(own) - count) + [True] * count
    with pytest.raises(ValueError, match="bp_steps is 1; it must be from 2 to 14"):
        module.gradient_calls(1)
    with pytest.raises(ValueError, match="credit has 2 counts; there are 3 levels"):
        module.credit(1, 1)


def test_a_three_level_hrm_text_trains_decodes_and_is_saved(tmp_path):
    torch.manual_seed(0)
    config = tiny.config(cycles=(2, 1, 2))
    model = HrmText(config).double()
    assert model.recurrence.calls == 2 * (1 * (2 + 1) + 1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 40, (2, 12), generator=generator)
    optimizer = AdamATan2(model.parameters(), lr=0.02)
    losses = []
    for step in range(25):
        loss = model(ids, labels=ids, bp_steps=None if step % 2 else 3 + step % 3).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    model.save_pretrained(tmp_path)
    again = HrmText.from_pretrained(tmp_path)
    assert again.config == config and again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    out = again.generate(ids[:, :4], max_new_tokens=5)
    prefix = torch.tensor([4, 4])
    for n in range(5):  # every token is what the whole model says of those before it
        logits = model(out[:, : 4 + n], prefix_lengths=prefix).logits[:, -1]
        assert torch.equal(logits.argmax(-1), out[:, 4 + n])
    with pytest.raises(ValueError, match="cycles is"):
        tiny.config(cycles=(2, 3))
    with pytest.raises(ValueError, match="L_bp_cycles is for two levels"):
        tiny.config(cycles=(2, 1, 2), L_bp_cycles=(1,))


def test_credit_schedule_of_the_papers():
    module = HierarchicalRecurrence(nn.Identity(), nn.Identity(), 2, 3)
    L, H = (0, 1, 2, 4, 5, 6), (3, 7)
    for bp_steps, (H_steps, L_steps) in {2: (1, 1), 3: (2, 1), 4: (2, 2), 5: (2, 3)}.items():
        flags = module.gradient_calls(bp_steps)
        assert [i for i in L if flags[i]] == list(L[6 - L_steps :])
        assert [i for i in H if flags[i]] == list(H[2 - H_steps :])
    assert module.gradient_calls(8) == (True,) * 8


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HierarchicalRecurrence(nn.Identity(), nn.Identity(), 0, 1), "H_cycles is 0"),
        (lambda: HierarchicalRecurrence(nn.Identity(), nn.Identity(), 1, 1.5), "L_cycles is 1.5"),
        (
            lambda: HierarchicalRecurrence(nn.Identity(), nn.Identity(), 1, 1).gradient_calls(True),
            "must be an int",
        ),
        (
            lambda: HierarchicalRecurrence(nn.Identity(), nn.Identity(), 1, 1)(0, 0, gradient_calls=[True]),
            "gradient_calls has 1 flags; there are 2 calls",
        ),
        (lambda: HierarchicalRecurrence([nn.Identity()] * 3, [1, 2]), "there are 3 stacks and 2 cycles"),
        (lambda: HierarchicalRecurrence([nn.Identity()] * 3, [1, 0, 2]), r"cycles\[1\] is 0"),
        (lambda: HierarchicalRecurrence([nn.Identity()], [1], 3), "stacks need cycles, and nothing else"),
        (lambda: HierarchicalRecurrence([nn.Identity()] * 3, [1, 1, 2])(0, 0), "there are 2 states"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def compiled_nodes(H_cycles, L_cycles):
    """(nodes of every graph compiled in a training forward, whether loss and gradients equal eager's)."""
    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        H_cycles=H_cycles,
        L_cycles=L_cycles,
    )
    model = HrmText(config)
    ids = torch.randint(0, 20, (1, 6))
    run = {"cu_seqlens": torch.tensor([0, 2, 6]), "labels": ids, "bp_steps": 2}
    eager = model(ids, **run).loss
    eager.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    sizes = []

    def backend(graph, example_inputs):
        sizes.append(len(graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    model.compile(backend=backend, fullgraph=True)
    loss = model(ids, **run).loss
    loss.backward()
    same = torch.equal(loss, eager) and all(
        (a is None and p.grad is None) or torch.equal(a, p.grad)
        for a, p in zip(gradients, model.parameters(), strict=True)
    )
    return sizes, same


def test_compiled_graphs_do_not_grow_with_the_cycles():
    small, same = compiled_nodes(2, 2)
    assert same and small  # L and H, with and without gradients of weights and of inputs
    large, same = compiled_nodes(3, 5)
    assert same and large == small
