"""Masks: their definition against a loop over pairs, and their errors."""

import inspect
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import masks, testing


def loop_allowed(lq, lk, causal=False, left=None, right=None, prefix=None, keys=None):
    """One sequence, pair by pair, in the words of the documentation."""
    allowed = torch.zeros(lq, lk, dtype=torch.bool)
    for i in range(lq):
        for j in range(lk):
            diagonal = i + lk - lq
            ok = True
            if causal or prefix is not None:
                ok = j <= diagonal or (prefix is not None and diagonal < prefix and j < prefix)
            if left is not None:
                ok &= j >= diagonal - left
            if right is not None:
                ok &= j <= diagonal + right
            if keys is not None:
                ok &= j < keys
            allowed[i, j] = ok
    return allowed


def dense(mask, batch, lq, lk):
    q, k = torch.empty(batch, 1, lq, 4), torch.empty(batch, 1, lk, 4)
    args = mask.args("attention", q, k)
    found = masks.dense_allowed(lq, lk, q.device, args)
    assert torch.equal(masks.row_counts(lq, lk, q.device, args).expand(found.shape[:3]), found.sum(-1))
    return found.expand(batch, 1, lq, lk)[:, 0]


sides = st.one_of(st.none(), st.integers(0, 9))


@given(
    lq=st.integers(0, 9),
    lk=st.integers(0, 9),
    causal=st.booleans(),
    left=sides,
    right=sides,
    prefixes=st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=2, max_size=2)),
    keys=st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=2, max_size=2)),
)
def test_definition_of_a_batch(lq, lk, causal, left, right, prefixes, keys):
    prefixes = None if prefixes is None else [min(p, lk) for p in prefixes]
    keys = None if keys is None else [min(n, lk) for n in keys]
    mask = fa.Mask(
        causal=causal,
        window=(left, right),
        prefix_lengths=None if prefixes is None else torch.tensor(prefixes),
        key_lengths=None if keys is None else torch.tensor(keys),
    )
    found = dense(mask, 2, lq, lk)
    for b in range(2):
        prefix, n = (None if x is None else x[b] for x in (prefixes, keys))
        assert torch.equal(found[b], loop_allowed(lq, lk, causal, left, right, prefix, n))


@given(
    documents=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=0, max_size=4
    ),
    padding=st.integers(0, 3),
    causal=st.booleans(),
    left=sides,
    prefixed=st.booleans(),
)
def test_definition_of_packed_documents(documents, padding, causal, left, prefixed):
    starts_q, starts_k = [0], [0]
    for nq, nk, _ in documents:
        starts_q.append(starts_q[-1] + nq)
        starts_k.append(starts_k[-1] + nk)
    lq, lk = starts_q[-1] + padding, starts_k[-1] + padding
    prefixes = [min(p, nk) for _, nk, p in documents]
    mask = fa.Mask(
        causal=causal,
        window=(left, None),
        cu_seqlens_q=torch.tensor(starts_q),
        cu_seqlens_k=torch.tensor(starts_k),
        prefix_lengths=torch.tensor(prefixes, dtype=torch.int64) if prefixed else None,
    )
    expected = torch.zeros(lq, lk, dtype=torch.bool)
    for n, (nq, nk, _) in enumerate(documents):
        block = loop_allowed(nq, nk, causal, left, None, prefixes[n] if prefixed else None)
        expected[starts_q[n] : starts_q[n + 1], starts_k[n] : starts_k[n + 1]] = block
    assert torch.equal(dense(mask, 1, lq, lk)[0], expected)


def test_dense_is_an_intersection_and_broadcasts():
    generator = torch.Generator().manual_seed(1)
    bits = torch.rand(2, 1, 5, 7, generator=generator) < 0.5
    found = dense(fa.Mask(causal=True, dense=bits), 2, 5, 7)
    assert torch.equal(found, bits[:, 0] & loop_allowed(5, 7, causal=True))
    assert torch.equal(dense(fa.Mask(dense=bits[0, 0]), 2, 5, 7), bits[:1, 0].expand(2, 5, 7))


def test_sequence_keys_counts_the_rows_own_sequence():
    def keys(batch, lq, lk, mask):
        q, k = torch.empty(batch, 1, lq, 8), torch.empty(batch, 1, lk, 8)
        return masks.sequence_keys(lq, lk, q.device, mask.args("attention", q, k))

    assert keys(1, 3, 7, fa.Mask()).unique().tolist() == [7]
    assert keys(2, 3, 7, fa.Mask(key_lengths=torch.tensor([2, 0])))[:, 0, 0, 0].tolist() == [2, 1]
    packed = fa.Mask(cu_seqlens_q=torch.tensor([0, 1, 1, 3]))
    assert keys(1, 4, 4, packed).flatten().tolist() == [1, 2, 2, 1]


def ints(*values):
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fa.Mask(causal=1), TypeError, "Mask: causal must be a bool, given int 1"),
        (lambda: fa.Mask(window=3), TypeError, r"Mask: window must be \(left, right\), given 3"),
        (lambda: fa.Mask(window=(-1, 0)), ValueError, "window counts keys"),
        (lambda: fa.Mask(cu_seqlens_k=ints(0, 2)), ValueError, "cu_seqlens_k needs cu_seqlens_q"),
        (lambda: fa.Mask(cu_seqlens_q=ints(1, 2)), ValueError, "cu_seqlens_q must start at 0, given 1"),
        (
            lambda: fa.Mask(cu_seqlens_q=ints(0, 5, 3)),
            ValueError,
            "must not decrease, given 5 then 3 at position 2",
        ),
        (
            lambda: fa.Mask(cu_seqlens_q=ints(0, -5)),
            ValueError,
            "must not decrease, given 0 then -5 at position 1",
        ),
        (lambda: fa.Mask(cu_seqlens_q=torch.tensor([], dtype=torch.int32)), ValueError, "at least one entry"),
        (
            lambda: fa.Mask(cu_seqlens_q=torch.tensor([0.0, 1.0])),
            TypeError,
            "cu_seqlens_q must be int32 or int64",
        ),
        (lambda: fa.Mask(cu_seqlens_q=ints(0, 2, 3), cu_seqlens_k=ints(0, 2)), ValueError, "they must agree"),
        (
            lambda: fa.Mask(cu_seqlens_q=ints(0, 2), prefix_lengths=ints(1, 1)),
            ValueError,
            "2 entries for 1 documents",
        ),
        (
            lambda: fa.Mask(cu_seqlens_q=ints(0, 2, 3), prefix_lengths=ints(1, 2)),
            ValueError,
            r"\[1\] is 2, longer than",
        ),
        (
            lambda: fa.Mask(cu_seqlens_q=ints(0, 2), key_lengths=ints(3)),
            ValueError,
            "longer than its document of 2",
        ),
        (
            lambda: fa.Mask(prefix_lengths=ints(-1)),
            ValueError,
            "prefix_lengths must be zero or more, given -1",
        ),
        (lambda: fa.Mask(prefix_lengths=[1]), TypeError, "prefix_lengths must be a tensor, given list"),
        (lambda: fa.Mask(key_lengths=ints(2**40)), ValueError, "at most 2\\*\\*31 - 1 is allowed"),
        (lambda: fa.Mask(dense=torch.ones(2, 2)), TypeError, "dense must be a bool tensor"),
        (
            lambda: fa.Mask(dense=torch.ones(1, 1, 1, 2, 2, dtype=torch.bool)),
            ValueError,
            "given 5 dimensions",
        ),
    ],
)
def test_bad_masks(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda: fa.Mask(cu_seqlens_q=ints(0, 4)), "packed documents .* need a batch of one, given 2"),
        (lambda: fa.Mask(prefix_lengths=ints(1)), "prefix_lengths has 1 entries for a batch of 2"),
        (lambda: fa.Mask(prefix_lengths=ints(1, 6)), "prefix_lengths holds 6, longer than the 5 keys given"),
        (lambda: fa.Mask(key_lengths=ints(1, 6)), "key_lengths holds 6, longer than the 5 keys given"),
        (lambda: fa.Mask(dense=torch.ones(3, 5, dtype=torch.bool)), "does not broadcast to"),
        (lambda: fa.Mask(dense=torch.ones(4, 5, dtype=torch.bool, device="meta")), "dense mask is on meta"),
    ],
)
def test_masks_that_do_not_fit_the_call(mask, message):
    q, k, v = testing.attention_inputs(2, 2, 2, 4, 5, requires_grad=False)
    with pytest.raises(ValueError, match=f"fastattn.attention: .*{message}"):
        fa.attention(q, k, v, mask=mask())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("lq, lk", [(4, 9), (9, 4), (6, 6)])
def test_the_widest_windows_are_no_limit(lq, lk, backend):
    q, k, v = testing.attention_inputs(1, 2, 2, lq, lk, requires_grad=False)
    groups, key_groups = torch.ones(1, lq, dtype=torch.int64), torch.zeros(1, lk, dtype=torch.int64)
    for widest in (2**31, sys.maxsize, 2**80):
        for window in ((widest, 1), (1, widest), (widest, widest)):
            limits = tuple(None if side == widest else side for side in window)
            found, expected = (
                fa.attention(q, k, v, mask=fa.Mask(window=sides), backend=backend)
                for sides in (window, limits)
            )
            assert torch.equal(found, expected)
        found, expected = (
            fa.grouped_attention(q, k, v, groups, key_groups=key_groups, window=window, backend=backend)
            for window in (widest, 100)
        )
        assert torch.equal(found, expected)


def test_a_mask_keeps_the_lengths_that_it_checked():
    lengths = torch.tensor([2, 3], dtype=torch.int32)
    mask = fa.Mask(key_lengths=lengths)
    lengths.fill_(1000)
    assert mask.key_lengths.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"cu_seqlens_q": (0, 99)}, r"cu_seqlens_q must lie in \[0, 5\], given 99 at position 1"),
        ({"cu_seqlens_q": (1, 5)}, r"cu_seqlens_q must lie in \[0, 0\], given 1 at position 0"),
        ({"cu_seqlens_k": (0, -1)}, r"cu_seqlens_k must lie in \[0, 7\], given -1 at position 1"),
        ({"prefix_lengths": (8,)}, r"prefix_lengths must lie in \[0, 7\], given 8 at position 0"),
        ({"key_lengths": (-1,)}, r"key_lengths must lie in \[0, 7\], given -1 at position 0"),
    ],
)
def test_indices_that_only_a_compiled_call_knows_are_checked(indices, message):
    """The op itself, as a compiled call runs it: the Mask was made of no contents."""
    q, k, v = testing.attention_inputs(1, 2, 2, 5, 7, requires_grad=False)
    mask = fa.Mask(
        cu_seqlens_q=ints(0, 5), cu_seqlens_k=ints(0, 7), prefix_lengths=ints(3), key_lengths=ints(6)
    )
    for name, values in indices.items():
        setattr(mask, name, torch.tensor(values, dtype=torch.int32))
    options = mask.args("attention", q, k)
    with pytest.raises(ValueError, match=message):
        torch.ops.fastattn.attention(q, k, v, None, None, 0, 1.0, 0.0, None, 0, None, *options, "cpu")


def test_a_tensor_for_a_mask_is_told_its_place():
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(TypeError, match=r"given Tensor; a bool tensor goes in as fastattn.Mask\(dense=...\)"):
        fa.attention(q, q, q, mask=torch.ones(2, 2, dtype=torch.bool))


def test_packed_offsets_past_the_tokens():
    q, k, v = testing.attention_inputs(1, 2, 2, 4, requires_grad=False)
    with pytest.raises(ValueError, match="cu_seqlens_q ends at 9, past the 4 tokens given"):
        fa.attention(q, k, v, mask=fa.Mask(cu_seqlens_q=ints(0, 9)))


def test_a_mask_prints_what_it_holds():
    assert repr(fa.Mask(causal=True, window=(3, None))) == "Mask(causal=True, window=(3, None))"


# --- queries aligned with the last key that key_lengths counts ------------------------------------------------------

ALIGNED = {
    "causal": {"causal": True},
    "window": {"window": (5, 2)},
    "causal window": {"causal": True, "window": (9, None)},
    "prefix": {"prefix_lengths": True},
}


@given(
    lq=st.integers(0, 9),
    lk=st.integers(0, 9),
    kind=st.sampled_from(sorted(ALIGNED)),
    keys=st.lists(st.integers(0, 9), min_size=2, max_size=2),
)
def test_definition_of_aligned_key_lengths(lq, lk, kind, keys):
    """As if the keys from the length on had never been given."""
    keys = [min(n, lk) for n in keys]
    options = dict(ALIGNED[kind])
    prefixes = ints(*(min(4, n) for n in keys)) if options.pop("prefix_lengths", False) else None
    mask = fa.Mask(**options, prefix_lengths=prefixes, key_lengths=ints(*keys), align="key_lengths")
    found = dense(mask, 2, lq, lk)
    for b, n in enumerate(keys):
        alone = fa.Mask(**options, prefix_lengths=None if prefixes is None else prefixes[b : b + 1])
        assert torch.equal(found[b, :, :n], dense(alone, 1, lq, n)[0])
        assert not found[b, :, n:].any()


LENGTHS, CAPACITY, QUERIES = (37, 60, 3), 60, 5


def rows_of(t, packed, b, size, used):
    """The first `used` rows of the b-th of three sequences of `size` rows."""
    return t[:, :, b * size : b * size + used] if packed else t[b : b + 1, :, :used]


def aligned_ops():
    """name -> f(q, k, v, mask, sequence or None for all, backend)."""
    generator = torch.Generator().manual_seed(1)
    groups, key_groups = (torch.randint(1, 8, (3, n), generator=generator) for n in (QUERIES, CAPACITY))

    def grouped(q, k, v, mask, b, backend):
        mine = (groups, key_groups) if b is None else (groups[b : b + 1], key_groups[b : b + 1, : k.shape[2]])
        of_q, of_k = (g.reshape(q.shape[0], -1) for g in mine)
        return fa.grouped_attention(q, k, v, of_q, key_groups=of_k, window=2, mask=mask, backend=backend)

    def scored(score):
        return lambda q, k, v, mask, b, backend: fa.attention(
            q, k, v, score=score, mask=mask, backend=backend
        )

    def reweighted(power):
        return lambda q, k, v, mask, b, backend: fa.softplus_attention(
            q, k, v, power=power, mask=mask, backend=backend
        )

    return {
        **{score: scored(score) for score in ("softmax", "sigmoid", "softplus")},
        "lssa": reweighted(None),
        "lssar": reweighted(3),
        "grouped": grouped,
    }


def check_aligned(op, backend, packed, kind):
    """Outputs and gradients are those of each sequence without its padding, which has gradients of exactly 0."""
    batch, parts = (1, 3) if packed else (3, 1)
    q, k, v = testing.attention_inputs(batch, 4, 2, QUERIES * parts, CAPACITY * parts, 16)
    options = dict(ALIGNED[kind])
    prefixes = ints(30, 7, 2) if options.pop("prefix_lengths", False) else None
    cuts = {"cu_seqlens_q": ints(0, 5, 10, 15), "cu_seqlens_k": ints(0, 60, 120, 180)} if packed else {}
    mask = fa.Mask(
        **options, **cuts, prefix_lengths=prefixes, key_lengths=ints(*LENGTHS), align="key_lengths"
    )
    (out,), grads = testing.differentiate(lambda *x: op(*x, mask, None, backend), (q, k, v))
    (incoming,) = testing.output_gradients((out,))
    for b, n in enumerate(LENGTHS):
        alone = fa.Mask(**options, prefix_lengths=None if prefixes is None else prefixes[b : b + 1])
        cut_q, cut_k = (packed, b, QUERIES, QUERIES), (packed, b, CAPACITY, n)
        inputs = [rows_of(t.detach(), *cut) for t, cut in ((q, cut_q), (k, cut_k), (v, cut_k))]
        (expected,), true = testing.differentiate(
            lambda *x, b=b, alone=alone: op(*x, alone, b, "reference"),
            testing.to_float64([t.requires_grad_() for t in inputs]),
            (rows_of(incoming, *cut_q).double(),),
        )
        found = [
            rows_of(t, *cut) for t, cut in ((out, cut_q), *zip(grads, (cut_q, cut_k, cut_k), strict=True))
        ]
        for a, t in zip(found, (expected, *true), strict=True):
            # sums over 16 products and 60 keys, or 10 rows, of terms below 8
            testing.assert_close_to_truth(a, t, None, terms=86, magnitude=8.0)
        for t in grads[1:]:
            assert not rows_of(t, packed, b, CAPACITY, CAPACITY)[:, :, n:].any()


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("kind", ALIGNED)
@pytest.mark.parametrize("name", aligned_ops())
def test_aligned_key_lengths(isa, nan_outputs, name, kind, packed):
    if name == "grouped" and kind == "prefix":
        pytest.skip("it refuses a prefix")
    for backend in ("cpu", "reference"):
        check_aligned(aligned_ops()[name], backend, packed, kind)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_aligned_key_lengths_of_one_query(isa, backend):
    """Decoding's kernel: a window counts back from the last key of the row."""
    q, k, v = testing.attention_inputs(2, 4, 2, 1, 90, 16, requires_grad=False)
    mask = fa.Mask(causal=True, window=(6, None), key_lengths=ints(90, 40), align="key_lengths")
    out = fa.attention(q, k, v, mask=mask, backend=backend)
    for b, n in enumerate((90, 40)):
        seen = slice(n - 7, n)
        alone = fa.attention(q[b : b + 1], k[b : b + 1, :, seen], v[b : b + 1, :, seen], backend="reference")
        testing.assert_close_to_truth(out[b : b + 1], alone, None, terms=7, magnitude=1.0)


def test_gated_attention_of_aligned_key_lengths(isa, nan_outputs):
    """As many queries as keys: the first queries of a shorter row have no key."""
    a = testing.random_tensor(2, 30, 3).abs().requires_grad_()
    inputs = (*testing.attention_inputs(2, 2, 1, 30, 30, 8), a)
    mask = fa.Mask(key_lengths=ints(30, 19), align="key_lengths")

    def op(backend):
        return lambda *x: fa.gated_attention(*x, window=4, sharpness=2.0, mask=mask, backend=backend)

    testing.check_op(op("cpu"), op("reference"), inputs, terms=120)
    out = op("cpu")(*inputs)
    assert not out[1, :, :11].any() and out[1, :, 11:].any()


def test_errors_of_align():
    with pytest.raises(ValueError, match="align must be one of 'keys', 'key_lengths', given 'last'"):
        fa.Mask(align="last")
    with pytest.raises(ValueError, match='align="key_lengths" needs key_lengths'):
        fa.Mask(causal=True, align="key_lengths")
    mask = fa.Mask(causal=True, key_lengths=ints(3), align="key_lengths")
    assert repr(mask) == "Mask(causal=True, key_lengths=int32[1], align='key_lengths')"
    assert mask.key_lengths.tolist() == [3]


def test_aligned_lengths_that_only_a_compiled_call_knows_are_checked():
    q, k, v = testing.attention_inputs(1, 2, 2, 5, 7, requires_grad=False)
    for length in (8, -1):
        mask = fa.Mask(causal=True, key_lengths=ints(6), align="key_lengths")
        mask.key_lengths = torch.tensor([length], dtype=torch.int32)
        options = mask.args("attention", q, k)
        with pytest.raises(ValueError, match=r"key_lengths must lie in \[0, 7\]"):
            torch.ops.fastattn.attention(q, k, v, None, None, 0, 1.0, 0.0, None, 0, None, *options, "cpu")


def test_aligned_key_lengths_compile():
    q, k, v = testing.attention_inputs(2, 2, 2, 5, 12, requires_grad=False)

    def call(q, k, v, lengths):
        mask = fa.Mask(causal=True, key_lengths=lengths, align="key_lengths")
        return fa.attention(q, k, v, mask=mask)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for lengths in (ints(12, 5), ints(7, 0)):
        assert torch.equal(compiled(q, k, v, lengths), call(q, k, v, lengths))


def test_a_mask_first_used_inside_a_transform_serves_calls_after_it():
    q = torch.randn(1, 2, 5, 4)
    for mask in (
        fa.Mask(prefix_lengths=ints(3)),
        fa.Mask(causal=True, key_lengths=ints(4), align="key_lengths"),
        fa.Mask(cu_seqlens_q=ints(0, 2, 5)),
    ):
        inside = torch.func.grad(lambda t, mask=mask: fa.attention(q, q, q, mask=mask).sum() * t)(
            torch.tensor(1.0)
        )
        vmapped = torch.vmap(lambda x, mask=mask: fa.attention(x, x, x, mask=mask))(q[None])
        out = fa.attention(q, q, q, mask=mask)
        assert torch.equal(vmapped[0], out) and torch.equal(inside, out.sum())


def test_fields_name_every_argument_that_excludes_keys():
    values = {
        "causal": True,
        "window": (2, None),
        "prefix_lengths": ints(1),
        "cu_seqlens_q": ints(0, 3),
        "cu_seqlens_k": ints(0, 4),
        "key_lengths": ints(3),
        "dense": torch.ones(3, 4, dtype=torch.bool),
        "blocks": fa.blocks.diagonal(block=(2, 2), q_length=3, k_length=4),
    }
    arguments = set(inspect.signature(fa.Mask).parameters) - {"align"}
    assert arguments == set(values), "a new argument: give it a value here, and _FIELDS its name"
    for name in arguments - {"cu_seqlens_k"}:
        documents = ("cu_seqlens_k",) if name == "cu_seqlens_q" else ()
        mask = fa.Mask(**{name: values[name]})
        assert mask.fields == (name, *documents), "a mask of a field that is not named serves as none"
    assert fa.Mask(**values).fields == tuple(values) and fa.Mask().fields == ()
    assert fa.Mask(window=(None, 3)).window == (None, 3) and fa.Mask(window=(None, None)).window is None
