"""The linear scan against loops written from its documentation, gradients of autograd, and the kernels against both."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.runtime import native as _native

KINDS = ("full", "constant", "shared", "one", "per batch", "of the last batch dim")


def factors(kind, shape, seed=1, dtype=torch.float64):
    """Of what broadcasts to shape (..., L, D)."""
    of = {
        "full": shape,
        "constant": shape[-1:],
        "shared": (*shape[:-1], 1),
        "one": (),
        "per batch": (*shape[:-2], 1, 1),
        "of the last batch dim": (*shape[-3:-2], *shape[-2:]),
    }
    return number(of[kind], seed, dtype)


def number(shape, seed, dtype=torch.float64):
    """At most 1 in size, so that nothing grows."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    if dtype.is_complex:
        x = torch.polar(x.abs(), x * 3)
    return x.to(wide).to(dtype)


def looped(a, b, initial, reverse, log_a):
    """Element by element of one sequence (L, D)."""
    h, out = list(initial), [[None] * b.shape[1] for _ in b]
    for t in reversed(range(len(b))) if reverse else range(len(b)):
        for d in range(b.shape[1]):
            factor = a[t, d].exp() if log_a else a[t, d]
            h[d] = factor * h[d] + b[t, d]
            out[t][d] = h[d]
    return torch.stack([torch.stack(row) for row in out])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("log_a", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_definition_is_the_recurrence_and_its_gradient_autograds(dtype, log_a, reverse):
    """The definition's backward is written out, because it reads h and no b."""
    shape = (2, 7, 3)
    b, initial = number(shape, 2, dtype).requires_grad_(), number((2, 3), 3, dtype).requires_grad_()
    grad = number(shape, 4, dtype)
    for kind in KINDS:
        a = factors(kind, shape, dtype=dtype).requires_grad_()
        out = fa.linear_scan(a, b, initial=initial, reverse=reverse, log_a=log_a)
        expected = torch.stack(
            [looped(f, x, i, reverse, log_a) for f, x, i in zip(a.expand(shape), b, initial, strict=True)]
        )
        # sums of products of numbers below 1 (e^1 for logarithms: h below e^7), in float64
        assert (out - expected).abs().max() < 1e-12
        slopes, true = (torch.autograd.grad(y, (a, b, initial), grad) for y in (out, expected))
        for x, y in zip(slopes, true, strict=True):
            assert x.shape == y.shape and (x - y).abs().max() < 1e-11 * (1 + y.abs().max())


LENGTHS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 130)


def documents(data, length):
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=5)))
    return torch.tensor([0, *cuts], dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))


def laid_out(t, how):
    """The same values: as they are, time last, and every other channel of a wider tensor."""
    if how == 1 and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    return torch.stack([t, t], -1)[..., 0] if how == 2 else t


def drawn(data, dtype):
    """(a, b, initial) that require gradients, and options."""
    packed = data.draw(st.booleans())
    length, channels = data.draw(st.sampled_from(LENGTHS)), data.draw(st.sampled_from((1, 3, 8, 20, 70, 270)))
    lead = data.draw(st.sampled_from(((), (1,)) if packed else ((), (0,), (1,), (3,), (2, 2), (1, 2, 2))))
    cuts = documents(data, length) if packed else None
    kind = data.draw(st.sampled_from(KINDS))
    own = data.draw(st.sampled_from((dtype, torch.float32))) if dtype.itemsize == 2 else dtype
    log_a = data.draw(st.booleans())
    a = factors(kind, (*lead, length, channels), dtype=own)
    a = -a.abs() if log_a and not dtype.is_complex else a
    b = number((*lead, length, channels), 2, dtype)
    initial = None
    if data.draw(st.booleans()):
        initial = number((len(cuts) - 1, channels) if packed else (*lead, channels), 3, own)
    tensors = [
        None if t is None else laid_out(t, data.draw(st.integers(0, 2))).requires_grad_()
        for t in (a, b, initial)
    ]
    return tensors, {"reverse": data.draw(st.booleans()), "log_a": log_a, "cu_seqlens": cuts}


def by(backend, options):
    def run(a, b, initial):
        return fa.linear_scan(a, b, initial=initial, backend=backend, **options)

    return run


@settings(max_examples=100)
@given(data=st.data())
def test_kernels_compute_the_definition(isa, data, nan_outputs):
    dtype = data.draw(st.sampled_from(testing.LOW_DTYPES))
    inputs, options = drawn(data, dtype)
    # a gradient of one factor for all is a sum over all elements; h itself over the tokens
    terms = max(1, inputs[1].numel())
    wanted = [n for n, t in zip(("a", "b", "initial"), inputs, strict=True) if t is not None]
    testing.check_op(
        by("cpu", options), by("reference", options), inputs, terms=terms, names=wanted,
        magnitudes=(rounded_h(dtype, options, inputs, terms),),
    )  # fmt: skip


def rounded_h(dtype, options, inputs, terms):
    """What `check_op` takes as the magnitude of a's gradient: it is made of h as it was stored. Each of n products g h that add up
    is off by up to half a unit of h's dtype, of random sign: sqrt(n) eps / 2 max|g| max|h|."""
    (h,), (_, g, *_) = testing.differentiate(by("reference", options), testing.to_float64(inputs))
    shared = max(1, inputs[1].numel() // max(1, inputs[0].numel()))
    initial = 0.0 if inputs[2] is None else testing.max_finite(inputs[2])
    size = testing.max_finite(g) * max(testing.max_finite(h), initial)
    off = shared**0.5 * torch.finfo(dtype).eps / 2 * size
    return off / ((4 + terms**0.5) * torch.finfo(torch.float32).eps)


@settings(max_examples=50)
@given(data=st.data())
def test_complex_kernels_compute_the_definition(isa, data, nan_outputs):
    """Parts apart, as the budgets take real tensors."""
    inputs, options = drawn(data, torch.complex64)
    parts = [None if t is None else torch.view_as_real(t.detach()).requires_grad_() for t in inputs]

    def run(backend):
        def of_parts(*parts):
            return torch.view_as_real(
                by(backend, options)(
                    *(None if t is None else torch.view_as_complex(t.contiguous()) for t in parts)
                )
            )

        return of_parts

    terms = max(1, inputs[1].numel())
    # a part of a product has two products: twice the magnitude that the largest result shows
    testing.check_op(run("cpu"), run("reference"), parts, terms=2 * terms, names=("a", "b", "initial"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_time_in_segments_is_the_scan(dtype, reverse, kind):
    """With more threads than rows of lanes, time is cut: to rounding, and the same at every call."""
    shape = (1, 2300, 5)
    a = factors(kind, shape, dtype=dtype)
    a = (
        a / a.abs() * 0.999 if kind != "shared" else a
    ).requires_grad_()  # what is carried over a segment counts
    b, initial = number(shape, 2, dtype).requires_grad_(), number((1, 5), 3, dtype).requires_grad_()
    grad = number(shape, 4, dtype)

    def run(threads):
        torch.set_num_threads(threads)
        try:
            out = fa.linear_scan(a, b, initial=initial, reverse=reverse, backend="cpu")
            return out, *torch.autograd.grad(out, (a, b, initial), grad)
        finally:
            torch.set_num_threads(2)

    whole, cut, again = run(1), run(4), run(4)
    wide = [
        t.detach().to(torch.complex128 if dtype.is_complex else torch.float64).requires_grad_()
        for t in (a, b, initial)
    ]
    out = fa.linear_scan(wide[0], wide[1], initial=wide[2], reverse=reverse)
    truth = (out, *torch.autograd.grad(out, wide, grad.to(out.dtype)))
    for one, other, same, true in zip(whole, cut, again, truth, strict=True):
        assert torch.equal(other, same)
        # with |a| = 0.999 roundings of 1000 steps are alive, each of half a unit of the largest value, of random sign; a constant's
        # gradient is a sum of 2300 such products
        bound = 2**-24 * 3 * (1000**0.5) * true.abs().max() * (8 if true.dim() == 1 else 1)
        assert (one - true).abs().max() < bound and (other - true).abs().max() < bound


@pytest.mark.parametrize("initial", [0.0, 2.0**-120])
def test_a_segment_whose_product_overflows_is_the_scan(initial):
    """The product of its first 200 factors is 2^200, which float32 has not; h has at most 2^80."""
    a, b = torch.ones(1, 2048, 1), torch.zeros(1, 2048, 1)
    a[:, :200], a[:, 200:400] = 2.0, 0.5
    b[:, 1000:] = 1.0
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(fa.linear_scan(a, b, initial=torch.full((1, 1), initial), backend="cpu"))
    finally:
        torch.set_num_threads(2)
    assert (
        torch.equal(*found)
        and found[0].isfinite().all()
        and found[0].max() == max(1048.0, initial * 2.0**200)
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 60, 20), (60, 20)])
def test_documents_are_scanned_one_by_one(backend, reverse, shape):
    cuts = [0, 0, 1, 17, 17, 49, 50]
    a, b = number(shape, 1, torch.float32).requires_grad_(), number(shape, 2, torch.float32).requires_grad_()
    initial = number((6, 20), 3, torch.float32).requires_grad_()
    grad, options = number(shape, 4, torch.float32), {"reverse": reverse, "backend": backend}
    out = fa.linear_scan(a, b, initial=initial, cu_seqlens=torch.tensor(cuts), **options)
    slopes = torch.autograd.grad(out, (a, b, initial), grad)
    for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
        span = (..., slice(begin, end), slice(None))
        leaves = [
            t.detach().requires_grad_()
            for t in (a[span], b[span], initial[i].expand(b[span][..., 0:1, :].sum(-2).shape))
        ]
        alone = fa.linear_scan(*leaves[:2], initial=leaves[2], **options)
        expected = torch.autograd.grad(alone, leaves, grad[span])
        assert torch.equal(out[span], alone)
        assert torch.equal(slopes[0][span], expected[0]) and torch.equal(slopes[1][span], expected[1])
        assert torch.equal(slopes[2][i], expected[2].reshape(20))
    for t in (out, *slopes[:2]):
        assert not t[..., 50:, :].any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_factor_of_zero_forgets_exactly(backend):
    a, b = number((1, 20, 9), 1, torch.float32).abs(), number((1, 20, 9), 2, torch.float32)
    a[:, 11] = 0
    log = a.log().requires_grad_()
    given = b.requires_grad_()
    out = fa.linear_scan(log, given, log_a=True, backend=backend)
    assert torch.equal(out[:, 11], b[:, 11])
    of_log, of_b = torch.autograd.grad(out[:, 11:].sum(), (log, given))
    assert not of_log[:, :12].any() and not of_b[:, :11].any() and of_log.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_sequence_in_pieces_is_the_sequence(isa, dtype):
    a, b = number((2, 40, 20), 1, dtype), number((2, 40, 20), 2, dtype)
    whole, state, parts = fa.linear_scan(a, b), None, []
    for piece in ((0, 1), (1, 2), (2, 19), (19, 40)):
        part = fa.linear_scan(a[:, slice(*piece)], b[:, slice(*piece)], initial=state)
        parts.append(part)
        state = part[:, -1]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_conjugate_views_are_read_as_what_they_are():
    a, b = number((2, 9, 5), 1, torch.complex64), number((2, 9, 5), 2, torch.complex64)
    expected = fa.linear_scan(a.conj().resolve_conj(), b.conj().resolve_conj(), backend="cpu")
    assert torch.equal(fa.linear_scan(a.conj(), b.conj(), backend="cpu"), expected)
    assert torch.equal(fa.linear_scan(a.imag, b.conj().imag), fa.linear_scan(a.imag.clone(), -b.imag))


def test_results_do_not_depend_on_the_number_of_threads():
    """Where time is not cut."""
    b, initial = number((2, 70, 300), 2, torch.float32).requires_grad_(), number((2, 300), 3, torch.float32)
    try:
        for kind in KINDS:
            if kind == "one":  # torch's own sum of what is left
                continue
            a, found = factors(kind, b.shape, dtype=torch.float32).requires_grad_(), []
            for threads in (1, 3, 8):
                torch.set_num_threads(threads)
                out = fa.linear_scan(a, b, initial=initial)
                found.append((out, *torch.autograd.grad(out.square().sum(), (a, b))))
            assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))
    finally:
        torch.set_num_threads(2)


def test_b_is_not_kept_for_the_backward():
    kept = []
    a, b = (
        number((2, 9, 5), 1, torch.float32).requires_grad_(),
        number((2, 9, 5), 2, torch.float32).requires_grad_(),
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = fa.linear_scan(a, b)
    assert a.data_ptr() in kept and out.data_ptr() in kept and b.data_ptr() not in kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(dtype, packed):
    b = number((1, 6, 2), 2, dtype).requires_grad_()
    cuts = torch.tensor([0, 2, 2, 5]) if packed else None
    initial = number((3 if packed else 1, 2), 3, dtype).requires_grad_()
    for kind in KINDS[:3]:
        a = factors(kind, b.shape, dtype=dtype).requires_grad_()
        for reverse, log_a in ((False, False), (True, True)):
            options = {"reverse": reverse, "log_a": log_a, "cu_seqlens": cuts}
            assert torch.autograd.gradcheck(by(None, options), (a, b, initial), fast_mode=True)


def test_opcheck():
    for dtype in (torch.float32, torch.complex64):
        a, b, initial = (
            number(s, i, dtype).requires_grad_() for i, s in enumerate(((6, 1), (1, 6, 3), (1, 3)))
        )
        for args in (
            (a, b, initial, None, True, False, ""),
            (b, b, None, torch.tensor([0, 2, 6]), False, True, ""),
        ):
            torch.library.opcheck(torch.ops.fastattn.linear_scan.default, args)


def test_one_graph():
    a, b = (
        number((2, 6, 1), 1, torch.float32).requires_grad_(),
        number((2, 6, 3), 2, torch.float32).requires_grad_(),
    )

    def call(a, b):
        return fa.linear_scan(a, b * 2, initial=b[:, 0], log_a=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = (testing.differentiate(f, (a, b)) for f in (compiled, call))
    for x, y in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert torch.equal(x, y)


def test_bad_arguments_are_refused():
    a, b, cuts = torch.zeros(2, 5, 3), torch.zeros(2, 5, 3), torch.tensor([0, 2, 5])
    for options, error, message in (
        ({"b": b[0, 0]}, ValueError, r"b must be \(..., L, D\)"),
        (
            {"b": b.int()},
            TypeError,
            "b must be one of float32, bfloat16, float16, float64, complex64, complex128",
        ),
        ({"a": a[:, :4]}, ValueError, r"a must broadcast to b's shape \(2, 5, 3\), given a float32 tensor"),
        ({"a": a[None]}, ValueError, "a must broadcast to b's shape"),
        ({"a": a.double()}, TypeError, "a must be float32, b's dtype, given"),
        ({"b": b.to(torch.complex64)}, TypeError, "a must be complex64, b's dtype"),
        ({"a": 0.5}, TypeError, "a must be a tensor"),
        ({"initial": b}, ValueError, r"initial must have shape \(2x3\)"),
        ({"initial": b[:, 0].half()}, TypeError, "initial must be float32"),
        ({"cu_seqlens": cuts}, ValueError, "cu_seqlens needs a batch of one, given 2"),
        (
            {"a": a[None], "b": b[None], "cu_seqlens": cuts},
            ValueError,
            r"cu_seqlens needs b of \(1, L, D\) or \(L, D\)",
        ),
        ({"a": a[0], "b": b[0], "cu_seqlens": cuts * 2}, ValueError, "cu_seqlens .* end at most at 5, given"),
        (
            {"a": a[0], "b": b[0], "cu_seqlens": cuts, "initial": b[0, :1]},
            ValueError,
            r"initial must have shape \(2x3\)",
        ),
        ({"backend": "triton"}, NotImplementedError, "there is no triton backend; there are: cpu, reference"),
        (
            {"a": a.double(), "b": b.double(), "backend": "cpu"},
            NotImplementedError,
            "no backend can serve this call .*it serves float32, bfloat16, float16 and complex64, not float64",
        ),
    ):
        with pytest.raises(error, match=f"fastattn.linear_scan: {message}"):
            fa.linear_scan(**{"a": a, "b": b, **options})


def test_what_the_kernels_cannot_hold_is_refused():
    x = torch.zeros(2, 5, 4)
    fields = {"a": x, "b": x, "out": torch.zeros(2, 5, 4)}
    _native.run("linear_scan_forward", **fields)
    pairs = {n: torch.zeros(2, 5, 4, dtype=torch.complex64).real for n in fields}
    _native.run("linear_scan_forward", **pairs, pairs=1)
    for change, message in (
        ({"a": torch.zeros(2, 5, 3)}, "a must have sizes"),
        ({"a": x.bfloat16()}, "a has another dtype"),
        ({"b": x.double()}, "b must be float32, bfloat16 or float16"),
        ({"out": torch.zeros(2, 4, 5).mT}, "out must be contiguous"),
        ({"initial": torch.zeros(3, 4)}, "initial must have sizes"),
        ({"segments": 6}, r"segments must lie in \[1, 5\]"),
        ({"slice": 257}, r"slice must lie in \[1, 256\]"),
        ({"pairs": 2}, r"pairs must lie in \[0, 1\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens needs a batch of one"),
        (
            {n: t[:1] for n, t in fields.items()} | {"cu_seqlens": torch.tensor([0, 6])},
            r"must lie in \[0, 5\], given 6",
        ),
        (pairs | {"pairs": 1, "log_a": 1}, "log_a is not served with pairs"),
        (
            pairs | {"pairs": 1, "a": torch.zeros(2, 5, 7)[..., :4]},
            "a must be the real parts of complex numbers",
        ),
        ({n: t.bfloat16() for n, t in fields.items()} | {"pairs": 1}, "b must be float32 where it has pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.run("linear_scan_forward", **fields | change)
    back = {"a": x, "out": x, "grad_out": x, "grad_b": torch.zeros(2, 5, 4)}
    _native.run("linear_scan_backward", **back)
    for change, message in (
        ({"grad_a": torch.zeros(2, 5, 3)}, "grad_a must have sizes"),
        ({"grad_a": torch.zeros(1, 2, 5), "grad_a_kind": 2}, "grad_a must have sizes"),
        ({"grad_a": torch.zeros(2, 5, 4), "grad_a_kind": 3}, "grad_a_kind must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.run("linear_scan_backward", **back | change)
