"""A tiny model of any transformers model type: its config shrunk by the names of its attributes, random weights, random inputs."""

import copy
import inspect

import torch
import transformers as hf
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TOKENS = 12
HIDDEN, HEADS, HEAD_DIM, VOCAB = 64, 4, 16, 256
AUTO = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "CTC", "",
    "PRETRAINING", "IMAGE", "BACKBONE",
)  # fmt: skip

# What an attribute of a config counts, by its name.
WIDTHS = frozenset(
    [
        "hidden_size",
        "d_model",
        "n_embd",
        "embed_dim",
        "dim",
        "emb_dim",
        "embedding_size",
        "projection_dim",
        "out_hidden_size",
        "hidden_dim",
        "encoder_hidden_size",
        "decoder_hidden_size",
        "text_hidden_size",
        "vision_hidden_size",
        "encoder_dim",
        "model_dim",
        "proj_dim",
        "width",
        "embedding_dim",
        "audio_embed_dim",
        "text_embed_dim",
        "vision_embed_dim",
        "output_dim",
        "pooler_output_size",
        "projection_size",
        "word_embed_proj_dim",
        "lm_hidden_size",
    ]
)
HEAD_COUNTS = frozenset(
    [
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "attention_heads",
        "encoder_num_attention_heads",
    ]
)
KEY_HEADS = frozenset(["num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num"])
HEAD_DIMS = frozenset(["head_dim", "d_kv", "attention_head_dim", "global_head_dim", "attention_head_size"])
LAYERS = frozenset(
    [
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "encoder_layers",
        "decoder_layers",
        "num_encoder_layers",
        "num_decoder_layers",
        "depth",
        "num_hidden_groups",
        "encoder_num_layers",
        "decoder_num_layers",
        "num_conv_layers",
        "encoder_num_hidden_layers",
        "decoder_num_hidden_layers",
    ]
)
INNER = frozenset(
    [
        "intermediate_size",
        "ffn_dim",
        "d_ff",
        "n_inner",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "d_inner",
        "mlp_dim",
        "ffn_hidden_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "intermediate_size_mlp",
        "inner_dim",
        "dim_feedforward",
        "expert_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
    ]
)
EXPERTS = frozenset(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"])
CHOSEN_EXPERTS = frozenset(["num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"])
FIXED = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "qk_head_dim": 32,
    "index_n_heads": 4, "index_head_dim": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_groups": 1,
    "o_lora_rank": 16, "o_groups": 2,
}  # fmt: skip
# Tried in this order: everything small; images of their size; two heads of 128; widths as they are.
LEVELS = ("small", "images kept", "wide heads", "widths kept")


def classes(model_type):
    """The names of the model's classes, the causal language model first."""
    names = []
    for kind in AUTO:
        mapping = getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES" if kind else "MODEL_MAPPING_NAMES", {})
        found = mapping.get(model_type) or ()
        names += [found] if isinstance(found, str) else list(found)
    return list(dict.fromkeys(names))


def config(model_type, level, layers):
    kind = CONFIG_MAPPING[model_type]
    return kind(**shrunk(kind(), level, layers))


def shrunk(config, level, layers):
    """Keyword arguments that make config's class small."""
    width, heads, head_dim = (256, 2, 128) if level == "wide heads" else (HIDDEN, HEADS, HEAD_DIM)
    result, token = {}, 200
    names = [n for n in vars(config) if not n.startswith("_")]
    for name in names:
        value = vars(config)[name]
        if isinstance(value, hf.PreTrainedConfig):
            result[name] = shrunk(value, level, layers) | {"model_type": value.model_type}
        elif (value is None and name == "num_experts_per_tok" and EXPERTS.intersection(names)) or (
            name == "eos_token_id" and value is not None
        ):
            result[name] = 2
        elif name == "depths" and isinstance(value, (list, tuple)):
            result[name] = [1 for _ in value]
        elif (
            name in ("rope_parameters", "rope_scaling")
            and "mrope_section" in str(value)
            and level in LEVELS[:2]
        ):
            result[name] = _sections(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            if (
                name.endswith(("token_id", "token_index")) or (name.endswith("_idx") and value > 255)
            ) and value > 255:
                token += 1
            small = _small(name, value, level, layers, (width, heads, head_dim), token, config)
            if small is not None:
                result[name] = small
    return result


def _small(name, value, level, layers, sizes, token, config):
    """What a number of a config becomes; None where it stays."""
    width, heads, head_dim = sizes
    if name in LAYERS:
        return min(value, layers)
    if name.startswith("vocab_size") or name.endswith("_vocab_size"):
        return VOCAB if value > 300 else None
    if name in ("pad_token_id", "bos_token_id", "decoder_start_token_id"):
        return 0 if name == "pad_token_id" else 1
    if (name.endswith(("token_id", "token_index")) or name.endswith("_idx")) and value > 255:
        return token
    if name in EXPERTS:
        return min(value, 4)
    if name in CHOSEN_EXPERTS:
        return min(value, 2)
    if level == "widths kept":
        return None
    if name in WIDTHS:
        return min(value, width)
    if name in HEAD_COUNTS:
        return heads
    if name in KEY_HEADS:
        return 1 if value == 1 else heads if value == vars(config).get("num_attention_heads") else heads // 2
    if name in HEAD_DIMS:
        return head_dim
    if name in INNER:
        return 96
    if name in FIXED:
        return FIXED[name]
    if name in ("rotary_dim", "rotary_ndims"):
        return min(value, head_dim)
    patch = getattr(config, "patch_size", None)
    return 4 * patch if level == "small" and name == "image_size" and isinstance(patch, int) else None


def _sections(rope):
    rope = copy.deepcopy(rope)
    for part in (rope, *(x for x in rope.values() if isinstance(x, dict))):
        if "mrope_section" in part:
            part["mrope_section"] = [4, 2, 2]
    return rope


def randomise(model, gentle):
    """Weights that tell a wrong mask; gently, where a model's own initialisation has to stay."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if not p.is_floating_point() or p.numel() == 0:
                continue
            noise = torch.randn(p.shape, generator=generator)
            if gentle:
                p.add_(noise * 0.02)
            elif p.dim() < 2:
                p.copy_(noise * 0.1 + (1.0 if p.dim() == 1 and float(p.mean()) > 0.5 else 0.0))
            else:
                p.copy_(noise * (1.5 / max(1, p[0].numel()) ** 0.5))


def number(config, *names):
    """The first of these attributes that is a number, in the config or in one inside of it."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    inner = (v for v in vars(config).values() if isinstance(v, hf.PreTrainedConfig))
    return next((found for c in inner if (found := number(c, *names)) is not None), None)


KINDS = ("text", "image", "audio", "both", "spectrogram", "video", "embeddings")


def inputs(model, config, kind):
    """Arguments of the model of one kind; None for a model that does not take it."""
    generator = torch.Generator().manual_seed(1)
    takes = inspect.signature(model.forward).parameters
    given = {}

    def normal(*shape):
        return torch.randn(2, *shape, generator=generator)

    def ids(n):
        drawn = torch.randint(3, 60, (2, n), generator=generator)
        # models that pool at the largest id or at the end of the text find it where no padding is
        drawn[:, n // 2], drawn[:, n // 2 + 1] = 61, 2
        return drawn

    size = number(config, "image_size", "img_size") or 64
    channels = number(config, "num_channels", "in_channels", "in_chans") or 3
    bands = ("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels")
    if kind in ("text", "both"):
        given["input_ids"] = ids(TOKENS)
        if "bbox" in takes:
            given["bbox"] = (
                torch.randint(0, 5, (2, TOKENS, 1), generator=generator).expand(-1, -1, 4).contiguous()
            )
    if kind in ("image", "both"):
        given["pixel_values"] = normal(channels, size, size)
    if kind == "video":
        name = "pixel_values_videos" if "pixel_values_videos" in takes else "pixel_values"
        given[name] = normal(number(config, "num_frames", "frames_per_clip") or 8, channels, size, size)
    if kind == "audio":
        length = 2 * (number(config, "max_source_positions") or 32)
        if "input_features" in takes:
            given["input_features"] = normal(number(config, *bands) or 80, length)
        else:
            given["input_values"] = normal(4000)
    if kind == "spectrogram":
        if "input_features" in takes:
            mel = number(
                config, "feature_projection_input_dim", "num_mel_bins", "input_size", "input_dim", *bands[2:]
            )
            given["input_features"] = normal(64, mel or 80)
        else:
            given["input_values"] = normal(1, 8000)
    if kind == "embeddings":
        given["inputs_embeds"] = normal(TOKENS, number(config, "hidden_size", "d_model") or HIDDEN)
    if any(name not in takes for name in given):
        return None
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids(7)
    if "use_cache" in takes:
        given["use_cache"] = False
    return given
