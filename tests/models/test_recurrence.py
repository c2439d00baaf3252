"""HierarchicalRecurrence: order of calls, credit, caches, and what torch.compile sees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastattn.models import HrmText, HrmTextConfig
from fastattn.nn import HierarchicalRecurrence


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
