"""scaled_dot_product_attention means what torch's means, argument by argument."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing


@st.composite
def calls(draw):
    """(shapes of q, k, v), mask shape or None, whether it is bool, is_causal, enable_gqa."""
    rank = draw(st.integers(2, 5))
    lq, lk = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    head_dim, v_dim = draw(st.sampled_from([1, 4, 8])), draw(st.sampled_from([1, 5, 8]))
    batch = [draw(st.integers(1, 3)) for _ in range(rank - 2)]
    shapes = [[*batch, lq, head_dim], [*batch, lk, head_dim], [*batch, lk, v_dim]]
    gqa = rank >= 3 and draw(st.booleans())
    if gqa:
        shapes[0][-3] = batch[-1] * draw(st.integers(1, 3))
    elif batch and draw(st.booleans()):
        shapes[draw(st.integers(0, 2))][draw(st.integers(0, len(batch) - 1))] = 1
    mask = None
    if draw(st.booleans()):
        full = [*(batch[:-1] + [shapes[0][-3]] if gqa else batch), lq, lk]
        mask = [n if draw(st.booleans()) else 1 for n in full[draw(st.integers(0, rank - 2)) :]]
    return shapes, mask, draw(st.booleans()), draw(st.booleans()), gqa


def torch_sdpa(q, k, v, mask, is_causal, gqa, scale=None):
    """torch's function; where both masks are given (its math path refuses that) their intersection."""
    if is_causal and mask is not None:
        causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        mask = mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -math.inf)
        is_causal = False
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=gqa)


@given(call=calls(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_equals_torch_in_values_and_gradients(call, dtype):
    shapes, mask_shape, bool_mask, is_causal, gqa = call
    inputs = [
        testing.random_tensor(*shape, dtype=dtype, seed=i, requires_grad=True)
        for i, shape in enumerate(shapes)
    ]
    mask = None
    if mask_shape is not None:
        generator = torch.Generator().manual_seed(1)
        mask = torch.rand(mask_shape, generator=generator)
        mask = mask < 0.6 if bool_mask else mask.to(dtype).requires_grad_(True)
    q, k, v = inputs
    wide = mask if mask is None or bool_mask else mask.detach().double()
    weights = testing.attention_weights(lambda *qkv: torch_sdpa(*qkv, wide, is_causal, gqa), q, k, v)
    magnitudes = testing.lone_key_magnitudes(weights, q, k, v, shapes[0][-1] ** -0.5)
    if not magnitudes and mask_shape is not None and mask_shape[-1] == 1:
        # One number added to all of a row's scores changes nothing: its true gradient is the sum of a row's, which is 0.
        magnitudes = (0.0, 0.0, 0.0, 2 * 2 * v.shape[-1] * testing.max_finite(v) * weights.shape[:-1].numel())
    testing.check_op(
        lambda q, k, v, m: fa.scaled_dot_product_attention(q, k, v, m, 0.0, is_causal, enable_gqa=gqa),
        lambda q, k, v, m: torch_sdpa(q, k, v, m, is_causal, gqa),
        [*inputs, mask],
        terms=shapes[1][-2] + shapes[0][-1],
        names=("query", "key", "value", "attn_mask"),
        magnitudes=magnitudes,
    )


def test_causal_aligns_the_first_query_with_the_first_key():
    for lq, lk in ((3, 7), (7, 3), (5, 5)):
        q, k, v = testing.attention_inputs(1, 2, None, lq, lk, 8, dtype=torch.float64)
        allowed = torch.ones(lq, lk, dtype=torch.bool).tril()
        expected = fa.scaled_dot_product_attention(q, k, v, allowed)
        torch.testing.assert_close(fa.scaled_dot_product_attention(q, k, v, is_causal=True), expected)


def test_a_row_without_keys_is_zero_as_in_torch():
    q, k, v = testing.attention_inputs(1, 1, None, 4, 6, 8)
    allowed = torch.ones(4, 6, dtype=torch.bool)
    allowed[1] = False
    for mask in (allowed, torch.zeros(4, 6).masked_fill(~allowed, -math.inf)):
        out = fa.scaled_dot_product_attention(q, k, v, mask)
        assert not out[:, :, 1].any() and not F.scaled_dot_product_attention(q, k, v, mask)[:, :, 1].any()


@pytest.mark.parametrize(
    ("leading", "key_leading", "gqa"), [((2, 0), (2, 0), False), ((3, 1), (3, 0), False), ((0,), (0,), True)]
)
def test_no_heads_give_an_empty_result(leading, key_leading, gqa):
    q = torch.ones(*leading, 4, 8, requires_grad=True)
    k, v = torch.ones(*key_leading, 6, 8), torch.ones(*key_leading, 6, 5)
    out = fa.scaled_dot_product_attention(q, k, v, torch.ones(4, 6, dtype=torch.bool), enable_gqa=gqa)
    assert out.shape == (*torch.broadcast_shapes(leading, key_leading), 4, 5)
    out.sum().backward()
    assert not q.grad.any()


def test_a_float32_mask_beside_float64_computes_in_float64():
    q, k, v = testing.attention_inputs(1, 2, None, 4, 6, 8, dtype=torch.float64, requires_grad=False)
    mask = torch.rand(4, 6)
    expected = F.scaled_dot_product_attention(q, k, v, mask.double())
    torch.testing.assert_close(fa.scaled_dot_product_attention(q, k, v, mask), expected)


def test_a_float32_mask_beside_bfloat16_is_not_rounded():
    q, k, v = testing.attention_inputs(1, 2, None, 8, 8, 8, dtype=torch.bfloat16, requires_grad=False)
    mask = 100 + torch.rand(8, 8)  # bfloat16 would keep steps of 0.5
    out = fa.scaled_dot_product_attention(q, k, v, mask)
    assert out.dtype == torch.bfloat16
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.double())
    assert testing.max_error(out, truth) <= testing.absolute_bound(
        torch.bfloat16, terms=8, magnitude=testing.max_finite(v)
    ) + 100 * testing.EPS32 * 4 * testing.max_finite(v)  # scores of 100 are off by 100 * eps, weights alike


def test_an_unmodified_module_runs_on_it(monkeypatch):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 7, 16)
    padding = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(7)

    def run():
        layer.zero_grad()
        out = layer(x, src_mask=causal, src_key_padding_mask=padding.float().masked_fill(padding, -math.inf))
        out.square().sum().backward()
        return out, [p.grad.clone() for p in layer.parameters()]

    expected = run()
    seen = []

    def counted(*args, **kwargs):
        seen.append(1)
        return fa.scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    actual = run()
    assert seen
    torch.testing.assert_close(actual, expected)


def test_autocast_casts_what_torch_casts():
    q, k, v = testing.attention_inputs(1, 2, None, 4, 6, 8, requires_grad=False)
    mask = torch.zeros(4, 6).masked_fill(torch.rand(4, 6) < 0.3, -math.inf)
    with torch.autocast("cpu", torch.bfloat16):
        out = fa.scaled_dot_product_attention(q, k, v.bfloat16(), mask)
        assert F.scaled_dot_product_attention(q, k, v.bfloat16(), mask).dtype == out.dtype == torch.bfloat16
        assert fa.scaled_dot_product_attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert torch.equal(out, fa.scaled_dot_product_attention(*(t.bfloat16() for t in (q, k, v, mask))))


def test_compiles_in_one_graph():
    q, k, v = testing.attention_inputs(1, 2, None, 6, 6, 8, requires_grad=False)
    mask = torch.rand(6, 6) < 0.7
    for options in ({"is_causal": True}, {"attn_mask": mask}):
        compiled = torch.compile(fa.scaled_dot_product_attention, fullgraph=True, backend="eager")
        torch.testing.assert_close(
            compiled(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options)
        )


def jagged(lengths, heads, dim, seed, dtype=torch.float32):
    """Nested (B, H, L of each sequence, D), a leaf's view, and the leaf (tokens, H, D)."""
    leaf = testing.random_tensor(sum(lengths), heads, dim, seed=seed, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    return torch.nested.nested_tensor_from_jagged(leaf, offsets=offsets).transpose(1, 2), leaf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths", "is_causal"),
    [((3, 7, 1), (3, 7, 1), False), ((3, 0, 7), (3, 0, 7), True), ((2, 5), (4, 9), False)],
)
def test_jagged_nested_tensors_are_sequences(q_lengths, k_lengths, is_causal, dtype):
    lengths, heads, dims = (q_lengths, k_lengths, k_lengths), (4, 2, 2), (8, 8, 5)
    made = [jagged(*shape, seed, dtype) for seed, shape in enumerate(zip(lengths, heads, dims, strict=True))]
    out = fa.scaled_dot_product_attention(*(n for n, _ in made), is_causal=is_causal, enable_gqa=True)
    assert out.is_nested and out.shape[:2] == (len(q_lengths), 4) and out.dtype == dtype
    sizes = [list(n) for n in lengths]
    for i, sequence in enumerate(out.unbind()):
        expected = fa.scaled_dot_product_attention(
            *(leaf.split(size)[i].transpose(0, 1) for (_, leaf), size in zip(made, sizes, strict=True)),
            is_causal=is_causal,
            enable_gqa=True,
        )
        torch.testing.assert_close(sequence, expected, rtol=0, atol=1e-14 if dtype == torch.float64 else 0)
    out.values().float().square().sum().backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.any() for _, leaf in made)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_result_of_nested_queries_can_be_added_to_them():
    q, _ = jagged((3, 5), 2, 8, 0)
    out = fa.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close((out + q).values() - q.values(), out.values())
    torch.testing.assert_close(out.values(), F.scaled_dot_product_attention(q, q, q).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: ((q, q, q), {"attn_mask": T(5, 5)}), "attn_mask is not served with nested tensors"),
        (lambda q: ((q, q, T(2, 2, 5, 8)), {}), "all jagged nested tensors"),
        (lambda q: ((q.transpose(1, 2),) * 3, {}), "all jagged nested tensors"),
        (
            lambda q: ((torch.nested.nested_tensor([T(2, 3, 8)], layout=torch.strided),) * 3, {}),
            "all jagged nested tensors",
        ),
        (
            lambda q: ((q, *[jagged((4, 5), 2, 8, 0)[0]] * 2), {"is_causal": True}),
            "of the same sequence lengths",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_nested_tensors_cannot_say_is_refused_by_name(change, message):
    args, kwargs = change(jagged((3, 5), 2, 8, 0)[0])
    with pytest.raises(NotImplementedError, match=message):
        fa.scaled_dot_product_attention(*args, **kwargs)


T = torch.zeros


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((T(2, 4), T(2, 4), T(2, 4)), {"dropout_p": 1.1}, ValueError, r"dropout_p must lie in \[0, 1\]"),
        ((T(4), T(2, 4), T(2, 4)), {}, ValueError, "query must have 2 or more"),
        ((T(2, 4), T(2, 5), T(2, 4)), {}, ValueError, "key has head dim 5, query has 4"),
        ((T(2, 4), T(3, 4), T(2, 4)), {}, ValueError, "value has length 2, key has 3"),
        ((T(2, 4), T(2, 4).half(), T(2, 4)), {}, TypeError, "key is float16 but query is float32"),
        ((T(2, 2, 4), T(3, 2, 4), T(3, 2, 4)), {}, ValueError, "do not broadcast"),
        (
            (T(4, 2, 4), T(3, 2, 4), T(3, 2, 4)),
            {"enable_gqa": True},
            ValueError,
            "3 heads, which does not divide",
        ),
        (
            (T(2, 4), T(2, 4), T(2, 4)),
            {"enable_gqa": True},
            ValueError,
            "3 or more dimensions with enable_gqa",
        ),
        ((T(2, 4), T(2, 4), T(2, 4)), {"attn_mask": T(2)}, ValueError, "attn_mask must broadcast"),
        ((T(2, 4), T(2, 4), T(2, 4)), {"attn_mask": T(3, 2)}, ValueError, "does not broadcast"),
        ((T(2, 4), T(2, 4), T(2, 4)), {"attn_mask": T(2, 2).int()}, TypeError, "attn_mask must be bool"),
        ((T(2, 4), T(2, 4), [0]), {}, TypeError, "value must be a tensor"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments_are_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        fa.scaled_dot_product_attention(*args, **kwargs)
