"""Triton recurrence pieces in the interpreter, against the reference."""

import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.nn.cache import KeyValueCache
from fastattn.ops.rowwise import reference, rotary_append

SHAPES = [(33,), (3, 40), (2, 3, 130), (1, 2, 2, 2, 9)]


@pytest.fixture(autouse=True)
def on_triton(nan_outputs):
    with fa.set_backend("triton"):
        yield


def made(*shape, seed, dtype=torch.float32, layout="odd"):
    return testing.random_tensor(*shape, seed=seed, dtype=dtype, layout=layout, requires_grad=True)


def reference_norm(x, residual, weight):
    normed, total, _ = reference.rms_norm(x, residual, weight, 1e-6)
    return normed if residual is None else (normed, total)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("weight", (False, True))
def test_rms_norm(shape, residual, weight):
    inputs = (
        made(*shape, seed=1),
        made(*shape, seed=2) if residual else None,
        made(shape[-1], seed=3, layout="contiguous") if weight else None,
    )
    testing.check_op(lambda x, r, w: fa.rms_norm(x, residual=r, weight=w), reference_norm, inputs, terms=130)


def test_rms_norm_of_rows_longer_than_a_tile(monkeypatch):
    from fastattn.ops.rowwise import triton as kernels

    monkeypatch.setattr(kernels, "_MOST_COLUMNS", 32)
    inputs = (made(3, 70, seed=1), made(3, 70, seed=2), made(70, seed=3, layout="contiguous"))
    testing.check_op(lambda x, r, w: fa.rms_norm(x, residual=r, weight=w), reference_norm, inputs, terms=70)


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4)])
def test_swiglu_and_gate(shape, dtype):
    doubled = (*shape[:-1], 2 * shape[-1])
    testing.check_op(fa.swiglu, reference.swiglu, (made(*doubled, seed=1, dtype=dtype),))
    testing.check_op(
        fa.gated, reference.gated, (made(*shape, seed=1, dtype=dtype), made(*shape, seed=2, dtype=dtype))
    )


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
def test_gates_at_infinities_and_nan(dtype):
    testing.assert_equal_at_extremes(
        lambda g, u: fa.swiglu(torch.cat([g, u])), lambda g, u: reference.swiglu(torch.cat([g, u])), dtype
    )
    testing.assert_equal_at_extremes(fa.gated, reference.gated, dtype)


@pytest.mark.parametrize("layout", ("odd", "swapped"))
@pytest.mark.parametrize("positions", [torch.tensor([3, 0, 70000]), torch.tensor([[1, 2, 3], [9, 9, 0]])])
def test_rotary(positions, layout):
    q = made(2, 4, 3, 20, seed=1, layout=layout)
    k = made(2, 1, 3, 20, seed=2, layout=layout)
    testing.check_op(
        lambda q, k: fa.rotary(q, k, positions),
        lambda q, k: reference.rotary(q, k, positions, 10000.0, False, False),
        (q, k),
        # Angles are formed in float32: one of 70000 radians is known to eps/2 of itself, 0.004, as in the eager run.
        terms=4,
    )


@pytest.mark.parametrize("positions", [torch.tensor([3, 0]), torch.tensor([[1, 2], [9, 70000]])])
@pytest.mark.parametrize("layout", ("odd", "swapped"))
def test_rotary_append(layout, positions):
    """Rows of the cache that no token takes are left as they are."""
    q, k, v = (made(2, h, 2, d, seed=h + d, layout=layout).detach() for h, d in ((4, 20), (1, 20), (1, 12)))
    slots = torch.tensor([[4, 5], [0, 1]])
    found = [torch.full((2, 1, 7, d), 7.0) for d in (20, 12)]
    expected = [t.clone().double() for t in found]
    out = rotary_append(q, k, v, positions, slots, *found)

    def define(q, k, v):
        caches = [t.to(q.dtype) for t in expected]
        return reference.rotary_append(q, k, v, positions, slots, *caches, 10000.0), *caches

    testing.assert_within_budget((out, *found), define, (q, k, v), terms=4)


def test_a_layers_cache_is_filled_in_one_launch():
    """Rows of one length and of several; the same as rotary, then the append."""
    q, k, v = (made(2, 2, 3, 16, seed=i).detach() for i in range(3))
    for lengths in (None, torch.tensor([1, 3])):
        results = []
        for backend in ("triton", "reference"):
            cache = KeyValueCache(1, 1, 2, 2, 8, 16, dtype=torch.float32, device="cpu")
            with fa.set_backend(backend):
                for more in (lengths, None):
                    positions = cache.reserve(2, 3)
                    results.append(cache[0][0].append_rotated(q, k, v, positions, 10000.0))
                    cache.commit(3, more)
        for ours, theirs in zip(results[:2], results[2:], strict=True):
            # sines and cosines of angles up to 6 to an ulp, then two products and a sum of values up to 4
            assert all(
                testing.max_error(a, b) < 8 * testing.EPS32 * 4 for a, b in zip(ours, theirs, strict=True)
            )


def test_a_captured_graphs_table_is_not_kept(monkeypatch):
    from fastattn.ops.rowwise import triton as kernels
    from fastattn.runtime import triton as _triton

    if not _triton.INTERPRETED:
        pytest.skip("a device's powers are not the host's to the last bit")
    monkeypatch.setattr(kernels, "_tables", {})
    q, k = made(1, 2, 3, 16, seed=1), made(1, 1, 3, 16, seed=2)
    with monkeypatch.context() as capturing:
        capturing.setattr(_triton, "stream", lambda device: None)
        captured = fa.rotary(q, k, torch.arange(3))
        assert not kernels._tables
    plain = fa.rotary(q, k, torch.arange(3))
    assert len(kernels._tables) == 1 and all(map(torch.equal, captured, plain))


def test_negated_views_of_one_column():
    z = torch.randn(5, 1, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    x = z.conj().imag
    assert x.is_neg()
    assert torch.equal(fa.gated(x, x), fa.gated(x.clone(), x.clone()))


def test_empty_tensors():
    assert fa.rms_norm(torch.empty(0, 8)).shape == (0, 8)
    assert (
        fa.rotary(torch.empty(1, 2, 0, 8), torch.empty(1, 1, 0, 8), torch.empty(0, dtype=torch.int64))[
            0
        ].numel()
        == 0
    )


@pytest.mark.parametrize(
    "types",
    [("bfloat16", "float32", "float32"), ("float32", "bfloat16", "bfloat16"), ("float16", None, "float32")],
)
@pytest.mark.parametrize("columns", (24, 300))
def test_rms_norm_of_several_dtypes(types, columns, nan_outputs):
    inputs = [
        None
        if name is None
        else testing.random_tensor(*size, dtype=getattr(torch, name), seed=i, requires_grad=True)
        for i, (name, size) in enumerate(zip(types, ((5, columns), (5, columns), (columns,)), strict=True))
    ]

    def ours(x, r, w):
        return fa.rms_norm(x, residual=r, weight=w, weight_offset=1.0, backend="triton")

    def definition(x, r, w):
        normed, total, _ = reference.rms_norm(x, r, w, 1e-6, 1.0)
        return normed if r is None else (normed, total)

    testing.check_op(ours, definition, tuple(inputs), terms=5 * columns)


@pytest.mark.parametrize("pairs", (False, True))
@pytest.mark.parametrize("whole", (False, True))
@pytest.mark.parametrize("sequences", (1, 2))
def test_rotary_tables(pairs, whole, sequences, nan_outputs):
    q, k = (testing.random_tensor(2, h, 5, 12, seed=h, layout="odd", requires_grad=True) for h in (4, 2))
    cos, sin = (testing.random_tensor(sequences, 5, 12 if whole else 6, seed=i) for i in (5, 6))
    testing.check_op(
        lambda q, k: fa.rotary_tables(q, k, cos, sin, interleaved=pairs, backend="triton"),
        lambda q, k: reference.rotary_tables(q, k, cos, sin, pairs, False),
        (q, k),
    )


@pytest.mark.parametrize("pairs", (False, True))
def test_angles_are_exact_at_long_positions(pairs, nan_outputs):
    q, k = (testing.random_tensor(1, h, 3, 16, seed=h, requires_grad=True) for h in (4, 2))
    positions = torch.tensor([4095, 131072, 1 << 24])
    testing.check_op(
        lambda q, k: fa.rotary(q, k, positions, interleaved=pairs, backend="triton"),
        lambda q, k: reference.rotary(q, k, positions, 10000.0, pairs, False),
        (q, k),
    )
