"""FocusRouter and its retrofit to frozen transformers models of three shapes, with random weights."""

import pytest
import torch
import transformers

import fastattn as fa
from fastattn import testing
from fastattn.integrations.transformers import cache_name
from fastattn.nn import FocusRouter

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: transformers.LlamaConfig(**COMMON, num_hidden_layers=2, num_key_value_heads=2),
    "hrm_text": lambda: transformers.HrmTextConfig(**COMMON, num_hidden_layers=1, H_cycles=2, L_cycles=2),
}
WINDOW = 3
# "past_key_values" goes with transformers 5.40
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
SERVED_NAMES = {cache_name()} | ({"past_key_values"} if VERSION < (5, 40) else set())


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(5)  # enough for attention to matter
    return made


def tokens(length=20, batch=2):
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(0))


def test_gpt2_has_148224_parameters():
    routers = torch.nn.ModuleList(FocusRouter(768, groups=4) for _ in range(12))
    assert sum(p.numel() for p in routers.parameters()) == 148_224


def test_only_the_routers_train(model):
    routers = FocusRouter.retrofit(model, groups=4, window=WINDOW, temperature=1.0)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "focus_router" in n
    }
    before = [p.clone() for p in model.parameters()]
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in routers.parameters())
    torch.optim.SGD(routers.parameters(), lr=10.0).step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(p, old) == ("focus_router" not in name)


def test_everyone_in_every_group_is_the_model_itself(model):
    with torch.no_grad():
        expected = model.eval()(tokens()).logits
        routers = FocusRouter.retrofit(model, groups=4, top_k=4, window=WINDOW).eval()
        assert (model(tokens()).logits - expected).abs().max() < 1e-4 * expected.abs().max()
        for router in routers:
            router.top_k = 1
        assert (model(tokens()).logits - expected).abs().max() > 1e-2 * expected.abs().max()


def test_no_token_sees_a_later_one(model):
    routers = FocusRouter.retrofit(model, groups=4, window=WINDOW)
    other = tokens()
    other[:, 12:] = 5
    for mode in (True, False):
        routers.train(mode)
        with torch.no_grad():
            change = (model(tokens()).logits - model(other).logits).abs().amax(-1)
        assert change[:, :12].max() < 1e-5 and change[:, 12:].max() > 1e-3


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_cached_decoding_keeps_signatures(model, name):
    """Greedy tokens by hand, from a cache, equal generate's; their groups are those of frozen potentials."""
    if name not in SERVED_NAMES:
        pytest.skip(f"transformers {transformers.__version__} does not take {name}")
    routers = FocusRouter.retrofit(model, groups=4, window=WINDOW).eval()
    made = model.generate(tokens(), max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=True)
    assert made.shape == (2, 26)
    assert all(signature.shape == (2, 25) for router in routers for signature, _ in router._caches)
    with torch.no_grad():
        state = model(tokens(), use_cache=True)
        ids = tokens()
        for _ in range(6):
            ids = torch.cat([ids, state.logits[:, -1:].argmax(-1)], 1)
            state = model(ids[:, -1:], use_cache=True, **{name: state[cache_name()]})
    assert torch.equal(ids, made)
    with torch.no_grad():  # the next prompt starts anew, with a cache of its own or without
        for fresh in (transformers.DynamicCache(config=model.config), None):
            model(tokens(), use_cache=True, **{name: fresh})
            assert all(signature.shape == (2, 20) for router in routers for signature, _ in router._caches)


@pytest.mark.parametrize("between", (True, False), ids=("another cache", "no cache"))
def test_a_cache_of_other_signatures_is_refused(model, between):
    """Of the same shape, so that nothing else would tell them apart."""
    FocusRouter.retrofit(model, groups=4, window=WINDOW).eval()
    with torch.no_grad():
        first = model(tokens(), use_cache=True)
        model(tokens().flip(1), use_cache=between)
        with pytest.raises(NotImplementedError, match="this call has another cache"):
            model(tokens()[:, :1], use_cache=True, **{cache_name(): first[cache_name()]})
        again = model(tokens(), use_cache=True, return_dict=False)
        model(tokens()[:, :1], use_cache=True, **{cache_name(): again[1]})


def test_padding_has_no_groups():
    router = FocusRouter(16, groups=4)
    h = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    signature, potentials = router.signature(h, lengths=torch.tensor([9, 4]))
    assert (signature[1, 4:] == 0).all() and (signature[0] > 0).all()
    assert potentials.shape == (2, 1, 4)
    assert router(h).shape == (2, 9, 4)


def test_errors_name_the_argument(model):
    with pytest.raises(ValueError, match="groups must be an integer of at least 1, given 0"):
        FocusRouter(8, groups=0)
    q, signed = torch.zeros(1, 1, 2, 4), torch.tensor([[0, -1]])
    with pytest.raises(ValueError, match=r"groups must lie in \[0, 9223372036854775807\], given -1"):
        fa.grouped_attention(q, q, q, signed)
    with pytest.raises(ValueError, match="groups must be at most 63, given 64"):
        FocusRouter(8, 64)
    with pytest.raises(ValueError, match=r"top_k must lie in \[1, 4\]"):
        FocusRouter(8, groups=4, top_k=5)
    with pytest.raises(ValueError, match=r"h must be \(B, L, 8\)"):
        FocusRouter(8)(torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="no causal attention layer"):
        FocusRouter.retrofit(torch.nn.Linear(2, 2))
    FocusRouter.retrofit(model)
    with pytest.raises(ValueError, match="has routers already"):
        FocusRouter.retrofit(model)
    assert fa.nn.FocusRouter is FocusRouter


# --- a PrefixLM -------------------------------------------------------------------------------------------------------


def prefix_lm() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS["hrm_text"]())
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(5)
    return made.eval()


def test_a_prefix_is_served_in_both_modes():
    """Everyone in every group is the model itself, at once and token by token after the prefix."""
    model, ids = prefix_lm(), tokens()
    types = (torch.arange(20) < 11).long().expand(2, -1)
    with torch.no_grad():
        expected = model(ids, token_type_ids=types).logits
        assert (model(ids).logits - expected).abs().max() > 1e-2 * expected.abs().max()
        FocusRouter.retrofit(model, groups=4, top_k=4, window=WINDOW).eval()
        assert (model(ids, token_type_ids=types).logits - expected).abs().max() < 1e-4 * expected.abs().max()
        state = model(ids[:, :11], token_type_ids=types[:, :11], use_cache=True)
        for i in range(11, 20):
            state = model(ids[:, i : i + 1], use_cache=True, **{cache_name(): state[cache_name()]})
            change = (state.logits[:, 0] - expected[:, i]).abs().max()
            assert change < 1e-4 * expected.abs().max()


def test_a_prefix_is_routed_with_itself_and_nothing_after_it():
    model, ids = prefix_lm(), tokens()
    types = (torch.arange(20) < 11).long().expand(2, -1)
    routers = FocusRouter.retrofit(model, groups=4, window=WINDOW)
    for mode in (True, False):
        routers.train(mode)
        for token, unchanged in ((15, 15), (11, 11), (10, 0)):
            other = ids.clone()
            other[:, token] = (other[:, token] + 1 - 3) % 58 + 3
            with torch.no_grad():
                logits = [model(x, token_type_ids=types).logits for x in (ids, other)]
            change = (logits[0] - logits[1]).abs().amax(-1)
            assert (change[:, :unchanged] < 1e-5).all() and change[:, token].min() > 1e-4
            assert unchanged or change[:, 0].min() > 1e-5


@pytest.mark.parametrize("gate", ["multiply", "log"])
def test_a_prefix_of_everything_is_attention_both_ways(gate):
    """Routing over the whole sequence, a window on both sides, shared groups wherever they are: training form and inference form."""
    router = FocusRouter(16, groups=4, top_k=2, window=WINDOW, temperature=1.0, dtype=torch.float64)
    h = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v = testing.attention_inputs(2, 4, 2, 20, 20, 8, dtype=torch.float64)
    everything = torch.tensor([20, 20])
    mask = fa.Mask(prefix_lengths=everything)
    assignment = router(h, prefix_lengths=everything)
    signature, potentials = router.signature(h, prefix_lengths=everything)
    router.causal = False
    assert testing.max_error(assignment, router(h)) < 1e-12
    plain, whole = router.signature(h)
    assert torch.equal(signature, plain) and testing.max_error(potentials, whole) < 1e-12

    far = (torch.arange(20)[:, None] - torch.arange(20)).abs() > WINDOW
    shared = (signature[:, :, None] & signature[:, None]) != 0
    actual = fa.grouped_attention(q, k, v, signature, window=WINDOW, mask=mask)
    expected = fa.attention(q, k, v, mask=fa.Mask(dense=(shared | ~far)[:, None]))
    assert testing.max_error(actual, expected) < 1e-13

    agreement = (assignment @ assignment.mT)[:, None]
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    open_ = torch.where(far, agreement.sigmoid(), 1.0)
    scores = scores * open_ if gate == "multiply" else scores + open_.log()
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    actual = fa.gated_attention(q, k, v, assignment, window=WINDOW, gate=gate, mask=mask)
    assert testing.max_error(actual, expected) < 1e-13


@pytest.mark.parametrize("structured", [True, False])
def test_masks_without_order_see_later_tokens(structured):
    """All keys of a row, or any pairs: nothing that a mask allows is left out."""
    model, ids = prefix_lm(), tokens()
    allowed = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    rows = torch.ones(2, 20, dtype=torch.bool)
    if structured:
        allowed[1, ..., 13:] = rows[1, 13:] = False  # padding has no groups
    else:
        allowed &= torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(1)) < 0.6
        allowed |= torch.eye(20, dtype=torch.bool)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        expected = model(ids, attention_mask=additive).logits
        routers = FocusRouter.retrofit(model, groups=4, top_k=4, window=WINDOW).eval()
        change = (model(ids, attention_mask=allowed).logits - expected)[rows].abs().max()
        assert change < 1e-4 * expected.abs().max()
        for router in routers.train():
            router.sharpness = 50.0  # a gate of log(1) where two tokens share every group
            router.gate = "log"
            torch.nn.init.zeros_(router.centroids)
        change = (model(ids, attention_mask=allowed).logits - expected)[rows].abs().max()
        assert change < 1e-4 * expected.abs().max()
