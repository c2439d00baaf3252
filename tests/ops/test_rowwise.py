"""The recurrence pieces: every instruction set and dtype against the reference, gradients, strides, errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.ops.rowwise import cpu, reference
from fastattn.runtime import native as _native

shapes = st.one_of(
    st.tuples(st.integers(1, 70)),
    st.tuples(st.integers(0, 5), st.integers(1, 40)),
    st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 40)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 20)),
)
layouts = st.sampled_from(("contiguous", "odd"))
dtypes = st.sampled_from(testing.LOW_DTYPES)

every_isa = pytest.mark.parametrize("isa", testing.isas())


def reference_norm(x, residual, weight):
    normed, total, _ = reference.rms_norm(x, residual, weight, 1e-6)
    return normed if residual is None else (normed, total)


def reference_rotary(q, k, positions):
    return reference.rotary(q, k, positions, 10000.0, False, False)


@every_isa
@given(shape=shapes, layout=layouts, dtype=dtypes, residual=st.booleans(), weight=st.booleans())
def test_rms_norm(isa, shape, layout, dtype, residual, weight):
    x, r = (
        testing.random_tensor(*shape, dtype=dtype, seed=i, layout=layout, requires_grad=True) for i in (1, 2)
    )
    w = testing.random_tensor(shape[-1], dtype=dtype, seed=3, requires_grad=True) if weight else None
    inputs = (x, r if residual else None, w)
    with _native.use_cpu_isa(isa), testing.nan_filled_outputs():
        testing.check_op(
            lambda x, r, w: fa.rms_norm(x, residual=r, weight=w),
            reference_norm,
            inputs,
            terms=max(x.numel(), 1),
        )


@pytest.mark.parametrize("eps", (1e-12, 1e-5, 1.0))
@pytest.mark.parametrize("size", (1e-3, 1.0, 1e4))
def test_a_norm_of_one_column_is_off_by_roundings_of_its_terms(isa, size, eps):
    """Its gradient is g * rstd less x^2 rstd^2 of that, which leaves g * rstd^3 * eps.

    With u = 2^-24: rstd is the root of a sum of x^2 and eps, three roundings, taken and divided by, two more: 3.5 u. The second
    term is x * ((g w x) * rstd * rstd), six roundings and twice rstd's, 13 u, where the first has one. Their difference, and
    its product with rstd, are off by 1 + 1 + 3.5 u of what is left.
    """
    x, grad = (
        testing.random_tensor(200, 1, scale=size, requires_grad=True),
        testing.random_tensor(200, 1, seed=2),
    )
    w = testing.random_tensor(1, seed=3)
    fa.rms_norm(x, weight=w, eps=eps).backward(grad)
    g, rstd = grad.double() * w.double(), (x.detach().double().square() + eps).rsqrt()
    true = g * rstd.pow(3) * eps
    bound = 2.0**-24 * (14 * (g * rstd).abs() + 6 * true.abs()) * (1 + 1e-5)
    assert bool(((x.grad.double() - true).abs() <= bound).all())


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
def test_gates_far_below_zero_are_right_or_zero(isa, dtype):
    """1 + e^-x is infinite from -89 on; x / (1 + e^-x) then is 0 where e^x is less than 2^-126. See src/cpu/math.h."""
    gate = torch.linspace(-104, -80, 400).to(dtype)
    up = torch.full_like(gate, 1e4)
    out = fa.swiglu(torch.stack((gate, up), -1)).squeeze(-1).double()
    sigmoid, factor = gate.double().sigmoid(), (gate.double() * up.double()).abs()
    limits = torch.finfo(dtype)
    divisor = {torch.float32: 4e-7, torch.bfloat16: 9e-5, torch.float16: 1.1e-5}[
        dtype
    ]  # and the stored result's
    relative = divisor + 2.0**-22 + (limits.eps / 2 if dtype != torch.float32 else 0)
    lost = torch.where(sigmoid < 2.0**-126, sigmoid, relative * sigmoid)
    least = limits.smallest_normal * limits.eps / 2
    assert bool(((out + factor * sigmoid).abs() <= factor * (lost + 2.0**-149) + least).all())


@every_isa
@given(shape=shapes, layout=layouts, dtype=dtypes, scale=st.sampled_from((1.0, 30.0)))
def test_swiglu(isa, shape, layout, dtype, scale):
    shape = (*shape[:-1], 2 * shape[-1])
    x = testing.random_tensor(*shape, dtype=dtype, scale=scale, layout=layout, requires_grad=True)
    with _native.use_cpu_isa(isa), testing.nan_filled_outputs():
        testing.check_op(fa.swiglu, reference.swiglu, (x,))


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
def test_gates_at_infinities_and_nan(isa, dtype):
    """silu(-inf) is NaN, as torch's is: -inf * 0."""
    testing.assert_equal_at_extremes(
        lambda g, u: fa.swiglu(torch.cat([g, u])), lambda g, u: reference.swiglu(torch.cat([g, u])), dtype
    )
    assert F.silu(torch.tensor([-torch.inf], dtype=dtype)).isnan().all()
    testing.assert_equal_at_extremes(fa.gated, reference.gated, dtype)


@every_isa
@given(shape=shapes, layout=layouts, dtype=dtypes, scale=st.sampled_from((1.0, 30.0)))
def test_gated(isa, shape, layout, dtype, scale):
    x, gate = (
        testing.random_tensor(*shape, dtype=dtype, seed=i, scale=scale, layout=layout, requires_grad=True)
        for i in (1, 2)
    )
    with _native.use_cpu_isa(isa), testing.nan_filled_outputs():
        testing.check_op(fa.gated, reference.gated, (x, gate))


@every_isa
@given(
    batch=st.integers(0, 2),
    heads=st.sampled_from(((1, 1), (4, 2))),
    length=st.integers(0, 9),
    half=st.integers(1, 20),
    layout=st.sampled_from(testing.LAYOUTS),
    dtype=dtypes,
    farthest=st.sampled_from((10, 5000, 1 << 20)),
    per_batch=st.booleans(),
    pairs=st.booleans(),
)
def test_rotary(isa, batch, heads, length, half, layout, dtype, farthest, per_batch, pairs):
    q, k = (
        testing.random_tensor(
            batch, h, length, 2 * half, dtype=dtype, seed=h, layout=layout, requires_grad=True
        )
        for h in heads
    )
    generator = torch.Generator().manual_seed(length)
    positions = torch.randint(0, farthest, (batch, length) if per_batch else (length,), generator=generator)

    with _native.use_cpu_isa(isa), testing.nan_filled_outputs():
        testing.check_op(
            lambda q, k: fa.rotary(q, k, positions, interleaved=pairs),
            lambda q, k: reference.rotary(q, k, positions, 10000.0, pairs, False),
            (q, k),
        )


@every_isa
@given(
    shape=shapes,
    layout=layouts,
    types=st.sampled_from(
        [
            (x, r, w)
            for x in testing.LOW_DTYPES
            for r in (None, torch.float32, torch.bfloat16, torch.float16)
            for w in (None, torch.float32, torch.bfloat16)
        ]
    ),
    offset=st.sampled_from((0.0, 1.0)),
)
def test_rms_norm_of_several_dtypes(isa, shape, layout, types, offset):
    """As under autocast: float32 weights, or a float32 residual stream, beside 16-bit rows. Nothing is rounded but the results."""
    inputs = [
        None
        if dtype is None
        else testing.random_tensor(*size, dtype=dtype, seed=i, layout=layout, requires_grad=True)
        for i, (dtype, size) in enumerate(zip(types, (shape, shape, shape[-1:]), strict=True))
    ]

    def ours(x, r, w):
        return fa.rms_norm(x, residual=r, weight=w, weight_offset=offset)

    def definition(x, r, w):
        normed, total, _ = reference.rms_norm(x, r, w, 1e-6, offset)
        return normed if r is None else (normed, total)

    with _native.use_cpu_isa(isa), testing.nan_filled_outputs():
        testing.check_op(ours, definition, tuple(inputs), terms=max(inputs[0].numel(), 1))
        found = ours(*inputs)
    given = [t for t in inputs if t is not None]
    results = found if isinstance(found, tuple) else (found,)
    assert results[0].dtype == types[0]
    if types[1] is not None:
        assert results[1].dtype == torch.promote_types(*types[:2])
    gradients = torch.autograd.grad(sum(t.float().sum() for t in results), given)
    assert [g.dtype for g in gradients] == [t.dtype for t in given]


def test_a_float32_weight_of_bfloat16_rows_is_not_rounded():
    """Of a weight of 1 + 2^-8 bfloat16 keeps 1, which would double the error of the results."""
    x = testing.random_tensor(64, 512, dtype=torch.bfloat16)
    weight = torch.full((512,), 1 + 2.0**-8)
    for backend in ("cpu", "reference"):
        found = fa.rms_norm(x, weight=weight, backend=backend).double()
        exact = fa.rms_norm(x.double(), weight=weight.double())
        # one rounding to bfloat16's 8 bits, and a few of float32
        assert bool(((found - exact).abs() <= exact.abs() * (2.0**-8 + 8 * testing.EPS32)).all())
    assert fa.explain("rms_norm", x, weight=weight).backend == "cpu"


def test_weight_offset_is_gemmas():
    x, weight = testing.random_tensor(5, 8, seed=1), testing.random_tensor(8, seed=2)
    expected = F.rms_norm(x, (8,), eps=1e-6) * (1 + weight)
    torch.testing.assert_close(fa.rms_norm(x, weight=weight, weight_offset=1), expected)


def turned_by_hand(x, cos, sin, pairs):
    """Each two by a loop."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if pairs else (i, i + half)
        ca, cb = (a, b) if cos.shape[-1] == x.shape[-1] else (i, i)
        c, s = cos[:, None], sin[:, None]
        out[..., a] = x[..., a] * c[..., ca] - x[..., b] * s[..., ca]
        out[..., b] = x[..., b] * c[..., cb] + x[..., a] * s[..., cb]
    return out


@every_isa
@given(
    batch=st.integers(0, 2),
    length=st.integers(0, 9),
    half=st.integers(1, 20),
    layout=st.sampled_from(testing.LAYOUTS),
    dtype=dtypes,
    whole=st.booleans(),
    per_batch=st.booleans(),
    pairs=st.booleans(),
)
def test_rotary_tables(isa, batch, length, half, layout, dtype, whole, per_batch, pairs):
    q, k = (
        testing.random_tensor(
            batch, h, length, 2 * half, dtype=dtype, seed=h, layout=layout, requires_grad=True
        )
        for h in (4, 2)
    )
    shape = (batch if per_batch else 1, length, 2 * half if whole else half)
    cos, sin = (testing.random_tensor(*shape, dtype=dtype, seed=i, layout=layout) for i in (5, 6))

    def ours(q, k):
        return fa.rotary_tables(q, k, cos, sin, interleaved=pairs)

    def definition(q, k):
        return reference.rotary_tables(q, k, cos, sin, pairs, False)

    with _native.use_cpu_isa(isa), testing.nan_filled_outputs():
        testing.check_op(ours, definition, (q, k))
    q64, c64, s64 = (t.detach().double() for t in (q, cos, sin))
    by_hand = turned_by_hand(q64, c64, s64, pairs)
    torch.testing.assert_close(fa.rotary_tables(q64, q64, c64, s64, interleaved=pairs)[0], by_hand)


@pytest.mark.parametrize("pairs", [False, True])
def test_rotary_tables_are_transformers_and_rotarys(pairs):
    """Tables of cat(angles, angles), as models hand them over, are `rotary` of the same angles."""
    q, k = testing.random_tensor(2, 4, 7, 16, seed=1), testing.random_tensor(2, 2, 7, 16, seed=2)
    angle = reference.angles(torch.arange(7)[None], 16, 10000.0).float()
    double = angle.repeat_interleave(2, -1) if pairs else torch.cat([angle, angle], -1)
    expected = fa.rotary(q, k, torch.arange(7)[None], interleaved=pairs)
    for table in (angle, double):
        found = fa.rotary_tables(q, k, table.cos(), table.sin(), interleaved=pairs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("position", [4095, 131072, 1 << 20, (1 << 31) - 1])
def test_angles_are_exact_at_long_positions(backend, position):
    """Case 20 beside it: positions (1, L) serve a batch."""
    q = torch.zeros(2, 1, 1, 128)
    q[..., :64] = 1  # rotated: cosines, then sines
    found, _ = fa.rotary(q, q, torch.tensor([[position]]), backend=backend)
    exponent = torch.arange(64, dtype=torch.float64) / 64
    angle = position * 10000.0**-exponent
    expected = torch.cat([angle.cos(), angle.sin()])
    # a rounding of the result; the angle's own in float64
    assert float((found.double() - expected).abs().max()) <= 2.0**-24 + position * 2.0**-51


def test_rotary_tables_refuse_by_name():
    q = torch.zeros(2, 3, 5, 8)
    cos = torch.zeros(1, 5, 4)
    for wrong, error, message in (
        (
            lambda: fa.rotary_tables(q, q, cos[:, 1:], cos),
            ValueError,
            r"cos must be \(B or 1, L, D or D/2\), here",
        ),
        (lambda: fa.rotary_tables(q, q, cos, torch.zeros(1, 5, 8)), ValueError, "sin must have shape"),
        (lambda: fa.rotary_tables(q, q, cos.int(), cos), TypeError, "cos must be one of float32"),
        (
            lambda: fa.rotary_tables(q, q, cos.clone().requires_grad_(), cos),
            NotImplementedError,
            "cos gets no gradient",
        ),
    ):
        with pytest.raises(error, match=message):
            wrong()


def test_negated_views_of_one_column_keep_their_sign():
    """torch keeps the sign of `z.conj().imag` as a bit, and a strided view of one column is not copied."""
    x = testing.random_tensor(6, 1, seed=1).to(torch.complex64).mul(1j).conj().imag
    gate = testing.random_tensor(6, 1, seed=2)
    assert x.is_neg()
    for call in (lambda x: fa.gated(x, gate), lambda x: fa.rms_norm(x), lambda x: fa.fused_linear(x, gate)):
        assert torch.equal(call(x), call(x.contiguous().resolve_neg()))
    q = x.view(1, 1, 6, 1)
    assert torch.equal(fa.attention(q, q, q), fa.attention(*[q.resolve_neg()] * 3))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_rotary_reads_positions_that_numpy_writes(dtype):
    x = testing.random_tensor(1, 1, 4, 8)
    memory = np.arange(4, dtype=dtype)
    positions = torch.from_numpy(memory)
    for far in (0, 1, 1000):  # the last one is past the first table of angles
        memory += dtype(far)
        expected, _ = fa.rotary(x.double(), x.double(), positions)
        # angles to 1004, each with three float32 roundings, times |x| < 4
        assert testing.max_error(fa.rotary(x, x, positions)[0], expected) <= 1004 * 3 * 2**-24 * 4


def test_tables_of_angles_are_bounded():
    x, positions = testing.random_tensor(1, 1, 3, 4), torch.arange(3)
    for i in range(40):
        found, _ = fa.rotary(x, x, positions, theta=1e4 + i)
        # angles to 2, each with three float32 roundings, times |x| < 4
        assert (
            testing.max_error(found, fa.rotary(x.double(), x.double(), positions, theta=1e4 + i)[0])
            <= 24 * 2**-24
        )
    assert len(cpu._tables) <= cpu._MOST_TABLES


def test_rotary_undoes_itself():
    q, k, _ = testing.attention_inputs(2, 3, 1, 17, head_dim=34, requires_grad=False)
    positions = torch.arange(17)
    turned = torch.ops.fastattn.rotary(q, k, positions, 1e4, False, False, "")
    back = torch.ops.fastattn.rotary(*turned, positions, 1e4, False, True, "")
    # two rotations of two products and a sum each: under 8 roundings of values up to |q| * sqrt(2)
    for x, y in zip((q, k), back, strict=True):
        assert testing.max_error(y, x) <= 8 * testing.EPS32 * float(x.abs().max()) * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_exact_on_every_isa(dtype):
    """Every finite half value, infinities and NaN survive a kernel that multiplies by sigmoid(inf) = 1."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    gate = torch.full_like(x, float("inf"))
    for isa in testing.isas():
        with _native.use_cpu_isa(isa):
            y = fa.gated(x, gate)
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y[~x.isnan()], x[~x.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even_on_every_isa(dtype):
    generator = torch.Generator().manual_seed(5)
    # float32 sums of two halves need rounding; x + residual is the kernel's own rounding of them
    a, b = (torch.randn(4096, generator=generator).mul(s).to(dtype) for s in (1.0, 0.01))
    wide = torch.cat([a.float() + b.float(), torch.tensor([70000.0, 1e-7, 6e-8, 3e-8])])
    a, b = torch.cat([a, wide[-4:].to(dtype)]), torch.cat([b, torch.zeros(4, dtype=dtype)])
    for isa in testing.isas():
        with _native.use_cpu_isa(isa):
            _, total = fa.rms_norm(a, residual=b)
        assert torch.equal(total, (a.float() + b.float()).to(dtype))


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    x, r = (testing.random_tensor(300, 256, dtype=dtype, seed=i) for i in (1, 2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = (*fa.rms_norm(x, residual=r), fa.swiglu(x), fa.gated(x, r))
        torch.set_num_threads(2)
        two = (*fa.rms_norm(x, residual=r), fa.swiglu(x), fa.gated(x, r))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def calls(dtype, requires_grad=True):
    x, r = (testing.random_tensor(3, 5, 8, dtype=dtype, seed=i, requires_grad=requires_grad) for i in (1, 2))
    w = testing.random_tensor(8, dtype=dtype, seed=3, requires_grad=requires_grad)
    q, k, _ = testing.attention_inputs(2, 4, 2, 5, head_dim=8, dtype=dtype, requires_grad=requires_grad)
    positions = torch.arange(5)
    return {
        "rms_norm": (lambda x, r, w: fa.rms_norm(x, residual=r, weight=w), (x, r, w)),
        "rms_norm plain": (lambda x: fa.rms_norm(x), (x,)),
        "swiglu": (fa.swiglu, (x,)),
        "gated": (fa.gated, (x, r)),
        "rotary": (lambda q, k: fa.rotary(q, k, positions), (q, k)),
    }


@pytest.mark.parametrize("name", calls(torch.float32))
def test_gradcheck(name):
    fn, inputs = calls(torch.float64)[name]
    assert torch.autograd.gradcheck(fn, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", calls(torch.float32))
def test_compiles_without_a_graph_break(name, dtype):
    fn, inputs = calls(dtype)[name]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    eager, eager_gradients = testing.differentiate(fn, inputs)
    found, gradients = testing.differentiate(compiled, inputs)
    assert all(
        torch.equal(a, b) for a, b in zip((*eager, *eager_gradients), (*found, *gradients), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    x, r = (testing.random_tensor(3, 5, 8, dtype=dtype, seed=i, requires_grad=True) for i in (1, 2))
    w = testing.random_tensor(8, dtype=dtype, seed=3, requires_grad=True)
    q, k, _ = testing.attention_inputs(2, 4, 2, 5, head_dim=8, dtype=dtype)
    ops = torch.ops.fastattn
    rstd = torch.ones(3, 5, dtype=torch.promote_types(dtype, torch.float32))
    plain = (x.detach(), r.detach(), w.detach())
    for op, args in (
        (ops.rms_norm, (x, r, w, 1e-6, 0.0, "")),
        (ops.rms_norm, (x.detach().bfloat16(), r, w, 1e-6, 1.0, "")),
        (ops.rms_norm, (x, None, None, 1e-6, 0.0, "")),
        (ops.rms_norm_backward, (plain[0], plain[1], plain[1], plain[2], rstd, 1e-6, 0.0, "")),
        (ops.swiglu, (x, "")),
        (ops.swiglu_backward, (plain[0][..., :4].contiguous(), plain[1], "")),
        (ops.gated, (x, r, "")),
        (ops.gated_backward, (*plain[:2], plain[0], "")),
        (ops.rotary, (q, k, torch.arange(5), 1e4, False, False, "")),
        (ops.rotary_tables, (q, k, q.detach()[:, 0], q.detach()[:, 0], True, False, "")),
    ):
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fa.rms_norm(x.int()), TypeError, "rms_norm: x must be one of float32"),
        (lambda x: fa.rms_norm([1.0]), TypeError, "rms_norm: x must be a tensor, given list"),
        (lambda x: fa.rms_norm(x[0, 0]), ValueError, "rms_norm: x must have a last dim of 1 or more"),
        (lambda x: fa.rms_norm(x, residual=x[:1]), ValueError, r"residual must have shape \(3x8\)"),
        (lambda x: fa.rms_norm(x, residual=x.int()), TypeError, "residual must be one of float32"),
        (lambda x: fa.rms_norm(x, weight=x), ValueError, r"weight must have shape \(8\)"),
        (
            lambda x: fa.rms_norm(x, weight=x[0], weight_offset=float("inf")),
            ValueError,
            "weight_offset must be finite",
        ),
        (lambda x: fa.rms_norm(x, weight=x[0, :3]), ValueError, r"weight must have shape \(8\)"),
        (lambda x: fa.rms_norm(x, eps=-1.0), ValueError, "eps must be zero or more, given -1.0"),
        (lambda x: fa.rms_norm(x, residual=x.to("meta")), ValueError, "residual is on meta but x is on cpu"),
        (lambda x: fa.swiglu(x[:, :7]), ValueError, "swiglu: gate_up must have an even last dim"),
        (lambda x: fa.gated(x[0, 0], x[0, 0]), ValueError, "gated: x must have a last dim"),
        (lambda x: fa.gated(x, x[:2]), ValueError, r"gated: gate must have shape \(3x8\)"),
        (lambda x: fa.rotary(x, x, torch.arange(3)), ValueError, "rotary: q must have 4 dimensions"),
        (
            lambda x: fa.rotary(x[None, None, :, :7], x[None, None, :, :7], torch.arange(3)),
            ValueError,
            "even head dim",
        ),
        (
            lambda x: fa.rotary(x[None, None], x[None, None], torch.arange(4)),
            ValueError,
            "positions must have shape",
        ),
        (
            lambda x: fa.rotary(x[None, None], x[None, None], torch.ones(3)),
            TypeError,
            "positions must be int32 or int64",
        ),
        (
            lambda x: fa.rotary(x[None, None], x[None, None, :2], torch.arange(3)),
            ValueError,
            "k must have q's batch",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3, 8))


def test_rotary_takes_one_row_of_positions_for_the_batch():
    q, k, _ = testing.attention_inputs(3, 4, 2, 7, 7, 8, requires_grad=False)
    positions = torch.arange(5, 12)
    for actual, expected in zip(
        fa.rotary(q, k, positions[None]), fa.rotary(q, k, positions.expand(3, -1)), strict=True
    ):
        assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match=r"\(L,\), \(1, L\) or \(B, L\)"):
        fa.rotary(q, k, positions.expand(2, -1))
