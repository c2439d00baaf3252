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
    return reference.rotary(q, k, positions, 10000.0, False)


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
)
def test_rotary(isa, batch, heads, length, half, layout, dtype, farthest, per_batch):
    q, k = (
        testing.random_tensor(
            batch, h, length, 2 * half, dtype=dtype, seed=h, layout=layout, requires_grad=True
        )
        for h in heads
    )
    generator = torch.Generator().manual_seed(length)
    positions = torch.randint(0, farthest, (batch, length) if per_batch else (length,), generator=generator)

    def rounded_angles(q, k, positions):
        # the truth takes the definition's float32 angles: their own rounding is not the kernel's error
        if q.dtype != torch.float64:
            return reference_rotary(q, k, positions)
        angle = reference.angles(positions, q.shape[-1], 10000.0, torch.float32)
        angle = angle[:, None] if positions.dim() == 2 else angle
        cos, sin = angle.cos().double(), angle.sin().double()
        return tuple(
            torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1))
        )

    with _native.use_cpu_isa(isa), testing.nan_filled_outputs():
        testing.check_op(
            lambda q, k: fa.rotary(q, k, positions), lambda q, k: rounded_angles(q, k, positions), (q, k)
        )


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
    turned = torch.ops.fastattn.rotary(q, k, positions, 1e4, False, "")
    back = torch.ops.fastattn.rotary(*turned, positions, 1e4, True, "")
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
        (ops.rms_norm, (x, r, w, 1e-6, "")),
        (ops.rms_norm, (x, None, None, 1e-6, "")),
        (ops.rms_norm_backward, (plain[0], plain[1], plain[1], plain[2], rstd, 1e-6, "")),
        (ops.swiglu, (x, "")),
        (ops.swiglu_backward, (plain[0][..., :4].contiguous(), plain[1], "")),
        (ops.gated, (x, r, "")),
        (ops.gated_backward, (*plain[:2], plain[0], "")),
        (ops.rotary, (q, k, torch.arange(5), 1e4, False, "")),
    ):
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fa.rms_norm(x.int()), TypeError, "rms_norm: x must be one of float32"),
        (lambda x: fa.rms_norm([1.0]), TypeError, "rms_norm: x must be a tensor, given list"),
        (lambda x: fa.rms_norm(x[0, 0]), ValueError, "rms_norm: x must have a last dim of 1 or more"),
        (lambda x: fa.rms_norm(x, residual=x[:1]), ValueError, r"residual must have shape \(3x8\)"),
        (lambda x: fa.rms_norm(x, residual=x.bfloat16()), TypeError, "residual is bfloat16 but x is float32"),
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
