"""Attention over block lists: the definition against dense masks, kernels against the definition, what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn import masks, testing

SCORES = ("softmax", "sigmoid", "softplus")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_blocks(block, lengths, batch=1, heads=1, share=0.4, seed=0):
    counts = (-(-n // size) for n, size in zip(lengths, block, strict=True))
    table = torch.rand(batch, heads, *counts, generator=torch.Generator().manual_seed(seed)) < share
    return fa.Blocks.from_dense(table, block=block, q_length=lengths[0], k_length=lengths[1])


@given(problem=testing.attention_problems(("blocks",), max_len=30, block_sizes=(1, 3, 16)))
def test_the_definition_is_the_dense_mask_of_the_same_pairs(problem):
    q, k, _ = problem.inputs(requires_grad=False)
    mask = problem.mask()
    blocks = mask.blocks
    found = masks.dense_allowed(q.shape[2], k.shape[2], q.device, mask.args("attention", q, k))
    options = {name: n for name, n in problem.mask_options.items() if name != "blocks"}
    rest = type(problem)(**{**vars(problem), "mask_options": options}).mask() or fa.Mask()
    without = masks.dense_allowed(q.shape[2], k.shape[2], q.device, rest.args("attention", q, k))
    listed = blocks.to_dense()
    if blocks.heads > 1:
        listed = listed[:, torch.arange(q.shape[1]) * blocks.heads // q.shape[1]]
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    assert torch.equal(found.expand(full), (without & listed).expand(full))


@pytest.mark.parametrize(
    "op", ["softplus_attention", "lssa_attention", "gated_attention", "grouped_attention"]
)
def test_other_ops_take_lists_by_their_definition(op):
    q, k, v = testing.attention_inputs(2, 4, 2, 20, 20, 8)
    blocks = random_blocks((4, 4), (20, 20), batch=2, heads=2, share=0.6)
    more = {"mask": fa.Mask(causal=True, blocks=blocks)}
    listed = blocks.to_dense().repeat_interleave(2, 1)
    dense = {"mask": fa.Mask(causal=True, dense=listed)}
    arguments = ()
    if op == "gated_attention":
        arguments = (torch.rand(2, 20, 3),)
        more["window"] = dense["window"] = 3
    if op == "grouped_attention":
        arguments = (torch.randint(1, 8, (2, 20)),)
        more["window"] = dense["window"] = 3
    function = getattr(fa, op)
    out = function(q, k, v, *arguments, **more)
    want = function(q, k, v, *arguments, **dense, backend="reference")
    assert torch.equal(out, want)
    grads = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, want)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert "it does not serve block lists" in str(fa.explain(function, q, k, v, *arguments, **more))


def test_flex_attention_takes_lists():
    q, k, v = testing.attention_inputs(1, 4, 2, 40, 48, 8)
    blocks = random_blocks((16, 16), (40, 48), heads=4)
    mask = fa.Mask(blocks=blocks)
    score = lambda s, b, h, i, j: s * 0.5 + i - j  # noqa: E731
    for mod in (None, score):
        out = fa.flex_attention(q, k, v, mod, mask, enable_gqa=True)
        dense = fa.Mask(dense=blocks.to_dense())
        want = fa.flex_attention(q, k, v, mod, dense, enable_gqa=True)
        # two orders of the same sums of at most 48 terms
        assert testing.max_error(out, want) < 1e-5


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (lambda: random_blocks((4, 4), (7, 9)), "blocks has q_length 7, the call has 8"),
        (lambda: random_blocks((4, 4), (8, 8)), "blocks has k_length 8, the call has 9"),
        (lambda: random_blocks((4, 4), (8, 9), batch=3), "blocks has a batch of 3, q has 2"),
        (
            lambda: random_blocks((4, 4), (8, 9), heads=3),
            "blocks has 3 heads; give 1, the 2 key heads or the 4",
        ),
    ],
)
def test_lists_of_another_call_are_refused(blocks, message):
    q, k, v = testing.attention_inputs(2, 4, 2, 8, 9, 8)
    with pytest.raises(ValueError, match=message):
        fa.attention(q, k, v, mask=fa.Mask(blocks=blocks()))


def test_explain_says_how_long_the_lists_are():
    q, k, v = testing.attention_inputs(1, 4, 2, 8, 12, 8)
    table = torch.tensor([[1, 0, 1], [1, 1, 1]]).bool()
    blocks = fa.Blocks.from_dense(table, block=(4, 4), q_length=8, k_length=12)
    text = str(fa.explain("attention", q, k, v, mask=fa.Mask(blocks=blocks)))
    assert "block lists of 4 x 4: density 0.833, 2.5 key blocks a row, at most 3" in text


def test_other_things_are_no_blocks():
    with pytest.raises(TypeError, match=r"blocks must be a fastattn.Blocks, given a bool tensor"):
        fa.Mask(blocks=torch.ones(2, 2, dtype=torch.bool))
    assert "blocks=Blocks(block=(4, 4)" in repr(fa.Mask(blocks=random_blocks((4, 4), (8, 9))))


def raw(q, k, v, offsets, keys, block=(4, 4), heads=1, group=4):
    """The op itself, whose lists nobody has checked."""
    mask = masks.Mask().args("attention", q, k)
    mask = mask._replace(
        list_offsets=offsets,
        list_keys=keys,
        list_q=block[0],
        list_k=block[1],
        list_heads=heads,
        list_group=group,
    )
    from fastattn.runtime.registry import call

    return call("attention", q, k, v, None, None, 0, 1.0, 0.0, None, 0, None, mask, "")


@pytest.mark.parametrize(
    ("offsets", "keys", "options", "error", "message"),
    [
        ([0, 1], [0], {}, ValueError, "list_offsets must have 3 entries, or 5"),
        ([0, 1, 2], None, {}, ValueError, "must be given together"),
        ([0, 1, 2], [0, 1], {"block": (0, 4)}, ValueError, r"must lie in \[1, 2\*\*31\), given 0 and 4"),
        ([0, 1, 2], [0, 1], {"heads": 2, "group": 1}, ValueError, "list_heads must be 1"),
        ([0, 1, 2], [0, 1], {"heads": 1, "group": 2}, ValueError, "list_heads must be 1"),
        ([0, 1, 2], [0.0, 1.0], {}, TypeError, "list_keys must be int32"),
    ],
)
def test_the_op_checks_sizes(offsets, keys, options, error, message):
    q, k, v = testing.attention_inputs(2, 4, 2, 8, 9, 8, requires_grad=False)
    keys = (
        None if keys is None else torch.tensor(keys, dtype=torch.int32 if isinstance(keys[0], int) else None)
    )
    with pytest.raises(error, match=message):
        raw(q, k, v, torch.tensor(offsets, dtype=torch.int32), keys, **options)


@pytest.mark.parametrize("made", ["outside", "inside"])
@pytest.mark.parametrize("block", [(4, 4), (32, 16)])
def test_compiles_whole(made, block):
    torch._dynamo.reset()
    q, k, v = testing.attention_inputs(2, 4, 2, 40, 50, 8)
    table = random_blocks(block, (40, 50), batch=2, heads=2, share=0.6).table()

    def lists(table):
        return fa.Blocks.from_dense(table, block=block, q_length=40, k_length=50)

    outside = fa.Mask(causal=True, blocks=lists(table))

    def call(q, k, v, table):
        mask = outside if made == "outside" else fa.Mask(causal=True, blocks=lists(table))
        return fa.attention(q, k, v, mask=mask)

    compiled = torch.compile(call, fullgraph=True)
    for seed in range(2):
        # lists of other contents, and inside of another number, are followed
        if made == "inside":
            table = random_blocks(
                block, (40, 50), batch=2, heads=2, share=0.3 + 0.5 * seed, seed=seed
            ).table()
        results = []
        for function in (compiled, call):
            out = function(q, k, v, table)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    q, k, v = testing.attention_inputs(2, 4, 2, 40, 50, 8)
    blocks = random_blocks((32, 16), (40, 50), heads=2, share=0.6)
    mask = fa.Mask(blocks=blocks).args("attention", q, k)
    members = (q, k, v, None, None, 0, 1.0, 0.0, None, 0, None, *mask, "")
    torch.library.opcheck(torch.ops.fastattn.attention.default, members)


def attention(backend, score, mask, **options):
    def op(q, k, v):
        return fa.attention(
            q, k, v, score=score, mask=mask, return_lse=score != "sigmoid", backend=backend, **options
        )

    return op


@settings(max_examples=25)
@given(
    problem=testing.attention_problems(("blocks",), max_len=200, block_sizes=(16, 18, 32, 64, 100)),
    score=st.sampled_from(SCORES),
    dtype=st.sampled_from(DTYPES),
)
def test_kernels_are_within_the_error_budget(isa, nan_outputs, problem, score, dtype):
    mask = problem.mask()
    testing.check_op(
        # lists of packed documents are the definition's
        attention(None if mask.packed else "cpu", score, mask),
        attention("reference", score, mask),
        problem.inputs(dtype),
        terms=problem.k_len * max(1, problem.heads // problem.kv_heads) + problem.q_len + problem.head_dim,
        names=("q", "k", "v"),
    )


@pytest.mark.parametrize("block", [(32, 16), (1, 16), (33, 26)])
@pytest.mark.parametrize("options", ["bias", "softcap", "sink", "dropout", "flex"])
def test_options_and_their_gradients(isa, block, options):
    lq, lk = 70, 90
    q, k, v = testing.attention_inputs(1, 4, 2, lq, lk, 16)
    blocks = random_blocks(block, (lq, lk), heads=4, share=0.5)
    bias = testing.random_tensor(1, 4, lq, lk, seed=5, requires_grad=options == "bias")
    sink = testing.random_tensor(4, seed=6, requires_grad=options == "sink")
    more = {
        "bias": {"bias": bias},
        "softcap": {"softcap": 2.0},
        "sink": {"sink": sink},
        "dropout": {"dropout_p": 0.25, "rng": torch.tensor([3, 4])},
    }.get(options, {})
    leaves = [t for t in (q, k, v, bias, sink) if t.requires_grad]
    results = []
    for backend in ("cpu", "reference"):
        if options == "flex":
            score = lambda s, b, h, i, j: s * 0.7 + (j - i) * 0.01  # noqa: E731
            out = fa.flex_attention(q, k, v, score, fa.Mask(causal=True, blocks=blocks), enable_gqa=True)
            if backend == "reference":
                dense = fa.Mask(causal=True, dense=blocks.to_dense())
                wide = (t.detach().double().requires_grad_() for t in (q, k, v))
                q, k, v = leaves = tuple(wide)
                out = fa.flex_attention(q, k, v, score, dense, enable_gqa=True)
        else:
            out = fa.attention(q, k, v, mask=fa.Mask(causal=True, blocks=blocks), backend=backend, **more)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        # float32 sums of at most 90 terms of size 10, two orders
        assert testing.max_error(a, b) < 90 * 10 * 2**-22


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("block", [(32, 16), (16, 64), (33, 26)])
def test_what_no_list_has_is_not_read(isa, score, block):
    """NaN in keys and values that no query lists reaches no result, and other keys' gradients are as without."""
    q, k, v = testing.attention_inputs(1, 2, 1, 100, 200, 16, requires_grad=False)
    table = random_blocks(block, (100, 200), share=0.6, seed=3).table()
    table[..., 1] = False
    blocks = fa.Blocks.from_dense(table, block=block, q_length=100, k_length=200)
    unlisted = ~blocks.to_dense()[0, 0].any(0)
    results = []
    for fill in (0.0, math.nan):
        inputs = [q, *(t.masked_fill(unlisted[:, None], fill) for t in (k, v))]
        inputs = [t.clone().requires_grad_() for t in inputs]
        out = fa.attention(*inputs, score=score, mask=fa.Mask(blocks=blocks), backend="cpu")
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and bool(a.isfinite().all())


def test_full_lists_of_the_kernels_own_tiles_are_plain_attention_bit_for_bit():
    q, k, v = testing.attention_inputs(1, 4, 2, 300, 400, 32)
    values = fa.explain("attention", q, k, v).config
    assert values["block_q"] % 6 == 0 and values["block_k"] % 64 == 0
    block = values["block_q"], values["block_k"]
    full = random_blocks(block, (300, 400), share=1.1)
    for causal in (False, True):
        masks = fa.Mask(causal=causal, blocks=full), fa.Mask(causal=causal)
        a, b = (fa.attention(q, k, v, mask=mask, backend="cpu") for mask in masks)
        assert torch.equal(a, b)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_kernels_are_deterministic(heads):
    q, k, v = testing.attention_inputs(1, 4, 2, 300, 300, 32)
    mask = fa.Mask(causal=True, blocks=random_blocks((32, 32), (300, 300), heads=heads))
    runs = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = fa.attention(q, k, v, mask=mask, backend="cpu")
            runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(runs[1], runs[2], strict=True))
    assert torch.equal(runs[0][0], runs[1][0])


@pytest.mark.parametrize(
    ("block", "mask", "reason"),
    [
        ((4, 1), {}, "it serves lists of blocks of 16 keys or more, an even number, not of 1"),
        ((4, 17), {}, "it serves lists of blocks of 16 keys or more, an even number, not of 17"),
        ((4, 16), {"cu_seqlens_q": torch.tensor([0, 20, 40])}, "it does not serve lists of packed documents"),
    ],
)
def test_what_the_kernels_do_not_serve_is_the_definitions(block, mask, reason):
    q, k, v = testing.attention_inputs(1, 2, 2, 40, 40, 8)
    mask = fa.Mask(blocks=random_blocks(block, (40, 40)), **mask)
    assert reason in str(fa.explain("attention", q, k, v, mask=mask))
    with pytest.raises(NotImplementedError, match=reason):
        fa.attention(q, k, v, mask=mask, backend="cpu")


@pytest.mark.parametrize(
    ("offsets", "keys", "message"),
    [
        ([0, 2, 1], [0, 1], "list_keys must lie in"),
        ([0, 1, 3], [0, 1], "list_keys must lie in"),
        ([0, 1, 2], [0, 3], r"list_keys must lie in \[0, 2\], given 3 at position 1"),
        ([0, 2, 2], [1, 0], r"list_keys must lie in \[2, 2\], given 0 at position 1"),
        ([1, 2, 2], [1, 0], "list_keys must lie in"),
    ],
)
def test_kernels_trust_no_list(offsets, keys, message):
    q, k, v = testing.attention_inputs(2, 4, 2, 8, 40, 8, requires_grad=False)
    offsets, keys = (torch.tensor(t, dtype=torch.int32) for t in (offsets, keys))
    with pytest.raises(ValueError, match=message):
        raw(q, k, v, offsets, keys, block=(4, 16))
