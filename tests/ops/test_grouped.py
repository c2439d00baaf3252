"""Signatures and grouped attention against their published forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.runtime import native as _native


def oracle(q, k, v, groups, key_groups, window, cuts_q=None, cuts_k=None, key_lengths=None, prefixes=None):
    """Row by row in float64: the rule spelled out, no masks module."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    rows = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    cuts_q = cuts_q or [0, q.shape[2]]
    cuts_k = cuts_k or [0, k.shape[2]]
    for b in range(q.shape[0]):
        for d in range(len(cuts_q) - 1):
            lq, lk = cuts_q[d + 1] - cuts_q[d], cuts_k[d + 1] - cuts_k[d]
            sequence = d if len(cuts_q) > 2 else b
            limit = lk if key_lengths is None else key_lengths[sequence]
            prefix = 0 if prefixes is None else prefixes[sequence]
            for i in range(lq):
                row = cuts_q[d] + i
                place = i + lk - lq
                keys = [
                    cuts_k[d] + j
                    for j in range(min(max(place + 1, prefix), limit))
                    if -window <= place - j <= window
                    or int(groups[b, row]) & int(key_groups[b, cuts_k[d] + j])
                ]
                if keys:
                    s = torch.einsum("hd,hjd->hj", q[b, :, row], k[b][:, keys]) / q.shape[3] ** 0.5
                    rows[b, :, row] = torch.einsum("hj,hjd->hd", s.softmax(-1), v[b][:, keys])
    return rows


@st.composite
def signatures(draw, batch: int, length: int):
    """top-k routing, everyone in one group, empty groups, no group at all, wild imbalance, many bits."""
    kind = draw(st.sampled_from(["top_k", "one", "none", "skewed", "bits"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if kind == "top_k":
        groups = draw(st.integers(1, 16))
        top_k = draw(st.integers(1, min(4, groups)))
        return fa.focus_groups(torch.rand(batch, length, groups, generator=generator), top_k=top_k)
    if kind == "one":
        return torch.full((batch, length), 1 << draw(st.integers(0, 62)))
    if kind == "none":
        return torch.zeros(batch, length, dtype=torch.int64)
    if kind == "skewed":
        return torch.where(torch.rand(batch, length, generator=generator) < 0.9, 1, 6)
    return torch.randint(0, 2**62, (batch, length), generator=generator)


@given(data=st.data())
def test_is_the_rule(data):
    batch, kv_heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    length, window = data.draw(st.integers(0, 24)), data.draw(st.integers(0, 26))
    groups = data.draw(signatures(batch, length))
    q, k, v = testing.attention_inputs(batch, kv_heads * 2, kv_heads, length, length, 8, dtype=torch.float64)
    prefixes = data.draw(st.none() | st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    mask = fa.Mask(prefix_lengths=torch.tensor(prefixes)) if prefixes is not None else None
    actual = fa.grouped_attention(q, k, v, groups, window=window, mask=mask, backend="reference")
    expected = oracle(q, k, v, groups, groups, window, prefixes=prefixes)
    assert testing.max_error(actual, expected) < 1e-13


def test_packed_documents_and_key_lengths():
    cuts = [0, 5, 5, 17, 20]
    q, k, v = testing.attention_inputs(1, 2, 1, 22, 22, 8, dtype=torch.float64)
    groups = fa.focus_groups(torch.rand(1, 22, 4, generator=torch.Generator().manual_seed(0)), top_k=2)
    lengths = [4, 0, 12, 3]
    for prefixes in (None, [5, 0, 9, 1]):
        mask = fa.Mask(
            cu_seqlens_q=torch.tensor(cuts),
            key_lengths=torch.tensor(lengths),
            prefix_lengths=None if prefixes is None else torch.tensor(prefixes),
        )
        actual = fa.grouped_attention(q, k, v, groups, window=3, mask=mask, backend="reference")
        expected = oracle(q, k, v, groups, groups, 3, cuts, cuts, lengths, prefixes)
        assert testing.max_error(actual, expected) < 1e-13
        assert (actual[:, :, 20:] == 0).all()


def test_decoding_continues_the_prefill():
    q, k, v = testing.attention_inputs(2, 4, 2, 30, 30, 8, dtype=torch.float64)
    groups = fa.focus_groups(torch.rand(2, 30, 8, generator=torch.Generator().manual_seed(0)), top_k=2)
    whole = fa.grouped_attention(q, k, v, groups, window=4)
    last = fa.grouped_attention(q[:, :, 28:], k, v, groups[:, 28:], key_groups=groups, window=4)
    assert testing.max_error(last, whole[:, :, 28:]) < 1e-14


def test_pairs_that_share_several_groups_count_once():
    """Everyone in every group is plain causal attention; a merge over groups would weigh distant keys twice."""
    q, k, v = testing.attention_inputs(1, 2, 2, 40, 40, 8, dtype=torch.float64)
    groups = torch.full((1, 40), 0b1111)
    actual = fa.grouped_attention(q, k, v, groups, window=2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert testing.max_error(actual, expected) < 1e-14


def test_gradcheck():
    q, k, v = testing.attention_inputs(1, 2, 1, 9, 9, 4, dtype=torch.float64)
    groups = fa.focus_groups(torch.rand(1, 9, 4, generator=torch.Generator().manual_seed(0)), top_k=2)
    assert torch.autograd.gradcheck(
        lambda *x: fa.grouped_attention(*x, groups, window=2, backend="reference"), (q, k, v), fast_mode=True
    )


def test_focus_groups():
    assignment = torch.tensor([[[0.1, 0.7, 0.2], [0.4, 0.4, 0.2], [0.0, 0.0, 0.0]]])
    assert fa.focus_groups(assignment).tolist() == [[0b010, 0b001, 0]]
    assert fa.focus_groups(assignment, top_k=2).tolist() == [[0b110, 0b011, 0]]
    wide = torch.eye(63)[None]
    assert fa.focus_groups(wide).tolist() == [[1 << g for g in range(63)]]


def test_opcheck_and_compile():
    q, k, v = testing.attention_inputs(1, 4, 2, 12, 12, 8)
    groups = fa.focus_groups(torch.rand(1, 12, 4, generator=torch.Generator().manual_seed(0)))
    mask = fa.Mask(cu_seqlens_q=torch.tensor([0, 5, 12]))
    options = (True, *mask.args("test", q, k)[1:])
    torch.library.opcheck(
        torch.ops.fastattn.grouped_attention.default, (q, k, v, groups, groups, 2, 0.3, *options, "")
    )
    scores = testing.random_tensor(1, 12, 4, requires_grad=True)

    def layer(q, k, v, scores):
        groups = fa.focus_groups(fa.sinkhorn(scores), top_k=2)
        return fa.grouped_attention(q * 2, k, v, groups, window=2, mask=mask).square()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, wanted = testing.differentiate(layer, (q, k, v, scores.detach()))
    actual, grads = testing.differentiate(compiled, (q, k, v, scores.detach()))
    for a, b in zip((*actual, *grads), (*expected, *wanted), strict=True):
        assert testing.max_error(a, b) <= 1e-6 * (1 + testing.max_finite(b))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": torch.zeros(1, 5, dtype=torch.int64)}, ValueError, r"groups must have shape \(1x4\)"),
        ({"groups": torch.zeros(1, 4)}, TypeError, "groups must be int32 or int64"),
        (
            {"groups": torch.tensor([[0, 1, -1, 2]])},
            ValueError,
            "groups must lie in .* given -1 at position 2",
        ),
        (
            {"key_groups": torch.zeros(1, 3, dtype=torch.int64)},
            ValueError,
            r"key_groups must have shape \(1x4\)",
        ),
        ({"window": -1}, ValueError, "window must be an integer of zero or more, given -1"),
        ({"scale": "big"}, TypeError, "scale must be a finite number"),
        (
            {"mask": fa.Mask(prefix_lengths=torch.tensor([5]))},
            ValueError,
            "prefix_lengths holds 5, longer than the 4 keys given",
        ),
    ],
)
def test_errors_name_the_argument(options, error, message):
    q, k, v = testing.attention_inputs(1, 2, 2, 4, 4, 8)
    options = {"groups": torch.zeros(1, 4, dtype=torch.int64), **options}
    with pytest.raises(error, match=f"fastattn.grouped_attention: {message}"):
        fa.grouped_attention(q, k, v, **options)


def test_router_errors_name_the_argument():
    scores = torch.zeros(1, 4, 3)
    for call, message in (
        (lambda: fa.sinkhorn(scores, temperature=0.0), "temperature must be more than zero"),
        (lambda: fa.sinkhorn(scores, iterations=0), "iterations must be an integer of at least 1"),
        (lambda: fa.sinkhorn(torch.zeros(1, 4, 64)), r"G in \[1, 63\], given G = 64"),
        (lambda: fa.sinkhorn(scores, lengths=torch.tensor([5])), r"lengths must lie in \[0, 5\)"),
        (lambda: fa.sinkhorn(scores, potentials=torch.zeros(1, 2, 3)), "potentials must have shape"),
        (lambda: fa.focus_groups(scores, top_k=4), r"top_k must lie in \[1, 3\], given 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    q, k, v = testing.attention_inputs(1, 1, 1, 2, 4, 8)
    with pytest.raises(ValueError, match="key_groups must be given where q and k differ in length"):
        fa.grouped_attention(q, k, v, torch.zeros(1, 2, dtype=torch.int64))


# --- native kernels -------------------------------------------------------------------------------------------------


@pytest.fixture(params=testing.isas())
def isa(request):
    with _native.use_cpu_isa(request.param):
        yield request.param


def call(groups, backend, **options):
    return lambda q, k, v: fa.grouped_attention(q, k, v, groups, backend=backend, **options)


@given(data=st.data())
def test_native_is_the_rule(isa, data):
    """Within 1e-5 of the dense float64 definition for every pattern of signatures, gradients within their budget."""
    kv_heads = data.draw(st.integers(1, 2))
    lengths = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=3))
    packed = len(lengths) > 1
    batch = 1 if packed else data.draw(st.integers(1, 2))
    length = sum(lengths)
    groups = data.draw(signatures(batch, length))
    options = {"window": data.draw(st.integers(0, 40) | st.just(length))}
    mask = {}
    if packed:
        mask["cu_seqlens_q"] = torch.tensor([0, *lengths]).cumsum(0)
    if data.draw(st.booleans()):
        mask["key_lengths"] = torch.tensor(
            [data.draw(st.integers(0, n)) for n in (lengths if packed else lengths * batch)]
        )
    if data.draw(st.booleans()):
        mask["prefix_lengths"] = torch.tensor(
            [data.draw(st.integers(0, n)) for n in (lengths if packed else lengths * batch)]
        )
    if data.draw(st.booleans()):
        mask["window"] = (data.draw(st.integers(0, length)), data.draw(st.none() | st.integers(0, length)))
    options["mask"] = fa.Mask(**mask) if mask else None
    head_dim, value_dim = data.draw(st.sampled_from([(1, 3), (8, 8), (17, 33), (64, 16)]))
    inputs = testing.attention_inputs(
        batch, kv_heads * 2, kv_heads, length, length, head_dim, value_dim, layout="odd"
    )
    with testing.nan_filled_outputs():
        actual = call(groups, "cpu", **options)(*inputs)
    truth = call(groups, "reference", **options)(*testing.to_float64(inputs))
    assert testing.max_error(actual, truth) <= 1e-5
    weights = testing.attention_weights(call(groups, "reference", **options), *inputs)
    with testing.nan_filled_outputs():
        testing.check_op(
            call(groups, "cpu", **options),
            call(groups, "reference", **options),
            inputs,
            terms=length + 16,
            magnitudes=testing.lone_key_magnitudes(weights, *inputs, head_dim**-0.5),
        )


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
@pytest.mark.parametrize(("count", "top_k"), [(8, 1), (16, 2), (4, 3), (60, 4)])
def test_native_dtypes(isa, nan_outputs, dtype, count, top_k):
    """60 groups: signatures of more than 32 bits; 4 groups with 3 each: one list of all is less work."""
    groups = fa.focus_groups(
        torch.rand(1, 200, count, generator=torch.Generator().manual_seed(0)), top_k=top_k
    )
    inputs = testing.attention_inputs(1, 2, 1, 200, 200, 32, dtype=dtype)
    testing.check_op(call(groups, "cpu", window=20), call(groups, "reference", window=20), inputs, terms=200)


def test_native_decoding(isa, nan_outputs):
    q, k, v = testing.attention_inputs(2, 4, 2, 150, 150, 16, requires_grad=False)
    groups = fa.focus_groups(torch.rand(2, 150, 8, generator=torch.Generator().manual_seed(0)), top_k=2)
    for rows in (1, 7):
        step = {"window": 9, "key_groups": groups, "mask": fa.Mask(key_lengths=torch.tensor([150, 140]))}
        last = (q[:, :, 150 - rows :], k, v)
        actual = call(groups[:, 150 - rows :], "cpu", **step)(*last)
        truth = call(groups[:, 150 - rows :], "reference", **step)(*(x.double() for x in last))
        assert testing.max_error(actual, truth) <= testing.rounding_band(truth, torch.float32, 150)


def pair_magnitudes(weights, q, k, v, scale) -> tuple[float, float]:
    """Of the gradients of q and k: dS = P (g.v - sum P g.v), whose two parts cancel in a row of few keys, each taken by its size."""
    q, k, v = (t.detach().double().abs() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    (grad,) = testing.output_gradients((torch.empty(*q.shape[:3], v.shape[3]),))
    products = grad.double().abs() @ v.mT
    pairs = weights * (products + (weights * products).sum(-1, keepdim=True)) * scale
    by_key = (pairs.mT @ q).sum(1)  # one key head
    return float((pairs @ k).max()), float(by_key.max())


@given(data=st.data())
def test_native_prefix_wherever_the_last_query_stands(isa, data):
    """More queries than keys, fewer, and the diagonal on the last key that counts: the first rows may stand before every key."""
    lq, lk, window = (
        data.draw(st.integers(1, 90)),
        data.draw(st.integers(1, 90)),
        data.draw(st.integers(0, 40)),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    count, top_k = data.draw(st.sampled_from([(2, 1), (3, 2), (8, 2), (60, 3)]))
    groups, key_groups = (
        fa.focus_groups(torch.rand(1, n, count, generator=generator), top_k=top_k) for n in (lq, lk)
    )
    mask = {"prefix_lengths": torch.tensor([data.draw(st.integers(0, lk))])}
    if data.draw(st.booleans()):
        mask |= {
            "key_lengths": torch.tensor([data.draw(st.integers(0, lk))]),
            "align": data.draw(st.sampled_from(["keys", "key_lengths"])),
        }
    options = {"key_groups": key_groups, "window": window, "mask": fa.Mask(**mask)}
    inputs = testing.attention_inputs(1, 2, 1, lq, lk, 8)
    weights = testing.attention_weights(call(groups, "reference", **options), *inputs)
    with testing.nan_filled_outputs():
        testing.check_op(
            call(groups, "cpu", **options),
            call(groups, "reference", **options),
            inputs,
            terms=lk + 16,
            magnitudes=pair_magnitudes(weights, *inputs, 8**-0.5),
        )


@pytest.mark.parametrize("dtype", (torch.float32, *testing.LOW_DTYPES))
@pytest.mark.parametrize(("count", "top_k"), [(8, 1), (16, 2), (4, 3)])
def test_native_prefix_over_several_tiles(isa, nan_outputs, dtype, count, top_k):
    groups = fa.focus_groups(
        torch.rand(2, 330, count, generator=torch.Generator().manual_seed(0)), top_k=top_k
    )
    inputs = testing.attention_inputs(2, 2, 1, 330, 330, 32, dtype=dtype)
    options = {"window": 20, "mask": fa.Mask(prefix_lengths=torch.tensor([170, 330]))}
    testing.check_op(call(groups, "cpu", **options), call(groups, "reference", **options), inputs, terms=330)


def test_native_prefix_of_nothing_changes_nothing(isa):
    inputs = testing.attention_inputs(2, 4, 2, 200, 200, 16)
    groups = fa.focus_groups(torch.rand(2, 200, 8, generator=torch.Generator().manual_seed(0)), top_k=2)
    empty = fa.Mask(prefix_lengths=torch.zeros(2, dtype=torch.int64))
    (out,), grads = testing.differentiate(call(groups, "cpu", window=9), inputs)
    (same,), alike = testing.differentiate(call(groups, "cpu", window=9, mask=empty), inputs)
    assert torch.equal(out, same) and all(torch.equal(a, b) for a, b in zip(grads, alike, strict=True))


def test_a_prefix_of_everything_and_one_group_is_attention_to_all():
    q, k, v = testing.attention_inputs(1, 2, 2, 40, 40, 8, dtype=torch.float64)
    mask = fa.Mask(prefix_lengths=torch.tensor([40]))
    actual = fa.grouped_attention(q, k, v, torch.ones(1, 40, dtype=torch.int64), window=2, mask=mask)
    assert testing.max_error(actual, torch.nn.functional.scaled_dot_product_attention(q, k, v)) < 1e-14


@pytest.mark.parametrize("threads", [1, 3, 5])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 3), (2, 2), (4, 1)])
def test_native_for_any_heads_and_threads(isa, nan_outputs, monkeypatch, threads, kv_heads, group):
    """Fewer key heads than threads: the gradients of one are made in parts and summed; some lists have fewer blocks of rows
    than there are parts."""
    monkeypatch.setattr(_native, "threads", lambda: threads)
    groups = fa.focus_groups(torch.rand(1, 230, 8, generator=torch.Generator().manual_seed(0)), top_k=2)
    groups[:, :100] = 1
    inputs = testing.attention_inputs(1, kv_heads * group, kv_heads, 230, 230, 16)
    cuts = torch.tensor([0, 40, 40, 230], dtype=torch.int32)
    for mask in (None, fa.Mask(cu_seqlens_q=cuts, cu_seqlens_k=cuts)):
        options = {"window": 9, "mask": mask}
        testing.check_op(
            call(groups, "cpu", **options), call(groups, "reference", **options), inputs, terms=230
        )


def test_native_is_deterministic(isa):
    inputs = testing.attention_inputs(1, 4, 2, 200, 200, 16)
    groups = fa.focus_groups(torch.rand(1, 200, 8, generator=torch.Generator().manual_seed(0)), top_k=2)
    runs = [testing.differentiate(call(groups, "cpu", window=9), inputs) for _ in range(3)]
    for out, grads in runs[1:]:
        assert torch.equal(out[0], runs[0][0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1], strict=True))


def test_dense_masks_take_the_definition():
    q, k, v = testing.attention_inputs(1, 1, 1, 6, 6, 8)
    groups = torch.ones(1, 6, dtype=torch.int64)
    mask = fa.Mask(dense=torch.ones(6, 6, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="it does not serve a dense mask"):
        fa.grouped_attention(q, k, v, groups, mask=mask, backend="cpu")
    assert fa.explain("grouped_attention", q, k, v, groups, mask=mask).backend == "reference"
    assert fa.explain("grouped_attention", q, k, v, groups).backend == "cpu"


# --- log-sum-exp ------------------------------------------------------------------------------------------------------


def test_lse_is_that_of_all_keys_attended():
    q, k, v = testing.attention_inputs(1, 2, 1, 30, 30, 8, dtype=torch.float64)
    groups = fa.focus_groups(torch.rand(1, 30, 4, generator=torch.Generator().manual_seed(0)), top_k=2)
    mask = fa.Mask(prefix_lengths=torch.tensor([17]), key_lengths=torch.tensor([25]), window=(20, None))
    options = {"window": 3, "mask": mask, "return_lse": True, "backend": "reference"}
    out, lse = fa.grouped_attention(q, k, v, groups, **options)
    place = torch.arange(30)
    near = (place[:, None] - place).abs() <= 3
    dense = (near | ((groups[0, :, None] & groups[0]) != 0))[None, None]
    parts = {"prefix_lengths": torch.tensor([17]), "key_lengths": torch.tensor([25]), "window": (20, None)}
    same, expected = fa.attention(q, k, v, mask=fa.Mask(dense=dense, **parts), return_lse=True)
    assert testing.max_error(out, same) < 1e-14 and testing.max_error(lse, expected) < 1e-14
    assert torch.autograd.gradcheck(
        lambda *x: fa.grouped_attention(*x, groups, **options), (q, k, v), fast_mode=True
    )


@pytest.mark.parametrize("dtype", (torch.float32, *testing.LOW_DTYPES))
@pytest.mark.parametrize("prefix", (0, 90))
def test_native_lse_and_its_gradient(isa, nan_outputs, dtype, prefix):
    groups = fa.focus_groups(torch.rand(2, 150, 8, generator=torch.Generator().manual_seed(0)), top_k=2)
    inputs = testing.attention_inputs(2, 4, 2, 150, 150, 16, dtype=dtype)
    mask = fa.Mask(prefix_lengths=torch.tensor([prefix, 0]), key_lengths=torch.tensor([150, 0]))
    options = {"window": 9, "mask": mask, "return_lse": True}
    (_, lse), _ = testing.differentiate(call(groups, "cpu", **options), inputs)
    assert lse.dtype == torch.float32 and (lse[1] == -torch.inf).all()
    testing.check_op(call(groups, "cpu", **options), call(groups, "reference", **options), inputs, terms=166)
    (alone,), _ = testing.differentiate(
        lambda *x: call(groups, "cpu", **options)(*x)[1], inputs
    )  # of the lse alone
    assert torch.equal(alone, lse)
