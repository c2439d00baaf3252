"""VQHead: equal to the dense head of its rows, fitted, trained in each assignment, saved and loaded."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from fastattn.models import HrmText, HrmTextConfig
from fastattn.nn import VQHead
from fastattn.nn.vq_head import ASSIGNMENTS, fit_codebook
from fastattn.runtime.files import write_tensors

D, V, K = 12, 50, 8


def rows_around(centres, per_code, spread, seed=0):
    """(V, d): `per_code` rows near each of the centres."""
    g = torch.Generator().manual_seed(seed)
    rows = centres.repeat_interleave(per_code, 0)
    return rows + spread * torch.randn(rows.shape, generator=g)


def test_is_the_dense_head_of_its_rows():
    torch.manual_seed(0)
    head = VQHead(D, V, K)
    torch.nn.init.normal_(head.bias)
    h, target = torch.randn(3, 5, D), torch.randint(0, V, (3, 5))
    dense = F.linear(h, head.codebook[head.codes], head.bias)
    torch.testing.assert_close(head(h), dense)
    torch.testing.assert_close(head.loss(h, target), F.cross_entropy(dense.flatten(0, 1), target.flatten()))
    assert torch.equal(head.argmax(h), dense.argmax(-1))
    assert head.sample(h).shape == (3, 5)
    assert sum(p.numel() for p in head.parameters()) == K * D + V


def test_a_code_a_token_is_exact():
    linear = torch.nn.Linear(D, V)
    head = VQHead.from_linear(linear, V)
    h = torch.randn(4, D)
    torch.testing.assert_close(head(h), linear(h))


def test_k_means_finds_the_groups():
    centres = 5 * torch.eye(D)[:K]
    rows = rows_around(centres, 30, 0.1)[torch.randperm(30 * K, generator=torch.Generator().manual_seed(3))]
    codebook, codes = fit_codebook(rows, K, iterations=30, batch_size=64, seed=1)
    spread = (rows - codebook[codes]).square().sum(1).mean()
    assert spread < 1.2 * D * 0.1**2  # 30 rows a code: the mean of D normal squares, within three deviations
    again = fit_codebook(rows, K, iterations=30, batch_size=64, seed=1)
    assert torch.equal(codebook, again[0]) and torch.equal(codes, again[1])


def test_k_means_shows_progress(capsys):
    fit_codebook(torch.randn(20, 3), 4, iterations=3, progress=True)
    assert "codebook" in capsys.readouterr().err
    fit_codebook(torch.randn(20, 3), 4, iterations=3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_training_lowers_the_loss(assignment):
    """Tokens read off a dense teacher; the head starts from its rows."""
    torch.manual_seed(0)
    teacher = rows_around(torch.randn(K, D), 6, 0.05)
    h = torch.randn(128, D)
    target = torch.distributions.Categorical(logits=3 * h @ teacher.T).sample()
    head = VQHead.from_linear(teacher, K, assignment=assignment, decay=0.5, iterations=20)
    optimizer = torch.optim.Adam([p for p in head.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(30):
        loss = head.loss(h, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if assignment != "fixed":
            head.update_codes()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert head.codebook.requires_grad == (assignment != "ema")


@pytest.mark.parametrize("assignment", ["straight_through", "ema"])
def test_dead_codes_start_again(assignment):
    torch.manual_seed(0)
    centres = 5 * torch.eye(D)[:K]
    head = VQHead.from_linear(rows_around(centres, 6, 0.1), K, assignment=assignment, decay=0.0, iterations=5)
    with torch.no_grad():
        head.codebook[3:] += 100.0  # nothing is near these now
    generator = torch.Generator().manual_seed(0)
    reseeded = [head.update_codes(generator=generator) for _ in range(6)]
    assert reseeded[0] == K - 3 and reseeded[-1] == 0
    assert head.codes.unique().numel() == K


def test_ema_codes_are_running_means():
    torch.manual_seed(1)
    rows = rows_around(5 * torch.eye(D)[:K], 5, 0.1)
    head = VQHead(D, 5 * K, K, assignment="ema", decay=0.0)
    with torch.no_grad():
        head.weight.copy_(rows)
        head.codebook.copy_(5 * torch.eye(D)[:K])
    assert head.update_codes() == 0
    torch.testing.assert_close(head.codebook.detach(), rows.view(K, 5, D).mean(1))
    head.decay = 0.9
    before = head.codebook.detach().clone()
    with torch.no_grad():
        head.weight += 1.0
    assert head.update_codes() == 0
    torch.testing.assert_close(head.codebook, before + 0.1)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("bias", [True, False])
def test_save_and_load(tmp_path, assignment, bias):
    head = VQHead(D, V, K, bias, assignment=assignment, decay=0.7, dtype=torch.bfloat16)
    head.save(tmp_path / "head.safetensors")
    loaded = VQHead.load(tmp_path / "head.safetensors")
    assert repr(loaded) == repr(head) and loaded.decay == 0.7
    state, other = head.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
    assert loaded.codebook.requires_grad == head.codebook.requires_grad
    (tmp_path / "head.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="unreadable"):
        VQHead.load(tmp_path / "head.safetensors")


@pytest.mark.parametrize("scale", (1e-25, 1e25))
def test_dead_codes_start_again_at_any_scale(scale):
    """Squared distances that float32 does not hold."""
    head = VQHead(D, V, K, assignment="straight_through")
    with torch.no_grad():
        head.weight.copy_(rows_around(torch.eye(5, D), 10, 1e-3) * scale)
        head.codebook.fill_(1.0)
        head.codebook[0] = 0.0
    assert head.update_codes(generator=torch.Generator().manual_seed(0)) == K - 1
    assert len(head.codes.unique()) == K
    with torch.no_grad():
        head.codebook[1:] = scale
        head.weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match="update_codes: weight or codebook holds NaN"):
        head.update_codes()


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_file_that_holds_no_head(tmp_path, assignment):
    path = tmp_path / "head.safetensors"
    head = VQHead(D, V, K, assignment=assignment, dtype=torch.bfloat16)
    head.save(path)
    with safe_open(path, framework="pt") as file:
        shape = file.metadata()["vq_head"]
    for change in (
        {"codes": torch.full((V,), K)},
        {"codes": torch.zeros(V)},
        {"codebook": torch.zeros(K - 1, D, dtype=torch.bfloat16)},
        {"codebook": torch.zeros(K, D, dtype=torch.int64)},
        {"codebook": torch.zeros(K, D)},
        {"more": torch.zeros(1)},
    ):
        write_tensors(path, head.state_dict() | change, {"vq_head": shape})
        with pytest.raises(ValueError, match=r"head\.safetensors holds no VQHead"):
            VQHead.load(path)
    for broken in ("[" * 100_000, "{", "5", json.dumps(json.loads(shape) | {"decay": "x"})):
        write_tensors(path, head.state_dict(), {"vq_head": broken})
        with pytest.raises(ValueError, match=r"head\.safetensors"):
            VQHead.load(path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: VQHead(D, V, V + 1), ValueError, "codebook_size must be 1 to vocab_size 50, given 51"),
        (lambda: VQHead(D, V, 0), ValueError, "codebook_size must be 1"),
        (lambda: VQHead(D, 0, 1), ValueError, "vocab_size must be an int of 1 or more"),
        (lambda: VQHead(D, V, K, assignment="gumbel"), ValueError, "assignment must be one of fixed"),
        (lambda: VQHead(D, V, K, decay=1.0), ValueError, r"decay must lie in \[0, 1\)"),
        (lambda: VQHead(D, V, K, codes=torch.full((V,), K)), ValueError, r"codes must lie in \[0, 8\)"),
        (lambda: VQHead(D, V, K, codes=torch.zeros(3, dtype=torch.int64)), ValueError, r"shape \(50,\)"),
        (lambda: VQHead(D, V, K).update_codes(), ValueError, "assignment is 'fixed'"),
        (lambda: VQHead.from_linear(torch.ones(3), 2), TypeError, "linear must be nn.Linear"),
        (lambda: VQHead.from_linear(torch.ones(3, 2), 2, bias=torch.ones(2)), ValueError, "bias must have"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def tiny(**options):
    torch.manual_seed(0)
    return HrmText(
        HrmTextConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            **options,
        )
    )


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_hrm_text_trains_generates_and_saves(tmp_path, assignment):
    model = tiny(head="vq", codebook_size=6, codebook_assignment=assignment)
    ids = torch.randint(0, 40, (2, 10))
    output = model(ids, labels=ids, return_logits=True)
    target = F.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), target.flatten()))
    output.loss.backward()
    assert model.lm_head.bias.grad.any() and model.embed_tokens.weight.grad is not None
    greedy = model.generate(ids, max_new_tokens=4)
    logits = model(greedy[:, :-1], prefix_lengths=torch.tensor([10, 10])).logits[:, 9:]
    assert torch.equal(greedy[:, 10:], logits.argmax(-1))
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}):
        drawn = model.generate(
            ids, max_new_tokens=3, temperature=0.8, generator=torch.Generator().manual_seed(1), **options
        )
        assert drawn.shape == (2, 13) and int(drawn.max()) < 40
    model.save_pretrained(tmp_path)
    loaded = HrmText.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_hrm_text_is_converted_in_place(tmp_path):
    model = tiny()
    ids = torch.randint(0, 40, (1, 8))
    before = model(ids).logits
    model.quantize_head(40, iterations=2)
    torch.testing.assert_close(model(ids).logits, before)
    assert model.config.head == "vq" and model.config.codebook_size == 40 and model.config.codebook_bias
    plain = tiny()
    plain.quantize_head(8, bias=False, iterations=2)
    plain.save_pretrained(tmp_path)
    assert torch.equal(HrmText.from_pretrained(tmp_path)(ids).logits, plain(ids).logits)
    with pytest.raises(ValueError, match="head 'vq' needs one"):
        tiny(head="vq")
    with pytest.raises(ValueError, match="'dense' or 'vq'"):
        tiny(head="sparse")
