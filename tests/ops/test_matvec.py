"""Few-row products: every instruction set and dtype against the reference, gradients, strides, errors, and who uses it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.nn.plain import linear
from fastattn.ops.matvec import matvec, reference
from fastattn.runtime import native as _native
from fastattn.runtime import tuning as _config
from fastattn.runtime.device import Target


def use(rows_at_once, dot):
    return _config.override({("matvec", "cpu"): {"rows_at_once": rows_at_once, "dot": dot}})


every_isa = pytest.mark.parametrize("isa", testing.isas())


@every_isa
@given(
    rows=st.sampled_from(((), (1,), (2,), (1, 3), (2, 2), (5,), (8,), (0,))),
    width=st.integers(1, 75),
    outputs=st.integers(0, 13),
    layout=st.sampled_from(("contiguous", "odd")),
    dtype=st.sampled_from(testing.LOW_DTYPES),
    rows_at_once=st.sampled_from((1, 2, 4)),
    dot=st.integers(0, 1),
)
def test_matvec(isa, rows, width, outputs, layout, dtype, rows_at_once, dot):
    x = testing.random_tensor(*rows, width, dtype=dtype, seed=1, layout=layout, requires_grad=True)
    weight = testing.random_tensor(
        outputs, width, dtype=dtype, seed=2, layout="odd" if outputs else "contiguous", requires_grad=True
    )
    with _native.use_cpu_isa(isa), testing.nan_filled_outputs(), use(rows_at_once, dot):
        testing.check_op(matvec, reference.matvec, (x, weight), terms=width)


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
@pytest.mark.parametrize("dot", (0, 1))
@every_isa
def test_a_row_does_not_depend_on_the_others_or_on_threads_or_on_rows_at_once(isa, dtype, dot):
    x, weight = (testing.random_tensor(n, 200, dtype=dtype, seed=n) for n in (8, 301))
    before = torch.get_num_threads()
    with _native.use_cpu_isa(isa):
        with use(1, dot):
            whole, two = matvec(x, weight), matvec(x[:2], weight)
            # one and two rows add up in one order, more in another
            assert dot or torch.equal(matvec(x[:1], weight), two[:1])
            for rows in (3, 4, 5):
                assert torch.equal(matvec(x[:rows], weight), whole[:rows])
        for rows_at_once in (1, 2, 4):
            with use(rows_at_once, dot):
                assert torch.equal(matvec(x, weight), whole)
                assert torch.equal(matvec(x[:2], weight), two)
        try:
            torch.set_num_threads(1)
            with use(2, dot):
                assert torch.equal(matvec(x, weight), whole)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_how_weights_are_read_by_default(dtype):
    """Long rows as many at once as there are rows of x, short ones by four; on Intel's processors all by four."""
    declared = _config.declared()["matvec", "cpu"]
    long = 1024 // getattr(torch, dtype).itemsize
    for name, expected in (("AMD EPYC (family 25 model 17)", [1, 2, 4, 4, 4]), ("Intel(R) Xeon(R)", [4] * 5)):
        target = Target("cpu", name, "avx512bf16")
        found = []
        for rows, width in ((1, long), (2, long), (3, long), (8, long), (1, long - 1)):
            key = {"dtype": dtype, "rows": rows, "inputs": width, "outputs": 5}
            values = declared.defaults(key, target)
            assert declared.refuses(values, key, target) is None
            assert values["dot"] == (dtype == "bfloat16" and rows > 1 and not target.intel)
            found.append(values["rows_at_once"])
        assert found == expected


def test_more_rows_than_the_kernel_has_go_to_the_reference():
    x, weight = torch.ones(9, 4), torch.ones(3, 4)
    assert torch.equal(matvec(x, weight), torch.full((9, 3), 4.0))
    with pytest.raises(NotImplementedError, match="it serves up to 8 rows, not 9"):
        matvec(x, weight, backend="cpu")


def test_linear_takes_the_kernel_only_where_nothing_is_lost(monkeypatch):
    layer = torch.nn.Linear(6, 5, bias=False).bfloat16()
    x = torch.randn(2, 1, 6).bfloat16()
    served = []
    monkeypatch.setattr("fastattn.nn.plain.matvec", lambda *args: served.append(args) or matvec(*args))
    with torch.no_grad():
        assert linear(x, layer).shape == (2, 1, 5)
        assert len(served) == 1
        linear(torch.randn(9, 6).bfloat16(), layer)
        linear(x.float(), layer.float())
        layer.bfloat16().register_forward_hook(lambda *args: None)
        linear(x, layer)
        linear(x, torch.nn.Linear(6, 5).bfloat16())
    linear(x, torch.nn.Linear(6, 5, bias=False).bfloat16()).sum().backward()
    assert len(served) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_and_compile(dtype):
    x, weight = (testing.random_tensor(n, 7, dtype=dtype, seed=n, requires_grad=True) for n in (3, 4))
    torch.library.opcheck(torch.ops.fastattn.matvec.default, (x, weight, ""))
    assert dtype != torch.float64 or torch.autograd.gradcheck(matvec, (x, weight))
    compiled = torch.compile(matvec, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), matvec(x, weight))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: matvec(x, torch.ones(3, 5)), ValueError, "weight must have shape"),
        (lambda x: matvec(x, torch.ones(4)), ValueError, "weight must have shape"),
        (lambda x: matvec(x, torch.ones(3, 4).half()), TypeError, "weight is float16 but x is float32"),
        (lambda x: matvec(x.int(), torch.ones(3, 4)), TypeError, "matvec: x must be one of float32"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 4))


def test_a_call_that_nothing_watches_gives_what_the_dispatcher_gives():
    x = torch.randn(3, 8)
    direct = fa.swiglu(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        assert torch.equal(fa.swiglu(x), direct)
    assert any(event.key == "fastattn::swiglu" for event in profiler.key_averages())
    assert torch.equal(torch.vmap(lambda row: row * 2)(fa.swiglu(x)), 2 * direct)
    assert fa.swiglu(x.to("meta")).shape == direct.shape
    assert fa.swiglu(x.clone().requires_grad_()).grad_fn is not None
