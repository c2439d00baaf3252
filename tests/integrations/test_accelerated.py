"""`accelerate`: an unmodified transformers model computes what it computed, on fastattn's ops, and is itself again afterwards."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers as hf
from closeness import InDouble, assert_as_close
from torch import nn

import fastattn as fa
from fastattn import testing
from fastattn.integrations import _replaced
from fastattn.integrations.transformers import accelerate

LENGTH = 13
TEXT = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HRM = {k: v for k, v in TEXT.items() if k not in ("num_hidden_layers", "num_key_value_heads")}
DROPPED = {"attention_dropout": 0.0, "residual_dropout": 0.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 1e4,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LAYER = {"attention": 1, "rotary": 2, "swiglu": 2}

# (what is replaced, further options of the config); the classes' names begin with the family's
FAMILIES = {
    "Llama": (LAYER | {"rms_norm": 5}, {}),
    "Llama yarn": (LAYER | {"rms_norm": 5}, {"rope_parameters": YARN}),
    "Llama llama3": (LAYER | {"rms_norm": 5}, {"rope_parameters": LLAMA3}),
    "Llama bias": (LAYER | {"rms_norm": 5}, {"mlp_bias": True, "attention_bias": True}),
    "Qwen2": (LAYER | {"rms_norm": 5}, {}),
    "Qwen3": (LAYER | {"rms_norm": 9}, {}),
    "Mistral": (LAYER | {"rms_norm": 5}, {"sliding_window": 5}),
    "Mixtral": ({"attention": 1, "rotary": 2, "rms_norm": 5}, {"num_local_experts": 4}),
    "Qwen3Moe": (
        {"attention": 1, "rotary": 2, "rms_norm": 9},
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "Gemma": ({"attention": 1, "rotary": 2, "rms_norm": 5}, {}),
    "Gemma2": ({"attention": 1, "rotary": 2, "rms_norm": 9}, {"sliding_window": 5}),
    "Gemma3": ({"attention": 1, "rotary": 2, "rms_norm": 13}, {"sliding_window": 5}),
    "Olmo2": (LAYER | {"rms_norm": 9}, {}),
    "Phi3": (LAYER | {"rms_norm": 5}, {}),
    "Granite": (LAYER | {"rms_norm": 5}, {"logits_scaling": 3.0}),
    "SmolLM3": (LAYER | {"rms_norm": 5}, {}),
    "Cohere": (LAYER, {}),
    "Cohere2": (LAYER, {}),
    "Glm": (LAYER | {"rms_norm": 5}, {}),
    "Glm4": (LAYER | {"rms_norm": 9}, {}),
    "GptOss": (
        {"attention": 1, "rotary": 2, "rms_norm": 5},
        {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "Llama4Text": (
        {"attention": 1, "swiglu": 2, "rms_norm": 7},
        {"num_local_experts": 2, "intermediate_size_mlp": 48},
    ),
    "StableLm": (LAYER, {}),
    "Phi": ({"attention": 1, "rotary": 2}, {}),
    "GPTNeoX": ({"attention": 1, "rotary": 2}, {"rotary_pct": 0.5}),
    "Starcoder2": ({"attention": 1, "rotary": 2}, {"residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "Helium": (LAYER | {"rms_norm": 5}, {}),
    "Exaone4": (LAYER | {"rms_norm": 9}, {}),
    "Lfm2": (LAYER | {"rms_norm": 9}, {"layer_types": ["full_attention"] * 2}),
    "HunYuanDenseV1": (LAYER | {"rms_norm": 9}, {}),
    "SeedOss": (LAYER | {"rms_norm": 5}, DROPPED),
    "Moshi": ({"attention": 1, "rotary": 2, "rms_norm": 5}, {}),
    "JetMoe": ({"attention": 1, "rotary": 2, "rms_norm": 5}, {}),
    "HrmText": (
        {"attention": 1, "rotary": 4, "swiglu": 4, "rms_norm": 10},
        {"num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 1},
    ),
}


@pytest.fixture(autouse=True)
def ours_however_small(monkeypatch):
    """Small inputs would run the modules' own forwards, which are faster there."""
    monkeypatch.setattr(_replaced, "FEWEST_NUMBERS", 0)
    monkeypatch.setattr(_replaced, "FEWEST_PRODUCTS", 0)


def build(family="Llama", dtype=torch.float32, **more):
    """The same weights for every call, large enough to tell a wrong mask or weight."""
    name = family.split()[0]
    config = getattr(hf, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model = getattr(hf, f"{name.removesuffix('Text') if name == 'Llama4Text' else name}ForCausalLM")
    options = (HRM if name == "HrmText" else TEXT) | FAMILIES[family][1] | more
    made = model._from_config(config(**options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + (0.5 if p.dim() == 1 else 0))
    return made.to(dtype)


def tokens(seed=1, rows=2, length=LENGTH):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model, **more):
    """(loss, logits, gradients) of a padded batch."""
    model.zero_grad(set_to_none=True)
    ids = tokens()
    keep = torch.ones_like(ids)
    keep[1, -3:] = 0
    labels = ids.masked_fill(keep == 0, more.get("ignore_index", -100))
    out = model(input_ids=ids, attention_mask=keep, labels=labels, **more)
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    logits = None if out.logits is None else out.logits.detach()[keep.bool()]
    return out.loss.detach(), logits, gradients


def truth(model, **more):
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # torch has no grouped product of float64
    with InDouble():
        return run(wide, **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_same_and_is_itself_again_afterwards(family):
    model = build(family)
    plain = run(model)
    before = {n: (p.data_ptr(), p._version) for n, p in model.state_dict(keep_vars=True).items()}
    implementation = model.config._attn_implementation
    with accelerate(model) as accelerated:
        assert accelerated.replaced == FAMILIES[family][0]
        assert {n: (p.data_ptr(), p._version) for n, p in model.state_dict(keep_vars=True).items()} == before
        fast = run(model)
    true = truth(model)
    assert_as_close(fast, plain, true, terms=1024)
    again = run(model)
    assert torch.equal(again[0], plain[0]) and torch.equal(again[1], plain[1])
    assert all(torch.equal(again[2][n], g) for n, g in plain[2].items())
    assert model.config._attn_implementation == implementation
    assert not any("forward" in vars(m) for m in model.modules()) and "_fastattn_accelerated" not in vars(
        model
    )


LINEAR = {
    "Llama": 9,
    "Llama bias": 9,
    "Qwen2": 9,
    "Qwen3": 9,
    "Gemma": 15,
    "Phi3": 5,
    "Olmo2": 9,
    "Glm": 9,
}  # projections of attention, the output layer, MLPs left alone


@pytest.mark.parametrize("family", LINEAR)
def test_bfloat16_is_as_close_to_float64_as_the_models_own(family):
    model = build(family, torch.bfloat16)
    plain, true = run(model), truth(model)
    with accelerate(model) as accelerated:
        assert accelerated.replaced == FAMILIES[family][0] | {"linear": LINEAR[family]}
        assert_as_close(run(model), plain, true, terms=96)
    again = run(model)
    assert torch.equal(again[1], plain[1]) and torch.equal(again[0], plain[0])


CAPPED = {
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(f, torch.float32) for f in ("Llama", "Phi", "Mixtral", *CAPPED)]
    + [("Llama", torch.bfloat16), ("Gemma2", torch.bfloat16)],
)
def test_the_loss_is_the_models_without_logits(family, dtype):
    model = build(family, dtype, **CAPPED.get(family, {}))
    shifted = tokens(seed=4)
    for more in (
        {},
        {"num_items_in_batch": torch.tensor(7)},
        {"num_items_in_batch": 5},
        {"ignore_index": 9},
        {"shift_labels": shifted},
    ):
        plain = run(model, **more)
        with accelerate(model, loss=True) as accelerated:
            assert accelerated.replaced["linear_cross_entropy"] == 1
            fast = run(model, **more)
            assert fast[1] is None
            names = ("logits", "loss")
            wanted = {
                "input_ids": tokens(),
                "labels": tokens(),
                "logits_to_keep": LENGTH,
                "return_dict": True,
            }
            assert all(model(**wanted)[name] is not None for name in names)  # who asks for logits gets them
            assert model(input_ids=tokens()).logits.shape == (2, LENGTH, 61)
        true = truth(model, **more)
        assert_as_close(
            fast, plain, true, terms=1024, labels=2 * LENGTH / float(more.get("num_items_in_batch", 26))
        )


def test_a_loss_with_more_than_the_cross_entropy_is_the_models():
    model = build("Mixtral", router_aux_loss_coef=0.5)
    wanted = {"input_ids": tokens(), "labels": tokens(), "output_router_logits": True}
    expected = model(**wanted)
    with accelerate(model, loss=True):
        actual = model(**wanted)
        assert model(input_ids=tokens(), labels=tokens()).logits is None
    assert actual.logits is not None and actual.aux_loss > 0
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=0)


def test_a_loss_that_is_not_the_cross_entropy_of_the_logits_is_left_alone():
    class Scaled(hf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return type(out)(loss=None if out.loss is None else out.loss * 1.01, logits=out.logits)

    class Shifted(hf.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = super().forward(input_ids, **kwargs).logits + 0.5 * torch.arange(61)
            return hf.modeling_outputs.CausalLMOutputWithPast(
                loss=self.loss_function(logits, labels, 61), logits=logits
            )

    for model, why in (
        (Scaled, "more than the cross-entropy"),
        (Shifted, "neither its output layer's product"),
    ):
        made = model(hf.LlamaConfig(**TEXT))
        accelerated = accelerate(made, loss=True)
        assert "linear_cross_entropy" not in accelerated.replaced
        assert any(why in reason for _, _, reason in accelerated.left)
        assert "forward" not in vars(made.lm_head)
        assert made.training and all(m.training for m in made.modules())


def test_small_models_are_proved_too(monkeypatch):
    """What steps aside for small inputs does not in a probe, where it would agree with anything."""
    monkeypatch.setattr(_replaced, "FEWEST_NUMBERS", 1 << 14)
    monkeypatch.setattr(_replaced, "FEWEST_PRODUCTS", 1 << 20)
    for family in ("Llama", "Gemma"):
        assert accelerate(build(family)).replaced == FAMILIES[family][0]


def test_generation_is_the_same():
    model = build()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(tokens(length=7), **options)
    for loss in (False, True):
        with accelerate(model, loss=loss):
            assert torch.equal(model.generate(tokens(length=7), **options), plain)
            assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))


def test_copies_and_pickles_are_accelerated_too_and_undone_alone():
    model = build()
    plain = run(model)
    state = set(model.state_dict())
    accelerated = accelerate(model, loss=True)
    fast = run(model)
    assert set(model.state_dict()) == state
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = accelerate(copied, loss=True)
        assert own is not accelerated and own.replaced == accelerated.replaced
        assert all(vars(m)["forward"].module is m for m in copied.modules() if "forward" in vars(m))
        with torch.no_grad():
            copied.lm_head.weight.zero_()  # what a forward of the copy reads is the copy's
        assert not torch.equal(run(copied)[0], fast[0]) and torch.equal(run(model)[0], fast[0])
        own.undo()
        assert run(copied)[1].count_nonzero() == 0 and run(model)[1] is None
    accelerated.undo()
    assert torch.equal(run(model)[1], plain[1])


@pytest.mark.parametrize("loss", [False, True])
def test_torch_compile_takes_the_whole_model(loss):
    model = build(num_hidden_layers=1)
    with accelerate(model, loss=loss):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results = []
        for run_by in (model, compiled):
            model.zero_grad()
            out = run_by(input_ids=tokens(), labels=tokens())
            out.loss.backward()
            results.append([out.loss.detach(), *(p.grad for p in model.parameters())])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * testing.max_finite(expected))


def test_a_second_call_changes_nothing_and_other_options_are_refused():
    model = build()
    first = accelerate(model)
    forwards = {id(m): vars(m).get("forward") for m in model.modules()}
    assert accelerate(model) is first
    assert {id(m): vars(m).get("forward") for m in model.modules()} == forwards
    with pytest.raises(ValueError, match="accelerated with loss=False, exact=False; undo"):
        accelerate(model, loss=True)
    first.undo()
    first.undo()
    assert accelerate(model, loss=True).replaced["linear_cross_entropy"] == 1
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, given str"):
        accelerate("llama")


def test_parts_of_a_model_can_be_accelerated_alone():
    model = build()
    inner = accelerate(model.model.layers[0])
    outer = accelerate(model)
    assert inner.replaced == {"rms_norm": 2, "rotary": 1, "swiglu": 1}
    assert outer.replaced == {"attention": 1, "rms_norm": 3, "rotary": 1, "swiglu": 1}
    outer.undo()
    assert sum("forward" in vars(m) for m in model.modules()) == 4
    inner.undo()
    assert not any("forward" in vars(m) for m in model.modules())


def test_exact_refuses_half_precision():
    with pytest.raises(
        ValueError, match=r"exact=True serves float32 weights, model.embed_tokens.weight is bfloat16"
    ):
        accelerate(build(dtype=torch.bfloat16), exact=True)
    model = build()
    assert accelerate(model, exact=True).replaced == FAMILIES["Llama"][0]


def test_another_forward_over_ours_is_not_thrown_away():
    model = build()
    accelerated = accelerate(model)
    layer = model.model.layers[1].mlp
    ours = layer.forward
    layer.forward = lambda x: ours(x)
    with pytest.raises(RuntimeError, match=r"another forward was set since on model.layers.1.mlp"):
        accelerated.undo()
    del layer.forward
    layer.forward = ours
    accelerated.undo()


def test_hooks_see_what_they_saw():
    model = build()
    seen = []
    for module in (model.model.norm, model.model.layers[0].mlp, model.model.layers[0].self_attn):
        module.register_forward_hook(
            lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    run(model)
    plain, seen[:] = list(seen), []
    with accelerate(model) as accelerated:
        assert accelerated.replaced == FAMILIES["Llama"][0]
        run(model)
    assert len(seen) == len(plain) == 3
    for a, b in zip(seen, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * testing.max_finite(b))


class Adapter(nn.Module):
    """A layer with a low-rank addition, as LoRA has it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = (
            nn.Linear(a, b, bias=False) for a, b in ((base.in_features, 2), (2, base.out_features))
        )

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_are_exchanged_or_hooked_later_are_called(dtype):
    def change(model):
        torch.manual_seed(5)
        first, second = (layer.mlp for layer in model.model.layers)
        first.gate_proj = Adapter(first.gate_proj).to(dtype)
        attention = model.model.layers[0].self_attn
        attention.q_proj = Adapter(attention.q_proj).to(dtype)
        second.up_proj.__class__ = Doubled
        second.down_proj.register_forward_hook(lambda module, args, out: out - 1)

    plain, fast = build(dtype=dtype), build(dtype=dtype)
    accelerated = accelerate(fast)
    for model in (plain, fast):
        change(model)
    expected, actual = run(plain), run(fast)
    bound = (
        1e-5 if dtype == torch.float32 else 0.05
    )  # what is compared is that adapters act, whose part is over a tenth
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=bound * testing.max_finite(expected[1]))
    assert actual[2].keys() == expected[2].keys() and any("base" in n for n in actual[2])
    accelerated.undo()
    assert torch.equal(run(fast)[1], expected[1])


def test_layers_that_are_not_plain_before_are_left_alone():
    model = build()
    first, second = (layer.mlp for layer in model.model.layers)
    first.up_proj = Adapter(first.up_proj)
    second.up_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    nn.utils.parametrize.register_parametrization(model.model.norm, "weight", nn.Identity())
    own = model.model.layers[0].input_layernorm
    own.forward = lambda x: x
    expected = run(model)
    accelerated = accelerate(model)
    assert accelerated.replaced == {"attention": 1, "rotary": 2, "rms_norm": 3}
    reasons = {name: why for name, _, why in accelerated.left}
    assert "one of its layers is Adapter" in reasons["model.layers.0.mlp"]
    assert "hooks" in reasons["model.layers.1.mlp"]
    assert "parametrised" in reasons["model.norm"]
    assert "forward of its own" in reasons["model.layers.0.input_layernorm"]
    text = accelerated.explain()
    assert (
        "3 x rms_norm" in text
        and "left alone" in text
        and "1 x LlamaMLP: one of its layers is Adapter" in text
    )
    assert (
        repr(accelerated) == "Accelerated(LlamaForCausalLM: attention 1, rms_norm 3, rotary 2; 4 left alone)"
    )
    actual = run(model)
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-5 * testing.max_finite(expected[1]))


def test_other_dtypes_and_autocast_run_as_they_did():
    plain, fast = build(), build()
    accelerate(fast)
    for model in (plain, fast):
        model.double()
    expected, actual = run(plain), run(fast)
    # norms of transformers are float32 here too
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-12 * testing.max_finite(expected[1]))
    for model in (plain, fast):
        model.float()
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = run(plain), run(fast)
    assert actual[1].dtype == expected[1].dtype
    torch.testing.assert_close(
        actual[1].float(), expected[1].float(), rtol=0, atol=0.03 * testing.max_finite(expected[1])
    )


def test_functional_call_uses_the_weights_it_is_given():
    model = build()
    halved = {n: p.detach() * 0.5 for n, p in model.named_parameters()}
    expected = torch.func.functional_call(model, halved, (tokens(),)).logits
    with accelerate(model):
        actual = torch.func.functional_call(model, halved, (tokens(),)).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_gradient_checkpointing():
    model = build().train()
    expected, true = run(model), truth(model)
    accelerate(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_as_close(run(model), expected, true, terms=1024)


def test_a_modeling_files_functions_stay_as_they_are():
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    with accelerate(build()):
        assert vars(modeling_llama) == before


def test_what_attention_refuses_by_name_is_left_alone():
    model = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)).eval()
    expected = model(tokens()).logits
    accelerated = accelerate(model)
    assert "attention" not in accelerated.replaced
    assert any(
        "does not go through transformers' AttentionInterface" in why for _, _, why in accelerated.left
    )
    assert torch.equal(model(tokens()).logits, expected)


def test_the_package_named_accelerate_is_not_shadowed():
    from pathlib import Path

    names = [p.stem for p in Path(fa.__file__).parent.rglob("*.py")]
    assert "accelerate" not in names and "fastattn" in fa.__name__
