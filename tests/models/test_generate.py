"""Decoding: the cache against full recomputation, sampling, stopping."""

import dataclasses

import pytest
import tiny
import torch

from fastattn.models import HrmText
from fastattn.models.generate import sample

CONFIG = tiny.config(vocab_size=30, max_position_embeddings=32, pad_token_id=1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HrmText(CONFIG).double()


def by_recomputation(model, prompt, count):
    """Greedy tokens of one prompt (L,), running the whole model again for each."""
    tokens = prompt.tolist()
    for _ in range(count):
        logits = model(torch.tensor([tokens]), prefix_lengths=torch.tensor([len(prompt)])).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_equals_recomputation_for_prompts_of_different_lengths(model):
    ids = torch.randint(0, 30, (4, 9))
    lengths = torch.tensor([9, 1, 5, 8])
    out = model.generate(ids, prompt_lengths=lengths, max_new_tokens=6)
    assert out.shape == (4, 15) and torch.equal(out[:, :9], ids)
    for row, n in enumerate(lengths):
        assert out[row, 9:].tolist() == by_recomputation(model, ids[row, :n], 6)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=6), out[:1])


@pytest.mark.parametrize("lengths", [None, [6, 4]])
@pytest.mark.parametrize("chunks", [(1, 1, 1), (3,), (2, 1)])
def test_cached_logits_equal_recomputation(model, lengths, chunks):
    prompt, response = torch.randint(0, 30, (2, 6)), torch.randint(0, 30, (2, 3))
    prefix = torch.tensor(lengths or [6, 6])
    cache = model.make_cache(2, 9)
    model(prompt, prefix_lengths=prefix, lengths=None if lengths is None else prefix, cache=cache)
    got = torch.cat([model(part, cache=cache).logits for part in response.split(chunks, 1)], 1)
    for row, n in enumerate(prefix):
        whole = torch.cat([prompt[row, :n], response[row]])[None]
        expected = model(whole, prefix_lengths=prefix[row : row + 1]).logits[0, n:]
        # float64: 1e-11 as for the uncached model
        torch.testing.assert_close(got[row], expected, rtol=0, atol=1e-11)


def test_a_prompt_cannot_be_extended(model):
    prompt = torch.randint(0, 30, (1, 4))
    cache = model.make_cache(1, 8)
    model(prompt, prefix_lengths=torch.tensor([4]), cache=cache)
    with pytest.raises(ValueError, match="a prompt can't be extended"):
        model(prompt, prefix_lengths=torch.tensor([4]), cache=cache)
    cache.reset()
    model(prompt, prefix_lengths=torch.tensor([4]), cache=cache)
    assert cache.longest == 4


def test_truncating_a_cache_takes_tokens_back(model):
    prompt, other = torch.randint(0, 30, (2, 4)), torch.randint(0, 30, (2, 2))
    cache = model.make_cache(2, 8)
    prefix = torch.tensor([4, 4])
    model(prompt, prefix_lengths=prefix, cache=cache)
    expected = model(other, cache=cache).logits
    model(other, cache=cache)
    cache.truncate(4)
    assert torch.equal(model(other, cache=cache).logits, expected) and cache.longest == 6
    with pytest.raises(ValueError, match="count is -1"):
        cache.truncate(-1)
    with pytest.raises(ValueError, match="count is 3, inside a prompt of 4 tokens"):
        cache.truncate(3)
    cache.truncate(0)
    model(prompt[:, :3], cache=cache)  # causal: may be cut anywhere
    cache.truncate(2)
    expected = model(torch.cat([prompt[:, :2], other], 1)).logits[:, 2:]
    torch.testing.assert_close(model(other, cache=cache).logits, expected, rtol=0, atol=1e-11)


def test_cache_limits(model):
    ids = torch.randint(0, 30, (2, 4))
    with pytest.raises(ValueError, match="exceed the capacity 3"):
        model(ids, cache=model.make_cache(2, 3))
    with pytest.raises(ValueError, match="input_ids has 2 rows; the cache has 1"):
        model(ids, cache=model.make_cache(1, 4))
    with pytest.raises(ValueError, match="capacity 33 exceeds max_position_embeddings 32"):
        model.make_cache(1, 33)
    with pytest.raises(ValueError, match="labels and cache"):
        model(ids, labels=ids, cache=model.make_cache(2, 4))
    with pytest.raises(ValueError, match="bp_steps and cache"):
        model(ids, bp_steps=2, cache=model.make_cache(2, 4))


def test_stop_tokens_and_stream(model):
    ids = torch.randint(0, 30, (3, 4))
    free = model.generate(ids, max_new_tokens=8)[:, 4:]
    stop = int(free[0, 2])
    seen = []
    out = model.generate(ids, max_new_tokens=8, stop_tokens=[stop], stream=seen.append)[:, 4:]
    assert torch.equal(torch.stack(seen, 1), out)
    for row in range(3):
        hits = (free[row] == stop).nonzero().flatten()
        end = int(hits[0]) + 1 if len(hits) else 8
        assert torch.equal(out[row, :end], free[row, :end])
        assert (out[row, end:] == CONFIG.pad_token_id).all()
    assert model.generate(ids[:1], max_new_tokens=8, stop_tokens=[stop]).shape[1] <= 4 + 3


def test_sampling_repeats_with_the_generator(model):
    ids = torch.randint(0, 30, (2, 4))
    draws = [
        model.generate(ids, max_new_tokens=8, temperature=2.0, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_sample_frequencies_and_cuts():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(20000, 4)

    def frequencies(**options):
        drawn = sample(logits, generator=torch.Generator().manual_seed(0), **options)
        return torch.bincount(drawn, minlength=4) / 20000

    # 5 standard deviations of a frequency of 0.5 among 20000 draws: 5 * 0.5 / sqrt(20000) = 0.018
    def near(got, expected):
        assert (got - torch.tensor(expected)).abs().max() < 0.018

    near(frequencies(temperature=1.0), [0.5, 0.25, 0.15, 0.1])
    near(frequencies(temperature=0.5), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345])
    near(frequencies(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0])
    near(frequencies(temperature=1.0, top_k=9), [0.5, 0.25, 0.15, 0.1])
    near(frequencies(temperature=1.0, top_p=0.6), [2 / 3, 1 / 3, 0, 0])
    near(frequencies(temperature=1.0, top_p=0.4), [1, 0, 0, 0])
    near(frequencies(temperature=1.0, top_k=3, top_p=0.7), [2 / 3, 1 / 3, 0, 0])
    assert (sample(logits[:3]) == 0).all()


def drawn_from(probabilities, **cuts):
    """Which tokens are drawn at all."""
    logits = torch.tensor(probabilities).log().expand(500, -1)
    return sorted(set(sample(logits, 1.0, generator=torch.Generator().manual_seed(0), **cuts).tolist()))


def test_cuts_are_those_of_transformers():
    # the distributions of its own unit tests
    assert drawn_from([0.3, 0.1, 0.1, 0.5], top_p=0.8) == [0, 3]
    assert drawn_from([0.15, 0.3, 0.3, 0.25], top_p=0.8) == [1, 2, 3]
    assert drawn_from([0.3, 0.3, 0.3, 0.1], top_k=2) == [0, 1, 2]  # as likely as the second
    processors = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        logits = torch.randn(4, 50, generator=generator) * (trial % 4)
        logits = (4 * logits).round() / 4 if trial % 2 else logits  # ties
        top_k, top_p = (0, 1, 7, 50, 80)[trial % 5], (0.0, 0.1, 0.5, 0.9, 0.999, 1.0)[trial % 6]
        scores = logits / 0.7
        if top_k:
            scores = processors.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = processors.TopPLogitsWarper(top_p)(None, scores)
        kept = scores > -torch.inf
        chosen = torch.zeros(4, 50, dtype=torch.bool)
        for seed in range(60):
            token = sample(logits, 0.7, top_k, top_p, torch.Generator().manual_seed(seed))
            expected = torch.multinomial(scores.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(token, expected[:, 0])
            chosen[torch.arange(4), token] = True
        assert not (chosen & ~kept).any()


def test_the_end_of_sequence_stops_by_default(model):
    ids = torch.randint(0, 30, (1, 4), generator=torch.Generator().manual_seed(2))
    free = model.generate(ids, max_new_tokens=8)[0, 4:].tolist()
    for eos in (free[2], (29, free[2])):
        ending = HrmText(dataclasses.replace(CONFIG, eos_token_id=eos)).double()
        ending.load_state_dict(model.state_dict())
        first = free.index(free[2])
        assert ending.generate(ids, max_new_tokens=8)[0, 4:].tolist() == free[: first + 1]
        assert ending.generate(ids, max_new_tokens=8, stop_tokens=())[0, 4:].tolist() == free


@pytest.mark.parametrize("temperature", (1e-3, 1e-30, 1e-40, 5e-324))
def test_a_small_temperature_takes_the_most_likely(model, temperature):
    ids = torch.randint(0, 30, (3, 4), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, max_new_tokens=4)
    assert torch.equal(model.generate(ids, max_new_tokens=4, temperature=temperature), expected)
    masked = torch.tensor([[0.0, -torch.inf, 3e38, -3e38]])
    assert sample(masked, temperature).tolist() == [2]


@pytest.mark.parametrize("temperature", (1e30, 1e39, 1e300))
def test_a_great_temperature_draws_evenly_among_what_the_cuts_leave(temperature):
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0]).expand(200, -1)
    for options, left in (({}, [0, 1, 3, 4]), ({"top_k": 2}, [1, 3]), ({"top_p": 0.3}, [1, 3])):
        drawn = sample(logits, temperature, generator=torch.Generator().manual_seed(1), **options)
        assert drawn.unique().tolist() == left


def test_cuts_at_their_ends_change_nothing(model):
    ids = torch.randint(0, 30, (2, 4))

    def drawn(**options):
        generator = torch.Generator().manual_seed(5)
        return model.generate(ids, max_new_tokens=5, **{"temperature": 1.5, "generator": generator} | options)

    free = drawn()
    for options in (
        {"top_p": 1.0},
        {"top_p": 1},
        {"top_k": 0},
        {"top_k": 30},
        {"top_k": 1 << 40},
        {"top_k": 1 << 40, "top_p": 1.0},
    ):
        assert torch.equal(drawn(**options), free)
    greedy = model.generate(ids, max_new_tokens=5)
    for options in (
        {"top_k": 1},
        {"top_p": 0.0},
        {"top_p": 0},
        {"top_p": 1e-30},
        {"top_p": 5e-324},
        {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    ):
        assert torch.equal(drawn(**options), greedy)
    torch.manual_seed(7)
    by_default = drawn(generator=None)
    torch.manual_seed(7)
    assert torch.equal(drawn(generator=None), by_default)


def test_stop_tokens_of_the_prompt_do_not_stop(model):
    ids = torch.randint(0, 30, (1, 4), generator=torch.Generator().manual_seed(1))
    free = model.generate(ids, max_new_tokens=5)
    stop = set(ids[0].tolist()) - set(free[0, 4:].tolist())
    assert stop
    for tokens in (stop, iter(stop), torch.tensor(sorted(stop))):
        assert torch.equal(model.generate(ids, max_new_tokens=5, stop_tokens=tokens), free)


def test_a_stream_that_raises_ends_the_call_alone(model):
    ids = torch.randint(0, 30, (2, 4))
    expected = model.generate(ids, max_new_tokens=4)

    def fail(token, seen=[]):  # noqa: B006  counts its calls
        seen.append(token)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=4, stream=fail)
    assert torch.equal(model.generate(ids, max_new_tokens=4), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"input_ids": torch.zeros(1, 33, dtype=torch.int64)}, "a prompt of 33 tokens and 2 new ones exceed"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"stop_tokens": [3, 30]}, r"stop_tokens is \[3, 30\]; ids are from 0 to 29"),
        ({"stop_tokens": [-1]}, "stop_tokens is"),
        ({"prompt_lengths": torch.tensor([3, 3])}, r"prompt_lengths has shape \(2,\)"),
        (
            {"prompt_lengths": torch.tensor([3], device="meta")},
            "prompt_lengths is on meta, but the model is on cpu",
        ),
        ({"max_new_tokens": 30}, "exceed max_position_embeddings 32"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"prompt_lengths": torch.tensor([0])}, "prompt_lengths is \\[0\\]; each must be from 1 to 4"),
        ({"prompt_lengths": torch.tensor([5])}, "from 1 to 4"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, r"shape \(1, 0\)"),
    ],
)
def test_bad_arguments(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(
            **({"input_ids": torch.zeros(1, 4, dtype=torch.int64), "max_new_tokens": 2} | arguments)
        )


@pytest.mark.parametrize(
    "arguments",
    (
        {"max_new_tokens": 2.0},
        {"max_new_tokens": True},
        {"temperature": None},
        {"temperature": "1"},
        {"top_k": 2.0},
        {"top_p": "1"},
        {"stop_tokens": 3},
        {"stop_tokens": [1.5]},
        {"stop_tokens": "end"},
        {"generator": 3},
        {"prompt_lengths": [3]},
        {"prompt_lengths": torch.tensor([3.0])},
        {"prompt_lengths": torch.tensor([True])},
        {"input_ids": [[1, 2, 3, 4]]},
        {"input_ids": torch.zeros(1, 4)},
    ),
)
def test_arguments_of_the_wrong_type(model, arguments):
    (name,) = arguments
    given = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "max_new_tokens": 2} | arguments
    with pytest.raises(TypeError, match=f"generate: {name} is"):
        model.generate(**given)


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize(
    ("head", "where"), [("linear", "lm_head"), ("linear", "recurrence"), ("vq", "recurrence")]
)
def test_weights_that_are_not_finite_name_no_token(head, temperature, where):
    torch.manual_seed(0)
    quantised = {"head": "vq", "codebook_size": 8} if head == "vq" else {}
    model = HrmText(dataclasses.replace(CONFIG, **quantised))
    part = getattr(model, where)
    with torch.no_grad():
        next(p for p in part.parameters() if p.ndim == 2).fill_(torch.nan)
    with pytest.raises(ValueError, match="hold NaN"):
        model.generate(torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=2, temperature=temperature)
