"""Model families beyond causal decoders: each equals eager attention on "fastattn", or is refused."""

import copy
import pickle

import pytest
import torch
import transformers as hf

import fastattn as fa
from fastattn.integrations.transformers import attention_forward

LENGTH = 13
TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ENCODER_DECODER = {
    "vocab_size": 61,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
DEEPSEEK = {
    **TEXT,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def ids(seed=1):
    return torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


def keep():
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -4:] = 0
    return mask


def text():
    return {"input_ids": ids(), "attention_mask": keep()}


def pair():
    return {**text(), "decoder_input_ids": ids(2)[:, :7]}


def image():
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))}


def sound():
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3))
    return {"input_features": features, "decoder_input_ids": ids(2)[:, :7]}


def falcon(**more):
    return hf.FalconConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        **more,
    )


SERVED = {
    "mistral": (hf.MistralForCausalLM, lambda: hf.MistralConfig(**TEXT, sliding_window=5), text),
    "llama4": (  # attends in chunks of 5
        hf.Llama4ForCausalLM,
        lambda: hf.Llama4TextConfig(
            **TEXT, head_dim=8, attention_chunk_size=5, num_local_experts=2, intermediate_size_mlp=48
        ),
        text,
    ),
    "deepseek_v3": (hf.DeepseekV3ForCausalLM, lambda: hf.DeepseekV3Config(**DEEPSEEK), text),
    "deepseek_v32": (  # each query's keys by their indices
        hf.DeepseekV32ForCausalLM,
        lambda: hf.DeepseekV32Config(**DEEPSEEK, index_topk=3, index_n_heads=2, index_head_dim=16),
        text,
    ),
    "minimax_m3": (  # each query's blocks of keys
        hf.MiniMaxM3VLForCausalLM,
        lambda: hf.MiniMaxM3VLTextConfig(
            **TEXT | {"bos_token_id": 1, "eos_token_id": 2}, head_dim=16, rotary_dim=16, num_local_experts=2,
            num_experts_per_tok=1, layer_types=["minimax_m3_sparse", "full_attention"], index_n_heads=2, index_head_dim=16,
            index_block_size=3, index_topk_blocks=1, index_local_blocks=1, dense_intermediate_size=48,
            shared_intermediate_size=48,
        ),
        text,
    ),
    "gpt_oss": (  # sinks
        hf.GptOssForCausalLM,
        lambda: hf.GptOssConfig(**TEXT, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=5),
        text,
    ),
    "vaultgemma": (  # a soft cap
        hf.VaultGemmaForCausalLM,
        lambda: hf.VaultGemmaConfig(**TEXT, head_dim=8, sliding_window=5, attn_logit_softcapping=1.0),
        text,
    ),
    "bert": (hf.BertModel, lambda: hf.BertConfig(**TEXT, attention_probs_dropout_prob=0.0), text),
    "t5": (  # a bias for each distance
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0),
        pair,
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        lambda: hf.WhisperConfig(
            **ENCODER_DECODER, num_mel_bins=8, max_source_positions=20, pad_token_id=0, decoder_start_token_id=1
        ),
        sound,
    ),
    "vit": (hf.ViTModel, lambda: hf.ViTConfig(**IMAGE), image),
    "clip": (
        hf.CLIPModel,
        lambda: hf.CLIPConfig(
            text_config={**TEXT, "eos_token_id": 2}, vision_config=IMAGE, projection_dim=16
        ),
        lambda: text() | image(),
    ),
    # tables of attention classes of their own
    "falcon": (hf.FalconForCausalLM, lambda: falcon(), text),
    "sam": (
        hf.SamVisionModel,
        lambda: hf.SamVisionConfig(**IMAGE, output_channels=8, window_size=3, global_attn_indexes=[1], mlp_dim=48),
        image,
    ),
    "data2vec_vision": (
        hf.Data2VecVisionModel,
        lambda: hf.Data2VecVisionConfig(**IMAGE, use_relative_position_bias=True, attention_probs_dropout_prob=0.0),
        image,
    ),
    # through the attention interface, but not on "sdpa": `is_causal` says nothing
    "nllb_moe": (
        hf.NllbMoeForConditionalGeneration,
        lambda: hf.NllbMoeConfig(
            **ENCODER_DECODER, num_experts=2, expert_capacity=64, encoder_sparse_step=0, decoder_sparse_step=0
        ),
        pair,
    ),
    # an encoder with attention of its own beside a decoder with the interface
    "bigbird_pegasus": (
        hf.BigBirdPegasusForConditionalGeneration,
        lambda: hf.BigBirdPegasusConfig(**ENCODER_DECODER, attention_type="original_full"),
        pair,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def registered():
    fa.integrations.transformers.register()


def build(model, config, implementation):
    """The same weights for every implementation, large enough to tell a wrong mask."""
    made = model._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + (0.3 if p.dim() == 1 else 0.0))
    return made


def result(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    if "logits_per_image" in out:
        return out.logits_per_image
    return out.logits if "logits" in out else out.last_hidden_state


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", SERVED)
def test_equals_eager_attention(family):
    model, config, inputs = SERVED[family]
    fast, eager = (build(model, config(), name) for name in ("fastattn", "eager"))
    for padded in (True, False):
        given = inputs()
        mask = given.get("attention_mask")
        if not padded:
            given.pop("attention_mask", None)
        actual, expected = result(fast, given), result(eager, given)
        if padded and mask is not None and expected.shape[:2] == mask.shape:
            actual, expected = actual[mask.bool()], expected[mask.bool()]
        assert_equal(actual, expected)
        if "ForCausalLM" in model.__name__ and not padded:
            given["input_ids"] = torch.cat([ids()[:, :9], ids(2)[:, 9:]], 1)
            torch.testing.assert_close(result(fast, given)[:, :9], actual[:, :9], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        # their own attention would add a bool mask, or miss one that "sdpa" leaves out
        (
            hf.BloomForCausalLM,
            lambda: hf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4),
            "bloom models compute",
        ),
        (
            hf.MptForCausalLM,
            lambda: hf.MptConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4),
            "mpt models compute",
        ),
    ],
    ids=["bloom", "mpt"],
)
def test_what_is_not_served_is_refused(model, config, message):
    made = build(model, config(), "fastattn")
    with pytest.raises(NotImplementedError, match=message):
        made(ids())


def test_a_model_that_drops_queries_keeps_its_causal_mask():
    """gemma4 runs its last layers on the queries whose logits are wanted."""
    config = hf.Gemma4TextConfig(
        **{**TEXT, "num_hidden_layers": 4},
        vocab_size_per_layer_input=61,
        hidden_size_per_layer_input=8,
        head_dim=8,
        num_kv_shared_layers=2,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    fast, eager = (build(hf.Gemma4ForCausalLM, config, name) for name in ("fastattn", "eager"))
    assert_equal(result(fast, {"input_ids": ids()}), result(eager, {"input_ids": ids()}))
    tokens = [
        m.generate(ids()[:, :7], max_new_tokens=4, do_sample=False, cache_implementation="static", eos_token_id=None,
                   pad_token_id=0, disable_compile=True)
        for m in (fast, eager)
    ]  # fmt: skip
    assert torch.equal(*tokens)
    with pytest.raises(NotImplementedError, match="3 queries and 13 keys came without a mask"):
        fast(ids(), logits_to_keep=3)


def test_classes_in_tables_refuse_what_sdpa_leaves_out():
    config = SERVED["sam"][1]()
    model = build(hf.SamVisionModel, config, "fastattn")
    layer = model.vision_encoder.layers[0].attn
    with pytest.raises(NotImplementedError, match="output_attentions is not served"):
        layer(torch.zeros(1, 3, 3, 32), output_attentions=True)
    config.attention_dropout = 0.1
    model = build(hf.SamVisionModel, config, "fastattn")
    model(**image())
    with pytest.raises(
        NotImplementedError, match="FastattnSamVisionSdpaAttention drops no attention weights"
    ):
        model.train()(**image())


@pytest.mark.parametrize("family", ["sam", "falcon"])
def test_models_of_class_tables_are_copied_and_pickled(family):
    kind, config, inputs = SERVED[family]
    model = build(kind, config(), "fastattn")
    expected = result(model, inputs())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(result(copied, inputs()), expected)


def test_falcon_with_biases_by_distance_equals_sdpa():
    """transformers' eager attention adds these biases twice, once as a part of the mask."""
    fast, sdpa = (build(hf.FalconForCausalLM, falcon(alibi=True), name) for name in ("fastattn", "sdpa"))
    rows = keep().bool()
    assert_equal(result(fast, text())[rows], result(sdpa, text())[rows])


def test_tables_keep_their_own_classes():
    from transformers.models.sam import modeling_sam

    table = modeling_sam.SAM_VISION_ATTENTION_CLASSES
    assert set(table) == {"eager", "sdpa", "fastattn"} and issubclass(table["fastattn"], table["sdpa"])
    before = table["fastattn"]
    fa.integrations.transformers.register()
    assert table["fastattn"] is before
    assert (
        modeling_sam.torch is torch
        and torch.nn.functional.scaled_dot_product_attention is not fa.scaled_dot_product_attention
    )


@pytest.mark.parametrize("kind", [None, "bool", "additive"])
def test_keys_by_their_indices(kind):
    """Negative indices are none; a query whose keys are all masked attends nothing."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) for n in (5, 5, 5))
    indices = torch.randint(-1, 5, (2, 5, 3), generator=generator, dtype=torch.int32)
    allowed = (
        torch.rand(2, 1, 5, 5, generator=generator) < 0.8
        if kind
        else torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    )
    mask = {
        None: None,
        "bool": allowed,
        "additive": torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, -torch.inf),
    }[kind]
    chosen = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    for b in range(2):
        for i in range(5):
            for j in indices[b, i].tolist():
                if j >= 0:
                    chosen[b, 0, i, j] = True
    out, _ = attention_forward(torch.nn.Module(), q, k, v, mask, scaling=0.3, indices=indices)
    scores = (0.3 * q @ k.mT).masked_fill(~(allowed & chosen), -torch.inf)
    expected = scores.softmax(-1).nan_to_num() @ v
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=0, atol=1e-14)  # float64 sums of 5
    with pytest.raises(NotImplementedError, match="indexer has build_block_mask, not Module"):
        attention_forward(torch.nn.Module(), q, k, v, mask, block_indices=indices)
    for wrong, message in ((indices[:1], "is served for"), (indices[:, None], "is served for")):
        with pytest.raises(NotImplementedError, match=message):
            attention_forward(torch.nn.Module(), q, k, v, mask, indices=wrong)
