"""`accelerate` on models with linear-time layers: they compute what they computed, keep their caches as they were, and keep packed
documents apart, which they refuse to do themselves on a CPU."""

import copy
import importlib
import pickle

import pytest
import torch
import transformers as hf
from closeness import InDouble, assert_as_close
from torch import nn

from fastattn import testing
from fastattn.integrations import _linear_time, _recurrent, _replaced
from fastattn.integrations.transformers import accelerate, cache_name

LENGTH = 70  # over the 64 tokens of a chunk
TERMS = 1024
TOKENS = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32}
ATTENTION = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
BOTH = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = BOTH | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
# family: (the kind of its linear-time layers, how many, further options of the config)
FAMILIES = {
    "Qwen3Next": (
        "gated_delta_rule", 1,
        ATTENTION | DELTA | {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                             "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2},
    ),
    "OlmoHybrid": ("gated_delta_rule", 1, ATTENTION | DELTA | {"linear_num_value_heads": 2}),
    "KimiLinear": (
        "kimi_delta_attention", 1,
        ATTENTION | BOTH | LATENT | {"num_key_value_heads": 4, "linear_num_heads": 2, "linear_head_dim": 8,
                                     "mlp_layer_types": ["dense", "dense"]},
    ),
    "Mamba2": (
        "mamba2", 2,
        {"num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 16},
    ),
    "Bamba": (
        "mamba2", 1,
        ATTENTION | {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                     "mamba_n_groups": 2, "mamba_chunk_size": 16},
    ),
    "Mamba": ("mamba", 2, {"num_hidden_layers": 2, "state_size": 4}),
    "FalconMamba": ("mamba", 2, {"num_hidden_layers": 2, "state_size": 4}),
    "Jamba": (
        "mamba", 1,
        ATTENTION | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "num_experts": 1},
    ),
    "Lfm2": ("causal_conv1d", 1, ATTENTION | {"layer_types": ["conv", "full_attention"]}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def ours_however_small(monkeypatch):
    monkeypatch.setattr(_replaced, "FEWEST_NUMBERS", 0)
    monkeypatch.setattr(_replaced, "FEWEST_PRODUCTS", 0)


def build(family, dtype=torch.float32):
    """The same weights for every call. What a decay is made of keeps its own, so that states last."""
    config = getattr(hf, f"{family}Config")(**TOKENS, **FAMILIES[family][2])
    torch.manual_seed(0)
    made = getattr(hf, f"{family}ForCausalLM")._from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "A_log" not in name and "dt" not in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + (0.5 if p.dim() == 1 else 0))
    return made.to(dtype)


def tokens(rows=2, length=LENGTH, seed=1):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model, **given):
    """(loss, logits, gradients) of a batch whose second row has padding on its left."""
    model.zero_grad(set_to_none=True)
    if not given:
        ids = tokens()
        keep = torch.ones_like(ids)
        keep[1, :5] = 0
        given = {"input_ids": ids, "attention_mask": keep, "labels": ids.masked_fill(keep == 0, -100)}
    out = model(**given)
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    keep = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    return out.loss.detach(), out.logits.detach()[keep], gradients


def in_double(model, function):
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")
    with InDouble():
        return function(wide)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_the_models(family):
    kind, count, _ = FAMILIES[family]
    model = build(family)
    modeling = importlib.import_module(type(model).__module__)
    before = dict(vars(modeling))
    plain = run(model)
    with accelerate(model) as accelerated:
        assert accelerated.replaced[kind] == count and accelerate(model) is accelerated
        assert not any("its" in why and "known by" in why for _, _, why in accelerated.left)
        fast = run(model)
    assert_as_close(fast, plain, in_double(model, run), terms=TERMS)
    assert vars(modeling) == before and not any("forward" in vars(m) for m in model.modules())
    again = run(model)
    assert torch.equal(again[0], plain[0]) and torch.equal(again[1], plain[1])


@pytest.mark.parametrize(
    "family", ["OlmoHybrid", "KimiLinear", "Mamba2", "Mamba"]
)  # no experts: a rounding may choose another
def test_bfloat16_is_as_close_to_float64_as_the_models_own(family):
    model = build(family, torch.bfloat16)
    plain, true = run(model), in_double(model, run)
    with accelerate(model) as accelerated:
        assert accelerated.replaced[FAMILIES[family][0]] == FAMILIES[family][1]
        assert_as_close(run(model), plain, true, terms=TERMS)


def decode(model):
    """(logits of a prefill and of three steps, each, and the states that the cache has afterwards, by layer and name)."""
    ids, keep = tokens(), torch.ones(2, LENGTH, dtype=torch.long)
    keep[1, :5] = 0
    name, cache, logits, places = cache_name(), None, [], []
    with torch.no_grad():
        for start, end in ((0, LENGTH - 3), *((i, i + 1) for i in range(LENGTH - 3, LENGTH))):
            given = {} if cache is None else {name: cache}
            out = model(ids[:, start:end], attention_mask=keep[:, :end], use_cache=True, **given)
            cache = out[name]
            logits.append(out.logits[:, -1])
            places.append({n: t.data_ptr() for n, t in states(cache).items()})
    assert all(p == places[0] for p in places)  # a compiled decoder has their addresses
    return logits, states(cache)


def states(cache):
    kinds = ("conv_states", "recurrent_states")
    return {
        (i, kind): getattr(layer, kind)[0]
        for i, layer in enumerate(cache.layers)
        for kind in kinds
        if getattr(layer, kind, {}).get(0) is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_is_the_models(family):
    model = build(family)
    logits, kept = decode(model)
    true_logits, true_states = in_double(model, decode)
    with accelerate(model):
        fast_logits, fast_states = decode(model)
    for a, b, c in zip(fast_logits, true_logits, logits, strict=True):
        testing.assert_close_to_truth(a, b, c, factor=2, terms=TERMS, name="logits")
    assert fast_states.keys() == kept.keys() != set()
    for name, state in fast_states.items():
        theirs = kept[name]
        assert (state.shape, state.dtype, state.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
        testing.assert_close_to_truth(state, true_states[name], theirs, terms=TERMS, name=str(name))


def pack(*lengths):
    ids, starts = tokens(1, sum(lengths)), torch.tensor([0, *lengths]).cumsum(0)
    return ids, starts, list(zip(starts.tolist(), starts[1:].tolist(), strict=False))


@pytest.mark.parametrize("family", ["Qwen3Next", "OlmoHybrid", "KimiLinear", "Bamba", "Lfm2"])
def test_packed_documents_are_sequences_of_their_own(family):
    model = build(family)
    ids, starts, parts = pack(9, 1, 66, 4)
    offsets = starts.int()
    longest = int((starts[1:] - starts[:-1]).max())
    given = {
        "input_ids": ids,
        "labels": ids,
        "seq_idx": torch.repeat_interleave(torch.arange(4, dtype=torch.int32), starts.diff())[None],
        "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest,
        "use_cache": False,
    }  # fmt: skip
    if "position_ids" in model.forward.__code__.co_varnames:
        given["position_ids"] = torch.cat([torch.arange(e - s) for s, e in parts])[None]
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        run(model, **given)
    with accelerate(model):
        _, logits, gradients = run(model, **given)
        assert all(g.isfinite().all() for g in gradients.values())
        ours = run(model, **{n: v for n, v in given.items() if n != "seq_idx"})[1]
        assert torch.equal(ours, logits)  # the offsets alone say the same
    for start, end in parts:
        part = {"input_ids": ids[:, start:end], "use_cache": False}
        with torch.no_grad():
            alone = model(**part).logits[0]
            true = in_double(model, lambda wide, part=part: wide(**part).logits[0])
        testing.assert_close_to_truth(logits[start:end], true, alone, factor=2, terms=TERMS, name="logits")


@pytest.mark.parametrize("family", ["Mamba2", "Mamba", "FalconMamba", "Jamba"])
def test_layers_train_on_packed_documents(family):
    """Their models tell them of none. In training they ask for a kernel of the whole layer first, which refuses documents, and the
    selective scan is not told of those that the convolution knows."""
    model = build(family).train()
    kind = FAMILIES[family][0]
    x, starts = testing.random_tensor(1, 20, 32), torch.tensor([0, 9, 9, 20])
    index = torch.repeat_interleave(torch.arange(3), starts.diff())[None]
    with accelerate(model):
        layer = next(m for m in model.modules() if getattr(vars(m).get("forward"), "kind", None) == kind)
        out = layer(x, seq_idx=index)
        # of other numbers of rows or documents, work is split and sums are added in another order: sums of 64 numbers
        bound = 64 * testing.EPS32 * testing.max_finite(out)
        assert testing.max_error(layer(x, cu_seq_lens_q=starts.int()), out) <= bound
        for start, end in ((0, 9), (9, 20)):
            assert testing.max_error(layer(x[:, start:end]), out[:, start:end]) <= bound
        out.square().sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        layer(x, seq_idx=index)


@pytest.mark.parametrize("family", ["Bamba", "Qwen3Next"])
def test_documents_that_are_not_served_are_refused(family):
    model = build(family)
    ids, starts, _ = pack(9, 7)
    index = torch.repeat_interleave(torch.arange(2), starts.diff())
    with accelerate(model), torch.no_grad():
        with pytest.raises(
            NotImplementedError, match=r"seq_idx is served for a batch of one, \(1, L\), given \(2, 16\)"
        ):
            model(ids.expand(2, -1), seq_idx=index.expand(2, -1), use_cache=False)
        cache = model(ids, use_cache=True)[cache_name()]
        with pytest.raises(NotImplementedError, match="keeps packed documents apart"):
            model(ids, seq_idx=index[None], use_cache=True, **{cache_name(): cache})
    wide = model.double()
    with (
        accelerate(wide),
        torch.no_grad(),
        pytest.raises(ValueError, match="can't keep packed sequences apart"),
    ):
        wide(ids, seq_idx=index[None], use_cache=False)


def test_a_function_that_is_another_is_left_alone(monkeypatch):
    from transformers.models.mamba2 import modeling_mamba2

    own = modeling_mamba2.mamba2_chunk_scan

    def clipped(*args, **kwargs):
        out = own(*args, **kwargs)
        return tuple(t.clamp(-1, 1) for t in out) if isinstance(out, tuple) else out.clamp(-1, 1)

    monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", clipped)
    model = build("Mamba2")
    plain = run(model)
    with accelerate(model) as accelerated:
        why = [why for _, kind, why in accelerated.left if kind == "Mamba2Mixer"]
        assert why == ["its mamba2_chunk_scan is not the function that is known by this name"] * 2
        assert accelerated.replaced["mamba2"] == 2  # its other functions
        torch.testing.assert_close(run(model)[1], plain[1], rtol=0, atol=1e-5)


def test_a_forward_of_someone_else_stays():
    model = build("Lfm2")
    layer = model.model.layers[0].conv
    layer.forward = own = lambda *args, **kwargs: torch.zeros(1)
    accelerated = accelerate(model)
    assert (
        layer.forward is own
        and ("model.layers.0.conv", "Lfm2ShortConv", "it has a forward of its own") in accelerated.left
    )
    del layer.forward


def test_without_compiled_kernels_layers_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(_recurrent.native, "cpu_isas", lambda: ())
    accelerated = accelerate(build("Mamba"))
    why = [why for _, kind, why in accelerated.left if kind == "MambaMixer"]
    assert why == ["this installation has no compiled kernels"] * 2 and "mamba" not in accelerated.replaced


@pytest.mark.parametrize("family", ["OlmoHybrid", "Mamba2", "Mamba"])
def test_under_autocast_they_are_ours(family):
    model = build(family)

    def forward(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(tokens()).logits

    with torch.no_grad():
        true = in_double(model, lambda wide: wide(tokens()).logits)
    plain = forward(model)
    with accelerate(model):
        for module in model.modules():
            replaced = vars(module).get("forward")
            for function in replaced.names.values() if isinstance(replaced, _recurrent.Recurrent) else ():
                function.function = None  # a call would raise
        fast = forward(model)
    assert fast.dtype == plain.dtype
    # both round to bfloat16 before each product
    allowed = 2 * testing.max_error(plain, true) + testing.rounding_band(true, torch.bfloat16, TERMS)
    assert testing.max_error(fast, true) <= allowed


def test_copies_and_pickles_are_accelerated_and_undone_alone():
    model = build("Mamba")
    with accelerate(model) as accelerated:
        expected = run(model)[1]
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(copied)[1], expected)
            own = accelerate(copied)
            assert own is not accelerated and own.replaced == accelerated.replaced
            own.undo()
            assert not any("forward" in vars(m) for m in copied.modules())
        assert torch.equal(run(model)[1], expected)


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


def test_calls_that_are_not_served_are_the_originals():
    from transformers.models.mamba2 import modeling_mamba2 as mamba2
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    scan = _linear_time.StateSpace(Counted(mamba2.mamba2_chunk_scan.__wrapped__))
    (args, options), *_ = scan.probes(_linear_time.Draw(torch.float32))
    scan(*args, **options)
    scan(*args, **options | {"z": None, "anything": 3})  # theirs ignores what it does not know
    assert scan.function.calls == 0
    scan(*args, **options | {"z": args[0]})
    scan(*(a.double() if isinstance(a, torch.Tensor) else a for a in args), **options)
    assert scan.function.calls == 2

    convolve = _linear_time.Convolution(Counted(qwen.causal_conv1d_fn.__wrapped__))
    x, weight = testing.random_tensor(1, 4, 5), testing.random_tensor(4, 9)
    assert torch.equal(convolve(x, weight), convolve.function.function(x, weight))  # 9 taps
    assert torch.equal(
        convolve(x, weight[:, :3], activation="gelu"),
        convolve.function.function(x, weight[:, :3], activation="gelu"),
    )
    assert convolve.function.calls == 2

    update = _linear_time.ConvolutionUpdate(Counted(qwen.causal_conv1d_update.__wrapped__))
    layer = nn.Conv1d(4, 4, 4, groups=4)
    given = x[..., :1], torch.zeros(1, 4, 4), layer.weight[:, 0]
    update(*given, layer.bias)  # with gradients, which a state that is written in place has none of
    assert update.function.calls == 1
    with torch.no_grad():
        update(*given, layer.bias)
    assert update.function.calls == 1

    rule = _linear_time.DeltaRuleStep(Counted(qwen.torch_recurrent_gated_delta_rule.__wrapped__))
    (args, options), *_ = rule.probes(_linear_time.Draw(torch.float32))
    state = options["initial_state"].clone()
    _, after = rule(*args, **options)
    assert torch.equal(state, options["initial_state"]) and not torch.equal(
        after, state
    )  # theirs is a new one
    args[0].requires_grad_()
    out, _ = rule(*args, **options)
    out.sum().backward()
    assert args[0].grad.any() and rule.function.calls == 0
    rule(*args[:2], args[2].bfloat16(), *args[3:], **options)
    assert rule.function.calls == 1
