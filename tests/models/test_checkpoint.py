"""Reading every layout, writing the released one, and files that are wrong."""

import dataclasses
import json
import os

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from fastattn.models import CheckpointError, HrmText, HrmTextConfig
from fastattn.models.hrm_text import released_name

CONFIG = tiny.config(max_position_embeddings=16, bos_token_id=6, eos_token_id=11)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HrmText(CONFIG)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def read(path):
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_keeps_every_byte(model, dtype, tmp_path):
    model.to(dtype).save_pretrained(tmp_path / "a")
    again = HrmText.from_pretrained(tmp_path / "a")
    assert same_weights(model, again) and again.config == CONFIG
    again.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json"):
        assert read(tmp_path / "a" / name) == read(tmp_path / "b" / name)
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "model.safetensors"]
    assert not again.z_L_init.requires_grad


def test_layers_have_the_released_names(model, tmp_path):
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    parts = ("attn.gqkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    blocks = {
        f"model.{stack}_module.layers.{i}.{part}.weight" for stack in "LH" for i in (0, 1) for part in parts
    }
    assert names == blocks | {"model.embed_tokens.weight", "lm_head.weight", "model.z_L_init"}


def test_transformers_reads_what_is_saved(model, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.9")
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    ids = torch.arange(5)[None]
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "saved_again")
    again = HrmText.from_pretrained(tmp_path / "saved_again")
    assert same_weights(model, again) and again.config == CONFIG


def split(tensors):
    """The layout of transformers' memory: one tensor a projection."""
    out = {}
    for name, tensor in tensors.items():
        if "gqkv_proj" in name:
            for part, rows in zip(("gate", "q", "k", "v"), tensor.chunk(4), strict=True):
                out[name.replace("attn.gqkv", f"self_attn.{part}")] = rows.clone()
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                out[name.replace("gate_up", part)] = rows.clone()
        else:
            out[name.replace(".attn.", ".self_attn.")] = tensor
    return out


def native(tensors):
    """The reference's own names, as a compiled model of it saves them."""
    out = {"model.zH_init": torch.zeros(8), "model.L_level.core.rotary_emb.cos_cached": torch.zeros(2)}
    for name, tensor in tensors.items():
        name = name.replace("_module.layers", "_level._orig_mod.core.layers").replace("z_L_init", "zL_init")
        out["_orig_mod." + name.replace("model.embed_tokens.weight", "embed_tokens.embedding_weight")] = (
            tensor
        )
    return out


@pytest.mark.parametrize("layout", [split, native])
def test_other_layouts(model, layout, tmp_path):
    tensors = {released_name(name): tensor for name, tensor in model.state_dict().items()}
    save_file(layout(tensors), tmp_path / "model.safetensors")
    assert same_weights(model, HrmText.from_pretrained(tmp_path, config=CONFIG))


@pytest.mark.parametrize("layout", [dict, split, native])
@pytest.mark.parametrize("count", [2, 4, 16])
def test_layers_may_be_counted_by_stack_by_both_or_by_calls(model, layout, count, tmp_path):
    """2 layers a stack, 8 calls. HRM-Text's own converter writes 4."""
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    save_file(layout(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    for per_stack in ({}, {"num_layers_per_stack": 2}):
        (tmp_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": count} | per_stack))
        again = HrmText.from_pretrained(tmp_path)
        assert again.config == CONFIG and same_weights(again, model)
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="missing: "):
        HrmText.from_pretrained(tmp_path)


def test_shards(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    os.remove(tmp_path / "model.safetensors")
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"part{i}.safetensors")
    weight_map = {name: f"part{i % 2}.safetensors" for i, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_weights(model, HrmText.from_pretrained(tmp_path))
    os.remove(tmp_path / "part1.safetensors")
    with pytest.raises(CheckpointError, match=r"part1.safetensors: no such file"):
        HrmText.from_pretrained(tmp_path)


def test_missing_and_unexpected_are_listed(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"], tensors["model.z_L_init"]
    tensors["model.extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"2 missing: lm_head.weight, model.z_L_init; 1 unexpected: model.extra$"
    ):
        HrmText.from_pretrained(tmp_path)


def test_wrong_shape_and_mixed_dtypes(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(21, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \(21, 8\); the config makes it"):
        HrmText.from_pretrained(tmp_path)
    mixed = tensors | {"lm_head.weight": tensors["lm_head.weight"].bfloat16()}
    save_file(mixed, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mix .*bfloat16.*float32.*; give dtype="):
        HrmText.from_pretrained(tmp_path)
    assert HrmText.from_pretrained(tmp_path, dtype=torch.float64).lm_head.weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_of_a_dtype_the_model_has_not(model, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: t.to(dtype) for n, t in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"is {dtype}, which the model does not compute in"):
        HrmText.from_pretrained(tmp_path)
    for asked in ("bfloat16", torch.int32):
        with pytest.raises(TypeError, match="dtype is"):
            HrmText.from_pretrained(tmp_path, dtype=asked)


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": ["a.safetensors"]}', '{"weight_map": {"lm_head.weight": 3}}']
)
def test_an_index_without_files(model, tmp_path, index):
    model.save_pretrained(tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"index.json: weight_map must name a file"):
        HrmText.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_half_written_weights(model, keep, tmp_path):
    model.save_pretrained(tmp_path)
    whole = read(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors: unreadable or only half written"):
        HrmText.from_pretrained(tmp_path)


def test_missing_and_unreadable_files(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: no such file"):
        HrmText.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: no such file"):
        HrmText.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 2')
    with pytest.raises(CheckpointError, match=r"config.json: not readable as JSON"):
        HrmText.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"holds a list"):
        HrmText.from_pretrained(tmp_path)


def test_an_interrupted_save_leaves_the_last_one(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = read(tmp_path / "model.safetensors")

    def interrupted(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert read(tmp_path / "model.safetensors") == before
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


RELEASED = {
    "architectures": ["HrmTextForCausalLM"],
    "model_type": "hrm_text",
    "vocab_size": 65536,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 128,
    "H_cycles": 2,
    "L_cycles": 3,
    "L_bp_cycles": [0, 3],
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.025515518,
    "embedding_scale": 39.1918,
    "prefix_lm": True,
    "pad_token_id": 5,
    "bos_token_id": 6,
    "eos_token_id": 11,
}


def test_both_forms_of_the_config():
    config = HrmTextConfig.from_dict(RELEASED)
    assert (config.num_hidden_layers, config.embedding_scale, config.L_bp_cycles) == (16, 39.1918, (0, 3))
    again = dict(RELEASED, num_hidden_layers=128, num_layers_per_stack=16)
    del again["rope_theta"]
    again["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    assert HrmTextConfig.from_dict(again) == config == HrmTextConfig.from_dict(config.to_dict())


def test_published_size():
    with torch.device("meta"):
        model = HrmText(HrmTextConfig.size("XL", 65536))
    core = sum(p.numel() for p in model.recurrence.parameters())
    assert core == 981_467_136 and len(model.state_dict()) == 131


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 4}, "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ({"sliding_window": 4}, "unknown key 'sliding_window'$"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"num_layers_per_stack": 12}, "num_hidden_layers is 16; .* must be 96"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters has type 'yarn'"),
        ({"L_bp_cycles": [0, 4]}, r"L_bp_cycles is \[0, 4\]"),
        ({"H_cycles": 0}, "H_cycles is 0"),
        ({"head_dim": 3}, "head_dim is 3"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"embedding_scale": "39"}, "embedding_scale is '39'"),
        ({"L_bp_cycles": 3}, "L_bp_cycles is 3; it must be a list"),
        ({"pad_token_id": -1}, "pad_token_id is -1; tokens are from 0 to 65535"),
        ({"eos_token_id": [11, 65536]}, r"eos_token_id is \(11, 65536\)"),
        (
            {"head_dim": None, "num_attention_heads": 7, "num_key_value_heads": 7},
            "7 does not divide hidden_size",
        ),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        HrmTextConfig.from_dict(RELEASED | change)


def test_an_unknown_key_in_a_file_names_the_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | {"sliding_window": 4}))
    with pytest.raises(CheckpointError, match=r"config.json: HrmTextConfig: unknown key 'sliding_window'"):
        HrmText.from_pretrained(tmp_path)


LOADING = """
from fastattn.models import HrmText

def problem(folder):
    return (folder,)

def run(folder):
    HrmText.from_pretrained(folder)
"""


@pytest.mark.parametrize("layout", [dict, split])
def test_loading_takes_no_more_memory_than_the_weights(peak_bytes, layout, tmp_path):
    """110 MB of bf16, in the released layout and with split projections."""
    large = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "vocab_size": 1000}
    for folder, config in (("small", CONFIG), ("large", dataclasses.replace(CONFIG, head_dim=None, **large))):
        with torch.device("meta"):
            model = HrmText(config).bfloat16()
        model.to_empty(device="cpu").save_pretrained(tmp_path / folder)
        file = tmp_path / folder / "model.safetensors"
        save_file(layout(load_file(file)), file)
    assert file.stat().st_size > 100e6
    folders = [[str(tmp_path / name)] for name in ("small", "large")]
    assert peak_bytes(LOADING, *folders) < 1.2 * file.stat().st_size
