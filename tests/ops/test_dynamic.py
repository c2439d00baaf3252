"""One compiled graph serves many sizes and options of every op: graphs are counted, results compared with eager ones."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from dynamic_calls import (
    GROUPS,
    OPTIONS,
    SIZES,
    TARGET,
    WEIGHT,
    X,
    floats,
    integers,
    offsets,
    qkv,
)
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn as fa
from fastattn import testing
from fastattn.runtime.examples import examples

MOST_GRAPHS = 3  # torch's own: one of the first sizes, one of symbols; a third where a size is 0 or 1
STEPS = range(12)  # more than torch compiles anew (torch._dynamo.config.recompile_limit)


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


# vq_sample: see `sampled`. A user's function runs outside of the graph (test_flex_attention.py, test_score.py)
OUTSIDE = ("vq_sample", "flex_attention", "attention, a function")
IN_A_GRAPH = [name for name in examples() if not name.startswith(OUTSIDE)]


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
