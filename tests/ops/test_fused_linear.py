"""Products with their neighbours: our kernel and torch's product against the reference, gradients, packing, errors."""

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.ops.fused_linear import cpu, reference
from fastattn.runtime import native as _native
from fastattn.runtime import tuning as _config
from fastattn.runtime.contents import ContentsCache, digest
from fastattn.runtime.device import Target

every_isa = pytest.mark.parametrize("isa", testing.isas())
SMALL = {"product": "native", "block_rows": 24, "block_columns": 64, "block_steps": 128}


def use(product):
    """Both directions by this product; ours in small blocks, so that a small problem has several."""
    values = SMALL if product == "native" else {"product": product}
    return _config.override({("fused_linear", "cpu"): values, ("fused_linear_backward", "cpu"): values})


def problem(rows, columns, contracted, before, swiglu, residual, layout, dtype=torch.float32, batch=()):
    """(x, weight, gate or None, residual or None) with gradients."""
    options = {"dtype": dtype, "requires_grad": True}
    columns = 2 * columns if swiglu else columns
    shape = (*batch, rows, contracted)
    if before == "gate":
        heads = 3 if contracted % 3 == 0 else 1
        shape = (*batch, rows, heads, contracted // heads)
    x = testing.random_tensor(*shape, seed=1, layout=layout, **options)
    weight = testing.random_tensor(
        columns, contracted, seed=2, scale=contracted**-0.5, layout=layout, **options
    )
    gate = testing.random_tensor(*shape, seed=3, layout=layout, **options) if before == "gate" else None
    out = (*batch, rows, columns // 2 if swiglu else columns)
    return (
        x,
        weight,
        gate,
        testing.random_tensor(*out, seed=4, layout=layout, **options) if residual else None,
    )


def run(before, swiglu):
    def call(x, weight, gate, residual):
        eps = 1e-6 if before == "norm" else None
        return fa.fused_linear(x, weight, norm_eps=eps, gate=gate, swiglu=swiglu, residual=residual)

    return call


def define(before, swiglu):
    def call(x, weight, gate, residual):
        eps = 1e-6 if before == "norm" else None
        return reference.fused_linear(x, weight, gate, residual, eps, swiglu, False)[0]

    return call


@every_isa
@pytest.mark.parametrize("product", ["native", "library"])
@given(
    rows=st.integers(0, 60),
    columns=st.integers(1, 70),
    contracted=st.one_of(st.integers(1, 40), st.integers(120, 300)),
    before=st.sampled_from((None, "norm", "gate")),
    swiglu=st.booleans(),
    residual=st.booleans(),
    layout=st.sampled_from(("contiguous", "odd")),
    dtype=st.sampled_from(testing.LOW_DTYPES),
)
def test_equals_the_definition(
    product, isa, rows, columns, contracted, before, swiglu, residual, layout, dtype
):
    if before == "norm":  # of a row of one element the gradient is nothing but cancellation
        contracted += 8
    inputs = problem(rows, columns, contracted, before, swiglu, residual, layout, dtype)
    terms = max(rows, contracted, 2 * columns)
    with _native.use_cpu_isa(isa), testing.nan_filled_outputs(), use(product):
        testing.check_op(run(before, swiglu), define(before, swiglu), inputs, terms=terms)


@pytest.mark.parametrize("before", [None, "norm", "gate"])
@pytest.mark.parametrize("batch", [(2,), (2, 1, 3)])
def test_batches(batch, before, isa):
    inputs = problem(5, 9, 12, before, True, True, "contiguous", batch=batch)
    with use("native"):
        testing.check_op(run(before, True), define(before, True), inputs, terms=30)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_gradients_of_some_inputs_alone(wanted):
    inputs = problem(5, 9, 12, "gate", True, True, "contiguous")
    some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    _, alone = testing.differentiate(run("gate", True), some)
    _, all_of_them = testing.differentiate(run("gate", True), inputs)
    assert all(torch.equal(g, all_of_them[i]) for g, i in zip(alone, wanted, strict=True))


def test_rows_of_zero_and_of_large_values(isa):
    x = testing.random_tensor(9, 20, seed=1)
    x[0], x[1] = 0, x[1] * 1e15
    weight = testing.random_tensor(14, 20, seed=2)
    with use("native"), testing.nan_filled_outputs():
        testing.check_op(run("norm", False), define("norm", False), (x, weight, None, None), terms=20)


def test_results_do_not_depend_on_the_number_of_threads():
    inputs = problem(100, 80, 150, "norm", True, True, "contiguous", torch.bfloat16)
    before = torch.get_num_threads()
    found = []
    try:
        with use("native"):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                outputs, gradients = testing.differentiate(run("norm", True), inputs)
                found.append((*outputs, *gradients))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def optimizer_step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=3.0).step()


def fused_optimizer_step(weight):
    """torch's writes to parameters without counting a version."""
    weight.grad = torch.zeros_like(weight)
    weight.grad[0, 5] = 1
    torch.optim.AdamW([weight], lr=3.0, weight_decay=0.0, fused=True).step()


def through_numpy(weight):
    weight.detach().numpy()[0, 5] += 3


def as_an_alias(weight):
    """As a replayed graph or a compiler's buffer: a tensor of the same memory with a counter of its own."""
    torch.empty(0).set_(weight.untyped_storage()).view(weight.shape)[0, 5] += 3


CHANGES = {
    "in place": lambda weight: weight.mul_(3),
    "one element in place": lambda weight: weight[0, 5].add_(3),
    "optimizer": optimizer_step,
    "fused optimizer": fused_optimizer_step,
    "loaded": lambda weight: torch.nn.ParameterList([weight]).load_state_dict({"0": weight * 3}),
    "through data": lambda weight: weight.data.mul_(3),
    "row through data": lambda weight: weight.data[-1].add_(3),
    "column through data": lambda weight: weight.data[:, -1].add_(3),
    "other storage": lambda weight: setattr(weight, "data", weight.data * 3),
    "one element through data": lambda weight: weight.data[0, 5].add_(3),
    "two signs through data": lambda weight: weight.data[0, 5:7].neg_(),
    "two rows exchanged through data": lambda weight: weight.data.copy_(weight.data.roll(1, 0)),
    "from outside of torch": through_numpy,
    "alias": as_an_alias,
}


def bound(x, weight):
    """Products and sums, each rounded by eps/2 of at most the sum of magnitudes."""
    return weight.shape[1] * testing.EPS32 * float((x.abs() @ weight.detach().abs().t()).max())


@pytest.mark.parametrize("shape", [(30, 24), (24, 30), (50, 7)])
@pytest.mark.parametrize("change", CHANGES)
def test_packed_weights_follow_the_weight(change, shape):
    x = testing.random_tensor(20, shape[1], seed=1)
    weight = torch.nn.Parameter(testing.random_tensor(*shape, seed=2))
    with use("native"), torch.no_grad():
        before = fa.fused_linear(x, weight)
        CHANGES[change](weight)
        found = fa.fused_linear(x, weight)
    assert not torch.equal(found, before)
    assert testing.max_error(found, F.linear(x, weight).detach()) <= bound(x, weight)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.bool))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 9), (1000, 300)])
def test_a_digest_sees_every_element_and_its_place(shape, dtype, isa):
    """The largest is of two parts of a digest."""
    source = testing.random_tensor(*shape, seed=1).to(dtype)
    before = digest(source)
    assert digest(source.clone()) == before
    seen = {before}
    flat = source.view(-1).view(torch.uint8 if dtype == torch.bool else torch.int16)
    for i in range(0, flat.numel(), 1 + flat.numel() // 200):
        flat[i] ^= 1  # its lowest bit
        seen.add(digest(source))
        flat[i] ^= 1
    assert digest(source) == before and len(seen) == 1 + len(range(0, flat.numel(), 1 + flat.numel() // 200))
    if dtype != torch.bool and source.numel() > 1:
        for other in (-source, source.flip(0, 1), source.roll(1), torch.zeros_like(source)):
            seen.add(digest(other.contiguous()))
        assert len(seen) >= 5


@pytest.mark.parametrize("product", ["native", "library"])
@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
def test_a_lone_weight_has_any_strides(dtype, product, isa):
    """One element is contiguous to torch whatever its strides are."""
    strided = torch.tensor([[3.0, -1.0]], dtype=dtype)[:, ::2]
    assert strided.is_contiguous() and strided.stride(1) == 2
    x = testing.random_tensor(5, 1, dtype=dtype, requires_grad=True)
    with use(product):
        testing.check_op(run(None, False), define(None, False), (x, strided.requires_grad_(), None, None))
    assert digest(strided) == digest(strided.clone(memory_format=torch.contiguous_format))


def test_a_digest_does_not_depend_on_the_number_of_threads():
    source = testing.random_tensor(1000, 300, seed=1)
    before = torch.get_num_threads()
    try:
        found = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(digest(source))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_inference_tensors_are_followed():
    x = testing.random_tensor(20, 24, seed=1)
    with use("native"), torch.inference_mode():
        weight = testing.random_tensor(30, 24, seed=2).clone()
        fa.fused_linear(x, weight)
        weight.mul_(3)
        found = fa.fused_linear(x, weight)
    assert testing.max_error(found, F.linear(x, weight)) <= bound(x, weight)


def test_weights_are_packed_once_and_forgotten(monkeypatch):
    cache = ContentsCache(entries=8, capacity=1 << 20)
    monkeypatch.setattr(cpu, "_packed", cache)
    x = testing.random_tensor(20, 24, seed=1)
    weights = [testing.random_tensor(30, 24, seed=i) for i in range(3)]
    with use("native"):
        for weight in weights * 3:
            fa.fused_linear(x, weight)
        assert len(cache) == 3
        weights[0].add_(1)
        fa.fused_linear(x, weights[0])
        assert len(cache) == 3  # what it was packed from before is gone
        view = weights[2][:1]
        del weights[1:], weight
        assert len(cache) == 2  # with its weight, but while a view is left
        del view
        assert len(cache) == 1
        assert cache.bytes == next(iter(cache._results.values()))[1].nbytes


def test_cache_is_bounded_and_shared_by_threads():
    sources = [torch.full((4, 4), float(i)) for i in range(20)]
    cache = ContentsCache(entries=6, capacity=5 * 64)
    wrong = []

    def work():
        for source in sources * 20:
            if not torch.equal(cache.get(source, (), lambda source=source: source.clone()), source):
                wrong.append(source)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(cache) <= 5
    assert cache.bytes == 64 * len(cache)


def calls(dtype):
    return {
        f"{before} {swiglu}": (
            run(before, swiglu),
            problem(4, 6, 9, before, swiglu, True, "contiguous", dtype),
        )
        for before, swiglu in ((None, False), ("norm", True), ("gate", False))
    }


@pytest.mark.parametrize("name", calls(torch.float32))
def test_gradcheck(name):
    fn, inputs = calls(torch.float64)[name]
    assert torch.autograd.gradcheck(lambda *given: fn(*(i if i is not None else None for i in given)), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", calls(torch.float32))
def test_compiles_without_a_graph_break(name, dtype):
    fn, inputs = calls(dtype)[name]
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    with use("native"):
        eager, eager_gradients = testing.differentiate(fn, inputs)
        found, gradients = testing.differentiate(compiled, inputs)
    pairs = zip((*eager, *eager_gradients), (*found, *gradients), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("product", ["native", "library"])
def test_opcheck(product, dtype):
    with use(product):
        for before, swiglu in ((None, False), ("norm", True), ("gate", False)):
            x, weight, gate, residual = problem(4, 6, 9, before, swiglu, True, "contiguous", dtype)
            args = (x, weight, gate, residual, 1e-6 if before == "norm" else None, swiglu, True, "")
            torch.library.opcheck(torch.ops.fastattn.fused_linear.default, args)
            out, product_, rstd = (t.detach() for t in torch.ops.fastattn.fused_linear(*args))
            plain = [None if t is None else t.detach() for t in (x, weight, gate)]
            backward = (out, *plain, rstd, product_, args[4], swiglu, True, True, "")
            torch.library.opcheck(torch.ops.fastattn.fused_linear_backward.default, backward)


@pytest.mark.parametrize(
    ("name", "arch", "l2", "float32", "bfloat16"),
    [
        ("AMD EPYC (family 25 model 1)", "avx2", 1 << 19, "library", (192, 128, 1024)),
        ("AMD EPYC (family 25 model 17)", "avx512bf16", 1 << 20, (192, 128, 512), (192, 128, 1024)),
        ("AMD EPYC (family 25 model 17)", "avx512", 0, (192, 128, 512), (192, 128, 512)),
        ("Intel(R) Xeon(R) (family 6 model 207)", "avx512bf16", 2 << 20, "library", "library"),
        ("Intel(R) Xeon(R) (family 6 model 85)", "avx512", 1 << 20, "library", (192, 128, 512)),
    ],
)
def test_whose_product_by_default(name, arch, l2, float32, bfloat16):
    declared = _config.declared()["fused_linear", "cpu"]
    target = Target("cpu", name, arch, l2=l2)
    for dtype, expected in (("float32", float32), ("bfloat16", bfloat16)):
        key = {"dtype": dtype, "rows": 2048, "inputs": 1536, "outputs": 6144}
        values = declared.defaults(key, target)
        assert declared.refuses(values, key, target) is None
        blocks = tuple(values[f"block_{name}"] for name in ("rows", "columns", "steps"))
        assert expected == (blocks if values["product"] == "native" else "library")


def test_explain_names_whose_product_runs():
    x, weight = testing.random_tensor(40, 24), testing.random_tensor(30, 24)
    assert fa.explain("fused_linear", x, weight).config["product"] in ("native", "library")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": torch.ones(4, 7)}, ValueError, "x must have last dim of 7, weight's columns"),
        ({"weight": torch.ones(8)}, ValueError, "weight must have 2 dimensions"),
        ({"weight": torch.ones(0, 8)}, ValueError, "weight must not be empty"),
        ({"weight": torch.ones(4, 8).bfloat16()}, TypeError, "weight is bfloat16 but x is float32"),
        ({"weight": torch.ones(5, 8), "swiglu": True}, ValueError, "even number of rows"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps must be zero or more"),
        ({"norm_eps": 1e-6, "gate": torch.ones(3, 8)}, ValueError, "exclude each other"),
        ({"gate": torch.ones(3, 8)}, ValueError, "x must have last two dims of 8"),
        ({"gate": torch.ones(3, 4)}, ValueError, r"gate must have shape \(3x8\)"),
        ({"residual": torch.ones(3, 8)}, ValueError, r"residual must have shape \(3x4\)"),
        ({"backend": "triton"}, NotImplementedError, "triton: it serves cuda tensors, not cpu"),
    ],
)
def test_bad_input(options, error, message):
    options = {"weight": torch.ones(4, 8)} | options
    with pytest.raises(error, match=message):
        fa.fused_linear(torch.ones(3, 8), **options)
