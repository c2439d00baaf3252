"""HrmText: packing, padding, credit, equality with transformers, errors."""

import copy

import pytest
import tiny
import torch

from fastattn.integrations.transformers import cache_name
from fastattn.models import HrmText, HrmTextConfig
from fastattn.models.hrm_text import released_name

CONFIG = tiny.config()


def make(config=CONFIG, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return HrmText(config).to(dtype)


def gradients(model):
    return {released_name(name): p.grad for name, p in model.named_parameters()}


def test_gradient_free_calls_save_nothing():
    model = make()
    ids = torch.randint(0, 40, (1, 12))

    def saved(bp_steps):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            model.hidden_states(ids, bp_steps=bp_steps)
        return sum(kept)

    per_call = saved(3) - saved(2)  # one H call more
    assert saved(2) < 3 * per_call  # its two calls and the embedding
    assert saved(8) > 3 * saved(2)


def test_activation_checkpointing_gives_the_same_gradients_and_keeps_less():
    ids = torch.randint(0, 40, (2, 7))
    grads, kept = [], []
    for on in (False, True):
        model = make()
        model.activation_checkpointing(on)
        sizes = []
        pack = lambda t, sizes=sizes: sizes.append(t.nbytes) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(ids, labels=ids).loss
        kept.append(sum(sizes))
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)
    assert kept[1] < kept[0] / 4  # a state a block, where a block keeps its norms, projections and products


def test_changing_one_packed_sample_leaves_the_others_bitwise_equal():
    model = make(dtype=torch.float32)
    ids = torch.randint(0, 40, (1, 12))
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    prefixes = torch.tensor([2, 3], dtype=torch.int32)
    other = ids.clone()
    other[0, :5] = (other[0, :5] + 1) % 40
    a, b = (model(x, cu_seqlens=cu_seqlens, prefix_lengths=prefixes).logits for x in (ids, other))
    assert torch.equal(a[:, 5:], b[:, 5:]) and not torch.equal(a[:, :5], b[:, :5])


def test_right_padding_changes_nothing():
    model = make()
    short = torch.randint(0, 40, (1, 5))
    ids = torch.cat([short, torch.randint(0, 40, (1, 3))], 1)
    prefix = torch.tensor([2])
    padded = model(ids, prefix_lengths=prefix, lengths=torch.tensor([5]), labels=ids, return_logits=True)
    plain = model(short, prefix_lengths=prefix, labels=short, return_logits=True)
    torch.testing.assert_close(padded.logits[:, :5], plain.logits, rtol=0, atol=1e-11)
    torch.testing.assert_close(padded.loss, plain.loss, rtol=0, atol=1e-11)


def test_a_batch_without_any_response_has_loss_zero_and_zero_gradients():
    model = make()
    ids = torch.randint(0, 40, (2, 5))
    out = model(ids, prefix_lengths=torch.tensor([5, 5]), labels=torch.full_like(ids, -100))
    assert out.loss == 0 and out.logits is None
    out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_one_token():
    model = make()
    ids = torch.tensor([[7]])
    assert model(ids).logits.shape == (1, 1, 40)
    assert model(ids, labels=ids).loss == 0


def test_credit_by_config():
    flags = make()._credit(None)
    assert flags == make().recurrence.gradient_calls(5) == (False,) * 3 + (True,) * 5
    one = HrmTextConfig(
        vocab_size=4, hidden_size=4, num_attention_heads=1, num_hidden_layers=1, L_bp_cycles=(2,)
    )
    assert make(one)._credit(None) == (False, False, True, True, False, True, True, True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    transformers = pytest.importorskip("transformers", minversion="5.9")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.HrmTextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
        L_bp_cycles=[0, 3],
        initializer_range=0.1,
        max_position_embeddings=64,
    )
    theirs = transformers.HrmTextForCausalLM(config).eval()
    theirs.model.z_L_init.normal_()
    folder = tmp_path_factory.mktemp("saved_again")
    theirs.save_pretrained(folder)
    return HrmText.from_pretrained(folder), theirs


@pytest.mark.parametrize("prefixes", [None, [4, 0, 11]])
def test_equal_to_transformers(pair, prefixes):
    ours, theirs = pair
    ids = torch.randint(0, 50, (3, 11), generator=torch.Generator().manual_seed(1))
    prefix = torch.zeros(3, dtype=torch.int64) if prefixes is None else torch.tensor(prefixes)
    kinds = (torch.arange(11) < prefix[:, None]).long()
    labels = ids.masked_fill(kinds == 1, -100)
    expected = theirs(ids, token_type_ids=None if prefixes is None else kinds, labels=labels)
    got = ours(
        ids,
        prefix_lengths=None if prefixes is None else prefix,
        labels=labels,
        bp_steps=5,
        return_logits=True,
    )
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=1e-5)

    ours.zero_grad()
    theirs.zero_grad()
    expected.loss.backward()
    got.loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, grad in gradients(ours).items():
        if name.endswith("gqkv_proj.weight"):
            base = name.replace(".attn.gqkv_proj", ".self_attn.{}_proj")
            expected_grad = torch.cat([grads[base.format(part)] for part in ("gate", "q", "k", "v")])
        elif name.endswith("gate_up_proj.weight"):
            expected_grad = torch.cat([grads[name.replace("gate_up", part)] for part in ("gate", "up")])
        else:
            expected_grad = grads[name.replace(".attn.", ".self_attn.")]
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-5, msg=name)


@torch.no_grad()
def test_bfloat16_is_as_close_to_the_truth_as_transformers(pair):
    ours, theirs = pair
    ids = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(3))
    prefix = torch.tensor([3, 12, 0, 7])
    kinds = (torch.arange(12) < prefix[:, None]).long()
    truth = copy.deepcopy(ours).double()(ids, prefix_lengths=prefix).logits
    low = copy.deepcopy(ours).bfloat16()(ids, prefix_lengths=prefix).logits
    yardstick = copy.deepcopy(theirs).bfloat16()(ids, token_type_ids=kinds).logits
    # recurrence amplifies roundings: twice eager's error is the budget of every op, taken here over the mean
    assert (low.double() - truth).abs().mean() <= 2 * (yardstick.double() - truth).abs().mean()


@torch.no_grad()
def test_cached_decoding_equals_transformers(pair):
    ours, theirs = pair
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(2))
    cache = ours.make_cache(2, 9)
    got = [ours(ids[:, :5], prefix_lengths=torch.tensor([5, 5]), cache=cache).logits]
    out = theirs(ids[:, :5], token_type_ids=torch.ones(2, 5, dtype=torch.int64), use_cache=True)
    expected = [out.logits]
    for t in range(5, 9):
        got.append(ours(ids[:, t : t + 1], cache=cache).logits)
        out = theirs(ids[:, t : t + 1], use_cache=True, **{cache_name(): out[cache_name()]})
        expected.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(expected, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.rand(1, 3)}, "input_ids is torch.float32"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids has shape \(2,\)"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, r"shape \(1, 0\)"),
        ({"input_ids": torch.tensor([[40]])}, "input_ids holds 40; ids are from 0 to 39"),
        ({"input_ids": torch.tensor([[-1]])}, "input_ids holds -1"),
        (
            {"input_ids": torch.zeros(1, 65, dtype=torch.int64)},
            "65 tokens exceeds max_position_embeddings 64",
        ),
        ({"prefix_lengths": torch.tensor([7])}, r"prefix_lengths is \[7\]; each must be from 0 to 6"),
        ({"prefix_lengths": torch.tensor([1, 2])}, r"prefix_lengths has shape \(2,\)"),
        ({"lengths": torch.tensor([0])}, r"lengths is \[0\]; each must be from 1 to 6"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens ends at 5"),
        ({"labels": torch.zeros(1, 5, dtype=torch.int64)}, r"labels has shape \(1, 5\)"),
        ({"bp_steps": 1}, "bp_steps is 1; it must be from 2 to 8"),
        ({"bp_steps": 9}, "bp_steps is 9"),
    ],
)
def test_bad_arguments(arguments, message):
    arguments = {"input_ids": torch.zeros(1, 6, dtype=torch.int64)} | arguments
    with pytest.raises((ValueError, TypeError), match=message):
        make()(**arguments)


def test_prefix_longer_than_its_document():
    with pytest.raises(ValueError, match="prefix_lengths"):
        make()(
            torch.zeros(1, 6, dtype=torch.int64),
            cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32),
            prefix_lengths=torch.tensor([3, 0], dtype=torch.int32),
        )


def test_causal_models_refuse_prefixes():
    config = HrmTextConfig(
        vocab_size=4, hidden_size=4, num_attention_heads=1, num_hidden_layers=1, prefix_lm=False
    )
    with pytest.raises(ValueError, match="prefix_lm False"):
        make(config)(torch.zeros(1, 2, dtype=torch.int64), prefix_lengths=torch.tensor([1]))
