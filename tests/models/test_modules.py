"""The models as the modules that they are: copies, other dtypes, replaced, wrapped, parametrized and hooked parts."""

import copy
import multiprocessing
import pickle

import pytest
import tiny
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import fastattn as fa
from fastattn import testing
from fastattn.models import Hrm, HrmConfig, HrmText
from fastattn.nn.blocks import PreNormBlock, SwiGLU

IDS = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(1))
# float32, the same numbers in another order: 8 calls of 2 layers on states of size 1, sums over 36 at most
CLOSE = 1e-5


def made(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return HrmText(tiny.config(**tiny.NARROW_HEADS | changes)).to(dtype)


@torch.no_grad()
def results(model):
    """Logits of 40 tokens (fused products), and of two steps over a cache (the decode step)."""
    cache = model.make_cache(2, 7)
    model(IDS[:, :5], cache=cache)
    return torch.cat([model(IDS).logits, *(model(IDS[:, t : t + 1], cache=cache).logits for t in (5, 6))], 1)


def gradients(model, bp_steps=5):
    model.zero_grad()
    model(IDS, labels=IDS, bp_steps=bp_steps).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


PARTS = ("mlp.down_proj", "mlp.gate_up_proj", "attn.gqkv_proj", "attn.o_proj")
every_part = pytest.mark.parametrize("part", PARTS)


def parent_of(model, part):
    """(the module that has it, its name) in a layer of the L stack."""
    inside, name = part.split(".")
    return getattr(model.recurrence.L_stack.layers[1], inside), name


@pytest.mark.parametrize("way", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
@pytest.mark.parametrize("head", ({}, {"head": "vq", "codebook_size": 8}))
def test_copies(way, head):
    model = made(**head)
    before = results(model)
    other = way(model)
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert torch.equal(results(other), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(results(other), before) and torch.equal(results(model), before)


def hrm_states(model):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(2, 2, model.config.puzzle_len + 16, 32, generator=generator).unbind(0)
    ids = torch.randint(5, (2, 16), generator=generator), torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        return torch.cat([t.flatten() for t in model.segment(*states, *ids)])


def made_hrm():
    torch.manual_seed(0)
    config = HrmConfig(
        vocab_size=5, seq_len=16, num_puzzles=1, hidden_size=32, num_heads=2, H_layers=1, L_layers=1
    )
    return Hrm(config)


def test_hrm_copies():
    model = made_hrm()
    before = hrm_states(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(hrm_states(other), before)


@pytest.mark.parametrize("part", ("self_attn.o_proj", "mlp.gate_up_proj"))
def test_a_changed_part_of_hrm(part):
    model, plain = made_hrm(), made_hrm()
    model.recurrence.L_stack.layers[0].get_submodule(part).register_forward_hook(
        lambda module, inputs, output: 2 * output
    )
    with torch.no_grad():
        plain.recurrence.L_stack.layers[0].get_submodule(part).weight.mul_(2)
    assert testing.max_error(hrm_states(model), hrm_states(plain)) < CLOSE
    assert testing.max_error(hrm_states(made_hrm()), hrm_states(plain)) > 1e-3


@pytest.mark.parametrize("way", (copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))))
@pytest.mark.parametrize("by_layers", (False, True))
def test_a_copied_cache_is_its_own(way, by_layers):
    model = made()
    if by_layers:
        model.recurrence.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        cache = model.make_cache(2, 7)
        model(IDS[:, :5], cache=cache, lengths=torch.tensor([5, 3]))
        other = way(cache)
        kept = other.keys.clone()
        logits = model(IDS[:, 5:6], cache=cache).logits
        assert torch.equal(other.keys, kept) and other.lengths.tolist() == [5, 3]
        assert torch.equal(model(IDS[:, 5:6], cache=other).logits, logits)
        assert torch.equal(other.keys, cache.keys)


@pytest.mark.parametrize("convert", (nn.Module.half, nn.Module.bfloat16, nn.Module.double))
def test_other_dtypes(convert):
    """Converted after a call, when weights are packed: as one made in that dtype."""
    model = made()
    results(model)
    convert(model)
    again = made(model.embed_tokens.weight.dtype)
    assert torch.equal(results(model), results(again))


def test_meta():
    model = made().to("meta")
    assert model(IDS.to("meta")).logits.shape == (2, 20, 40)
    with pytest.raises(ValueError, match="generate: input_ids is on cpu, but the model is on meta"):
        model.generate(IDS, max_new_tokens=1)
    with pytest.raises(ValueError, match="the model is on meta: it has no weights"):
        model.generate(IDS.to("meta"), max_new_tokens=1)


def test_state_dicts():
    model = made()
    before = results(model)
    state = model.state_dict()
    other = made()
    other.reset_parameters()
    assert not torch.equal(results(other), before)
    other.load_state_dict(state)  # over weights that are packed
    assert torch.equal(results(other), before)
    with torch.device("meta"):
        bare = HrmText(model.config)
    bare.load_state_dict(state, assign=True)
    assert torch.equal(results(bare), before)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = (
            nn.Linear(base.in_features, 2, bias=False),
            nn.Linear(2, base.out_features, bias=False),
        )

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def parametrized(parent, name, weight):
    parametrize.register_parametrization(getattr(parent, name), "weight", Twice())
    weight.mul_(2)


def low_rank(parent, name, weight):
    setattr(parent, name, Lora(getattr(parent, name)))
    lora = getattr(parent, name)
    weight.add_(lora.up.weight @ lora.down.weight)


def subclassed(parent, name, weight):
    base = getattr(parent, name)
    setattr(parent, name, Doubled(base.in_features, base.out_features, bias=False))
    getattr(parent, name).weight = base.weight
    weight.mul_(2)


def hooked(parent, name, weight):
    getattr(parent, name).register_forward_hook(lambda module, inputs, output: 2 * output)
    weight.mul_(2)


def hooked_before(parent, name, weight):
    getattr(parent, name).register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    weight.mul_(2)


def own_forward(parent, name, weight):
    layer = getattr(parent, name)
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    weight.mul_(2)


def pruned(parent, name, weight):
    layer = prune.l1_unstructured(getattr(parent, name), "weight", 0.5)
    weight.copy_(layer.weight)


@every_part
@pytest.mark.parametrize(
    "change", (parametrized, low_rank, subclassed, hooked, hooked_before, own_forward, pruned)
)
def test_a_changed_product_is_as_its_weight_changed(part, change):
    model, plain = made(), made()
    results(model)
    with torch.no_grad():
        parent, name = parent_of(model, part)
        torch.manual_seed(1)
        change(parent, name, getattr(*parent_of(plain, part)).weight)
    expected = results(plain)
    assert testing.max_error(results(made()), expected) > 1e-3
    assert testing.max_error(results(model), expected) < CLOSE
    mine, true = gradients(model), gradients(plain)
    for key in true.keys() & mine.keys():
        if part not in key:
            assert testing.max_error(mine[key], true[key]) < CLOSE, key


@every_part
def test_a_bias_counts(part):
    model = made()
    before = results(model)
    parent, name = parent_of(model, part)
    base = getattr(parent, name)
    setattr(parent, name, nn.Linear(base.in_features, base.out_features))
    layer = getattr(parent, name)
    layer.weight = base.weight
    nn.init.zeros_(layer.bias)
    assert testing.max_error(results(model), before) < CLOSE
    nn.init.ones_(layer.bias)
    assert testing.max_error(results(model), before) > 1e-2
    assert gradients(model)[f"recurrence.L_stack.layers.1.{part}.bias"].any()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@every_part
@pytest.mark.parametrize("normed", (nn.utils.weight_norm, parametrizations.weight_norm))
def test_a_normed_weight_follows_its_parameters(part, normed):
    model = made()
    before = results(model)
    layer = normed(getattr(*parent_of(model, part)))
    assert testing.max_error(results(model), before) < CLOSE
    gradients(model)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    after = results(model)
    plain = made()
    state = {key: value for key, value in model.state_dict().items() if key in plain.state_dict()}
    plain.load_state_dict(state, strict=False)
    weight = getattr(*parent_of(plain, part)).weight
    with torch.no_grad():
        if normed is nn.utils.weight_norm:
            weight.copy_(layer.weight_v * (layer.weight_g / layer.weight_v.norm(dim=1, keepdim=True)))
        else:
            weight.copy_(layer.weight)
    assert testing.max_error(results(plain), after) < CLOSE


class Mlp(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return 2 * self.inside(x)


@pytest.mark.parametrize("name", ("attn", "mlp"))
@pytest.mark.parametrize("kind", ("module", "hook", "backward hook"))
def test_a_changed_part_of_a_layer(name, kind):
    """What stands for the attention or the MLP gives its own result, without the residual, however many the tokens."""
    model, plain = made(), made()
    layer, heard = model.recurrence.L_stack.layers[1], []
    part = getattr(layer, name)
    if kind == "module" and name == "mlp":
        layer.mlp = Mlp(part)
    elif kind == "backward hook":
        part.register_full_backward_hook(lambda *_: heard.append(1))
    else:
        part.register_forward_hook(lambda module, inputs, output: 2 * output)
    if kind != "backward hook":
        weights = {"attn": "o_proj", "mlp": "down_proj"}
        with torch.no_grad():
            getattr(getattr(plain.recurrence.L_stack.layers[1], name), weights[name]).weight.mul_(2)
    assert testing.max_error(results(model), results(plain)) < CLOSE
    gradients(model)
    assert len(heard) == (3 if kind == "backward hook" else 0)  # 3 L calls carry gradients


@torch.no_grad()
def test_hooks_of_all_modules_are_called():
    model, heard = made(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(type(module)))
    model(IDS)
    handle.remove()
    assert heard.count(nn.Linear) == 4 * 2 * 8 + 1  # projections, layers and stack calls; the output layer


@pytest.mark.parametrize("kind", (SwiGLU, PreNormBlock))
@torch.no_grad()
def test_a_forward_that_replaces_the_class_own_is_called(kind, monkeypatch):
    """However many the tokens."""
    model, heard, own = made(), [], kind.forward
    before = results(model)
    monkeypatch.setattr(kind, "forward", lambda *args: heard.append(1) or own(*args))
    assert testing.max_error(results(model), before) < CLOSE
    assert len(heard) == 4 * 2 * 8  # the prompt, all of the tokens, two of them one by one


@torch.no_grad()
def test_a_block_with_a_hook_works_on_what_it_says():
    model, heard = made(), []
    before = results(model)
    layer = model.recurrence.L_stack.layers[1]
    layer.register_forward_hook(lambda module, inputs, output: heard.append((inputs[:2], output)))
    assert testing.max_error(results(model), before) < CLOSE
    assert all(t.shape[2] == 24 for inputs, output in heard for t in (*inputs, *output))


def test_hooks_on_projections_are_called_once_a_call():
    model, heard = made(), []
    for part in PARTS:
        getattr(*parent_of(model, part)).register_forward_hook(lambda *_: heard.append(1))
    with torch.no_grad():
        model(IDS)
    assert len(heard) == 4 * 6
    heard.clear()
    model.generate(IDS[:, :5], max_new_tokens=3)
    assert len(heard) == 4 * 6 * 3


def test_tied_weights(tmp_path):
    model = made()
    model.lm_head.weight = model.embed_tokens.weight
    before = results(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.lm_head.weight is other.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(results(HrmText.from_pretrained(tmp_path)), before)
    model.recurrence.H_stack.layers[0].mlp = model.recurrence.L_stack.layers[0].mlp
    copied = made()
    copied.load_state_dict(model.state_dict())
    assert torch.equal(results(model), results(copied))
    mine, apart = gradients(model), gradients(copied)
    name = "recurrence.{}_stack.layers.0.mlp.down_proj.weight"
    assert testing.max_error(mine[name.format("L")], sum(apart[name.format(s)] for s in "LH")) < CLOSE


def test_inference_mode():
    model = made()
    before = results(model)
    with torch.inference_mode():
        assert torch.equal(results(model), before)
        inside = made()
        assert torch.equal(results(inside), before)
        for parameter in inside.parameters():  # which have no version counter
            parameter.mul_(1.5)
        changed = results(inside)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(results(model), changed)


def test_functional_call():
    model, other = made(), made()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    weights = {name: p.detach() for name, p in other.named_parameters()}
    before = results(model)
    found = functional_call(model, weights, (IDS,)).logits
    assert testing.max_error(found, other(IDS).logits) < CLOSE
    with torch.no_grad():
        caches = model.make_cache(2, 6), other.make_cache(2, 6)
        for tokens in (IDS[:, :5], IDS[:, 5:6]):
            found = functional_call(model, weights, (tokens,), {"cache": caches[0]}).logits
            assert testing.max_error(found, other(tokens, cache=caches[1]).logits) < CLOSE
    assert torch.equal(results(model), before)


@pytest.mark.parametrize(
    "frozen", ("recurrence.L_stack", "recurrence.H_stack.layers.1.mlp.gate_up_proj", "embed_tokens")
)
def test_frozen_parts(frozen):
    model, plain = made(), made()
    model.get_submodule(frozen).requires_grad_(False)
    mine, all_of_them = gradients(model), gradients(plain)
    assert mine.keys() == {name for name in all_of_them if not name.startswith(frozen)}
    for name, gradient in mine.items():
        assert testing.max_error(gradient, all_of_them[name]) < CLOSE, name


def test_compiles_as_a_whole():
    small = {"H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1]}
    model = made(**small)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(IDS, labels=IDS, bp_steps=2).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    plain = gradients(made(**small), bp_steps=2)
    assert found.keys() == plain.keys()
    assert all(testing.max_error(found[name], plain[name]) < CLOSE for name in found)
    assert torch.equal(
        compiled.generate(IDS[:, :5], max_new_tokens=2), model.generate(IDS[:, :5], max_new_tokens=2)
    )


class Logits(torch.utils.data.Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.no_grad():
            return self.model(IDS[:1]).logits[0] * fa.rms_norm(torch.full((3, 40), index + 1.0))[0]


# Python 3.12 and later warn of forks; forking is what is tested
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_data_loader_workers_call_ops():
    """Forked from a process whose threads have run."""
    model = made()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = model(IDS[:1]).logits[0]
        loader = torch.utils.data.DataLoader(
            Logits(model), num_workers=2, batch_size=2, multiprocessing_context="fork"
        )
        for batch in loader:
            assert testing.max_error(batch, expected.expand_as(batch)) < CLOSE
    finally:
        torch.set_num_threads(before)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("kind", ["hrm_text", "hrm"])
def test_autocast(kind):
    """Products in bfloat16, states and gradients in float32: no farther from float32 than a model all in bfloat16,
    within the factor that holds for results of one dtype (fastattn/testing/budget.py)."""

    def run(model):
        model.zero_grad()
        if kind == "hrm_text":
            loss = model(IDS, labels=IDS).loss
        else:
            cells = IDS[:, :16] % 5
            batch = {"inputs": cells, "labels": cells, "puzzle_ids": torch.zeros(2, dtype=torch.int64)}
            loss = model.eval()(model.initial_carry(2), batch)[1].loss
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model = made() if kind == "hrm_text" else made_hrm()
    exact = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(model)
    error = (run(model.bfloat16()).float() - exact).norm()
    assert cast.dtype == torch.float32 and 0 < (cast - exact).norm() <= 3 * error


def test_autocast_fills_a_cache():
    model = made()
    prefilled = model.make_cache(2, 7)
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS[:, :5], cache=prefilled)
        assert model.generate(IDS, max_new_tokens=3).shape == (2, 23)
    expected = model.make_cache(2, 7)
    model(IDS[:, :5], cache=expected)
    plain = model.bfloat16()
    low = plain.make_cache(2, 7)
    plain(IDS[:, :5], cache=low)
    error = (low.keys.float() - expected.keys).norm()
    assert prefilled.keys.dtype == torch.float32
    assert 0 < (prefilled.keys - expected.keys).norm() <= 2 * error
