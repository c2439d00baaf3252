"""HRM's and TRM's own checkpoints and arch files, against models that are built as their code builds them."""

import json
import pickle
import warnings

import numpy as np
import original
import pytest
import tiny
import torch
import torch.distributed.checkpoint
from original import DATA, HRM, TRM
from safetensors.torch import load_file, save_file

from fastattn.models import CheckpointError, Hrm, HrmConfig, HrmText
from fastattn.models.checkpoint import WEIGHTS
from fastattn.models.convert import convert
from fastattn.runtime import plain_yaml
from fastattn.train.data.puzzles import write_folder

VARIANTS = {
    "hrm": HRM,
    "hrm, learned positions": HRM | {"pos_encodings": "learned", "puzzle_emb_ndim": 20},
    "trm": TRM,
    "trm, as many positions as needed": TRM | {"puzzle_emb_len": 0, "puzzle_emb_ndim": 24},
    "trm, no positions": TRM | {"pos_encodings": "none", "puzzle_emb_len": 3},
    "trm, mlp_t": TRM | {"mlp_t": True, "pos_encodings": "none", "no_ACT_continue": False},
    "trm, expansion": TRM | {"mlp_t": True, "expansion": 60, "pos_encodings": "learned"},
}


def same_outputs(ours, theirs):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(0, DATA["vocab_size"], (3, DATA["seq_len"]), generator=generator)
    puzzles = torch.tensor([0, 4, 2])
    state = [
        z.expand(3, ours.config.puzzle_len + ours.config.seq_len, -1) for z in (ours.H_init, ours.L_init)
    ]
    with torch.no_grad():
        for logits, q_halt, q_continue in original.segments(theirs, inputs, puzzles):
            *state, got, got_halt, got_continue = ours.segment(*state, inputs, puzzles)
            # theirs takes sqrt(1/2) as 0.707106781, 3e-10 off; the q's are float32
            torch.testing.assert_close(got, logits, rtol=0, atol=1e-7)
            torch.testing.assert_close(got_halt.double(), q_halt, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(got_continue.double(), q_continue, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", VARIANTS.values(), ids=VARIANTS)
def test_arch_keys_in_a_config_give_their_outputs(arch, tmp_path):
    theirs = original.make(arch)
    save_file(original.state(theirs), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(arch | DATA))
    ours = Hrm.from_pretrained(tmp_path)
    same_outputs(ours, theirs)
    ours.save_pretrained(tmp_path / "again")
    again = Hrm.from_pretrained(tmp_path / "again")
    assert again.config == ours.config
    same_outputs(again, theirs)


def test_the_puzzles_vector_takes_as_many_positions_as_the_arch_says():
    """Names and shapes of a TRM checkpoint fit any puzzle_emb_len; the published ones have 16."""
    assert HrmConfig.from_dict(TRM | DATA).puzzle_len == HrmConfig.trm().puzzle_len == 16
    assert (
        HrmConfig.from_dict({k: v for k, v in TRM.items() if k != "puzzle_emb_len"} | DATA).puzzle_len == 16
    )
    assert HrmConfig.from_dict(HRM | DATA).puzzle_len == 1
    config = HrmConfig.from_dict(TRM | DATA)
    assert (config.halt_exploration, config.q_continue, config.full_last_cycle) == (0.1, False, True)
    assert HrmConfig.from_dict(TRM | DATA | {"no_ACT_continue": False}).q_continue


@pytest.mark.parametrize("loss", ["stablemax", "softmax"])
def test_the_loss_of_the_arch_file_trains(loss):
    arch = TRM | DATA | {"loss": {"loss_type": f"{loss}_cross_entropy"}, "mlp_t": True}
    torch.manual_seed(0)
    model = Hrm(HrmConfig.from_dict(arch))
    assert model.config.loss == loss
    cells = torch.randint(1, 7, (2, 9))
    batch = {"inputs": cells, "labels": cells, "puzzle_ids": torch.zeros(2, dtype=torch.int64)}
    _, out = model(model.initial_carry(2), batch)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if loss == "softmax":
        cross_entropy = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), cells.flatten())
        halting = torch.nn.functional.binary_cross_entropy_with_logits(out.q_halt, out.correct.float())
        torch.testing.assert_close(out.loss, cross_entropy + 0.5 * halting)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "recursive_reasoning.trm_singlez@TinyRecursiveReasoningModel_ACTV1"},
            "name is 'recursive_reasoning.trm_s",
        ),
        ({"name": "transformers_baseline@Model_ACTV2"}, "name is 'transformers_baseline"),
        ({"name": HRM["name"]}, "puzzle_emb_len is given for Hierarchical"),
        ({"name": HRM["name"], "puzzle_emb_len": 0, "mlp_t": True}, "mlp_t is given for Hierarchical"),
        ({"name": HRM["name"], "puzzle_emb_len": 0}, "no_ACT_continue is given for Hierarchical"),
        ({"causal": True}, "causal is true"),
        ({"forward_dtype": "int8"}, "forward_dtype is 'int8'"),
        ({"pos_encodings": "alibi"}, "positions is 'alibi'; it must be one of rope, learned, none"),
        ({"loss": {"loss_type": "mse"}}, "loss is 'mse'"),
        ({"expansion": "4"}, "expansion is '4'"),
        ({"puzzle_emb_dim": 3}, "puzzle_emb_ndim and puzzle_emb_dim are the same"),
        ({"puzzle_emb_ndim": 0}, "without puzzle vectors"),
        (
            {"puzzle_emb_len": 1, "puzzle_emb_ndim": 17},
            "puzzle_emb_len is 1; puzzle_emb_dim 17 takes at least 2",
        ),
        ({"attn_dropout": 0.1}, "unknown key 'attn_dropout'; take it out"),
    ],
)
def test_an_arch_that_is_not_served_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        HrmConfig.from_dict(TRM | DATA | change)
    with pytest.raises(ValueError, match="vocab_size is missing: an arch file leaves it to the data"):
        HrmConfig.from_dict(TRM)


ALL_CONFIG = """\
arch:
{arch}
beta1: 0.9
beta2: 0.95
checkpoint_path: checkpoints/Sudoku-extreme ACT-torch/{name}
data_paths:
- data/sudoku-extreme-1k-aug-1000
data_paths_test: []
ema: true
ema_rate: 0.999
epochs: 50000
eval_interval: 5000
eval_save_outputs: []
evaluators:
- name: arc@ARC
lr: 0.0001
lr_min_ratio: 1.0
project_name: 'Sudoku: extreme'
run_name: null
weight_decay: 1.0e-05
"""


def saved(folder, arch, steps=(10, 9), seed=0, **more):
    """A run's folder as their code leaves it."""
    folder.mkdir()
    model = original.make(arch, seed)
    for step in steps:
        torch.save(
            original.state(model if step == max(steps) else original.make(arch, seed + 1)),
            folder / f"step_{step}",
        )
    nested = {**arch, "loss": "\n" + "".join(f"    {k}: {v}\n" for k, v in arch["loss"].items()).rstrip()}
    lines = "\n".join(
        f"  {key}: {str(value).lower() if value is False else value}" for key, value in nested.items()
    )
    (folder / "all_config.yaml").write_text(ALL_CONFIG.format(arch=lines, name="x"))
    (folder / "trm.py").write_text("raise SystemExit\n")
    return model


@pytest.mark.parametrize("arch", VARIANTS.values(), ids=VARIANTS)
def test_their_folders_are_converted(arch, tmp_path):
    theirs = saved(tmp_path / "theirs", arch)
    lines = convert(tmp_path / "theirs", tmp_path / "ours", seq_len=9)
    assert lines[0].endswith("step_10")
    ours = Hrm.from_pretrained(tmp_path / "ours")
    assert ours.config == HrmConfig.from_dict(arch | DATA)
    same_outputs(ours, theirs)
    theirs_again = original.make(arch, seed=5)  # and back
    theirs_again.load_state_dict(load_file(tmp_path / "ours" / "model.safetensors"))
    same_outputs(ours, theirs_again)


def test_the_cells_of_a_puzzle(tmp_path, monkeypatch):
    saved(tmp_path / "rope", TRM)
    saved(tmp_path / "learned", VARIANTS["hrm, learned positions"])
    saved(tmp_path / "mixer", VARIANTS["trm, mlp_t"])
    for name in ("learned", "mixer"):
        convert(tmp_path / name, tmp_path / f"{name} converted")
        assert Hrm.from_pretrained(tmp_path / f"{name} converted").config.seq_len == 9
    with pytest.raises(CheckpointError, match="neither its weights nor its config tell the cells"):
        convert(tmp_path / "rope", tmp_path / "converted")
    cells = np.ones((3, 9), dtype=np.int64)
    write_folder(tmp_path / "data" / "sudoku-extreme-1k-aug-1000", "train", cells, cells, vocab_size=7)
    monkeypatch.chdir(tmp_path)
    convert(tmp_path / "rope", tmp_path / "converted")  # all_config.yaml names the data
    model = Hrm.from_pretrained(tmp_path / "converted")
    assert (model.config.seq_len, model.config.num_puzzles) == (9, 5)


def test_another_number_of_puzzles_starts_at_the_mean(tmp_path):
    theirs = saved(tmp_path / "theirs", TRM)
    lines = convert(tmp_path / "theirs", tmp_path / "ours", seq_len=9, num_puzzles=8)
    assert "8 puzzles in place of 5: each starts at the mean of their vectors" in lines
    weights = Hrm.from_pretrained(tmp_path / "ours").puzzle_emb.weights
    mean = theirs.model.inner.puzzle_emb.weights.mean(0)
    assert weights.shape == (8, 16) and torch.equal(weights, mean.expand(8, 16))


def test_states_are_computed_in_the_weights_dtype(tmp_path):
    """Theirs keeps float32 weights and bfloat16 initial states."""
    theirs = original.make(TRM).float()
    state = original.state(theirs)
    state |= {name: tensor.bfloat16() for name, tensor in state.items() if name.endswith("_init")}
    torch.save({"model": state, "step": 3, "optimizer": {"lr": torch.tensor(1.0)}}, tmp_path / "model.pt")
    (tmp_path / "arch.json").write_text(json.dumps(TRM))
    convert(tmp_path / "model.pt", tmp_path / "ours", config=tmp_path / "arch.json", seq_len=9)
    ours = Hrm.from_pretrained(tmp_path / "ours")
    assert {t.dtype for t in ours.state_dict().values()} == {torch.float32}
    assert torch.equal(ours.H_init, theirs.model.inner.H_init.bfloat16().float())


def test_nothing_in_a_file_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"model": Evil()}, tmp_path / "step_1")
    (tmp_path / "all_config.yaml").write_text("arch:\n  H_layers: 0\n")
    with pytest.raises(CheckpointError, match=r"step_1: needs .*print; only files of tensors are read"):
        convert(tmp_path, tmp_path / "ours")
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"it holds builtins\.print"):
        convert(folder, tmp_path / "ours")
    encoding = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING

    class Reaching:  # older Pythons pickle an enum's member as a getattr, which must find nothing but members
        def __reduce__(self):
            return getattr, (encoding, "__subclasses__")

    (folder / ".metadata").write_bytes(pickle.dumps(Reaching()))
    with pytest.raises(CheckpointError, match="it holds getattr of '__subclasses__'"):
        convert(folder, tmp_path / "ours")
    (tmp_path / "step_2").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="step_2: "):
        convert(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_hrm_text_from_a_dcp_folder(tmp_path):
    """Under the reference's own names, as torch.distributed.checkpoint writes them."""
    torch.manual_seed(0)
    config = tiny.config(eos_token_id=3)
    model = HrmText(config)
    names = {"embed_tokens.weight": "embed_tokens.embedding_weight", "z_L_init": "model.zL_init"}

    def native(name):
        return names.get(name, name.replace("recurrence.", "model.").replace("_stack.", "_level.core."))

    state = {"model": {f"_orig_mod.{native(name)}": tensor for name, tensor in model.state_dict().items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save(state | {"step": 7}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    values = config.to_dict() | {"num_hidden_layers": 4}  # both stacks' layers
    (tmp_path / "dcp" / "config.json").write_text(json.dumps(values))
    convert(tmp_path / "dcp", tmp_path / "ours")
    (tmp_path / "own.yaml").write_text("arch:\n  hidden_size: 16\n")
    with pytest.raises(CheckpointError, match="arch keys are not read; name a file of HrmTextConfig keys"):
        convert(tmp_path / "dcp", tmp_path / "other", config=tmp_path / "own.yaml")
    model.save_pretrained(tmp_path / "released")
    wrapped = {
        f"module.{name}": tensor for name, tensor in load_file(tmp_path / "released" / WEIGHTS).items()
    }
    torch.save({"model": wrapped}, tmp_path / "ddp.pt")
    convert(tmp_path / "released", tmp_path / "again")
    convert(tmp_path / "ddp.pt", tmp_path / "from ddp", config=tmp_path / "released" / "config.json")
    for name in ("ours", "again", "from ddp"):
        again = HrmText.from_pretrained(tmp_path / name)
        assert again.config == config
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_a_folder_that_is_not_converted_says_so(tmp_path):
    saved(tmp_path / "theirs", HRM, steps=(3,))
    for kind in (Hrm, HrmText):
        for path in (tmp_path / "theirs", tmp_path / "theirs" / "step_3"):
            with pytest.raises(CheckpointError, match=r"`fastattn convert .* FOLDER` makes one"):
                kind.from_pretrained(path)
    with pytest.raises(CheckpointError, match="no such file"):
        Hrm.from_pretrained(tmp_path)


def test_yaml():
    yaml = pytest.importorskip("yaml")
    value = {
        "arch": TRM,
        "empty": [],
        "none": None,
        "numbers": [1, -2.5, 1e-05, 3.0e8, 0.1],
        "text": ["a: b", "it's", "1", "true", "", "x y", "- dash", 'quote "q"'],
        "nested": [{"a": 1, "b": [1, 2]}, {"c": {"d": None}}],
        "yes": True,
    }
    assert plain_yaml.parse(yaml.dump(value)) == value
    assert plain_yaml.parse("") is None
    for text in ("a: &x 1\n", "a: [1, 2]\n", "a: |\n  text\n", "a:1\n", "a: 1\n  b: 2\n"):
        with pytest.raises(ValueError, match="line"):
            plain_yaml.parse(text)
