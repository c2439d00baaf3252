"""One compiled graph serves many sizes and options of every op: graphs are counted, results compared with eager ones."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn as fa
from fastattn import testing
from fastattn.ops.matvec import matvec
from fastattn.ops.rowwise import rotary_append
from fastattn.runtime.examples import examples

MOST_GRAPHS = 3  # torch's own: one of the first sizes, one of symbols; a third where a size is 0 or 1
STEPS = range(12)  # more than torch compiles anew (torch._dynamo.config.recompile_limit)


def floats(*shape):
    return testing.random_tensor(*shape, seed=sum(shape))


def integers(high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def qkv(step, *, batch=None):
    batch, length = 5 + step % 5 if batch is None else batch, 20 + step
    return [floats(batch, heads, length, 8) for heads in (4, 2, 2)]


def offsets(step):
    """Of 2 to 13 documents in 20 + step tokens."""
    return torch.tensor([*range(2 + step), 20 + step])


def weights(*shape):
    return [floats(*shape[i : i + 2]) for i in range(len(shape) - 1)]


def decode_inputs(step):
    batch, capacity = 4 + step % 5, 20 + step  # up to 8 rows
    layer = [floats(32, 8), floats(8, 8), floats(24, 8), floats(8, 12)]
    caches = [floats(2, 1, batch, 2, capacity, 4), floats(2, 1, batch, 2, capacity, 4)]
    return [floats(batch, 8), floats(batch, 8), *layer, *layer, *caches, torch.arange(batch)]


def decode(z_h, z_l, *rest):
    *weights, keys, values, position = rest
    with torch.no_grad():
        return fa.decode_step(
            z_h, z_l, weights, keys.clone(), values.clone(), position, h_cycles=1, l_cycles=1, backend="cpu"
        )


def append(q, k, v, positions, slots, keys, values):
    with torch.no_grad():
        keys, values = keys.clone(), values.clone()
        return rotary_append(q, k, v, positions, slots, keys, values), keys, values


def append_inputs(step):
    batch, length = 5 + step % 5, 20 + step
    place = torch.arange(length).expand(batch, length).contiguous()
    cache = floats(batch, 2, length + 9, 8)
    return [*qkv(step), place, place, cache, cache.clone()]


def rows(step):
    return 20 + step


# name: (function, its inputs at a step); tensors of floats get gradients
SIZES = {
    "attention": (fa.attention, qkv),
    "attention, causal, with lse": (
        lambda *t: fa.attention(*t, mask=fa.Mask(causal=True), return_lse=True),
        qkv,
    ),
    "attention, sigmoid": (fa.sigmoid_attention, qkv),
    "attention, bias": (
        lambda q, k, v, bias: fa.attention(q, k, v, score="softplus", bias=bias),
        lambda step: [*qkv(step), floats(20 + step, 20 + step)],
    ),
    "attention, dense mask": (
        lambda q, k, v, dense: fa.attention(q, k, v, mask=fa.Mask(dense=dense)),
        lambda step: [*qkv(step), floats(20 + step, 20 + step) > 0],
    ),
    "attention, prefixes and key lengths": (
        lambda q, k, v, prefix, keys: fa.attention(
            q, k, v, mask=fa.Mask(prefix_lengths=prefix, key_lengths=keys)
        ),
        lambda step: [*qkv(step), integers(9, 5 + step % 5), 9 + integers(9, 5 + step % 5)],
    ),
    "attention, packed": (
        lambda q, k, v, starts: fa.attention(q, k, v, mask=fa.Mask(causal=True, cu_seqlens_q=starts)),
        lambda step: [*qkv(step, batch=1), offsets(step)],
    ),
    "attention, more keys than queries": (
        lambda q, k, v: fa.attention(q, k, v, mask=fa.Mask(causal=True, window=(9, None))),
        lambda step: [qkv(step)[0][:, :, 7:], *qkv(step)[1:]],
    ),
    "scaled_dot_product_attention": (
        lambda q, k, v, mask: fa.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
        lambda step: [*qkv(step), floats(20 + step, 20 + step)],
    ),
    "scaled_dot_product_attention, causal": (
        lambda *t: fa.scaled_dot_product_attention(*t, is_causal=True, enable_gqa=True),
        qkv,
    ),
    "softplus_attention": (
        lambda *t: fa.softplus_attention(*t, power=3.0, mask=fa.Mask(causal=True)),
        qkv,
    ),
    "grouped_attention": (
        lambda q, k, v, groups: fa.grouped_attention(q, k, v, groups, window=4),
        lambda step: [*qkv(step), integers(8, 5 + step % 5, 20 + step)],
    ),
    "gated_attention": (
        lambda *t: fa.gated_attention(*t, window=4),
        lambda step: [*qkv(step), floats(5 + step % 5, 20 + step, 4).softmax(-1)],
    ),
    "sinkhorn": (
        lambda s, lengths: fa.sinkhorn(s, lengths=lengths),
        lambda step: [floats(5 + step % 5, 20 + step, 4), 9 + integers(9, 5 + step % 5)],
    ),
    "sinkhorn, packed": (
        lambda s, starts: fa.sinkhorn(s, cu_seqlens=starts, causal=True),
        lambda step: [floats(1, 20 + step, 4), offsets(step)],
    ),
    "sinkhorn, of potentials": (
        lambda s, v: fa.sinkhorn(s, potentials=v),
        lambda step: [floats(5 + step % 5, 20 + step, 4), floats(5 + step % 5, 1, 4)],
    ),
    "causal_conv1d": (
        lambda x, w, state: fa.causal_conv1d(x, w, initial_state=state, activation="silu", return_state=True),
        lambda step: [floats(5 + step % 5, 20 + step, 4), floats(4, 3), floats(5 + step % 5, 2, 4)],
    ),
    "causal_conv1d, packed": (
        lambda x, w, starts: fa.causal_conv1d(x, w, cu_seqlens=starts, return_state=True),
        lambda step: [floats(1, 20 + step, 4), floats(4, 3), offsets(step)],
    ),
    "linear_scan": (
        lambda a, b, h: fa.linear_scan(a, b, initial=h),
        lambda step: [
            floats(5 + step % 5, 20 + step, 1),
            floats(5 + step % 5, 20 + step, 4),
            floats(5 + step % 5, 4),
        ],
    ),
    "linear_scan, packed": (
        lambda a, b, starts: fa.linear_scan(a, b, cu_seqlens=starts, reverse=True),
        lambda step: [floats(4), floats(1, 20 + step, 4), offsets(step)],
    ),
    "selective_scan": (
        lambda u, A, B, z, h: fa.selective_scan(
            u, u, -A.abs(), B, B, z=z, initial_state=h, return_state=True
        ),
        lambda step: [
            floats(5 + step % 5, 20 + step, 4),
            floats(4, 3),
            floats(5 + step % 5, 20 + step, 3),
            floats(5 + step % 5, 20 + step, 4),
            floats(5 + step % 5, 4, 3),
        ],
    ),
    "selective_scan, packed": (
        lambda u, A, B, starts: fa.selective_scan(u, u, -A.abs(), B, B, cu_seqlens=starts, return_state=True),
        lambda step: [floats(1, 20 + step, 4), floats(4, 3), floats(1, 20 + step, 3), offsets(step)],
    ),
    "linear_attention": (
        lambda q, k, v, decay, beta: fa.linear_attention(
            q[:, :2], k, v, decay=decay, beta=beta, qk_norm=True, return_state=True
        ),
        lambda step: [
            *qkv(step),
            -floats(5 + step % 5, 2, 20 + step).abs(),
            floats(5 + step % 5, 2, 20 + step).abs(),
        ],
    ),
    "linear_attention, packed": (
        lambda q, k, v, starts: fa.linear_attention(q[:1, :2], k[:1], v[:1], cu_seqlens=starts),
        lambda step: [*qkv(step), offsets(step)],
    ),
    "focus_groups": (fa.focus_groups, lambda step: [floats(5 + step % 5, 20 + step, 4)]),
    "linear_cross_entropy": (
        lambda h, w, target: fa.linear_cross_entropy(h, w, target, softcap=9.0, temperature=0.7),
        lambda step: [
            floats(5 + step % 5, 20 + step, 8),
            floats(30, 8),
            integers(30, 5 + step % 5, 20 + step),
        ],
    ),
    "linear_cross_entropy, a loss a row": (
        lambda h, w, target, b: fa.linear_cross_entropy(h, w, target, bias=b, reduction="none"),
        lambda step: [floats(20 + step, 8), floats(30 + step, 8), integers(30, 20 + step), floats(30 + step)],
    ),
    "stablemax_cross_entropy": (
        fa.stablemax_cross_entropy,
        lambda step: [floats(5 + step % 5, 20 + step, 30 + step), integers(30, 5 + step % 5, 20 + step)],
    ),
    "vq_logits": (
        fa.vq_logits,
        lambda step: [floats(5 + step % 5, 20 + step, 8), floats(7, 8), integers(7, 30 + step)],
    ),
    "vq_cross_entropy": (
        lambda h, c, codes, target, shadow: fa.vq_cross_entropy(h, c, codes, target, shadow=shadow),
        lambda step: [
            floats(5 + step % 5, 20 + step, 8),
            floats(7, 8),
            integers(7, 30 + step),
            integers(30, 5 + step % 5, 20 + step),
            floats(30 + step, 8),
        ],
    ),
    "vq_argmax": (fa.vq_argmax, lambda step: [floats(20 + step, 8), floats(7, 8), integers(7, 30 + step)]),
    "nearest_codes": (fa.nearest_codes, lambda step: [floats(20 + step, 8), floats(7 + step, 8)]),
    "rms_norm": (
        lambda x, r, w: fa.rms_norm(x, residual=r, weight=w),
        lambda step: [floats(5 + step % 5, 20 + step, 8), floats(5 + step % 5, 20 + step, 8), floats(8)],
    ),
    "swiglu": (fa.swiglu, lambda step: [floats(5 + step % 5, 20 + step, 8)]),
    "gated": (
        fa.gated,
        lambda step: [floats(5 + step % 5, 20 + step, 8), floats(5 + step % 5, 20 + step, 8)],
    ),
    "rotary": (
        fa.rotary,
        lambda step: [*qkv(step)[:2], torch.arange(20 + step).expand(5 + step % 5, -1).contiguous()],
    ),
    "rotary_append": (append, append_inputs),
    "fused_linear": (
        lambda x, w: fa.fused_linear(x, w, norm_eps=1e-6, swiglu=True),
        lambda step: [floats(5 + step % 5, 20 + step, 8), floats(24, 8)],
    ),
    "matvec": (matvec, lambda step: [floats(5 + step % 5, 8), floats(30 + step, 8)]),
    "decode_step": (decode, decode_inputs),
}


X, WEIGHT, TARGET, CODES = floats(9, 16), floats(30, 16), integers(30, 9), integers(7, 30)
CODEBOOK, GROUPS = floats(7, 16), integers(8, 5, 20)


def masked(**options):
    return lambda q, k, v, n: fa.attention(
        q, k, v, mask=fa.Mask(**{name: of(n) for name, of in options.items()})
    )


def sampled(h, codebook, n):
    """The uniforms are torch's, and not those of another compilation: of one token, what is drawn is known."""
    return fa.vq_sample(h, codebook, CODES[:1] * 0, temperature=0.5 + n)


# name: (function of the inputs and a number from 0 to 11, inputs)
OPTIONS = {
    "attention, scale": (lambda q, k, v, n: fa.attention(q, k, v, scale=0.1 + n), qkv(0)),
    "attention, bias": (lambda q, k, v, n: fa.attention(q, k, v, score="sigmoid", bias=n - 5.5), qkv(0)),
    "attention, left window": (masked(window=lambda n: (n, None)), qkv(0)),
    "attention, both windows": (masked(causal=lambda n: False, window=lambda n: (n, 2 * n + 1)), qkv(0)),
    "sigmoid_attention": (lambda q, k, v, n: fa.sigmoid_attention(q, k, v, scale=0.1 + n), qkv(0)),
    "scaled_dot_product_attention, scale": (
        lambda q, k, v, n: fa.scaled_dot_product_attention(q, k, v, scale=0.1 + n, enable_gqa=True),
        qkv(0),
    ),
    "softplus_attention, power": (lambda q, k, v, n: fa.softplus_attention(q, k, v, power=1.5 + n), qkv(0)),
    "grouped_attention, window": (
        lambda q, k, v, n: fa.grouped_attention(q, k, v, GROUPS, window=n),
        qkv(0),
    ),
    "grouped_attention, scale": (
        lambda q, k, v, n: fa.grouped_attention(q, k, v, GROUPS, scale=0.1 + n),
        qkv(0),
    ),
    "gated_attention, window": (
        lambda *t: fa.gated_attention(*t[:4], window=t[4]),
        [*qkv(0), floats(5, 20, 4)],
    ),
    "gated_attention, sharpness and scale": (
        lambda *t: fa.gated_attention(*t[:4], window=2, sharpness=0.5 + t[4], scale=0.1 + t[4]),
        [*qkv(0), floats(5, 20, 4)],
    ),
    "sinkhorn, temperature": (lambda s, n: fa.sinkhorn(s, temperature=0.1 + n), [floats(5, 20, 4)]),
    "sinkhorn, iterations": (lambda s, n: fa.sinkhorn(s, iterations=1 + n), [floats(5, 20, 4)]),
    "sinkhorn, temperature of potentials": (
        lambda s, v, n: fa.sinkhorn(s, temperature=0.1 + n, potentials=v),
        [floats(5, 20, 4), floats(5, 1, 4)],
    ),
    "linear_cross_entropy, temperature": (
        lambda h, w, n: fa.linear_cross_entropy(h, w, TARGET, temperature=0.5 + n),
        [X, WEIGHT],
    ),
    "linear_cross_entropy, softcap and z_loss": (
        lambda h, w, n: fa.linear_cross_entropy(h, w, TARGET, softcap=5.5 + n, z_loss=n / 100),
        [X, WEIGHT],
    ),
    "linear_cross_entropy, ignore_index": (
        lambda h, w, n: fa.linear_cross_entropy(h, w, TARGET, ignore_index=n),
        [X, WEIGHT],
    ),
    "vq_cross_entropy, ignore_index": (
        lambda h, c, n: fa.vq_cross_entropy(h, c, CODES, TARGET, ignore_index=n),
        [X, CODEBOOK],
    ),
    "vq_sample, temperature": (sampled, [X, CODEBOOK]),
    "rms_norm, eps": (lambda x, n: fa.rms_norm(x, eps=0.1 + n), [X]),
    "rotary, theta": (lambda q, k, n: fa.rotary(q, k, torch.arange(20), theta=100.5 + n), qkv(0)[:2]),
    "fused_linear, eps": (lambda x, w, n: fa.fused_linear(x, w, norm_eps=0.1 + n), [X, WEIGHT]),
    "decode_step, position": (
        lambda *t: decode(*t[:-2], t[-1]),
        decode_inputs(0),
    ),
}


@pytest.fixture(autouse=True)
def two_graphs_and_no_more():
    """A compiled function does not leave its graphs to the next test."""
    yield
    torch._dynamo.reset()


def graphs(fn, calls, *, backend="aot_eager", **options):
    """How many graphs torch.compile makes for the calls; outputs and gradients equal eager ones at each."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(fn, fullgraph=True, backend=counter, **options)
    for inputs in calls:
        given = [
            t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs
        ]
        (found, gradients), (outputs, expected) = (testing.differentiate(f, given) for f in (compiled, fn))
        for a, b in zip((*found, *gradients), (*outputs, *expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    return counter.frame_count


@pytest.mark.parametrize("name", SIZES)
def test_twelve_sizes(name):
    fn, make = SIZES[name]
    assert graphs(fn, map(make, STEPS)) <= MOST_GRAPHS


@pytest.mark.parametrize("name", OPTIONS)
def test_twelve_numbers(name):
    fn, inputs = OPTIONS[name]
    numbers = (
        STEPS
        if name.endswith(("window", "windows", "iterations", "index", "position"))
        else map(float, STEPS)
    )
    assert graphs(fn, ([*inputs, n] for n in numbers)) <= MOST_GRAPHS


# vq_sample: see `sampled`. flex_attention runs outside of the graph (test_flex_attention.py)
IN_A_GRAPH = [name for name in examples() if name != "vq_sample" and not name.startswith("flex_attention")]


@pytest.mark.parametrize("name", IN_A_GRAPH)
def test_five_lengths_of_an_example(name):
    example = examples()[name]
    # an option's tensors have no gradient
    tables = [n for n, value in example.options.items() if isinstance(value, torch.Tensor)]

    def call(*tensors):
        given = dict(zip([*example.tensors, *tables], tensors, strict=True))
        given = example.options | given | {n: given[n].detach() for n in tables}
        if example.gradients:
            return example.function(**given)
        with torch.no_grad():  # it may write to what it is given
            given |= {name: given[name].clone() for name in example.floating}
            return *testing.as_tuple(example.function(**given)), *(given[name] for name in example.floating)

    made = [examples(longer=step)[name] for step in range(5)]
    calls = [[*each.tensors.values(), *(each.options[n] for n in tables)] for each in made]
    assert graphs(call, calls) <= MOST_GRAPHS


def documents(step):
    """Offsets of 2 to 6 documents, none of the longest length of another step."""
    cuts = torch.arange(2 + step % 5) * 3
    return torch.cat([cuts, torch.tensor([30 + 2 * step])])


# name: (the Mask of a step, inputs of a step)
MASKS = {
    "documents": (
        lambda step: fa.Mask(causal=True, cu_seqlens_q=documents(step)),
        lambda step: qkv(40, batch=1),
    ),
    "documents, padded": (
        lambda step: fa.Mask(cu_seqlens_q=documents(step)),
        lambda step: qkv(33 + step, batch=1),
    ),
    "documents with prefixes": (
        lambda step: fa.Mask(
            cu_seqlens_q=documents(step), prefix_lengths=integers(3, documents(step).numel() - 1) + step % 2
        ),
        lambda step: qkv(40, batch=1),
    ),
    "prefixes": (lambda step: fa.Mask(prefix_lengths=2 + integers(4 + step, 5)), lambda step: qkv(0)),
    "key lengths": (
        lambda step: fa.Mask(causal=True, key_lengths=2 + integers(4 + step, 5)),
        lambda step: qkv(0),
    ),
    "windows": (lambda step: fa.Mask(window=(2 + step, 13 - step)), lambda step: qkv(0)),
    "dense": (lambda step: fa.Mask(dense=floats(20 + step, 20 + step) > 0), qkv),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_a_batch(name):
    mask, inputs = MASKS[name]
    calls = [[*inputs(step), mask(step)] for step in STEPS]
    assert graphs(lambda q, k, v, mask: fa.attention(q, k, v, mask=mask), calls) <= MOST_GRAPHS


@pytest.mark.parametrize("op", ("softplus_attention", "gated_attention", "grouped_attention"))
def test_a_mask_a_batch_of_other_ops(op):
    mask, inputs = MASKS["documents"]
    groups = integers(8, 1, 60)
    router = {
        "softplus_attention": (),
        "grouped_attention": (groups,),
        "gated_attention": (groups[..., None].float(),),
    }
    calls = [[*inputs(step), mask(step)] for step in STEPS]

    def call(q, k, v, mask):
        return getattr(fa, op)(q, k, v, *router[op], mask=mask)

    assert graphs(call, calls) <= MOST_GRAPHS


def test_a_mask_that_does_not_fit_a_compiled_call():
    compiled = torch.compile(lambda q, k, v, mask: fa.attention(q, k, v, mask=mask), backend="eager")
    for step in range(4):
        compiled(*qkv(40, batch=1), fa.Mask(cu_seqlens_q=documents(step)))
    with pytest.raises(ValueError, match="cu_seqlens_q ends at 99, past the 60 tokens given"):
        compiled(*qkv(40, batch=1), fa.Mask(cu_seqlens_q=torch.tensor([0, 5, 99])))


@pytest.mark.parametrize("name", ("attention", "scaled_dot_product_attention", "grouped_attention"))
def test_sizes_that_are_symbols_from_the_start(name):
    fn, make = SIZES[name]
    # a float argument's default is a symbol too: torch traces again where one has to be a number
    assert graphs(fn, map(make, STEPS), dynamic=True) <= 2


FIXED = torch.nn.Parameter(floats(24, 24))  # whose sizes are no symbols


@pytest.mark.parametrize(
    "fn",
    [
        lambda *t: fa.attention(*t, bias=FIXED),
        lambda *t: fa.attention(*t, mask=fa.Mask(dense=torch.ones(24, 24, dtype=torch.bool))),
        lambda *t: fa.scaled_dot_product_attention(*t, FIXED, enable_gqa=True),
        lambda *t: fa.scaled_dot_product_attention(*t, FIXED > 0, enable_gqa=True),
        lambda *t: fa.sinkhorn(t[0][:, 0], potentials=FIXED[None, :1, :8]),
    ],
    ids=("bias", "dense", "attn_mask", "bool attn_mask", "potentials"),
)
def test_a_fixed_size_beside_symbols(fn):
    assert graphs(fn, [qkv(4), qkv(4)], dynamic=True) <= 2


def test_a_fixed_size_that_does_not_fit():
    compiled = torch.compile(lambda *t: fa.attention(*t, bias=FIXED), backend="eager", dynamic=True)
    compiled(*qkv(4))
    with pytest.raises(ValueError, match=r"bias of shape \(24, 24\) does not broadcast"):
        compiled(*qkv(5))


@pytest.mark.parametrize("name", SIZES)
def test_shapes_on_the_meta_device(name):
    fn, make = SIZES[name]
    found = testing.as_tuple(fn(*(t.to("meta") for t in make(2))))
    for a, b in zip(found, testing.as_tuple(fn(*make(2))), strict=True):
        assert (a.device.type, a.shape, a.dtype, a.stride()) == ("meta", b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", SIZES)
def test_vmap_over_every_input(name):
    fn, make = SIZES[name]
    first, second = make(2), make(2)
    second[0] = second[0] * 0.5
    both = [torch.stack(pair) for pair in zip(first, second, strict=True)]
    if name in ("rotary_append", "decode_step"):
        with pytest.raises(NotImplementedError, match=f"fastattn.{name}: torch.vmap is not supported"):
            torch.vmap(fn)(*both)
        return
    found = testing.as_tuple(torch.vmap(fn)(*both))
    for i, inputs in enumerate((first, second)):
        for a, b in zip(found, testing.as_tuple(fn(*inputs)), strict=True):
            assert torch.equal(a[i], b)


@pytest.mark.parametrize("name", SIZES)
def test_tensors_of_inference_mode(name):
    """Outside of it, beside one that gets a gradient, and others inside of it."""
    fn, make = SIZES[name]
    with torch.inference_mode():
        kept = [t.clone() for t in make(2)]
        inside = testing.as_tuple(fn(*make(2)))
    kept[0] = make(2)[0].requires_grad_()
    outputs, gradients = testing.differentiate(fn, kept)
    _, expected = testing.differentiate(fn, [kept[0], *make(2)[1:]])
    assert all(torch.equal(a, b) for a, b in zip(inside, outputs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_a_mask_of_inference_mode():
    with torch.inference_mode():
        mask = fa.Mask(causal=True, cu_seqlens_q=offsets(3))
        fa.attention(*qkv(3, batch=1), mask=mask)
    assert graphs(lambda *t: fa.attention(*t, mask=mask), [qkv(3, batch=1)]) == 1


NUMBERS = (
    np.float32(0.5),
    np.float64(0.5),
    np.int64(2),
    torch.tensor(0.5),
    torch.tensor(2),
    Fraction(1, 2),
    2,
)


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_numbers_of_numpy_and_torch(number):
    q, k, v = qkv(0)
    plain, options = float(number), {"window": (4, 2)}
    found = fa.attention(q, k, v, scale=number, bias=plain, mask=fa.Mask(window=(np.int64(4), np.int32(2))))
    assert torch.equal(found, fa.attention(q, k, v, scale=plain, bias=plain, mask=fa.Mask(**options)))
    found = fa.scaled_dot_product_attention(q, k, v, scale=number, enable_gqa=True)
    assert torch.equal(found, fa.attention(q, k, v, scale=plain))
    found = fa.grouped_attention(q, k, v, GROUPS, window=np.int16(3), scale=number)
    assert torch.equal(found, fa.grouped_attention(q, k, v, GROUPS, window=3, scale=plain))
    assert torch.equal(
        fa.sinkhorn(FIXED[None], temperature=number), fa.sinkhorn(FIXED[None], temperature=plain)
    )
    assert torch.equal(fa.rms_norm(X, eps=number), fa.rms_norm(X, eps=plain))
    found = fa.linear_cross_entropy(X, WEIGHT, TARGET, softcap=number, ignore_index=np.int64(-1))
    assert torch.equal(found, fa.linear_cross_entropy(X, WEIGHT, TARGET, softcap=plain, ignore_index=-1))


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (torch.ones(1), "NAME must be a (finite )?number, given a float32 tensor"),
        (torch.tensor(1.0, requires_grad=True), "NAME gets no gradient; multiply q by it"),
        (torch.tensor(1.0, device="meta"), r"NAME is a tensor on meta, .* give float\(NAME\)"),
        (torch.tensor(True), "NAME must be a (finite )?number"),
        (1j, "NAME must be a (finite )?number, given complex"),
        (True, "NAME must be a (finite )?number, given bool"),
    ],
)
def test_numbers_that_are_none(number, message):
    with pytest.raises(TypeError, match=message.replace("NAME", "softcap")):
        fa.attention(*qkv(0), softcap=number)
    with pytest.raises(TypeError, match=message.replace("NAME", "scale")):
        fa.grouped_attention(*qkv(0), GROUPS, scale=number)
    for window in ((np.float64(2), None), (np.bool_(True), None), (torch.tensor(2), None), (np.int64(-1), 0)):
        with pytest.raises(ValueError, match="window counts keys"):
            fa.Mask(window=window)


@pytest.mark.parametrize("overload", ("default", "numbers", "traced"))
def test_opcheck_of_symbolic_sizes(overload):
    """Each way to take numbers, forward and backward; other ops' are the same code."""
    q, k, v = (t.requires_grad_() for t in qkv(1))
    number = torch.tensor(0.5, dtype=torch.float64) if overload == "numbers" else 0.5
    mask = fa.Mask(causal=True, window=(5, None)).args("attention", q, k)
    op = getattr(torch.ops.fastattn.attention, overload)
    torch.library.opcheck(op, (q, k, v, None, None, 0, number, None, number * 8, 0, None, *mask, ""))
    for other in (torch.ops.fastattn.rms_norm, torch.ops.fastattn.softplus_attention):
        args = (X.clone().requires_grad_(), None, None, number, number)
        if other is torch.ops.fastattn.softplus_attention:
            args = (q, k, v, number * 4, *mask)
        torch.library.opcheck(getattr(other, overload), (*args, ""))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ("attention", "scaled_dot_product_attention", "linear_cross_entropy", "rotary")
)
def test_twelve_sizes_of_inductor(name):
    fn, make = SIZES[name]
    assert graphs(fn, map(make, STEPS), backend="inductor") <= MOST_GRAPHS


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    (
        "attention, scale",
        "attention, left window",
        "sinkhorn, temperature",
        "linear_cross_entropy, temperature",
    ),
)
def test_twelve_numbers_of_inductor(name):
    fn, inputs = OPTIONS[name]
    numbers = STEPS if name.endswith("window") else map(float, STEPS)
    assert graphs(fn, ([*inputs, n] for n in numbers), backend="inductor") <= MOST_GRAPHS


class _Module(torch.nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *inputs):
        return self.fn(*inputs)


def _varying(first, second):
    """torch.export's dynamic shapes of inputs whose sizes differ between two steps."""
    dims = []
    for a, b in zip(first, second, strict=True):
        dims.append(
            {
                i: torch.export.Dim.DYNAMIC
                for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True))
                if m != n
            }
        )
    return (tuple(dims),)


@pytest.mark.parametrize("name", SIZES)
def test_export_of_a_dynamic_size(name):
    fn, make = SIZES[name]
    exported = torch.export.export(_Module(fn), tuple(make(3)), dynamic_shapes=_varying(make(3), make(5)))
    run = exported.module()
    for step in (3, 5, 11):
        found, expected = (testing.as_tuple(f(*make(step))) for f in (run, fn))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_named_length(strict):
    length, batch = torch.export.Dim("length", max=4096), torch.export.Dim("batch")
    shapes = (({0: batch, 2: length},) * 3,)
    module = _Module(lambda *t: fa.attention(*t, mask=fa.Mask(causal=True, window=(5, None))))
    exported = torch.export.export(module, tuple(qkv(0)), dynamic_shapes=shapes, strict=strict)
    for step in STEPS:
        assert torch.equal(exported.module()(*qkv(step)), module(*qkv(step)))
