"""What chooses block lists: each against its definition in loops, and whether later tokens change earlier lists."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.blocks import builders

B, HQ, HKV, L, D = 2, 4, 2, 44, 8


def qk(lq=L, lk=L, seed=0):
    q, k, _ = testing.attention_inputs(
        B, HQ, HKV, lq, lk, D, dtype=torch.float64, seed=seed, requires_grad=False
    )
    return q, k


@given(
    lengths=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    block=st.tuples(st.sampled_from((1, 3, 8)), st.sampled_from((1, 4, 8))),
    window=st.tuples(*[st.none() | st.integers(0, 20)] * 2),
)
def test_local_lists_the_blocks_that_the_window_touches(lengths, block, window):
    lq, lk = lengths
    blocks = builders.local(window, block=block, q_length=lq, k_length=lk)
    i, j = torch.arange(lq)[:, None] + lk - lq, torch.arange(lk)
    seen = torch.ones(lq, lk, dtype=torch.bool)
    if window[0] is not None:
        seen &= j >= i - window[0]
    if window[1] is not None:
        seen &= j <= i + window[1]
    table = torch.zeros_like(blocks.table())[0, 0]
    for a, b in seen.nonzero().tolist():
        table[a // block[0], b // block[1]] = True
    # a block whose queries lie on both sides of the keys has no pair of its own, and may be listed: none is with one window
    assert bool((blocks.table()[0, 0] >= table).all())
    if None not in window and lq and lk:
        spans = (blocks.table()[0, 0] & ~table).sum()
        assert spans == 0


def test_first_and_diagonal():
    assert fa.blocks.first(2, block=(4, 4), q_length=9, k_length=13).table()[0, 0].long().sum(0).tolist() == [
        3,
        3,
        0,
        0,
    ]
    assert torch.equal(
        fa.blocks.diagonal(block=(4, 4), q_length=9).table()[0, 0], torch.eye(3, dtype=torch.bool)
    )


def of_head(k, h):
    return k[:, h // (HQ // HKV)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [(4, 4), (5, 3)])
def test_pooled_topk_is_its_definition(causal, block):
    q, k = qk()
    top = 4
    table = fa.blocks.pooled_topk(q, k, block=block, top=top, causal=causal).table()
    bq, bk = block
    for h in range(HQ):
        for i in range(-(-L // bq)):
            rows = torch.arange(i * bq, min(L, i * bq + bq))
            scores = {}
            own = set()
            for j in range(-(-L // bk)):
                columns = torch.arange(j * bk, min(L, j * bk + bk))
                pooled = of_head(k, h)[0, columns].mean(0)
                if not causal:
                    scores[j] = float(q[0, h, rows].mean(0) @ pooled)
                elif columns[-1] <= rows[0]:
                    scores[j] = float(q[0, h, rows[0]] @ pooled)
                elif columns[0] <= rows[-1]:
                    own.add(j)
            best = sorted(scores, key=lambda j: -scores[j])[: max(top - len(own), 0)]
            assert set(table[0, h, i].nonzero()[:, 0].tolist()) == own | set(best)


def test_moba_is_its_definition():
    q, k = qk()
    block, top = 8, 3
    blocks = fa.blocks.moba(q, k, block=block, top=top)
    assert blocks.block == (1, block) and blocks.leaks is None
    for h in range(HQ):
        for i in range(L):
            own = i // block
            scores = {
                j: float(q[1, h, i] @ of_head(k, h)[1, j * block : j * block + block].mean(0))
                for j in range(own)
            }
            best = sorted(scores, key=lambda j: -scores[j])[: top - 1]
            assert set(blocks.table()[1, h, i].nonzero()[:, 0].tolist()) == {own, *best}


@pytest.mark.parametrize("top", [1, 2, 4])
def test_nsa_sums_groups_and_overlaps_and_forces_first_and_own(top):
    generator = torch.Generator().manual_seed(0)
    block, width, stride = 8, 8, 4
    compressed = (L - width) // stride + 1
    done = (torch.arange(compressed) * stride + width - 1) <= torch.arange(L)[:, None]
    weights = torch.rand(B, HQ, L, compressed, generator=generator) * done
    table = fa.blocks.nsa(
        weights, kv_heads=HKV, block=block, top=top, k_length=L, width=width, stride=stride
    ).table()
    assert int(table.sum(-1).max()) <= top
    for h in range(HKV):
        for i in range(L):
            own = i // block
            scores = {}
            for j in range(own + 1):
                over = [
                    c
                    for c in range(compressed)
                    if c * stride < (j + 1) * block and c * stride + width > j * block
                ]
                scores[j] = sum(float(weights[0, 2 * h : 2 * h + 2, i, c].sum()) for c in over)
            scores[0], scores[own] = math.inf if own else 2 * math.inf, math.inf
            order = sorted(scores, key=lambda j: (j != own, -scores[j], j))
            assert set(table[0, h, i].nonzero()[:, 0].tolist()) == set(order[:top])


def test_coverage_is_the_smallest_set():
    p = (
        torch.randn(B, 3, 5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    ).softmax(-1)
    blocks = fa.blocks.coverage(p, 0.9, block=(4, 4), q_length=20, k_length=28)
    mass = (p * blocks.table()).sum(-1)
    smallest = torch.where(blocks.table(), p, math.inf).amin(-1)
    assert float(mass.min()) >= 0.9 and float((mass - smallest).max()) < 0.9
    one = fa.blocks.coverage(p, 0.0, block=(4, 4), q_length=20, k_length=28)
    assert one.table().sum(-1).unique().tolist() == [1]


def test_vertical_slash_lists_what_the_last_queries_attend():
    q, k = qk()
    table = fa.blocks.vertical_slash(q, k, block=(8, 4), vertical=0.6, slash=0.5).table()
    p = builders._last_rows(q, k, 8)
    columns = builders._covered(p.sum(2) / 8, 0.6, 1)
    sums = torch.zeros(B, HQ, L, dtype=p.dtype)
    for r in range(8):
        for j in range(L - 8 + r + 1):
            sums[:, :, L - 8 + r - j] += p[:, :, r, j]
    slashes = builders._covered(sums / 8, 0.5, 1)
    for h in range(HQ):
        for i in range(-(-L // 8)):
            for j in range(-(-L // 4)):
                queries, keys = range(i * 8, min(L, i * 8 + 8)), range(j * 4, min(L, j * 4 + 4))
                below = keys[0] <= queries[-1]
                kept = bool(columns[0, h, keys[0] : keys[-1] + 1].any()) or j == 0
                kept |= any(a >= b and bool(slashes[0, h, a - b]) for a in queries for b in keys)
                kept |= queries[0] <= keys[-1]
                assert bool(table[0, h, i, j]) == (below and kept)


def test_flexprefill_takes_coverage_or_the_pattern_of_a_head():
    q, k = qk()
    options = {"block": (8, 8), "gamma": 0.7}
    pattern = fa.blocks.vertical_slash(q, k, block=(8, 8), vertical=0.7, slash=0.7).table()
    assert torch.equal(fa.blocks.flexprefill(q, k, tau=0.0, **options).table(), pattern)
    # the square root of a Jensen-Shannon divergence is at most sqrt(log 2) = 0.83
    covered = fa.blocks.flexprefill(q, k, tau=1.0, **options).table()
    pooled = builders._products(builders._pool(q, 8), builders._pool(k, 8)) / math.sqrt(D)
    number = torch.arange(6)
    seen = number <= number[:, None]
    p = pooled.masked_fill(~seen, -math.inf).softmax(-1)
    want = (builders._covered(p, 0.7, 1) | torch.eye(6, dtype=torch.bool) | (number == 0)) & seen
    assert torch.equal(covered, want)


@pytest.mark.parametrize("causal", [False, True])
def test_tree_topk_of_enough_ranges_is_every_block_and_of_few_is_no_more(causal):
    q, k = qk()
    number = torch.arange(11)
    seen = number <= number[:, None] if causal else torch.ones(11, 11, dtype=torch.bool)
    every = fa.blocks.tree_topk(q, k, block=(4, 4), top=11, causal=causal).table()
    assert torch.equal(every, seen.expand_as(every))
    few = fa.blocks.tree_topk(q, k, block=(4, 4), top=2, causal=causal).table()
    # its own block besides, where causal
    assert int(few.sum(-1).max()) <= 2 + causal and bool((few <= seen).all())
    assert bool(few.diagonal(dim1=2, dim2=3).all()) or not causal


def perturbed(q, k, position):
    """Other tokens from a position on."""
    fresh = qk(seed=7)
    return tuple(
        torch.cat([a[:, :, :position], b[:, :, position:]], 2) for a, b in zip((q, k), fresh, strict=True)
    )


def probabilities(q, k):
    """NSA's compressed branch, of blocks of 4."""
    pooled = builders._pool(k, 4)
    done = (torch.arange(L // 4) + 1) * 4 - 1 <= torch.arange(L)[:, None]
    scores = builders._products(q, pooled)[..., : L // 4].masked_fill(~done, -math.inf)
    return scores.softmax(-1).nan_to_num()


BUILDERS = {
    "pooled_topk": lambda q, k: fa.blocks.pooled_topk(q, k, block=(4, 4), top=3),
    "pooled_topk, causal": lambda q, k: fa.blocks.pooled_topk(q, k, block=(4, 4), top=3, causal=True),
    "pooled_topk, causal, other blocks": lambda q, k: fa.blocks.pooled_topk(
        q, k, block=(6, 4), top=4, causal=True
    ),
    "moba": lambda q, k: fa.blocks.moba(q, k, block=4, top=3),
    "nsa": lambda q, k: fa.blocks.nsa(probabilities(q, k), kv_heads=HKV, block=4, top=4, k_length=L),
    "vertical_slash": lambda q, k: fa.blocks.vertical_slash(q, k, block=(4, 4), vertical=0.5, slash=0.5),
    "flexprefill": lambda q, k: fa.blocks.flexprefill(q, k, block=(4, 4), gamma=0.6, tau=0.3),
    "tree_topk": lambda q, k: fa.blocks.tree_topk(q, k, block=(4, 4), top=3),
    "tree_topk, causal": lambda q, k: fa.blocks.tree_topk(q, k, block=(4, 4), top=3, causal=True),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_what_leaks_says_it_and_nothing_else_does(name):
    """Tokens from a position on are replaced: where any list of a query before it changes, among keys before it, lists leak."""
    q, k = qk()
    blocks = BUILDERS[name](q, k)
    changed = False
    for position in range(1, L, 3):
        other = BUILDERS[name](*perturbed(q, k, position))
        before = slice(0, position)
        a, b = (x.to_dense()[:, :, before, before] for x in (blocks, other))
        changed |= not torch.equal(a, b)
    assert changed == (blocks.leaks is not None)


def test_training_with_lists_that_leak_warns():
    q, k = (t.requires_grad_() for t in qk())
    leaking = fa.blocks.pooled_topk(q, k, block=(16, 16), top=2)
    with pytest.warns(
        UserWarning, match="leak the future: a query block's list is chosen by all of its tokens"
    ):
        fa.attention(q, k, k, mask=fa.Mask(causal=True, blocks=leaking))
    quiet = fa.blocks.pooled_topk(q, k, block=(16, 16), top=2, causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fa.attention(q, k, k, mask=fa.Mask(causal=True, blocks=quiet))
        fa.attention(q, k, k, mask=fa.Mask(blocks=leaking))
        with torch.no_grad():
            fa.attention(q, k, k, mask=fa.Mask(causal=True, blocks=leaking))


@pytest.mark.parametrize("name", BUILDERS)
def test_lists_have_no_gradient_and_are_right_in_bf16(name):
    q, k = (t.bfloat16().requires_grad_() for t in qk())
    if name == "nsa":
        return
    blocks = BUILDERS[name](q, k)
    assert blocks.keys.dtype == torch.int32
    assert torch.equal(blocks.table(), BUILDERS[name](q.float(), k.float()).table())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda q, k: fa.blocks.moba(q, k[..., :4], block=4, top=2), ValueError, "k must have q's batch and head dim"),
        (lambda q, k: fa.blocks.moba(q, k, block=0, top=2), ValueError, "block must be an integer of 1 or more"),
        (lambda q, k: fa.blocks.pooled_topk(q, k, block=4, top=2), TypeError, r"block must be \(queries, keys\)"),
        (lambda q, k: fa.blocks.pooled_topk(q, k, block=(4, 4), top=2, pool="sum"), ValueError, "pool must be one of"),
        (lambda q, k: fa.blocks.vertical_slash(q, k, block=(4, 4), slash=1.5), ValueError, r"slash must lie in \[0, 1\]"),
        (lambda q, k: fa.blocks.nsa(q, kv_heads=3, block=4, top=2, k_length=L), ValueError, "kv_heads must divide the 4"),
    ],
)  # fmt: skip
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make(*qk())
