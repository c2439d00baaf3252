"""The causal convolution against loops written from its documentation, torch's convolution, and the kernels against both."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.runtime import native as _native

SLICE = _native.defaults("causal_conv1d_backward")["slice"]
LAYOUTS = ("contiguous", "time last", "columns of a wider tensor", "every other channel")


def random(*shape, seed, dtype=torch.float32):
    return testing.random_tensor(*shape, seed=seed, dtype=dtype, requires_grad=True)


def laid_out(t, layout):
    """The same values in memory as callers have them."""
    if layout == "time last":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns of a wider tensor":
        return torch.cat([t, t], -1)[..., t.shape[-1] :]
    if layout == "every other channel":
        return torch.stack([t, t], -1)[..., 0]
    return t


def looped(x, weight, bias, initial_state, silu):
    """Token by token, of one sequence (L, D)."""
    taps = weight.shape[1]
    known = list(initial_state) + list(x)  # K - 1 more than there are tokens
    out = []
    for t in range(len(x)):
        pre = bias.clone()
        for k in range(taps):
            pre = pre + weight[:, k] * known[t + k]
        out.append(pre / (1 + (-pre).exp()) if silu else pre)
    return torch.stack(out) if out else x, torch.stack(known[len(x) :]) if taps > 1 else initial_state


@given(data=st.data())
def test_the_definition_is_the_documented_sum(data):
    length, channels, taps = (
        data.draw(st.integers(0, 9)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 8)),
    )
    silu = data.draw(st.booleans())
    x, weight, bias, state = (
        testing.random_tensor(*shape, dtype=torch.float64, seed=i)
        for i, shape in enumerate(
            ((2, length, channels), (channels, taps), (channels,), (2, taps - 1, channels))
        )
    )
    activation = "silu" if silu else None
    options = {"bias": bias, "activation": activation, "initial_state": state, "return_state": True}
    out, following = fa.causal_conv1d(x, weight, **options)
    for i in range(2):
        expected, kept = looped(x[i], weight, bias, state[i], silu)
        # a sum of taps + 1 numbers of a few units, and an exponential, in float64
        assert testing.max_error(out[i], expected) < 1e-13 and torch.equal(following[i], kept)


def test_the_definition_is_torchs_convolution():
    """As transformers' layers call it, on (B, D, L)."""
    x, weight, bias = (testing.random_tensor(*s, dtype=torch.float64) for s in ((2, 6, 11), (6, 4), (6,)))
    expected = F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=6)[..., :11])
    out = fa.causal_conv1d(x.transpose(1, 2), weight, bias=bias, activation="swish").transpose(1, 2)
    assert testing.max_error(out, expected) < 1e-14


LENGTHS = (0, 1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33, SLICE - 1, SLICE, SLICE + 1, SLICE + 9, 2 * SLICE + 3)


def documents(data, length):
    """Offsets, some of empty documents, not always up to the last token."""
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=5)))
    return torch.tensor([0, *cuts], dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))


@settings(max_examples=100)
@given(data=st.data())
def test_kernels_compute_the_definition(isa, data, nan_outputs):
    dtype = data.draw(st.sampled_from(testing.LOW_DTYPES))
    length, channels = data.draw(st.sampled_from(LENGTHS)), data.draw(st.sampled_from((1, 3, 8, 20, 33)))
    taps, silu = data.draw(st.integers(1, 8)), data.draw(st.booleans())
    packed = data.draw(st.booleans())
    cuts = documents(data, length) if packed else None
    batch = 1 if packed else data.draw(st.integers(0, 3))
    sequences = len(cuts) - 1 if packed else batch
    own = data.draw(st.sampled_from([dtype, torch.float32]))
    x = laid_out(random(batch, length, channels, seed=1, dtype=dtype), data.draw(st.sampled_from(LAYOUTS)))
    weight = random(channels, taps, seed=2, dtype=own)
    bias = random(channels, seed=3, dtype=dtype) if data.draw(st.booleans()) else None
    state = None
    if data.draw(st.booleans()):
        state = random(sequences, taps - 1, channels, seed=4, dtype=dtype)
        state = laid_out(state, data.draw(st.sampled_from(LAYOUTS)))

    def op(backend):
        return lambda x, weight, bias, state: fa.causal_conv1d(
            x, weight, bias=bias, activation="silu" if silu else None, initial_state=state, cu_seqlens=cuts,
            return_state=True, backend=backend,
        )  # fmt: skip

    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, state)]
    # the longest sums: of the taps' gradients, over all tokens
    terms = max(1, batch * length)
    testing.check_op(op("cpu"), op("reference"), inputs, terms=terms, names=("x", "weight", "bias", "state"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_channels_in_every_layout(isa, layout, nan_outputs):
    """More than a panel of 512, and gradients that come in that layout too; the same bits as of contiguous tensors."""
    x, weight, bias = (random(*s, seed=i) for i, s in enumerate(((2, SLICE + 21, 520), (520, 4), (520,))))
    state, grad = random(2, 3, 520, seed=5), testing.random_tensor(2, SLICE + 21, 520, seed=6)

    def results(lay):
        given = [lay(x.detach()), weight.detach(), bias.detach(), lay(state.detach())]
        given = [t.requires_grad_() for t in given]
        options = {"bias": given[2], "activation": "silu", "initial_state": given[3], "backend": "cpu"}
        out, following = fa.causal_conv1d(*given[:2], **options, return_state=True)
        return out, following, *torch.autograd.grad((out, following), given, (lay(grad), lay(following * 2)))

    for a, b in zip(results(lambda t: laid_out(t, layout)), results(lambda t: t), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_documents_are_convolved_one_by_one(backend):
    cuts = [0, 0, 2, 3, 3, 3 + SLICE, 290]
    x, weight = random(1, 300, 7, seed=1), random(7, 4, seed=2)
    state = random(len(cuts) - 1, 3, 7, seed=3)
    options = {"activation": "silu", "return_state": True, "backend": backend}
    grads = testing.random_tensor(1, 300, 7, seed=4), testing.random_tensor(len(cuts) - 1, 3, 7, seed=5)
    outputs = fa.causal_conv1d(x, weight, initial_state=state, cu_seqlens=torch.tensor(cuts), **options)
    slopes = torch.autograd.grad(outputs, (x, state, weight), grads)
    total = torch.zeros_like(weight)
    for i, span in enumerate(map(slice, cuts[:-1], cuts[1:])):
        leaf, before = (t.detach().requires_grad_() for t in (x[:, span], state[i : i + 1]))
        alone = fa.causal_conv1d(leaf, weight, initial_state=before, **options)
        assert torch.equal(outputs[0][:, span], alone[0]) and torch.equal(outputs[1][i : i + 1], alone[1])
        given = (grads[0][:, span], grads[1][i : i + 1])
        expected = torch.autograd.grad(alone, (leaf, before, weight), given)
        assert torch.equal(slopes[0][:, span], expected[0]) and torch.equal(slopes[1][i : i + 1], expected[1])
        total += expected[2]
    assert not outputs[0][:, 290:].any() and not slopes[0][:, 290:].any()
    # both are sums of 290 products in float32, in two orders
    bound = 290 * 2**-24 * testing.max_finite(x) * testing.max_finite(grads[0]) * 290**0.5
    assert testing.max_error(slopes[2], total) < bound


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES, ids=str)
def test_a_sequence_in_pieces_is_the_sequence(isa, dtype):
    """To the bit: what a token's taps read is the same, whichever call it is in."""
    x, weight, bias = (testing.random_tensor(*s, dtype=dtype, seed=1) for s in ((2, 40, 20), (20, 4), (20,)))
    options = {"bias": bias, "activation": "silu", "return_state": True}
    whole, last = fa.causal_conv1d(x, weight, **options)
    for sizes in ([1] * 40, [2, 38], [17, 0, 23]):
        state, parts = None, []
        for part in x.split(sizes, 1):
            out, state = fa.causal_conv1d(part, weight, initial_state=state, **options)
            parts.append(out)
        assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(state, last)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_gradient_through_the_state_alone(backend):
    for length in (0, 1, 2, 5):
        x, weight, state = random(2, length, 3, seed=1), random(3, 4, seed=2), random(2, 3, 3, seed=3)
        _, last = fa.causal_conv1d(x, weight, initial_state=state, return_state=True, backend=backend)
        grad = testing.random_tensor(2, 3, 3, seed=4)
        slopes = torch.autograd.grad(last, (x, state, weight), grad)
        expected = torch.autograd.grad(torch.cat([state, x], 1)[:, length:], (x, state), grad)
        assert all(torch.equal(a, b) for a, b in zip(slopes, expected, strict=False))
        assert not slopes[2].any()


def test_results_do_not_depend_on_the_number_of_threads():
    x, weight, bias = random(3, SLICE + 40, 600, seed=1), random(600, 4, seed=2), random(600, seed=3)

    def results():
        return testing.differentiate(
            lambda x, w, b: fa.causal_conv1d(x, w, bias=b, activation="silu"), (x, weight, bias)
        )

    (out,), grads = results()
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            (other,), others = results()
            assert torch.equal(out, other) and all(map(torch.equal, grads, others))
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(silu, packed):
    x, weight, bias = (
        random(*s, seed=i, dtype=torch.float64) for i, s in enumerate(((1, 7, 2), (2, 3), (2,)))
    )
    cuts = torch.tensor([0, 1, 1, 6]) if packed else None
    state = random(3 if packed else 1, 2, 2, seed=5, dtype=torch.float64)

    def call(x, weight, bias, state):
        return fa.causal_conv1d(
            x, weight, bias=bias, initial_state=state, cu_seqlens=cuts, activation="silu" if silu else None,
            return_state=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (x, weight, bias, state), fast_mode=True)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    x, weight, bias = random(1, 6, 3, seed=1), random(3, 4, seed=2), random(3, seed=3)
    cuts, state = (
        (torch.tensor([0, 2, 6]), random(2, 3, 3, seed=4)) if packed else (None, random(1, 3, 3, seed=4))
    )
    for args in ((x, weight, None, None, cuts, True, ""), (x, weight, bias, state, cuts, False, "")):
        torch.library.opcheck(torch.ops.fastattn.causal_conv1d.default, args)


def test_one_graph():
    x, weight, state = random(2, 6, 3, seed=1), random(3, 4, seed=2), random(2, 3, 3, seed=4)

    def call(x, weight, state):
        return fa.causal_conv1d(x * 2, weight, initial_state=state, activation="silu", return_state=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = (testing.differentiate(f, (x, weight, state)) for f in (compiled, call))
    for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert torch.equal(a, b)


def test_bad_arguments_are_refused():
    x, weight = torch.zeros(2, 5, 3), torch.zeros(3, 4)
    state, cuts = torch.zeros(2, 3, 3), torch.tensor([0, 2, 5])
    for options, error, message in (
        ({"x": x[0]}, ValueError, "x must have 3 dimensions"),
        ({"x": x.int()}, TypeError, "x must be one of float32"),
        ({"weight": weight[:2]}, ValueError, r"weight must be \(D, K\) with x's 3 channels and 1 to 8 taps"),
        (
            {"weight": torch.zeros(3, 9)},
            ValueError,
            r"weight must be \(D, K\) with x's 3 channels and 1 to 8 taps",
        ),
        (
            {"weight": torch.zeros(3, 0)},
            ValueError,
            r"weight must be \(D, K\) with x's 3 channels and 1 to 8 taps",
        ),
        ({"weight": weight.bfloat16()}, TypeError, "weight must be float32, x's dtype, given"),
        ({"x": x.double()}, TypeError, "weight must be float64, x's dtype"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(3\)"),
        ({"bias": torch.zeros(3).half()}, TypeError, "bias must be float32"),
        ({"activation": "gelu"}, ValueError, "activation must be one of None, 'silu', 'swish', given 'gelu'"),
        ({"initial_state": state[:1]}, ValueError, r"initial_state must have shape \(2x3x3\)"),
        ({"initial_state": state.bfloat16()}, TypeError, "initial_state is bfloat16 but x is float32"),
        ({"cu_seqlens": cuts}, ValueError, "cu_seqlens needs a batch of one, given 2"),
        ({"x": x[:1], "cu_seqlens": cuts + 1}, ValueError, "cu_seqlens must start at 0"),
        ({"x": x[:1], "cu_seqlens": cuts.flip(0)}, ValueError, "cu_seqlens must start at 0"),
        ({"x": x[:1], "cu_seqlens": cuts * 2}, ValueError, "cu_seqlens .* end at most at 5, given"),
        ({"x": x[:1], "cu_seqlens": cuts.float()}, TypeError, "cu_seqlens must be int32 or int64"),
        ({"x": x[:1], "cu_seqlens": cuts[:0]}, ValueError, "cu_seqlens must have at least one entry"),
        ({"backend": "triton"}, NotImplementedError, "there is no triton backend; there are: cpu, reference"),
    ):
        with pytest.raises(error, match=f"fastattn.causal_conv1d: {message}"):
            fa.causal_conv1d(**{"x": x, "weight": weight, **options})


def test_what_the_kernels_cannot_hold_is_refused():
    fields = {"x": torch.zeros(1, 5, 3), "weight": torch.zeros(3, 4), "out": torch.zeros(1, 5, 3)}
    _native.run("causal_conv1d_forward", **fields)
    for change, message in (
        ({"weight": torch.zeros(3, 9)}, r"weight's taps must lie in \[1, 8\], given 9"),
        ({"weight": torch.zeros(4, 4)}, "weight must have sizes"),
        ({"x": torch.zeros(1, 5, 3).double()}, "x must be float32, bfloat16 or float16"),
        ({"out": torch.zeros(1, 3, 5).mT}, "out must be contiguous"),
        ({"slice": 0}, "slice must lie in"),
        ({"initial_state": torch.zeros(1, 4, 3)}, "initial_state must have sizes"),
        ({"cu_seqlens": torch.tensor([0, 6])}, r"cu_seqlens must lie in \[0, 5\], given 6 at position 1"),
        ({"cu_seqlens": torch.tensor([0, 3, 2])}, r"cu_seqlens must lie in \[3, 5\], given 2"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "cu_seqlens has another dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.run("causal_conv1d_forward", **fields | change)
    grads = {"grad_out": fields["x"], "grad_x": torch.zeros(1, 5, 3), "grad_sums": torch.zeros(1, 1, 5, 3)}
    _native.run("causal_conv1d_backward", **fields | grads)
    with pytest.raises(ValueError, match="grad_sums must have sizes"):
        _native.run("causal_conv1d_backward", **fields | grads | {"grad_sums": torch.zeros(1, 1, 4, 3)})
