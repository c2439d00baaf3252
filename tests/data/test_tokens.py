"""Tokens and packing: what a model is given."""

import itertools

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.train.data.jsonl import Example
from fastattn.train.data.packing import IGNORED, Order, batches, pack
from fastattn.train.data.tokenizer import SPECIAL_TOKENS, Sample, Tokenizer

EXAMPLES = [
    Example("What does os.path.join do?", "Join two or more pathname components."),
    Example("Hé?", "→ 你好"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(EXAMPLES, vocab_size=300)


def test_a_sample_is_prompt_then_response(tokenizer):
    for example, sample in zip(EXAMPLES, tokenizer.samples(EXAMPLES), strict=True):
        tokens, prefix = sample
        assert tokens[:prefix] == tokenizer.prompt(example.instruction)
        assert tokens[0] == tokenizer.start and tokens[prefix - 1] == tokenizer.end_of_prompt
        assert tokens[-1] == tokenizer.end_of_response
        assert tokenizer.decode(tokens[prefix:]) == example.response


def streamed(tokenizer, tokens):
    stream = tokenizer.text_stream()
    return [*(stream.push(token) for token in tokens), stream.finish()]


@given(st.text())
def test_any_text_survives(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert "".join(streamed(tokenizer, tokens)) == text


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_text_that_spells_a_special_token_is_text(tokenizer, special):
    ids = tokenizer.encode(f"a {special} b")
    assert not set(ids) & {tokenizer.start, tokenizer.end_of_prompt, tokenizer.end_of_response}
    assert tokenizer.decode(ids) == f"a {special} b"


def test_a_character_is_streamed_whole(tokenizer):
    pieces = streamed(tokenizer, tokenizer.encode("a🐍b"))
    assert "🐍" in pieces and "".join(pieces) == "a🐍b"
    assert streamed(tokenizer, tokenizer.encode("🐍")[:2])[-1] == "\N{REPLACEMENT CHARACTER}"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.samples(EXAMPLES) == tokenizer.samples(EXAMPLES)
    assert loaded.vocab_size == tokenizer.vocab_size <= 300


def test_refusals(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"half":')
    with pytest.raises(ValueError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="at least 259"):
        Tokenizer.train(EXAMPLES, vocab_size=100)
    with pytest.raises(ValueError, match="empty"):
        tokenizer.prompt("  ")


def test_truncation_and_padding_of_a_saved_tokenizer_are_not_applied(tokenizer, tmp_path):
    """transformers saves those of its last call into tokenizer.json."""
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.enable_truncation(8)
    inner.enable_padding(length=32)
    inner.save(str(path))
    loaded = Tokenizer.load(tmp_path)
    text = "What does os.path.join do? " * 10
    assert loaded.prompt(text) == tokenizer.prompt(text) and len(loaded.prompt(text)) > 32
    assert loaded.encode("a") == tokenizer.encode("a")
    assert loaded.samples(EXAMPLES) == tokenizer.samples(EXAMPLES)


def test_conditions_are_tokens_before_the_instruction():
    examples = [Example("a", "b", ("cot", "<|synth|>")), Example("a", "b", ("cot",)), Example("a", "b")]
    tokenizer = Tokenizer.train(examples, vocab_size=280)
    cot, synth = (tokenizer.tags[f"<|{tag}|>"] for tag in ("cot", "synth"))
    for example, condition in zip(examples, ([cot, synth], [cot], []), strict=True):
        (sample,) = tokenizer.samples([example])
        prompt = [tokenizer.start, *condition, *tokenizer.encode("a"), tokenizer.end_of_prompt]
        assert sample.tokens[: sample.prefix_length] == prompt
        assert tokenizer.prompt("a", example.condition) == prompt
    assert cot not in tokenizer.encode("<|cot|> cot")  # text never makes one
    for tag in ("noisy", "<|im_start|>", "a"):
        with pytest.raises(ValueError, match=r"data.jsonl:7: condition: .* it has <\|cot\|>, <\|synth\|>"):
            tokenizer.samples([Example("a", "b", (tag,), where="data.jsonl:7")])


def test_hrm_text_s_conditions_are_the_tokens_that_its_code_takes(tmp_path):
    """Names and tokens as scripts/prepare_sft_data.py of HRM-Text has them."""
    theirs = {
        "direct": "<|object_ref_start|>",
        "cot": "<|object_ref_end|>",
        "noisy": "<|quad_start|>",
        "synth": "<|quad_end|>",
    }
    released = Tokenizer.train(EXAMPLES, 280, theirs.values())
    for name, token in theirs.items():
        assert released.condition([name]) == released.condition([token]) == [released.tags[token]]
    with pytest.raises(ValueError, match="'other' is no special token"):
        released.condition(["other"])
    released.save(tmp_path)
    loaded = Tokenizer.load(tmp_path, added=["direct", "synth", "own"])
    assert loaded.vocab_size == released.vocab_size + 1  # own alone is new
    assert loaded.condition(["synth", "own"]) == [released.tags["<|quad_end|>"], loaded.tags["<|own|>"]]
    named = Tokenizer.load(tmp_path, added=["<|cot|>"])  # a token of that very name comes first
    assert named.condition(["cot", "direct"]) == [
        named.tags["<|cot|>"],
        released.tags["<|object_ref_start|>"],
    ]


def test_a_sample_that_is_too_long_is_named_by_its_line(tokenizer):
    rows = [Example("a", "b", where="data.jsonl:1"), Example("a", "b" * 50, where="data.jsonl:30")]
    length = len(tokenizer.samples(rows)[1].tokens)
    assert tokenizer.samples(rows, length)
    with pytest.raises(
        ValueError, match=f"^data.jsonl:30: has {length} tokens; at most {length - 1} are allowed"
    ):
        tokenizer.samples(rows, length - 1)


@st.composite
def sample(draw):
    tokens = draw(st.lists(st.integers(0, 99), min_size=2, max_size=12))
    return Sample(tokens, draw(st.integers(1, len(tokens) - 1)))


samples = st.lists(sample(), min_size=1, max_size=12)


@given(samples)
def test_packing_keeps_every_token_and_labels_only_responses(rows):
    batch = pack(rows)
    ends = batch.cu_seqlens.tolist()
    assert batch.input_ids.shape == batch.labels.shape == (1, ends[-1])
    assert batch.input_ids.dtype == torch.int64 and batch.cu_seqlens.dtype == torch.int32
    for i, (tokens, prefix) in enumerate(rows):
        ids = batch.input_ids[0, ends[i] : ends[i + 1]].tolist()
        labels = batch.labels[0, ends[i] : ends[i + 1]].tolist()
        assert ids == tokens and int(batch.prompt_lengths[i]) == prefix
        assert labels == [IGNORED] * prefix + tokens[prefix:]
    assert batch.response_tokens == sum(len(tokens) - prefix for tokens, prefix in rows)


@given(samples, st.integers(12, 40))
def test_every_epoch_shows_every_sample_once(rows, batch_tokens):
    order = Order(rows, batch_tokens, seed=3)
    for epoch in range(2):
        seen = []
        while True:
            batch = order.next()
            assert order.epoch == epoch and batch.tokens <= batch_tokens
            ends = batch.cu_seqlens.tolist()
            seen += [tuple(batch.input_ids[0, a:b].tolist()) for a, b in itertools.pairwise(ends)]
            if order.position == len(rows):
                break
        assert sorted(seen) == sorted(tuple(tokens) for tokens, _ in rows)
    assert sum(b.tokens for b in batches(rows, batch_tokens)) == sum(len(tokens) for tokens, _ in rows)


@settings(max_examples=20)
@given(samples, st.integers(0, 9), st.integers(0, 5))
def test_an_order_goes_on_from_its_place(rows, seed, steps):
    first = Order(rows, 16, seed)
    for _ in range(steps):
        first.next()
    second = Order(rows, 16, seed, first.epoch, first.position)
    for _ in range(4):
        assert torch.equal(first.next().input_ids, second.next().input_ids)


def test_an_order_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="example 2 has 9 tokens; at most 8"):
        Order([Sample([1] * 4, 2), Sample([1] * 9, 2)], 8, seed=0)
    with pytest.raises(ValueError, match="no samples"):
        Order([], 8, seed=0)
