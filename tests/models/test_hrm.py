"""Hrm against its definition, halting, puzzle embeddings, TRM's shape, checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fastattn.models import CheckpointError, Hrm, HrmConfig
from fastattn.optim import SignSGD

SHAPE = {
    "vocab_size": 6,
    "seq_len": 5,
    "num_puzzles": 4,
    "puzzle_emb_dim": 10,
    "hidden_size": 8,
    "num_heads": 2,
    "intermediate_size": 12,
    "H_layers": 2,
    "L_layers": 2,
    "halt_max_steps": 4,
}


def make(seed=0, **changes):
    torch.manual_seed(seed)
    model = Hrm(HrmConfig(**(SHAPE | changes))).double()
    with torch.no_grad():
        if model.config.puzzle_emb_dim:
            model.puzzle_emb.weights.normal_()
        model.q_head.weight.normal_()
    return model


def batch(rows=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, 6, (rows, 5), generator=generator)
    labels = torch.randint(1, 6, (rows, 5), generator=generator)
    labels[0, :2] = -100
    return {
        "inputs": inputs,
        "labels": labels,
        "puzzle_ids": torch.randint(0, 4, (rows,), generator=generator),
    }


def rms(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def rotate(x):
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * 1e4 ** -(torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def definition_stack(stack, x, heads=2):
    for layer in stack.layers:
        B, T, D = x.shape
        q, k, v = (
            part.view(B, T, heads, D // heads).transpose(1, 2)
            for part in (x @ layer.self_attn.qkv_proj.weight.T).chunk(3, -1)
        )
        weights = (rotate(q) @ rotate(k).transpose(-1, -2) / (D // heads) ** 0.5).softmax(-1)
        out = (weights @ v).transpose(1, 2).reshape(B, T, D)
        x = rms(x + out @ layer.self_attn.o_proj.weight.T)
        gate, up = (x @ layer.mlp.gate_up_proj.weight.T).chunk(2, -1)
        x = rms(x + (F.silu(gate) * up) @ layer.mlp.down_proj.weight.T)
    return x


def definition_segment(model, zH, zL, inputs, puzzle):
    """``puzzle`` (B, 10): the looked-up vectors; 8 wide, so they take two positions, padded with 6 zeros."""
    L, H = model.recurrence.L_stack, model.recurrence.H_stack
    puzzle = torch.cat([puzzle, puzzle.new_zeros(len(puzzle), 6)], 1).view(len(puzzle), 2, 8)
    x = 8**0.5 * torch.cat([puzzle, model.embed_tokens.weight[inputs]], 1)
    config = model.config
    with torch.no_grad():
        for h in range(config.H_cycles):
            for l in range(config.L_cycles):
                if (h, l) != (config.H_cycles - 1, config.L_cycles - 1):
                    zL = definition_stack(L, zL + zH + x)
            if h != config.H_cycles - 1:
                zH = definition_stack(H, zH + zL)
    zL = definition_stack(L, zL + zH + x)
    zH = definition_stack(H, zH + zL)
    q = zH[:, 0] @ model.q_head.weight.T + model.q_head.bias
    return zH, zL, zH[:, 2:] @ model.lm_head.weight.T, q


def stablemax_loss(logits, labels):
    s = torch.where(logits >= 0, logits + 1, 1 / (1 - logits))
    chosen = (s / s.sum(-1, keepdim=True)).gather(-1, labels.clamp(min=0)[..., None])[..., 0].log()
    return -torch.where(labels == -100, 0.0, chosen).sum(-1) / (labels != -100).sum(-1)


def test_two_steps_equal_the_definition_in_loss_and_every_gradient():
    model = make(halt_exploration=0.0, halt_max_steps=16)
    with torch.no_grad():  # no row halts after its first segment
        model.q_head.weight.mul_(0.1)
        model.q_head.bias.copy_(torch.tensor([-5.0, 5.0]))
    data = batch()
    optimizer = SignSGD(model.puzzle_emb, lr=0.0)
    carry, out = model(model.initial_carry(3), data)
    assert not carry.halted.any()
    optimizer.zero_grad()
    carry, out = model(carry, batch(seed=9))  # ignored: no row takes a sample
    out.loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    puzzle_grad = model.puzzle_emb.weights.grad.to_dense()

    model.zero_grad()
    puzzle = model.puzzle_emb.weights[data["puzzle_ids"]].clone().requires_grad_()
    zH, zL = (init.expand(3, 7, 8) for init in (model.H_init, model.L_init))
    with torch.no_grad():
        zH, zL, _, _ = definition_segment(model, zH, zL, data["inputs"], puzzle)
    zH, zL, logits, q = definition_segment(model, zH, zL, data["inputs"], puzzle)
    with torch.no_grad():
        next_q = definition_segment(model, zH, zL, data["inputs"], puzzle)[3]
        right = ((logits.argmax(-1) == data["labels"]) | (data["labels"] == -100)).all(-1)
    loss = stablemax_loss(logits, data["labels"])
    for logit, target in ((q[:, 0], right.double()), (q[:, 1], next_q.max(-1).values.sigmoid())):
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(logit, target, reduction="none")
    loss.mean().backward()

    # the q's are float32: relative error 2^-24 of values of about 5
    torch.testing.assert_close(out.loss, loss.mean(), rtol=0, atol=1e-6)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-11)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=0, atol=1e-6, msg=name)
    summed = torch.zeros_like(puzzle_grad).index_add(0, data["puzzle_ids"], puzzle.grad)
    torch.testing.assert_close(puzzle_grad, summed, rtol=0, atol=1e-6)


def test_halted_rows_take_the_next_sample_and_fresh_state():
    model = make().eval()
    first, second = batch(seed=1), batch(seed=2)
    carry, _ = model(model.initial_carry(3), first)
    assert torch.equal(carry.inputs, first["inputs"]) and carry.steps.tolist() == [1, 1, 1]
    carry.halted = torch.tensor([False, True, False])
    carry, out = model(carry, second)
    assert carry.steps.tolist() == [2, 1, 2]
    assert torch.equal(
        carry.inputs, torch.stack([first["inputs"][0], second["inputs"][1], first["inputs"][2]])
    )
    assert torch.equal(carry.labels[1], second["labels"][1])
    _, alone = model(model.initial_carry(3), second)
    torch.testing.assert_close(out.logits[1], alone.logits[1], rtol=0, atol=1e-12)


def padded(data, rows):
    """The batch with rows of padding, as puzzle folders fill it up, among its own."""
    order = [0, *range(3, 3 + rows), 1, 2]
    fill = {"inputs": 0, "labels": -100, "puzzle_ids": 0}
    return {
        name: torch.cat([value, torch.full((rows, *value.shape[1:]), fill[name])])[order]
        for name, value in data.items()
    }, torch.tensor(order) < 3


@pytest.mark.parametrize("q_continue", [True, False])
def test_rows_without_labels_count_nowhere(q_continue):
    results = []
    for rows in (0, 5):
        model = make(q_continue=q_continue, halt_exploration=0.0)
        optimizer = SignSGD(model.puzzle_emb, lr=0.1)
        data, real = padded(batch(), rows)
        data["puzzle_ids"] = torch.where(
            real, data["puzzle_ids"].clamp(min=1), 0
        )  # padding's vector is no puzzle's
        carry, out = model(model.initial_carry(3 + rows), data)
        out.loss.backward()
        assert torch.equal(out.counted, real)
        assert carry.halted[~real].all() and not out.correct[~real].any()
        optimizer.step()
        grads = [p.grad for p in model.parameters()]
        results.append((out.loss, out.correct[real], *grads, model.puzzle_emb.weights))
    for alone, among_padding in zip(*results, strict=True):
        # float64 sums in another order, of q's in float32
        torch.testing.assert_close(alone, among_padding, rtol=0, atol=1e-7)


def test_a_batch_of_padding_teaches_nothing():
    model = make()
    nothing = {name: value[~real] for data, real in [padded(batch(), 4)] for name, value in data.items()}
    _, out = model(model.initial_carry(4), nothing)
    out.loss.backward()
    assert out.loss == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_padding_leaves_its_place_to_the_next_sample():
    model = make()
    carry, _ = model(model.initial_carry(5), padded(batch(), 2)[0])
    carry, out = model(carry, {k: v[[0, 1, 2, 0, 1]] for k, v in batch(seed=2).items()})
    assert out.counted.all() and carry.steps[1] == 1


@pytest.mark.parametrize("q_continue", [True, False])
def test_halting(q_continue):
    model = make(q_continue=q_continue, halt_exploration=0.0)
    halts, goes_on = torch.tensor([5.0, -5.0]), torch.tensor([-5.0, 5.0])
    with torch.no_grad():
        model.q_head.weight.zero_()
        model.q_head.bias.copy_(halts)
        carry, _ = model(model.initial_carry(3), batch())
        assert carry.halted.all()
        model.q_head.bias.copy_(goes_on)
        carry = model.initial_carry(3)
        for step in range(1, 5):  # the limit is 4
            carry, _ = model(carry, batch())
            assert bool(carry.halted.all()) == (step == 4)
        model.q_head.bias.copy_(halts)
        carry, _ = model.eval()(model.initial_carry(3), batch())
        assert not carry.halted.any()  # evaluation always runs to the limit


@torch.no_grad()
def test_exploration_keeps_rows_for_a_uniform_number_of_steps():
    model = make(halt_exploration=1.0, q_continue=False, halt_max_steps=3)
    model.q_head.weight.zero_()
    model.q_head.bias.copy_(torch.tensor([5.0, 0.0]))
    data = {name: value[:1].expand(400, *value.shape[1:]) for name, value in batch().items()}
    generator = torch.Generator().manual_seed(0)
    carry, _ = model(model.initial_carry(400), data, generator=generator)
    assert not carry.halted.any()  # at least 2
    carry, _ = model(carry, data, generator=generator)
    # half of them, within 5 standard deviations sqrt(400) / 2
    assert abs(int(carry.halted.sum()) - 200) <= 50


def test_activation_checkpointing_gives_the_same_gradients():
    grads = []
    for on in (False, True):
        model = make(q_continue=False)
        model.activation_checkpointing(on)
        _, out = model(model.initial_carry(3), batch())
        out.loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_solve_equals_the_segments_of_forward():
    model = make().eval()
    data = batch()
    carry = model.initial_carry(3)
    steps = list(model.solve(data["inputs"], data["puzzle_ids"]))
    assert len(steps) == 4
    for tokens, q_halt in steps:
        carry, out = model(carry, data)
        assert torch.equal(tokens, out.logits.argmax(-1)) and torch.equal(q_halt, out.q_halt)


def test_published_parameter_count():
    with torch.device("meta"):
        model = Hrm(HrmConfig())
    assert sum(p.numel() for p in model.parameters()) == 27_275_266
    assert model.puzzle_emb.weights.shape == (1, 512)


def test_trm_shape():
    model = make(
        **{name: getattr(HrmConfig.trm(), name) for name in ("shared_stack", "full_last_cycle", "q_continue")}
    )
    assert model.recurrence.L_stack is model.recurrence.H_stack
    assert model.recurrence.credit(1, 2) == (False, False, False, True, True, True)
    _, out = model(model.initial_carry(3), batch())
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.device("meta"):
        core = Hrm(HrmConfig.trm()).recurrence
    assert sum(p.numel() for p in core.parameters()) == 2 * (4 * 512**2 + 3 * 512 * 1536)
    assert (core.H_cycles, core.L_cycles) == (3, 6)


@pytest.mark.parametrize("shared_stack", [False, True])
def test_checkpoints(shared_stack, tmp_path):
    model = make(shared_stack=shared_stack)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    attention = "model.inner.L_level.layers.1.self_attn.qkv_proj.weight"
    head = {"H_init", "L_init", "lm_head.weight", "q_head.weight", "q_head.bias", "puzzle_emb.weights"}
    assert {f"model.inner.{name}" for name in (*head, "embed_tokens.embedding_weight")} | {attention} <= set(
        tensors
    )
    assert any("H_level" in name for name in tensors) != shared_stack
    save_file({f"_orig_mod.{name}": t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    again = Hrm.from_pretrained(tmp_path)
    assert again.config == model.config
    assert (again.recurrence.L_stack is again.recurrence.H_stack) == shared_stack
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.puzzle_emb.weights.requires_grad is False
    del tensors[attention]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"1 missing: {attention}"):
        Hrm.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(3, 4, dtype=torch.int64)}, r"inputs has shape \(3, 4\)"),
        ({"inputs": torch.full((3, 5), 6)}, "inputs must be from 0 to 5"),
        ({"puzzle_ids": torch.tensor([0, 4, 0])}, "puzzle_ids must be from 0 to 3"),
        ({"labels": torch.zeros(3, 5)}, "labels has shape .* torch.float32"),
    ],
)
def test_bad_batches(change, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        model(model.initial_carry(3), batch() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 12, "num_heads": 4}, "hidden_size 12"),
        ({"H_cycles": 0}, "H_cycles is 0"),
        ({"halt_exploration": 2.0}, "halt_exploration is 2.0"),
        ({"shared_stack": True, "H_layers": 3}, "shared_stack"),
        ({"puzzle_emb_dim": -1}, "puzzle_emb_dim is -1"),
        ({"puzzle_emb_dim": "8"}, "puzzle_emb_dim is '8'"),
        ({"halt_exploration": "x"}, "halt_exploration is 'x'"),
        ({"rms_norm_eps": -1.0}, r"rms_norm_eps is -1\.0"),
        ({"rope_theta": None}, "rope_theta is None"),
        ({"shared_stack": "no"}, "shared_stack is 'no'"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        HrmConfig(**(SHAPE | change))
    with pytest.raises(ValueError, match="unknown key 'hiden'"):
        HrmConfig.from_dict({"hiden": 1})
