"""Recursive: equal to its masked and unrolled definitions in float64, with gradients; what leaks, and what does not."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastattn as fa
from fastattn.nn import Recursive, TokenChoice, TopK
from fastattn.nn.blocks import PostNormBlock, PostNormStack, Routing

D = 8


def a_block(seed=0):
    torch.manual_seed(seed)
    return PostNormBlock(D, 2, 4, 12, rope_theta=1e4, eps=1e-6).double()


def inputs(B, L, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, D, generator=g, dtype=torch.float64, requires_grad=True)


def masked(block, x, routing, kept):
    """The block on every token, the keys of those that are not kept (B, L) masked."""
    mask = routing.mask or fa.Mask()
    offsets = mask.cu_seqlens_q
    L = x.shape[1]
    dense = kept[:, None, None, :].expand(-1, 1, L, -1)
    if offsets is not None:
        document = torch.bucketize(torch.arange(L), offsets.long(), right=True)
        dense = dense & (document[:, None] == document)[None, None]
    return block(x, Routing(fa.Mask(causal=mask.causal, dense=dense), routing.positions))


def expert_choice(module, x, routing):
    """TopK's definition: scores of the tokens that are left, the largest, the masked block."""
    B, L, _ = x.shape
    left = torch.ones(B, L, dtype=torch.bool)
    for step, share in enumerate(module.router.shares):
        scores = x @ module.router.weight[step]
        ranked = scores.masked_fill(~left, -torch.inf)
        kept = torch.zeros_like(left)
        for row in range(B):
            count = min(max(1, int(share * L)), int(left[row].sum()))
            best = sorted(range(L), key=lambda i: (-ranked[row, i].item(), i))[:count]
            kept[row, best] = True
        weight = module.router.scale * scores.sigmoid()
        done = masked(module.block, x, routing, kept)
        x = torch.where(kept[..., None], x + weight[..., None] * done, x)
        left = kept
    return x


def token_choice(module, x, routing):
    scores = x @ module.router.weight.T
    p = scores.softmax(-1) if module.router.function == "softmax" else scores.sigmoid()
    p = module.router.scale * p
    depth = p.argmax(-1)
    state = result = x
    for step in range(module.steps):
        kept = depth >= step
        state = torch.where(kept[..., None], masked(module.block, state, routing, kept), state)
        last = (depth == step)[..., None]
        result = torch.where(last, x + p[..., step : step + 1] * state, result)
    return result


def routings(L, packed, causal):
    offsets = torch.tensor([0, L // 3, L // 3, L]) if packed else None
    return Routing(fa.Mask(causal=causal, cu_seqlens_q=offsets), torch.arange(L) + 3)


def same_with_gradients(got, want, module, x):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    probe = torch.cos(torch.arange(got.numel(), dtype=torch.float64)).view_as(got)
    leaves = [x, *module.parameters()]
    grads = [
        torch.autograd.grad((out * probe).sum(), leaves, allow_unused=True, retain_graph=True)
        for out in (got, want)
    ]
    for name, a, b in zip(["x", *dict(module.named_parameters())], *grads, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if a is None else a, zero.to(b) if a is None else b if b is not None else torch.zeros_like(a),
            rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 13), st.booleans(), st.booleans(), st.integers(0, 99))
def test_expert_choice_is_the_masked_definition(B, L, packed, causal, seed):
    B = 1 if packed else B
    module = Recursive(a_block(), router=TopK(D, [1, 0.6, 0.3], scale=0.7).double())
    nn.init.normal_(module.router.weight, generator=torch.Generator().manual_seed(seed))
    x, routing = inputs(B, L, seed), routings(L, packed, causal)
    got, choices = module(x, routing, return_choices=True)
    same_with_gradients(got, expert_choice(module, x, routing), module, x)
    assert [int(c.kept.sum(1).max()) for c in choices] == [max(1, int(s * L)) for s in (1, 0.6, 0.3)]
    # its own choices, given
    again = module(x, routing, keep=[choice.kept for choice in choices])
    same_with_gradients(again, got, module, x)


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(1, 11), st.booleans(), st.booleans(), st.integers(0, 99),
    st.sampled_from(["softmax", "sigmoid"]),
)  # fmt: skip
def test_token_choice_is_the_masked_definition(B, L, packed, causal, seed, function):
    B = 1 if packed else B
    module = Recursive(a_block(), router=TokenChoice(D, 3, function=function, scale=0.7).double())
    nn.init.normal_(module.router.weight, generator=torch.Generator().manual_seed(seed))
    x, routing = inputs(B, L, seed), routings(L, packed, causal)
    got, choices = module(x, routing, return_choices=True)
    same_with_gradients(got, token_choice(module, x, routing), module, x)
    assert choices[0].kept.all() and not (choices[2].kept & ~choices[1].kept).any()


def test_a_tie_keeps_the_earlier_token():
    module = Recursive(a_block(), router=TopK(D, [0.5]).double())
    nn.init.zeros_(module.router.weight)
    _, (choice,) = module(inputs(2, 8), return_choices=True)
    assert choice.kept.tolist() == [[True] * 4 + [False] * 4] * 2


def changed_by_the_last_token(module, x, routing, **options):
    """Whether an earlier token's result changes with the last token."""
    other = x.detach().clone()
    other[:, -1] += 5
    with torch.no_grad():
        return not torch.allclose(
            module(x, routing, **options)[:, :-1], module(other, routing, **options)[:, :-1]
        )


def test_top_k_leaks_and_the_others_do_not():
    """A later token takes an earlier one's place. What is given, and what a token decides by itself, cannot."""
    routing = routings(9, packed=False, causal=True)
    x = inputs(2, 9)
    top_k = Recursive(a_block(), router=TopK(D, [0.5]).double())
    nn.init.normal_(top_k.router.weight)
    with torch.no_grad():  # the last token's score rises
        top_k.router.weight.copy_(top_k.router.weight.abs())
    assert changed_by_the_last_token(top_k, x, routing)
    keep = [torch.arange(9).expand(2, 9) % 2 == 0]
    assert not changed_by_the_last_token(top_k, x, routing, keep=keep)
    token = Recursive(a_block(), router=TokenChoice(D, 3).double())
    nn.init.normal_(token.router.weight)
    assert not changed_by_the_last_token(token, x, routing)
    assert not changed_by_the_last_token(Recursive(a_block(), 3), x, routing)


def layers(count=3):
    return [PostNormStack([a_block(seed)]) for seed in range(count)]


class Call(nn.Module):
    """A stack as a block."""

    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, x, routing):
        return self.stack(x, torch.zeros_like(x), routing)


def test_a_full_rank_is_the_layers_it_started_from():
    own = [Call(stack) for stack in layers()]
    module = Recursive.from_layers(own, lora_rank=100)
    x, routing = inputs(2, 7), routings(7, False, True)
    want = x
    for layer in own:
        want = layer(want, routing)
    torch.testing.assert_close(module(x, routing), want, rtol=1e-10, atol=1e-12)
    (g_module,) = torch.autograd.grad(module(x, routing).sin().sum(), x)
    (g_layers,) = torch.autograd.grad(want.sin().sum(), x)
    torch.testing.assert_close(g_module, g_layers, rtol=1e-9, atol=1e-12)
    assert own[0].stack.layers[0].mlp.down_proj.weight.shape == (D, 12)  # left as they are
    assert type(own[0].stack.layers[0].mlp.down_proj) is nn.Linear


def test_a_small_rank_is_the_best_of_that_rank():
    own = [nn.Sequential(nn.Linear(9, 7, bias=False)).double() for _ in range(3)]
    module = Recursive.from_layers(own, lora_rank=2)
    layer = module.block[0]
    mean = torch.stack([one[0].weight for one in own]).mean(0)
    torch.testing.assert_close(layer.weight, mean)
    for step, one in enumerate(own):
        difference = (one[0].weight - mean).detach()
        term = layer.lora_B[step] @ layer.lora_A[step]
        rest = torch.linalg.svdvals(difference - term)
        torch.testing.assert_close(rest[:5], torch.linalg.svdvals(difference)[2:], rtol=1e-10, atol=1e-12)
        assert torch.linalg.matrix_rank(term) == 2


@settings(max_examples=10)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_steps_are_the_block_with_their_own_weights(steps, rank, seed):
    """W + B_s A_s in the place of W, unrolled, with every gradient."""
    block = a_block()
    module = Recursive(copy.deepcopy(block), steps, lora_rank=rank)
    g = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.3, generator=g)
    x, routing = inputs(2, 6, seed), routings(6, False, True)
    want = x
    for step in range(steps):
        weights = {
            name: module.block.get_submodule(name).weight
            + module.block.get_submodule(name).lora_B[step] @ module.block.get_submodule(name).lora_A[step]
            for name, layer in block.named_modules()
            if type(layer) is nn.Linear
        }
        weights = {f"{name}.weight": value for name, value in weights.items()}
        want = torch.func.functional_call(block, weights, (want, routing))
    same_with_gradients(module(x, routing), want, module, x)


def test_a_lora_starts_as_the_block():
    block = a_block()
    module = Recursive(copy.deepcopy(block), 2, lora_rank=3)
    x, routing = inputs(2, 6), routings(6, False, False)
    torch.testing.assert_close(module(x, routing), block(block(x, routing), routing), rtol=1e-12, atol=1e-12)
    loaded = Recursive(a_block(5), 2, lora_rank=3)
    loaded.load_state_dict(module.state_dict())
    torch.testing.assert_close(loaded(x, routing), module(x, routing))
    copied = copy.deepcopy(module)
    torch.testing.assert_close(copied(x, routing), module(x, routing))


@pytest.mark.parametrize("router", [None, "top_k", "token"])
def test_checkpointing_recomputes_the_same(router):
    routers = {None: None, "top_k": TopK(D, [1, 0.5]).double(), "token": TokenChoice(D, 2).double()}
    module = Recursive(a_block(), 2, router=routers[router], lora_rank=2)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    x, routing = inputs(2, 8), routings(8, False, True)
    want = module(x, routing)
    module.activation_checkpointing = True
    same_with_gradients(module(x, routing), want, module, x)


def test_checkpointing_inside_of_a_block_is_refused_with_a_lora():
    stack = PostNormStack([a_block()])
    stack.activation_checkpointing = True
    module = Recursive(Call(stack), 2, lora_rank=2)
    out = module(inputs(1, 4), routings(4, False, True))
    with pytest.raises(RuntimeError, match="set activation_checkpointing of the Recursive"):
        out.sum().backward()


@pytest.mark.parametrize("router", [None, [1, 0.5]])
def test_compiles_whole(router):
    torch.manual_seed(0)
    router = router and TopK(D, router)
    module = Recursive(a_block().float(), 2, router=router, lora_rank=2)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    x, routing = inputs(2, 8).float(), routings(8, False, True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, routing), module(x, routing), rtol=1e-5, atol=1e-5)
    for call in (compiled, module):
        module.zero_grad()
        call(x, routing).sin().sum().backward()
        grads = {name: parameter.grad for name, parameter in module.named_parameters()}
        if call is compiled:
            first = grads
    for name, grad in grads.items():
        torch.testing.assert_close(first[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("router", [TopK(D, [0.5]), TokenChoice(D, 2)])
def test_masks_that_count_dropped_tokens_are_refused(router):
    module = Recursive(a_block().float(), router=router)
    nn.init.normal_(router.weight)
    x = inputs(1, 8).float()
    for name, mask in {
        "window": fa.Mask(causal=True, window=(2, 0)),
        "prefix_lengths": fa.Mask(prefix_lengths=torch.tensor([2])),
        "key_lengths": fa.Mask(key_lengths=torch.tensor([2])),
        "dense": fa.Mask(dense=torch.ones(8, 8, dtype=torch.bool)),
    }.items():
        with pytest.raises(NotImplementedError, match=f"the mask has {name}, which counts tokens"):
            module(x, Routing(mask, torch.arange(8)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TopK(D, []), r"shares is \[\]"),
        (lambda: TopK(D, [1, 0]), "each must be over 0 and at most 1"),
        (lambda: TopK(D, [0.5, 1]), "a step cannot keep more than the one before it"),
        (lambda: TopK(0, [1]), "TopK: d_model is 0"),
        (lambda: TokenChoice(D, 0), "TokenChoice: steps is 0"),
        (lambda: TokenChoice(D, 2, function="tanh"), "function is 'tanh'"),
        (lambda: Recursive(a_block()), "Recursive: steps is None"),
        (lambda: Recursive(a_block(), 3, router=TopK(D, [1, 1])), "steps is 3; the router has 2"),
        (lambda: Recursive(a_block(), 2, lora_rank=-1), "lora_rank is -1"),
        (lambda: Recursive(nn.ReLU(), 2, lora_rank=1), "the block has no nn.Linear"),
        (lambda: Recursive.from_layers([], lora_rank=1), "layers is empty"),
        (
            lambda: Recursive.from_layers([nn.Linear(2, 2), nn.Linear(2, 3)], lora_rank=1),
            "layer 1 differs from layer 0 in bias, weight",
        ),
        (lambda: Recursive(a_block(), 2)(torch.zeros(3, D)), r"x has shape \(3, 8\); it must be \(B, L, D\)"),
        (
            lambda: Recursive(a_block(), router=TopK(5, [1]))(torch.zeros(1, 3, D)),
            "x has width 8; the router's d_model is 5",
        ),
        (lambda: Recursive(a_block(), 1)(inputs(1, 3), keep=[]), "keep is for a TopK router"),
        (
            lambda: Recursive(a_block(), router=TopK(D, [1]))(inputs(1, 3), keep=[]),
            "keep has 0 entries; there are 1 steps",
        ),
        (
            lambda: Recursive(a_block(), router=TopK(D, [1]))(inputs(1, 3), keep=[torch.zeros(1, 3)]),
            "it must be bool",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_other_linear_layers_and_routers_are_refused():
    class Own(nn.Linear):
        pass

    with pytest.raises(NotImplementedError, match="0 is a Own, which does more than a linear layer"):
        Recursive(nn.Sequential(Own(2, 2)), 2, lora_rank=1)
    with pytest.raises(TypeError, match="router is a Linear; it must be TopK or TokenChoice"):
        Recursive(nn.Linear(2, 2), 2, router=nn.Linear(2, 2))
