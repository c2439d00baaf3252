"""HRM's and TRM's own checkpoints and arch files, against models that are built as their code builds them."""

import json

import original
import pytest
import torch
from original import DATA, HRM, TRM
from safetensors.torch import save_file

from fastattn.models import Hrm, HrmConfig

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
