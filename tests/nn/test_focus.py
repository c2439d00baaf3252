"""FocusRouter and its retrofit to frozen transformers models of three shapes, with random weights."""

import pytest
import torch
import transformers

import fastattn as fa
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
