"""transformers models on fastattn: equal to eager attention, and no mask is ever dropped."""

import weakref

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import masks, testing
from fastattn.integrations import transformers as integration
from fastattn.integrations.transformers import attention_forward, cache_name, recognise

VOCAB = 61
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GEMMA2 = {**COMMON, "sliding_window": 5, "query_pre_attn_scalar": 8, "final_logit_softcapping": None}
CONFIGS = {
    "hrm_text": lambda: transformers.HrmTextConfig(
        **{k: v for k, v in COMMON.items() if k not in ("num_hidden_layers", "num_key_value_heads")},
        num_hidden_layers=1,  # in each of the two stacks
        H_cycles=2,
        L_cycles=1,
    ),
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    ),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON),
    "gemma": lambda: transformers.GemmaConfig(**COMMON),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA2, attn_logit_softcapping=2.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA2, sliding_window_pattern=2),
}  # fmt: skip
LENGTH = 13  # past gemma's window of 5


@pytest.fixture(scope="module", autouse=True)
def registered():
    fa.integrations.transformers.register()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return build(request.param)


def build(name):
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="fastattn")
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.normal_(0, 0.2)  # the default initialisation leaves logits too small to tell a wrong mask
    return made.eval()


def tokens(batch=2, length=LENGTH, seed=1):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, implementation, *args, **kwargs):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(*args, **kwargs).logits


def assert_equal_to_eager(model, *args, rows=None, **kwargs):
    actual, expected = (logits(model, name, *args, **kwargs) for name in ("fastattn", "eager"))
    if rows is not None:
        actual, expected = actual[rows], expected[rows]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_logits_equal_eager_attention(model):
    assert_equal_to_eager(model, tokens())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_eager_attention_and_is_not_attended(model, side):
    ids = tokens()
    keep = torch.ones_like(ids)
    padded = (slice(None), slice(0, 4)) if side == "left" else (slice(None), slice(-4, None))
    keep[1:][padded] = 0
    positions = (keep.cumsum(-1) - 1).clamp(min=0)
    rows = keep.bool()
    assert_equal_to_eager(model, ids, attention_mask=keep, position_ids=positions, rows=rows)
    other = torch.where(rows, ids, ids.flip(0))
    first, second = (
        logits(model, "fastattn", i, attention_mask=keep, position_ids=positions) for i in (ids, other)
    )
    assert torch.equal(first[rows], second[rows])


def test_a_future_token_cannot_change_a_past_logit(model):
    ids = tokens()
    full = logits(model, "fastattn", ids)
    for t in (1, 5, LENGTH - 1):
        changed = ids.clone()
        changed[:, t:] = tokens(seed=2)[:, t:]
        after = logits(model, "fastattn", changed)
        assert torch.equal(after[:, :t], full[:, :t])
        assert not torch.equal(after[:, t:], full[:, t:])


@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_equals_one_pass(model, padded):
    ids = tokens()
    keep = torch.ones_like(ids)
    if padded:
        keep[1, :3] = 0
    positions = (keep.cumsum(-1) - 1).clamp(min=0)
    whole = logits(model, "eager", ids, attention_mask=keep, position_ids=positions)
    model.set_attn_implementation("fastattn")
    cache, found = None, []
    with torch.no_grad():
        for start, stop in ((0, 6), (6, 9), (9, 10), (10, 11), (11, LENGTH)):
            step = model(
                ids[:, start:stop],
                attention_mask=keep[:, :stop],
                position_ids=positions[:, start:stop],
                use_cache=True,
                **{cache_name(): cache},
            )
            cache = step[cache_name()]
            found.append(step.logits)
    rows = keep.bool()
    actual, expected = torch.cat(found, 1)[rows], whole[rows]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_equals_eager_attention(model, cache):
    ids = tokens(length=7)
    keep = torch.ones_like(ids)
    keep[1, :2] = 0
    found = {}
    for name in ("fastattn", "eager"):
        model.set_attn_implementation(name)
        found[name] = model.generate(
            ids, attention_mask=keep, max_new_tokens=4, do_sample=False, cache_implementation=cache, eos_token_id=None,
            pad_token_id=0, disable_compile=True,
        )  # fmt: skip
    assert torch.equal(found["fastattn"], found["eager"])


def test_gradients_equal_eager_attention(model):
    ids = tokens()
    gradients = {}
    for name in ("fastattn", "eager"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert gradients["fastattn"].keys() == gradients["eager"].keys() and gradients["eager"]
    for n, expected in gradients["eager"].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            gradients["fastattn"][n], expected, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=n: f"{n}: {m}"
        )


def prefix_types(lengths):
    return (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("padded", [False, True])
def test_hrm_text_prefix_lm(padded):
    model = build("hrm_text")
    ids, types = tokens(), prefix_types([6, 3])
    keep = torch.ones_like(ids)
    if padded:
        keep[1, 9:] = 0
    assert_equal_to_eager(model, ids, token_type_ids=types, attention_mask=keep, rows=keep.bool())
    full = logits(model, "fastattn", ids, token_type_ids=types)
    changed = ids.clone()
    changed[:, 8:] = tokens(seed=2)[:, 8:]
    assert torch.equal(logits(model, "fastattn", changed, token_type_ids=types)[:, :8], full[:, :8])
    changed = ids.clone()
    changed[:, 5] = tokens(seed=2)[:, 5]  # in the first row's prefix, after the second row's
    after = logits(model, "fastattn", changed, token_type_ids=types)
    assert not torch.equal(after[0, 0], full[0, 0]) and torch.equal(after[1, :5], full[1, :5])


def test_hrm_text_prefix_lm_decodes_from_its_cache():
    model = build("hrm_text")
    ids, types = tokens(batch=1), prefix_types([6])
    whole = logits(model, "eager", ids, token_type_ids=types)
    model.set_attn_implementation("fastattn")
    with torch.no_grad():
        step = model(ids[:, :6], token_type_ids=types[:, :6], use_cache=True)
        found = [step.logits]
        for t in range(6, LENGTH):
            step = model(ids[:, t : t + 1], use_cache=True, **{cache_name(): step[cache_name()]})
            found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_what_is_not_served_is_refused():
    q = torch.zeros(1, 2, 3, 4)
    for name in ("head_mask", "cache", "block_table", "read_index", "output_attentions"):
        with pytest.raises(NotImplementedError, match=name):
            attention_forward(torch.nn.Module(), q, q, q, None, **{name: torch.ones(1)})


def test_dropout_in_training_drops_attention_weights():
    """Reproduced by torch's seed, gone in evaluation; its mean and its gradients are `fastattn.attention`'s, tested there."""
    dropping = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0
    )
    model = transformers.AutoModelForCausalLM.from_config(dropping, attn_implementation="fastattn")
    with torch.no_grad():
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(model.train()(tokens()).logits)
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
        assert not torch.equal(model.eval()(tokens()).logits, runs[0])
    assert_equal_to_eager(model, tokens())


def test_sinks_of_each_query():
    """inkling2's: a column of scores beside the keys', cut off again."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(2, 4, 5, 1, generator=generator, dtype=torch.float64)
    out, _ = attention_forward(torch.nn.Module(), q, k, v, None, scaling=0.3, is_causal=False, sinks=sinks)
    scores = torch.cat([0.3 * q @ k.mT, sinks], -1)
    expected = scores.softmax(-1)[..., :-1] @ v
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=0, atol=1e-14)  # float64 sums of 5


def test_a_models_own_cache_is_not_a_paged_one():
    """Layers that hand on all their arguments hand on the cache too."""
    q = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    expected, _ = attention_forward(torch.nn.Module(), q, q, q, None)
    actual, _ = attention_forward(torch.nn.Module(), q, q, q, None, cache=transformers.DynamicCache())
    assert torch.equal(actual, expected)


def test_loads_from_a_directory(tmp_path):
    build("llama").save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="fastattn"
    ).eval()
    assert loaded.config._attn_implementation == "fastattn"
    assert_equal_to_eager(loaded, tokens())


def test_additive_masks_and_position_biases_are_added():
    torch.manual_seed(3)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    bias, allowed = torch.randn(1, 4, 5, 7), torch.rand(2, 1, 5, 7) < 0.7
    additive = torch.zeros(2, 1, 5, 7).masked_fill(~allowed, -torch.inf)
    expected = fa.attention(q, k, v, bias=bias, mask=fa.Mask(dense=allowed)).transpose(1, 2)
    for mask in (allowed, additive):
        out, _ = attention_forward(torch.nn.Module(), q, k, v, mask, position_bias=bias)
        torch.testing.assert_close(out, expected)


@given(data=st.data())
def test_recognised_masks_mean_the_same(data):
    """Any mask, structured or not: attention under what was recognised is attention under the tensor."""
    batch, lq = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    lk = lq + data.draw(st.integers(0, 4))
    i, j = torch.arange(lq)[:, None] + data.draw(st.integers(0, lk - lq)), torch.arange(lk)
    allowed = (j <= i) if data.draw(st.booleans()) else torch.ones(lq, lk, dtype=torch.bool)
    allowed = allowed.expand(batch, 1, lq, lk).clone()
    if data.draw(st.booleans()):
        allowed |= (
            j < torch.tensor([data.draw(st.integers(0, lk)) for _ in range(batch)])[:, None, None, None]
        )
    if data.draw(st.booleans()):
        allowed &= j > i - data.draw(st.integers(1, 6))
    if data.draw(st.booleans()):
        allowed &= (
            j < torch.tensor([data.draw(st.integers(0, lk)) for _ in range(batch)])[:, None, None, None]
        )
    if data.draw(st.booleans()):
        flip = tuple(data.draw(st.integers(0, n - 1)) for n in allowed.shape)
        allowed[flip] = ~allowed[flip]
    mask, keys = recognise(allowed, lk)
    mask = mask or fa.Mask()
    q, k = torch.empty(batch, 1, lq, 4), torch.empty(batch, 1, keys, 4)
    meant = masks.dense_allowed(lq, keys, q.device, mask.args("attention", q, k))
    assert (
        torch.equal(meant.expand(batch, 1, lq, keys), allowed[..., :keys]) and not allowed[..., keys:].any()
    )


def test_common_masks_are_recognised_and_a_changed_tensor_is_read_again():
    lq, window = 12, 4
    i, j = torch.arange(lq)[:, None], torch.arange(lq)
    causal = (j <= i)[None, None]
    prefix = torch.tensor([5, 0])[:, None, None, None]
    for allowed, options in (
        (causal, {"causal"}),
        (causal & (j > i - window), {"causal", "window_left"}),
        (causal | (j < prefix), {"causal", "prefix_lengths"}),
        ((causal | (j < prefix)) & (j < torch.tensor([12, 9])[:, None, None, None]),
         {"causal", "prefix_lengths", "key_lengths"}),
    ):  # fmt: skip
        mask, keys = recognise(allowed, lq)
        assert keys == lq and mask.dense is None and mask.causal
        assert (mask.window_left >= 0) == ("window_left" in options)
        assert (mask.prefix_lengths is not None) == ("prefix_lengths" in options)
        assert (mask.key_lengths is not None) == ("key_lengths" in options)
    assert recognise(causal, lq)[0] is recognise(causal, lq)[0]
    changed = causal.clone()
    recognise(changed, lq)
    changed[0, 0, 7, 2] = False
    assert recognise(changed, lq)[0].dense is changed


def test_a_mask_that_numpy_writes_to_is_read_again():
    memory = np.tril(np.ones((1, 1, 6, 6), dtype=bool))
    allowed = torch.from_numpy(memory)
    assert recognise(allowed, 6)[0].causal
    memory[..., 3, 2] = False
    found, _ = recognise(allowed, 6)
    assert torch.equal(found.dense, torch.from_numpy(memory))


def test_a_mask_given_to_a_model_can_be_saved_afterwards(model, tmp_path):
    allowed = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    logits(model, "fastattn", tokens(), attention_mask=allowed)
    torch.save(allowed, tmp_path / "mask.pt")
    assert torch.equal(torch.load(tmp_path / "mask.pt", weights_only=True), allowed)
    assert not vars(allowed)


@pytest.mark.parametrize("mask", [None, "given"])
def test_packed_documents_by_their_offsets_do_not_attend_each_other(model, mask):
    """As transformers' DataCollatorWithFlattening packs them."""
    documents = [
        tokens(1, n, seed=n) for n in (5, 4, 3)
    ]  # within gemma's window, which a given mask replaces
    offsets = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
    ids = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    packing = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 5, "max_length_k": 5}
    allowed = None if mask is None else torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    packed = logits(model, "fastattn", ids, position_ids=positions, attention_mask=allowed, **packing)
    for start, document in zip((0, 5, 9), documents, strict=True):
        alone = logits(model, "eager", document)
        actual = packed[:, start : start + document.shape[1]]
        torch.testing.assert_close(actual, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_one_query_in_float32_is_attention_with_every_backend(key_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 1, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, key_heads, 9, 8, generator=generator, requires_grad=True) for _ in range(2))

    def attend(q, k, v):
        return attention_forward(torch.nn.Module(), q, k, v, None, scaling=0.3)[0]

    results = []
    for call, backend in (
        (attend, None),
        (attend, "cpu"),
        (torch.compile(attend, fullgraph=True, backend="eager"), None),
        (attend, "reference"),
    ):
        with fa.set_backend(backend):
            out = call(q, k, v)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    for found in results[:-1]:
        for actual, expected in zip(found, results[-1], strict=True):
            # sums of 9 and of 8, and a handful of operations
            torch.testing.assert_close(
                actual, expected, rtol=0, atol=32 * testing.EPS32 * testing.max_finite(expected)
            )


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents_by_their_positions_are_what_eager_makes_of_them(model, use_cache):
    """Documents whose positions start at 0 again; transformers reads the boundaries off them where there is no cache."""
    documents = [tokens(1, n, seed=n) for n in (5, 4, 3)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    given = {"position_ids": positions, "use_cache": use_cache}
    assert_equal_to_eager(model, torch.cat(documents, 1), **given)
    if use_cache:
        return
    packed = logits(model, "fastattn", torch.cat(documents, 1), **given)
    for start, document in zip((0, 5, 9), documents, strict=True):
        alone = logits(model, "eager", document)
        actual = packed[:, start : start + document.shape[1]]
        torch.testing.assert_close(actual, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


@pytest.mark.parametrize("packing", ["positions", "offsets"])
def test_gradients_of_packed_documents_are_the_sums_of_theirs(model, packing):
    documents = [tokens(1, n, seed=n) for n in (5, 4, 3)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    given = {"position_ids": positions, "use_cache": False}
    if packing == "offsets":
        offsets = torch.tensor([0, 5, 9, 12], dtype=torch.int32)
        given |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 5, "max_length_k": 5}
    gradients = {}
    for name, pieces in (("fastattn", [torch.cat(documents, 1)]), ("eager", documents)):
        model.set_attn_implementation(name)
        model.zero_grad()
        for piece in pieces:
            model(piece, **(given if name == "fastattn" else {})).logits.sin().sum().backward()
        gradients[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for n, expected in gradients["eager"].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            gradients["fastattn"][n],
            expected,
            rtol=1e-3,
            atol=1e-4 * scale + 1e-6,
            msg=lambda m, n=n: f"{n}: {m}",
        )


@pytest.mark.parametrize(
    ("shapes", "packing", "error", "message"),
    [
        (
            (2, 4, 4),
            {"cu_seq_lens_q": [0, 4], "cu_seq_lens_k": [0, 4]},
            NotImplementedError,
            "a batch of one",
        ),
        ((1, 4, 6), {"cu_seq_lens_q": [0, 4], "cu_seq_lens_k": [0, 6]}, NotImplementedError, "no cache"),
        ((1, 4, 4), {"cu_seq_lens_q": [0, 4]}, ValueError, "must be given together"),
    ],
)
def test_offsets_that_are_not_served_are_refused_by_name(shapes, packing, error, message):
    batch, lq, lk = shapes
    q, k = torch.zeros(batch, 2, lq, 8), torch.zeros(batch, 2, lk, 8)
    packing = {name: torch.tensor(value) for name, value in packing.items()}
    with pytest.raises(error, match=message):
        attention_forward(torch.nn.Module(), q, k, k, None, is_causal=True, **packing)


def test_additive_masks_that_only_forbid_are_recognised():
    lq = 12
    i, j = torch.arange(lq)[:, None], torch.arange(lq)
    allowed = ((j <= i) & (j > i - 4))[None, None]
    for lowest in (torch.finfo(torch.float32).min, -torch.inf):
        mask, keys = recognise(torch.zeros(1, 1, lq, lq).masked_fill(~allowed, lowest), lq)
        assert keys == lq and mask.causal and mask.window_left == 3 and mask.dense is None
    for other in (-1e4, 1.0, torch.nan):
        assert recognise(torch.zeros(1, 1, lq, lq).masked_fill(~allowed, other), lq) is None
    assert recognise(torch.zeros(1, 1, lq, lq, requires_grad=True), lq) is None


def test_a_bias_of_another_dtype_computes_in_the_wider_one():
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 5, 8).bfloat16() for _ in range(3))
    bias = torch.randn(1, 2, 5, 5)
    out, _ = attention_forward(torch.nn.Module(), q, k, v, None, is_causal=False, position_bias=bias)
    expected = fa.attention(q.float(), k.float(), v.float(), bias=bias).bfloat16().transpose(1, 2)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_on_other_devices_are_read_once_a_version(monkeypatch, dtype):
    """A CPU tensor in place of a GPU's: what counts is that no second look waits for it."""
    allowed = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask = (
        allowed.clone() if dtype == torch.bool else torch.zeros(2, 1, 6, 6).masked_fill(~allowed, -torch.inf)
    )
    looked_at = []
    structure = integration._structure
    monkeypatch.setattr(integration, "_structure", lambda *args: looked_at.append(1) or structure(*args))
    for _ in range(2):
        found, keys = integration._recognise_on_device(mask, 6)
        assert found.causal and keys == 6 and len(looked_at) == 1
    mask[1, 0, 3, 2] = False if dtype == torch.bool else -torch.inf
    for _ in range(2):
        found, _ = integration._recognise_on_device(mask, 6)
        assert not found.dense[1, 0, 3, 2] and len(looked_at) == 2
    kept = weakref.ref(mask)
    del mask, found
    assert kept() is None
