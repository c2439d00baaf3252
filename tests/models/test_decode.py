"""decode_step: the definition against the layers, the CPU kernel against the definition, errors, explain; and HrmText's
use of it."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.models import HrmText
from fastattn.runtime import native as _native


def small(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return HrmText(tiny.config(**tiny.NARROW_HEADS | changes)).to(dtype)


@torch.no_grad()
def decoded(model, ids, prompt):
    """Logits of the tokens after the prompt, one a step, and the cache."""
    cache = model.make_cache(ids.shape[0], ids.shape[1])
    model(ids[:, :prompt], prefix_lengths=torch.full((ids.shape[0],), prompt), cache=cache)
    steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(prompt, ids.shape[1])]
    return torch.cat(steps, 1), cache


@pytest.fixture
def calls(monkeypatch):
    """The positions that the model called decode_step with, in order: a number, or a list of one a row."""
    from fastattn.models import decode

    seen = []
    run = decode.decode_step
    monkeypatch.setattr(decode, "decode_step", lambda *a, **o: seen.append(listed(a[5])) or run(*a, **o))
    return seen


def listed(position):
    return position.tolist() if isinstance(position, torch.Tensor) else position


@pytest.mark.parametrize(
    ("batch", "changes"), ((1, {}), (3, {"H_cycles": 1, "L_cycles": 1}), (1, {"rope_theta": 50.0}))
)
def test_the_definition_is_what_the_layers_do(calls, batch, changes):
    model = small(**changes)
    ids = torch.randint(40, (batch, 9))
    expected, kept = decoded(model, ids, 5)
    assert calls == []  # no fast backend in float64
    with fa.set_backend("reference"):
        got, cache = decoded(model, ids, 5)
    assert calls == [5, 6, 7, 8]
    # float64, as between cached and uncached decoding (tests/models/test_generate.py)
    assert testing.max_error(got, expected) < 1e-11
    assert testing.max_error(cache.keys, kept.keys) < 1e-11
    assert testing.max_error(cache.values, kept.values) < 1e-11


def test_rows_of_different_lengths_are_what_the_layers_do(calls):
    model = small()
    ids, lengths = torch.randint(40, (3, 7)), torch.tensor([3, 1, 5])

    @torch.no_grad()
    def run():
        cache = model.make_cache(3, 7)
        cache.keys.fill_(9.0), cache.values.fill_(9.0)  # of no token
        model(ids[:, :5], prefix_lengths=lengths, lengths=lengths, cache=cache)
        return torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in (5, 6)], 1), cache

    expected, kept = run()
    assert calls == []
    with fa.set_backend("reference"):
        got, cache = run()
    assert calls == [[3, 1, 5], [4, 2, 6]] and cache.lengths.tolist() == [5, 3, 7]
    # float64, as above
    assert testing.max_error(got, expected) < 1e-11
    assert testing.max_error(cache.keys, kept.keys) < 1e-11
    assert testing.max_error(cache.values, kept.values) < 1e-11
    with (
        fa.set_backend("reference"),
        pytest.raises(ValueError, match="1 more tokens after 7 exceed the capacity 7"),
    ):
        model(ids[:, :1], cache=cache)
    assert cache.lengths.tolist() == [5, 3, 7]


def test_the_layers_are_called_where_the_op_has_no_part(calls):
    model = small()
    ids = torch.randint(40, (2, 6))
    with fa.set_backend("reference"):
        # a hook that would not be called
        heard = []
        handle = model.recurrence.L_stack.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
        decoded(model, ids, 5)
        handle.remove()
        assert len(heard) == 2 * 2 * 3
        # more than one token
        cache = model.make_cache(2, 6)
        with torch.no_grad():
            model(ids[:, :2], cache=cache)
            model(ids[:, 2:4], cache=cache)
        assert calls == []
        decoded(model, ids, 5)
        assert calls == [5]


def arguments(
    dtype=torch.float32,
    batch=1,
    position=3,
    capacity=6,
    layers=1,
    heads=2,
    dim=4,
    hidden=8,
    inner=6,
    unused=0.0,
):
    """Of one L call and one H call. What no token has been written to is `unused`."""
    shapes = ((4 * heads * dim, hidden), (hidden, heads * dim), (2 * inner, hidden), (hidden, inner))
    weights = [
        testing.random_tensor(*shape, seed=i, scale=shape[1] ** -0.5, dtype=dtype)
        for i, shape in enumerate(shapes * 2 * layers)
    ]
    caches = [
        testing.random_tensor(2, layers, batch, heads, capacity, dim, seed=20 + i, dtype=dtype)
        for i in range(2)
    ]
    for cache in caches:
        for row, at in enumerate(
            position.tolist() if isinstance(position, torch.Tensor) else [position] * batch
        ):
            cache[:, :, row, :, at:] = unused
    states = [testing.random_tensor(batch, hidden, seed=30 + i, dtype=dtype) for i in range(2)]
    return [*states, weights, *caches, position], {"h_cycles": 1, "l_cycles": 1}


def test_bad_arguments():
    given, options = arguments()
    z_h, z_l, weights, k, v, position = given

    def refused(error, message, **changes):
        names = ("z_h", "z_l", "weights", "k_cache", "v_cache", "position")
        with pytest.raises(error, match=message):
            fa.decode_step(**dict(zip(names, given, strict=True)) | options | changes)

    refused(ValueError, "position must be from 0 to 5, k_cache's last, given 6", position=6)
    whole, at = [c.clone() for c in (k, v)], torch.tensor
    refused(ValueError, r"position must lie in \[0, 6\), given 6", position=at([6]))
    refused(ValueError, r"position must lie in \[0, 6\), given -1", position=at([-1]))
    refused(ValueError, r"position must lie in \[0, 3\), given 3", position=at([3]), bound=2)
    refused(ValueError, "bound must be from 0 to 5, k_cache's last, given 6", position=at([3]), bound=6)
    refused(ValueError, "bound is for a tensor of positions", bound=4)
    refused(ValueError, r"position must have shape \(1\) \(one a row\)", position=at([3, 3]))
    refused(ValueError, "position must have 1 dimensions", position=at(3))
    refused(TypeError, "position must be int32 or int64", position=at([3.0]))
    refused(ValueError, "position is on meta but z_h is on cpu", position=at([3], device="meta"))
    assert torch.equal(k, whole[0]) and torch.equal(v, whole[1])
    refused(ValueError, "z_l must have shape", z_l=z_l[:, :4])
    refused(ValueError, "v_cache must have shape", v_cache=v[..., :2])
    refused(ValueError, "h_cycles .* calls", h_cycles=2)
    refused(ValueError, "weights must be 8 tensors", weights=weights[:4])
    refused(
        ValueError,
        r"weights\[5\] must have shape \(8x8\) \(out of a layer\)",
        weights=weights[:5] + [weights[4]] + weights[6:],
    )
    refused(TypeError, r"weights\[7\] is bfloat16", weights=weights[:7] + [weights[7].bfloat16()])
    refused(NotImplementedError, "no gradients", z_h=z_h.clone().requires_grad_())
    refused(NotImplementedError, "no gradients", weights=[w.clone().requires_grad_() for w in weights])
    with torch.no_grad():
        fa.decode_step(z_h.clone().requires_grad_(), z_l, weights, k, v, position, **options)


def test_explain_leaves_the_caches_alone():
    given, options = arguments(torch.float64)
    before = given[3].clone()
    assert fa.explain("decode_step", *given, **options).backend == "reference"
    assert torch.equal(given[3], before)


@pytest.mark.parametrize("position", (3, torch.tensor([3, 1])))
def test_compiles(position):
    """One graph, the caches written in place."""
    given, options = arguments(torch.float64, batch=2, position=position)
    z_h, z_l, weights, k, v, position = given
    expected = fa.decode_step(z_h, z_l, weights, k_there := k.clone(), v.clone(), position, **options)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(z_h, z_l, weights, k, v):
        return fa.decode_step(z_h, z_l, weights, k, v, position, **options) * 1

    assert torch.equal(run(z_h, z_l, weights, k, v), expected)
    assert torch.equal(k, k_there)


def converted(given, to):
    return [[to(w) for w in a] if isinstance(a, list) else to(a) for a in given[:-1]] + given[-1:]


def drawn_positions(data, batch, capacity):
    """One of every row, or one a row."""
    position = st.integers(0, capacity - 1)
    rows = data.draw(st.one_of(position, st.lists(position, min_size=batch, max_size=batch)))
    return (
        torch.tensor(rows, dtype=data.draw(st.sampled_from((torch.int32, torch.int64))))
        if isinstance(rows, list)
        else rows
    )


def of_the_tokens(cache, position):
    """What a cache holds at the positions, (calls, layers, H, B, D)."""
    batch = cache.shape[2]
    return cache[:, :, torch.arange(batch), :, torch.as_tensor(position).long().expand(batch)]


@pytest.fixture
def on_two_threads():
    """The name differs from that of the suite's fixture, which would give every test here two."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", testing.isas())
@given(
    batch=st.integers(1, 8),
    hidden=st.sampled_from((7, 16, 33, 70)),
    heads=st.integers(1, 3),
    dim=st.sampled_from((2, 6, 32)),
    inner=st.sampled_from((9, 24, 50)),
    layers=st.integers(1, 2),
    capacity=st.sampled_from((1, 9, 600)),
    dtype=st.sampled_from(testing.LOW_DTYPES),
    data=st.data(),
)
def test_cpu_kernel(on_two_threads, isa, dtype, capacity, data, **shape):
    position = drawn_positions(data, shape["batch"], capacity)
    given, options = arguments(dtype, position=position, capacity=capacity, unused=torch.nan, **shape)
    eager, truth = (converted(given, to) for to in (torch.Tensor.clone, torch.Tensor.double))
    expected = fa.decode_step(*truth, **options, backend="reference")
    with testing.rounding_every_step():
        by_eager = fa.decode_step(*eager, **options, backend="reference")
    with _native.use_cpu_isa(isa), testing.nan_filled_outputs():
        found = fa.decode_step(*given, **options, backend="cpu")
    # the longest sum of a product
    terms = max(
        shape["hidden"],
        shape["inner"],
        shape["heads"] * shape["dim"],
        int(torch.as_tensor(position).max()) + 1,
    )
    testing.assert_close_to_truth(found, expected, by_eager, terms=terms)
    for i in (3, 4):
        assert torch.equal(given[i].isnan(), truth[i].isnan()), "another place than the token's was written"
        mine, true, theirs = (of_the_tokens(x[i], position) for x in (given, truth, eager))
        testing.assert_close_to_truth(mine, true, theirs, terms=terms)


def test_cpu_kernel_gives_each_row_what_it_gives_it_alone_on_any_threads(on_two_threads):
    given, options = arguments(batch=3, hidden=64, inner=300, position=33, capacity=40)
    whole = fa.decode_step(*converted(given, torch.Tensor.clone), **options)
    torch.set_num_threads(1)
    assert torch.equal(fa.decode_step(*converted(given, torch.Tensor.clone), **options), whole)
    alone = [given[0][2:], given[1][2:], given[2], *(c[:, :, 2:].clone() for c in given[3:5]), given[5]]
    # one row's sums run in another order: float32, 8 products of at most 300 terms on states of size 1
    assert testing.max_error(fa.decode_step(*alone, **options)[0], whole[2]) < 1e-5


@pytest.mark.parametrize("isa", testing.isas())
@given(
    lengths=st.lists(st.integers(0, 39), min_size=1, max_size=8),
    dtype=st.sampled_from(testing.LOW_DTYPES),
    dim=st.sampled_from((6, 32)),
)
def test_cpu_kernel_gives_rows_of_different_lengths_what_a_batch_of_one_length_gives_them(
    on_two_threads, isa, lengths, dtype, dim
):
    """Bit for bit: how a row's sums run depends on the number of rows and on its own length."""
    at = torch.tensor(lengths)
    batch = {"batch": len(lengths), "hidden": 40, "inner": 50, "dim": dim, "capacity": 40}
    given, options = arguments(dtype, position=at, unused=torch.nan, **batch)
    before = converted(given, torch.Tensor.clone)
    with _native.use_cpu_isa(isa), testing.nan_filled_outputs():
        found = fa.decode_step(*given, **options, bound=39, backend="cpu")
        for length in set(lengths):
            one = converted(before[:-1] + [length], torch.Tensor.clone)
            for cache in one[3:5]:
                cache.nan_to_num_()  # the other rows' tokens that are not there
            expected = fa.decode_step(*one, **options, backend="cpu")
            for row in (at == length).nonzero()[:, 0]:
                assert torch.equal(found[row], expected[row])
                for mine, whole in zip(given[3:5], one[3:5], strict=True):
                    assert torch.equal(mine[:, :, row, :, : length + 1], whole[:, :, row, :, : length + 1])
                    assert mine[:, :, row, :, length + 1 :].isnan().all()


@settings(max_examples=6)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_generating_from_prompts_of_different_lengths(calls, lengths):
    """Each row as alone, by one op a token, stop tokens among them."""
    model = small(torch.float32, vocab_size=300)
    ids = torch.randint(300, (len(lengths), 6), generator=torch.Generator().manual_seed(1))
    alone = [
        model.generate(ids[i : i + 1, :n], max_new_tokens=5)[0, n:].tolist() for i, n in enumerate(lengths)
    ]
    calls.clear()
    at = torch.tensor(lengths)
    found = model.generate(ids, prompt_lengths=at, max_new_tokens=5)[:, 6:].tolist()
    assert calls == [(at + t).tolist() for t in range(4)]
    assert found == alone
    stop = alone[0][2]
    found = model.generate(ids, prompt_lengths=at, max_new_tokens=5, stop_tokens=[stop])[:, 6:].tolist()
    for row, free in zip(found, alone, strict=True):
        end = free.index(stop) + 1 if stop in free else 5
        assert row[:end] == free[:end] and set(row[end:]) <= {stop}


def test_what_the_cpu_kernel_refuses():
    def refused(message, given):
        with pytest.raises(NotImplementedError, match=message):
            fa.decode_step(*given[0], **given[1], backend="cpu")

    refused("up to 8 rows, not 9", arguments(batch=9))
    refused("not float64", arguments(torch.float64))
    refused("head dims up to 256, not 258", arguments(dim=258))
    given = arguments()
    given[0][2][0] = given[0][2][0].T.contiguous().T
    refused("contiguous", given)


@torch.no_grad()
def test_a_wrapped_layer_is_called(calls):
    """Tools that move weights about put their own forward on an instance."""
    model = small(torch.float32)
    ids = torch.randint(40, (1, 6))
    decoded(model, ids, 5)
    assert calls == [5]
    layer = model.recurrence.H_stack.layers[0]
    for module in (layer, layer.attn, layer.mlp, layer.mlp.down_proj, model.recurrence):
        heard, own = [], module.forward
        module.forward = lambda *a, own=own, heard=heard, **o: heard.append(1) or own(*a, **o)
        decoded(model, ids, 5)
        del module.forward
        assert heard and calls == [5]


def swapped(layer):
    layer.attn.o_proj = type(layer.attn.o_proj)(16, 24, bias=False)


def halved(layer):
    layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight / 2)


def overwritten(layer):
    layer.mlp.gate_up_proj.weight.data = layer.mlp.gate_up_proj.weight.flip(0)


def loaded(layer):
    layer.load_state_dict({name: w.flip(0) for name, w in layer.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", (swapped, halved, overwritten, loaded))
@torch.no_grad()
def test_weights_that_change_between_tokens_are_taken(calls, monkeypatch, change):
    from fastattn.models import decode

    model, layers = small(torch.float32), small(torch.float32)
    ids = torch.randint(40, (1, 6))
    decoded(model, ids, 5)
    change(model.recurrence.L_stack.layers[1])
    layers.load_state_dict(model.state_dict())
    found, _ = decoded(model, ids, 5)
    assert calls == [5, 5]
    monkeypatch.setattr(decode, "step", lambda *_: None)
    expected, _ = decoded(layers, ids, 5)
    # float32 on logits of size 1: 16 stack calls of sums of at most 72 terms each
    assert testing.max_error(found, expected) < 1e-4
    assert testing.max_error(expected, decoded(small(torch.float32), ids, 5)[0]) > 1e-3


@torch.no_grad()
def test_what_the_op_does_not_know_of_goes_to_the_layers(calls):
    model = small(torch.float32)
    ids = torch.randint(40, (1, 6))
    layer = model.recurrence.L_stack.layers[0]
    forward = type(layer.mlp).forward
    for where, name, value in (
        (layer.attn, "rope_theta", 7.0),
        (layer, "eps", 0.1),
        (model.recurrence.H_stack, "eps", 0.1),
        (layer.attn, "attend", lambda *a, **o: fa.attention(*a, **o)),
        (layer.mlp, "gate_up_proj", torch.nn.Linear(24, 72)),
        (type(layer.mlp), "forward", lambda *a, **o: forward(*a, **o)),
    ):
        before = getattr(where, name)
        setattr(where, name, value)
        decoded(model, ids, 5)
        setattr(where, name, before)
    heard = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: heard.append(1))
    decoded(model, ids, 5)
    handle.remove()
    assert heard and calls == []
    decoded(model, ids, 5)
    assert calls == [5]


def test_opcheck_and_profiler():
    given, options = arguments()
    torch.library.opcheck(
        torch.ops.fastattn.decode_step.default,
        (*given[:-1], None, given[-1], *options.values(), 100.0, 1e-6, ""),
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        fa.decode_step(*given, **options)
    assert any(event.key == "fastattn::decode_step" for event in profiler.key_averages())
