"""flex_attention: published functions against autograd in float64, refusals, block lists, caches, torch's own as a judge."""

import functools
import gc
import math

import numpy as np
import pytest
import torch
from flex_mods import BATCH, HEADS, MASKS, SCORES
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex

import fastattn as fa
from fastattn import testing
from fastattn.ops.flex import plan, prepare
from fastattn.runtime import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTH = 70


def inputs(dtype=torch.float32, length=LENGTH, keys=None, dim=16, kv_heads=2):
    return testing.attention_inputs(BATCH, HEADS, kv_heads, length, keys or length, dim, dtype=dtype)


def run(score, mask, captured, qkv, **options):
    """(out, lse and the gradients of q, k, v and of what is captured), as tensors of one list."""
    leaves = [t.detach().requires_grad_() for t in qkv]
    captured = [t.detach().requires_grad_(t.is_floating_point()) for t in captured]
    score_mod = None if score is None else SCORES[score][1](*captured)
    out, lse = fa.flex_attention(*leaves, score_mod, mask, enable_gqa=True, return_lse=True, **options)
    of_rows = torch.arange(lse.numel(), dtype=lse.dtype).view(lse.shape).sin()
    weights = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).cos().to(out.dtype)
    loss = (out * weights).float().sum() + (lse.masked_fill(lse.isinf(), 0.0) * of_rows).sum()
    loss.backward()
    floating = [t for t in captured if t.is_floating_point()]
    # a function without its score gives q and k no gradient
    return [out, lse, *(torch.zeros_like(t) if t.grad is None else t.grad for t in (*leaves, *floating))]


def check(score, mask, dtype, length=LENGTH, **shape):
    """The kernel's results against float64, by what eager torch in the same dtype is off by (testing.budget)."""
    captured = () if score is None else SCORES[score][0](length)
    mask_mod = None if mask is None else MASKS[mask](length)
    qkv = inputs(dtype, length, **shape)
    low = [t.float() if t.is_floating_point() else t for t in captured]
    wide = [t.double() for t in qkv]
    truth = run(score, mask_mod, [t.double() if t.is_floating_point() else t for t in low], wide)
    eager = run(score, mask_mod, low, qkv, backend="reference")
    found = run(score, mask_mod, low, qkv, backend="cpu")
    for i, (mine, true, plain) in enumerate(zip(found, truth, eager, strict=True)):
        # a captured tensor's gradient is a sum over as many scores as read an element
        terms = length if i < 5 else BATCH * HEADS * length * length
        factor = 2.0 if i < 2 else 3.0
        testing.assert_close_to_truth(mine, true, plain, factor=factor, terms=terms, name=f"result {i}")


@pytest.fixture(params=(1 << 20, 0), ids=("as it is", "tables"))
def tables(request, monkeypatch):
    """Whether parts of functions become tables of their own, as they do in large calls."""
    monkeypatch.setattr(plan, "_LEAST_SCORES", request.param)
    plan._plans.clear()
    yield
    plan._plans.clear()


@pytest.mark.parametrize("score", SCORES)
def test_scores(score, tables, nan_outputs):
    for isa in testing.isas():
        with native.use_cpu_isa(isa):
            check(score, None, torch.float32)


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, tables, nan_outputs):
    check(None, mask, torch.float32)
    check("alibi", mask, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("score", ("alibi", "learned cap", "relative table", "T5", "causal in the score"))
def test_half_precision(score, dtype, nan_outputs):
    for isa in testing.isas():
        with native.use_cpu_isa(isa):
            check(score, "causal", dtype)
            check(score, "dilated", dtype)


@given(
    st.sampled_from([n for n in SCORES if n != "graph distances"]),
    st.sampled_from([None, *MASKS]),
    st.integers(31, 200),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([8, 24, 64]),
)
def test_lengths_and_heads(score, mask, length, kv_heads, dim):
    check(score, mask, torch.float32, length=length, kv_heads=kv_heads, dim=dim)


@pytest.mark.parametrize("queries, keys", ((1, 90), (5, 90), (90, 40), (0, 5), (5, 0), (33, 300)))
def test_more_keys_than_queries_and_fewer(queries, keys, nan_outputs):
    """q_idx and kv_idx count from the first query and the first key, as torch has it; a few queries are decoded."""
    q, k, v = testing.attention_inputs(BATCH, HEADS, 2, queries, keys, 16)
    table = testing.random_tensor(HEADS, 7)
    causal = MASKS["causal"](0)

    def score_mod(s, b, h, q_idx, kv_idx):
        return s + table[h, (kv_idx + 2 * q_idx) % 7]

    found = fa.flex_attention(q, k, v, score_mod, causal, enable_gqa=True, return_lse=True, backend="cpu")
    true = fa.flex_attention(
        *(t.double() for t in (q, k, v)), score_mod, causal, enable_gqa=True, return_lse=True
    )
    for a, b in zip(found, true, strict=True):
        testing.assert_close_to_truth(a, b, None, terms=max(keys, 1), absolute=2e-6, name="out")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("score", (None, "alibi", "soft cap", "bias of keys"))
@pytest.mark.parametrize("mask", (None, "causal", "documents", "by head", "some rows nothing"))
def test_torch_agrees(score, mask):
    """torch's own eager forward, which evaluates the same function by vmap."""
    captured = () if score is None else [t.float() for t in SCORES[score][0](LENGTH)]
    score_mod = None if score is None else SCORES[score][1](*captured)
    mask_mod = None if mask is None else MASKS[mask](LENGTH)
    q, k, v = (t.detach() for t in inputs())
    block_mask = None
    if mask_mod is not None:
        block_mask = torch_flex.create_block_mask(mask_mod, BATCH, HEADS, LENGTH, LENGTH, device="cpu")
    theirs, aux = torch_flex.flex_attention(
        *(t.double() for t in (q, k, v)),
        score_mod,
        block_mask,
        enable_gqa=True,
        return_aux=torch_flex.AuxRequest(lse=True),
    )
    for given_mask in {mask_mod, block_mask} if mask else {None}:
        mine = fa.flex_attention(q, k, v, score_mod, given_mask, enable_gqa=True, return_lse=True)
        for a, b in zip(mine, (theirs, aux.lse), strict=True):
            # float32's roundings of 70 terms of size 1
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_block_lists_decide():
    """What no list has is not attended, whatever mask_mod says; full blocks are attended whatever it says."""
    length, size = 96, 32
    kinds = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 2, 0]])  # 1: full, 2: by mask_mod

    def odd(b, h, q_idx, kv_idx):
        return (q_idx + kv_idx) % 2 == 1

    def lists(kind):
        listed = (kinds == kind).int()
        return listed.sum(-1)[None, None].int(), torch.argsort(listed, dim=-1, descending=True, stable=True)[
            None, None
        ].int()

    mask = torch_flex.BlockMask.from_kv_blocks(
        *lists(2), *lists(1), BLOCK_SIZE=size, mask_mod=odd, seq_lengths=(length, length)
    )
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    kind = kinds[i // size, j // size]
    dense = (kind == 1) | ((kind == 2) & ((i + j) % 2 == 1))
    q, k, v = inputs(length=length)
    for backend in ("cpu", "reference"):
        found = fa.flex_attention(q, k, v, None, mask, enable_gqa=True, backend=backend)
        expected = fa.attention(q, k, v, mask=fa.Mask(dense=dense))
        torch.testing.assert_close(
            found, expected, rtol=1e-5, atol=2e-6
        )  # another order of 96 terms of size 1
    with pytest.raises(ValueError, match="block_mask was made for 96 queries and 96 keys, given 70 and 70"):
        fa.flex_attention(*inputs(), None, mask, enable_gqa=True)


def test_a_mask_of_ours():
    q, k, v = inputs()
    mask = fa.Mask(causal=True, window=(7, None), key_lengths=torch.tensor([40, 70]))
    found = fa.flex_attention(q, k, v, lambda s, b, h, i, j: 4 * torch.tanh(s / 4), mask, enable_gqa=True)
    torch.testing.assert_close(found, fa.attention(q, k, v, softcap=4.0, mask=mask), rtol=1e-5, atol=2e-6)
    packed = fa.Mask(causal=True, cu_seqlens_q=torch.tensor([0, 13, 70]))
    q, k, v = (t[:1] for t in (q, k, v))
    found = fa.flex_attention(q, k, v, lambda s, b, h, i, j: s * (i % 3), packed, enable_gqa=True)
    true = fa.flex_attention(
        q, k, v, lambda s, b, h, i, j: s * (i % 3), packed, enable_gqa=True, backend="reference"
    )
    torch.testing.assert_close(found, true, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("score", (None, "alibi"))
def test_documents_in_a_batch_of_one(score, nan_outputs):
    """They are packed: a row's and a key's numbers stay those of the whole sequence."""
    of = torch.tensor([0] * 13 + [1] * 40 + [4] + [7] * 16)
    captured = () if score is None else [t.float() for t in SCORES[score][0](LENGTH)]
    qkv = [t[:1] for t in inputs()]

    def mask_mod(b, h, q, k):
        return (of[q] == of[k]) & (q >= k)

    found = run(score, mask_mod, captured, qkv)
    eager = run(score, mask_mod, captured, qkv, backend="reference")
    true = run(score, mask_mod, [t.double() for t in captured], [t.double() for t in qkv])
    for i, (a, b, plain) in enumerate(zip(found, true, eager, strict=True)):
        terms = LENGTH if i < 5 else HEADS * LENGTH * LENGTH
        testing.assert_close_to_truth(a, b, plain, factor=3.0, terms=terms, name=f"result {i}")


# --- what cannot be --------------------------------------------------------------------------------------------------

TABLE, VECTORS = torch.randn(8), torch.randn(8, 4)


def _branch(s, b, h, q, k):
    return s if q > k else -s


def _item(s, b, h, q, k):
    return s * float(h)


def _rows(s, b, h, q, k):
    return s + (VECTORS[q] * VECTORS[k]).sum(-1)


def _score_index(s, b, h, q, k):
    return s + TABLE[s.to(torch.int32)]


def _float_index(s, b, h, q, k):
    return s + TABLE[q / 2]


def _random(s, b, h, q, k):
    return s + torch.rand_like(s)


def _softmax(s, b, h, q, k):
    return torch.softmax(s, -1)


def _whole(s, b, h, q, k):
    return s + TABLE


def _wide(s, b, h, q, k):
    return s + (q * 1_000_000_000 + k * 1_000_000_000) % 7


def _float_quotient(s, b, h, q, k):
    return s // 0.1


def _writes(s, b, h, q, k):
    return torch.relu_(s) + s


def _adds(s, b, h, q, k):
    return s.add_(1) + s


def _inplace(s, b, h, q, k):
    return torch.nn.functional.relu(s, inplace=True)


@pytest.mark.parametrize(
    "function, words",
    (
        (
            _branch,
            r"has a branch \(if, and, or, not\) on a value that differs between scores; write torch.where",
        ),
        (_item, "has a Python number of a value that differs"),
        (_rows, "1 indices of a captured tensor of 2 dimensions.*concatenate them to their head dims"),
        (_score_index, "an index that depends on the score"),
        (_float_index, "an index that is no integer"),
        (_random, "torch.rand_like, which is outside of what a score may use"),
        (_softmax, "torch.softmax, which is outside of what a score may use"),
        (_float_quotient, "// or % of floats; write torch.floor"),
        (_writes, "torch.relu_, which writes to its argument"),
        (_adds, "Tensor.add_, which writes to its tensor"),
        (_inplace, "inplace=True; use its result"),
        (_whole, r"a captured tensor of shape \(8,\) without an index"),
        (_wide, "an integer .* may not fit 32 bits"),
    ),
)
def test_refusals_name_the_line_and_the_way_out(function, words):
    q, k, v = testing.attention_inputs(1, 1, 1, 8, 8, 8)
    with pytest.raises(NotImplementedError, match=words) as raised:
        fa.flex_attention(q, k, v, function)
    if function is not _wide:
        line = function.__code__.co_firstlineno + 1
        assert f"{__file__}:{line}" in str(raised.value)
        assert 'backend="reference"' in str(raised.value)


def test_other_mistakes_are_named():
    q, k, v = testing.attention_inputs(1, 2, 1, 8, 8, 8)
    with pytest.raises(ValueError, match="key has 1 heads and query 2; enable_gqa=True"):
        fa.flex_attention(q, k, v)
    with pytest.raises(IndexError, match=r"shape \(8,\) is out of range: from 0 to 14 where the size is 8"):
        fa.flex_attention(q, q, q, lambda s, b, h, i, j: s + TABLE[i + j])
    with pytest.raises(TypeError, match="it must return a boolean"):
        fa.flex_attention(q, q, q, None, lambda b, h, i, j: i - j)
    with pytest.raises(
        TypeError, match=r"block_mask must be a fastattn.Mask, a function.*fastattn.Mask\(dense"
    ):
        fa.flex_attention(q, q, q, None, torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match="score_mod must be a function"):
        fa.flex_attention(q, q, q, 3)
    with pytest.raises(NotImplementedError, match="names a kernel of torch"):
        fa.flex_attention(q, q, q, kernel_options={"BACKEND": "FLASH"})
    with pytest.raises(NotImplementedError, match="the cpu backend does not serve float64"):
        fa.flex_attention(*(t.double() for t in (q, q, q)), backend="cpu")
    with pytest.raises(KeyError, match="of the function itself"):
        fa.flex_attention(q, q, q, lambda s, b, h, i, j: {}["of the function itself"])


class _Learned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = torch.nn.Parameter(torch.rand(HEADS))

    def forward(self, score, b, h, q_idx, kv_idx):
        return score * self.scales[h].exp() + np.float32(0.5) * (q_idx == kv_idx) * np.int64(2)


def test_every_name_of_integers_floats_and_booleans():
    """Each operation of one or two operands is refused by name, or is torch's in value."""
    from fastattn.ops.flex.vocabulary import OPERATIONS

    served = 0
    for name in OPERATIONS:
        function = getattr(torch, name, None) or getattr(torch.nn.functional, name, None)
        for kinds in ("f", "i", "b", "ff", "fi", "if", "ii", "bb", "bi"):

            def score_mod(s, b, h, q, k, function=function, kinds=kinds):
                x = {"f": s, "i": q - k + 3, "b": q > k}
                y = {"f": s * 0.5 + 0.75, "i": k % 5 + 1, "b": k % 2 == 0}
                return s * 0.5 + function(*(of[kind] for of, kind in zip((x, y), kinds, strict=False))) * 0.25

            q, k, v = (t.detach()[:1, :, :9] for t in inputs())
            try:
                true = fa.flex_attention(q, k, v, score_mod, enable_gqa=True, backend="reference")
            except (TypeError, RuntimeError, NotImplementedError):  # torch's function takes no such operands
                continue
            try:
                found = fa.flex_attention(q, k, v, score_mod, enable_gqa=True, backend="cpu")
            except NotImplementedError as refused:
                assert "score_mod" in str(refused) or "32 bits" in str(refused)
                continue
            served += 1
            # float32's roundings, more of them where a base is large
            torch.testing.assert_close(
                found,
                true,
                rtol=1e-4,
                atol=1e-4,
                equal_nan=True,
                msg=lambda m, n=name, t=kinds: f"{n} {t}: {m}",
            )
    assert served > 100


def test_functions_of_any_kind():
    """A module, a partial function, numbers of numpy, and a tensor made inside."""
    module = _Learned()
    shifted = functools.partial(
        lambda t, s, b, h, q, k: s + (t * torch.tensor([1.0, 2.0]))[k % 2], torch.ones(2)
    )
    for score_mod in (module, shifted):
        found = fa.flex_attention(*inputs(), score_mod, enable_gqa=True)
        true = fa.flex_attention(*inputs(), score_mod, enable_gqa=True, backend="reference")
        torch.testing.assert_close(found, true, rtol=1e-5, atol=2e-6)
    fa.flex_attention(*inputs(), module, enable_gqa=True).square().sum().backward()
    assert module.scales.grad.abs().min() > 0


def test_any_function_is_served_by_the_reference():
    q, k, v = testing.attention_inputs(1, 1, 1, 8, 8, 8)
    found = fa.flex_attention(q, k, v, _score_index_clamped, backend="reference")
    assert found.isfinite().all()


def _score_index_clamped(s, b, h, q, k):
    return s + TABLE[s.to(torch.int32).clamp(0, 7).long()]


# --- traces and caches -----------------------------------------------------------------------------------------------


def test_a_captured_tensor_is_read_anew():
    table, doc = torch.randn(HEADS), torch.arange(LENGTH) // 9

    def score_mod(s, b, h, q, k):
        return s * table[h]

    def mask_mod(b, h, q, k):
        return doc[q] == doc[k]

    qkv = inputs()
    for change in (
        lambda: None,
        lambda: table.mul_(2),
        lambda: doc.copy_(torch.arange(LENGTH) // 20),
        lambda: doc.numpy().fill(1),
    ):
        change()
        found = fa.flex_attention(*qkv, score_mod, mask_mod, enable_gqa=True)
        true = fa.flex_attention(*qkv, score_mod, mask_mod, enable_gqa=True, backend="reference")
        torch.testing.assert_close(found, true, rtol=1e-5, atol=2e-6)


def test_a_closure_made_in_each_step_makes_no_cache_grow():
    qkv = inputs()
    prepare._programs.clear()
    plan._plans.clear()
    for _ in range(5):
        table = torch.randn(HEADS, requires_grad=True)
        fa.flex_attention(*qkv, lambda s, b, h, q, k, t=table: s + t[h], enable_gqa=True).sum().backward()
    assert len(prepare._programs) == len(plan._plans) == 1
    for step in range(300):
        fa.flex_attention(
            *(t[:1, :, :2] for t in qkv), lambda s, b, h, q, k, c=step: s * (c + 0.5), enable_gqa=True
        )
    gc.collect()
    assert len(prepare._programs) == prepare._MOST_PROGRAMS and len(plan._plans) == plan._MOST_PLANS


def test_tables_are_made_anew(tables):
    """A plan that is kept computes its tables from what captured tensors hold now, and sends their gradients there."""
    table = torch.randn(HEADS, 9, requires_grad=True)

    def score_mod(s, b, h, q, k):
        return s + table[h, (q - k).abs() % 9] * 2

    qkv = inputs()
    for step in range(3):
        with torch.no_grad():
            table.mul_(step + 1)
        results = []
        for backend in ("cpu", "reference"):
            table.grad = None
            fa.flex_attention(*qkv, score_mod, enable_gqa=True, backend=backend).sin().sum().backward()
            results.append(table.grad)
        # sums of 39,200 terms of about 1e-3
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_indices_made_of_captured_numbers_are_looked_at_anew(tables):
    """They are in range in one call, negative in the next, and out of range after that."""
    shift, table = torch.zeros(HEADS), torch.randn(9)

    def score_mod(s, b, h, q, k):
        return s + table[shift[h].to(torch.int32) + k % 5]

    for by in (0.0, 3.0, -6.0, 4.0):
        shift.fill_(by)
        results = [
            fa.flex_attention(*inputs(), score_mod, enable_gqa=True, backend=backend)
            for backend in ("cpu", "reference")
        ]
        torch.testing.assert_close(*results, rtol=1e-5, atol=2e-6)
    shift.fill_(5.0)
    with pytest.raises(IndexError, match="from 5 to 9 where the size is 9"):
        fa.flex_attention(*inputs(), score_mod, enable_gqa=True)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64, torch.float32, torch.bool))
def test_documents_are_looked_at_anew(dtype, tables):
    numbers = torch.arange(LENGTH) // 40
    of = numbers.to(dtype)
    qkv = [t[:1] for t in inputs()]
    for changed in (numbers, (torch.arange(LENGTH) > 9).long(), torch.arange(LENGTH) % 2, numbers * 0):
        of.copy_(changed)
        results = [
            fa.flex_attention(*qkv, None, lambda b, h, q, k: of[q] == of[k], enable_gqa=True, backend=backend)
            for backend in ("cpu", "reference")
        ]
        torch.testing.assert_close(*results, rtol=1e-5, atol=2e-6)


def test_a_kept_plan_of_a_mask_in_parts(tables):
    """What is not recognised of a mask is put together anew; a later call of the same functions has the same parts."""
    scale = torch.rand(HEADS)

    def mask_mod(b, h, q, k):
        return ((q >= k) & ((q - k) % 3 != 1)) & ((q - k) % 5 != 2) & (k % 7 != 3)

    for _ in range(3):
        qkv = inputs()
        results = [
            fa.flex_attention(
                *qkv, lambda s, b, h, q, k: s * scale[h], mask_mod, enable_gqa=True, backend=backend
            )
            for backend in ("cpu", "reference")
        ]
        torch.testing.assert_close(*results, rtol=1e-5, atol=2e-6)
        scale.mul_(2)


def test_gradients_only_where_they_are_asked_for():
    qkv = [t.detach() for t in inputs()]
    table = torch.randn(HEADS, requires_grad=True)
    out = fa.flex_attention(*qkv, lambda s, b, h, q, k: s + table[h] * k, enable_gqa=True)
    out.sum().backward()
    assert table.grad is not None and table.grad.abs().max() > 0
    with torch.no_grad():
        assert not fa.flex_attention(*qkv, lambda s, b, h, q, k: s + table[h], enable_gqa=True).requires_grad


def test_gradients_repeat_bit_for_bit():
    table = torch.randn(HEADS, 9, requires_grad=True)
    qkv = inputs(length=190)

    def gradient():
        table.grad = None
        fa.flex_attention(
            *qkv, lambda s, b, h, q, k: s + table[h, (q + k) % 9], enable_gqa=True
        ).square().sum().backward()
        return table.grad

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(3))


def test_inside_torch_compile_it_runs_as_it_is():
    slopes = torch.rand(HEADS)

    def model(q, k, v):
        q = q * 2
        return (
            fa.flex_attention(
                q, k, v, lambda s, b, h, i, j: s + slopes[h] * (j - i), MASKS["causal"](0), enable_gqa=True
            )
            + 1
        )

    qkv = inputs()
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(*qkv), model(*qkv))
    (grads, true) = ([t.grad for t in _backward(f, qkv)] for f in (compiled, model))
    assert all(torch.equal(a, b) for a, b in zip(grads, true, strict=True))


def _backward(f, qkv):
    leaves = [t.detach().requires_grad_() for t in qkv]
    f(*leaves).sum().backward()
    return leaves


def test_check_score():
    table = torch.randn(HEADS, 31, requires_grad=True)
    testing.check_score(lambda s, b, h, q, k: s + table[h, q - k + 15])
    testing.check_score(lambda s, b, h, q, k: torch.tanh(s * table[h, q]) + q / (k + 1), queries=7, keys=9)
    with pytest.raises(NotImplementedError, match="has a branch"):
        testing.check_score(_branch)
    seen = []

    def differs(s, b, h, q, k):
        """What it computes depends on how often it was called."""
        seen.append(None)
        return s * len(seen)

    with pytest.raises(AssertionError, match=r"^score: "):
        testing.check_score(differs)


def test_explain_prints_the_program():
    slopes = torch.rand(HEADS)
    text = str(
        fa.explain(
            fa.flex_attention,
            *inputs(),
            lambda s, b, h, q, k: torch.tanh(s) * slopes[h],
            lambda b, h, q, k: (q >= k) & (k % 3 != 0),
            enable_gqa=True,
        )
    )
    for line in (
        "flex_attention: cpu backend",
        "mask: causal, as ranges of keys",
        "tiles of 64 x 64: 0 full, 4 mixed",
        "= tanh(s)",
        "row ",
    ):
        assert line in text


def test_outputs_as_asked_for():
    q, k, v = inputs()
    out, lse = fa.flex_attention(q, k, v, enable_gqa=True, return_lse=True)
    wanted = torch_flex.AuxRequest(lse=True, max_scores=True)
    again, aux = fa.flex_attention(q, k, v, enable_gqa=True, return_aux=wanted)
    assert isinstance(aux, torch_flex.AuxOutput)
    torch.testing.assert_close((again, aux.lse), (out, lse))
    expected = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(16)).amax(-1)
    torch.testing.assert_close(aux.max_scores, expected)
    shared = (t[:1].expand(2, -1, -1, -1) for t in (k, v))  # a batch of one key
    torch.testing.assert_close(fa.flex_attention(q, k[:1], v[:1], enable_gqa=True), fa.attention(q, *shared))
