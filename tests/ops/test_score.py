"""fastattn.Score: scores as Python functions against the built-in ones and loops, gradients, statistics of rows, mistakes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import Score, testing
from fastattn.ops.flex import plan
from fastattn.runtime import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
B, H, LENGTH, DIM = 2, 4, 70, 16

# each a function of a captured tensor (H,). Sums that are divided by do not vanish: an error of the difference dO.(v - out), whose terms
# cancel, is multiplied by a weight's derivative over that sum
SCORES = {
    "softmax": lambda t: Score.from_function(lambda x, b, h, q, k: x + t[h] * (k % 5)),
    "softmax of a square": lambda t: Score.from_function(
        lambda x, *places: 2 * x, before=lambda s, b, h, q, k: s * s * t[h]
    ),
    "sigmoid": lambda t: Score.from_function(
        lambda x, row, b, h, q, k: torch.sigmoid(x + t[h]), normalise=None
    ),
    "softplus": lambda t: Score.from_function(
        lambda x, row, b, h, q, k: torch.nn.functional.softplus(x + t[h]), normalise="sum"
    ),
    "relu squared": lambda t: Score.from_function(
        lambda x, row, b, h, q, k: t[h] * torch.relu(x) ** 2, normalise=None
    ),
    "relu squared, divided": lambda t: Score.from_function(
        lambda x, row, b, h, q, k: torch.relu(x + 2 + t[h]) ** 2 + 0.3, normalise="sum"
    ),
    "exponential, undivided": lambda t: Score.from_function(
        lambda x, row, b, h, q, k: torch.exp(x - 3 * t[h].abs()), normalise=None
    ),
    "polynomial": lambda t: Score.from_function(
        lambda x, row, b, h, q, k: 1 + x + t[h] * x**2 - 0.1 * x**3, normalise=None
    ),
    "the product itself": lambda t: Score.from_function(lambda x, *others: x, normalise=None),
    "no score": lambda t: Score.from_function(lambda x, row, b, h, q, k: 1 + t[h].abs() * k, normalise="sum"),
    "by key number": lambda t: Score.from_function(
        lambda x, row, b, h, q, k: torch.exp(torch.tanh(x) - t[h].abs() * (q - k).abs()), normalise="sum"
    ),
    "count": lambda t: Score.from_function(
        lambda x, row, b, h, q, k: torch.sigmoid(x - torch.log(row.count) * t[h]),
        normalise=None,
        statistics=("count",),
    ),
    "mean": lambda t: Score.from_function(
        lambda x, row, b, h, q, k: torch.relu(x - row.mean * t[h]) ** 2 + 0.3,
        normalise="sum",
        statistics=("mean",),
    ),
    "mean of a function": lambda t: Score.from_function(
        lambda x, row, *places: torch.relu(x - row.mean) ** 3 / row.count,
        before=lambda s, b, h, q, k: torch.nn.functional.softplus(s + t[h]),
        normalise=None,
        statistics=("mean", "count"),
    ),
    "max": lambda t: Score.from_function(
        lambda x, row, *places: torch.exp(x - row.max), normalise=None, statistics=("max",)
    ),
    "all of a function": lambda t: Score.from_function(
        lambda x, row, *places: (torch.relu(x - row.mean) / (row.max - row.mean + 0.5)) ** 4 + 1 / row.count,
        before=lambda s, b, h, q, k: torch.tanh(s * (t[h] + 1)) + s,
        normalise="sum",
        statistics=("max", "mean", "count"),
    ),
}

MASKS = {
    "none": lambda length, keys: None,
    "causal": lambda length, keys: fa.Mask(causal=True),
    "window": lambda length, keys: fa.Mask(causal=True, window=(9, None)),
    "prefix": lambda length, keys: fa.Mask(causal=True, prefix_lengths=torch.tensor([min(5, keys), 0])),
    "padding": lambda length, keys: fa.Mask(key_lengths=torch.tensor([keys // 2, 0])),
    "dense": lambda length, keys: fa.Mask(dense=_some(length, keys)),
    "dense and causal": lambda length, keys: fa.Mask(causal=True, dense=_some(length, keys)),
}


def _some(length, keys):
    i, j = torch.arange(length)[:, None], torch.arange(keys)
    return ((i * 7 + j * 3) % 5 != 0) & (i % 11 != 3)  # some rows attend nothing


def packed(length):
    return fa.Mask(causal=True, cu_seqlens_q=torch.tensor([0, length // 3, length // 3, length - 2]))


def inputs(dtype=torch.float32, length=LENGTH, keys=None, dim=DIM, kv_heads=2, batch=B, seed=0):
    return testing.attention_inputs(batch, H, kv_heads, length, keys or length, dim, dtype=dtype, seed=seed)


def run(score, mask, qkv, **options):
    """[out, the gradients of q, k, v and of the tensor (H,) that the score captures]."""
    leaves = [t.detach().requires_grad_() for t in qkv]
    dtype = torch.float64 if leaves[0].dtype == torch.float64 else torch.float32
    captured = torch.tensor([0.5, 0.25, 1.0, 0.75], dtype=dtype, requires_grad=True)
    out = fa.attention(*leaves, score=SCORES[score](captured), mask=mask, **options)
    weights = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).cos().to(out.dtype)
    (out * weights).to(dtype).sum().backward()
    return [out, *(torch.zeros_like(t) if t.grad is None else t.grad for t in (*leaves, captured))]


def check(score, mask, dtype, qkv):
    """The kernel's results against float64, by what eager torch in the same dtype is off by (testing.budget)."""
    truth = run(score, mask, [t.double() for t in qkv])
    eager = run(score, mask, qkv, backend="reference")
    found = run(score, mask, qkv, backend="cpu")
    keys = qkv[1].shape[2]
    for i, (mine, true, plain) in enumerate(zip(found, truth, eager, strict=True)):
        # the captured tensor's gradient is a sum over a head's scores, each a sum over a head dim
        terms = keys if i < 4 else B * qkv[0].shape[2] * keys
        factor = 2.0 if i == 0 else 3.0
        testing.assert_close_to_truth(mine, true, plain, factor=factor, terms=terms, name=f"result {i}")


@pytest.mark.parametrize("score", SCORES)
def test_scores(score, nan_outputs):
    for isa in testing.isas():
        with native.use_cpu_isa(isa):
            check(score, None, torch.float32, inputs())
            check(score, fa.Mask(causal=True), torch.float32, inputs())


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", ("softplus", "relu squared", "all of a function"))
def test_masks(mask, score, nan_outputs):
    check(score, MASKS[mask](LENGTH, LENGTH), torch.float32, inputs())


@pytest.mark.parametrize("score", [n for n in SCORES if not n.startswith("softmax")])
def test_documents(score, nan_outputs):
    check(score, packed(LENGTH), torch.float32, inputs(batch=1))


@pytest.mark.parametrize("score", ("by key number", "no score", "all of a function"))
def test_parts_as_tables(score, monkeypatch, nan_outputs):
    """As in large calls, where what needs no score becomes a table of its own."""
    monkeypatch.setattr(plan, "_LEAST_SCORES", 0)
    plan._plans.clear()
    check(score, fa.Mask(causal=True), torch.float32, inputs())
    plan._plans.clear()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_half_precision(score, dtype, nan_outputs):
    for isa in testing.isas():
        with native.use_cpu_isa(isa):
            check(score, fa.Mask(causal=True), dtype, inputs(dtype))


@pytest.mark.parametrize("queries, keys", ((1, 90), (2, 90), (90, 40), (0, 5), (5, 0), (33, 300)))
@pytest.mark.parametrize("score", ("softplus", "polynomial", "all of a function"))
def test_more_keys_than_queries_and_fewer(score, queries, keys, nan_outputs):
    q, k, v = inputs(length=max(queries, 1), keys=max(keys, 1))
    check(score, fa.Mask(causal=True), torch.float32, (q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]))


@given(
    st.sampled_from(list(SCORES)),
    st.sampled_from(list(MASKS)),
    st.integers(1, 150),
    st.integers(31, 150),  # were all rows of one key, gradients would be what is left of terms that cancel
    st.sampled_from([1, 2, 4]),
    st.sampled_from([8, 24, 64]),
)
def test_lengths_heads_and_masks(score, mask, queries, keys, kv_heads, dim):
    qkv = inputs(length=queries, keys=keys, kv_heads=kv_heads, dim=dim)
    check(score, MASKS[mask](queries, keys), torch.float32, qkv)


# --- the built-in scores, re-written ---------------------------------------------------------------------------------


def differentiated(call, qkv):
    leaves = [t.detach().requires_grad_() for t in qkv]
    out = call(*leaves)
    weights = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).cos().to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def _unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def lssar(length_scale, power):
    """LSSAR as fa.lssa_attention has it, of normalised queries and keys: relu(s - mean)^power; few keys have no offset. The highest
    weight is 1, as a power would underflow."""

    def weight(x, row, *places):
        offset = torch.where(row.count > 3, row.mean, 0.0)
        return (torch.relu(x - offset) / (row.max - offset)) ** power

    def before(s, b, h, q, k):
        return torch.nn.functional.softplus(length_scale * torch.log(count_of(q)) * s)

    def count_of(q):  # of a causal sequence
        return (q + 1).double()

    return Score.from_function(weight, before=before, normalise="sum", statistics=("mean", "max", "count"))


def by_lssar(q, k, v, power=15):
    score = lssar(math.log(q.shape[-1]), power)
    return fa.attention(_unit(q), _unit(k), v, score=score, scale=1.0, mask=fa.Mask(causal=True))


BUILT_IN = {
    "softmax": (
        lambda *t: fa.attention(*t, mask=fa.Mask(causal=True)),
        lambda *t: fa.attention(
            *t, score=Score.from_function(lambda x, *places: x), mask=fa.Mask(causal=True)
        ),
    ),
    "softmax by its maximum": (
        lambda *t: fa.attention(*t, mask=fa.Mask(causal=True)),
        lambda *t: fa.attention(
            *t,
            score=Score.from_function(
                lambda x, row, *places: torch.exp(x - row.max), normalise="sum", statistics=("max",)
            ),
            mask=fa.Mask(causal=True),
        ),
    ),
    "sigmoid": (
        lambda *t: fa.attention(*t, score="sigmoid"),
        lambda q, k, v: fa.attention(
            q,
            k,
            v,
            score=Score.from_function(
                lambda x, row, *places: torch.sigmoid(x - torch.log(row.count)),
                normalise=None,
                statistics=("count",),
            ),
        ),
    ),
    "softplus": (
        lambda *t: fa.attention(*t, score="softplus", mask=fa.Mask(causal=True)),
        lambda *t: fa.attention(
            *t,
            score=Score.from_function(
                lambda x, row, *places: torch.nn.functional.softplus(x), normalise="sum"
            ),
            mask=fa.Mask(causal=True),
        ),
    ),
    "LSSAR": (lambda *t: fa.lssa_attention(*t, power=15, mask=fa.Mask(causal=True)), by_lssar),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_scores_in_float64(name):
    own, written = BUILT_IN[name]
    qkv = [t.double() for t in inputs()]
    for a, b in zip(differentiated(own, qkv), differentiated(written, qkv), strict=True):
        # 70 terms of size 1, a few roundings each; the power of LSSAR takes 15 times as many
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_scores_on_the_kernels(name, nan_outputs):
    """Both are within the budget of the one truth."""
    own, written = BUILT_IN[name]
    truth = differentiated(own, [t.double() for t in inputs()])
    with fa.set_backend("reference"):
        eager = differentiated(written, inputs())
    for i, (mine, true, plain) in enumerate(
        zip(differentiated(written, inputs()), truth, eager, strict=True)
    ):
        factor = 3.0 if i else 2.0
        testing.assert_close_to_truth(mine, true, plain, factor=factor, terms=LENGTH, name=f"{name} {i}")


# --- rows, sums and statistics ---------------------------------------------------------------------------------------


def test_loops():
    """Out and statistics, written as sums."""
    q, k, v = (t.double() for t in inputs(length=7, keys=9))
    score = Score.from_function(
        lambda x, row, b, h, i, j: (x - row.mean) * row.count + row.max * (i + j),
        before=lambda s, b, h, i, j: s * (h + 1),
        normalise=None,
        statistics=("mean", "max", "count"),
    )
    found = fa.attention(q, k, v, score=score, scale=0.3, mask=fa.Mask(causal=True))
    for b in range(B):
        for h in range(H):
            for i in range(7):
                keys = range(i + 2 + 1)  # the last query is aligned with the last key
                x = [0.3 * float(q[b, h, i] @ k[b, h // 2, j]) * (h + 1) for j in keys]
                mean, most, count = sum(x) / len(x), max(x), len(x)
                weights = [(x[j] - mean) * count + most * (i + j) for j in keys]
                expected = sum(w * v[b, h // 2, j] for w, j in zip(weights, keys, strict=True))
                torch.testing.assert_close(found[b, h, i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_rows_of_nothing_and_sums_of_nothing(backend, nan_outputs):
    """A row that attends no key, and one whose weights are all 0 or add up to 0, give 0 and gradient 0."""
    q, k, v = inputs(length=40)
    with torch.no_grad():
        q[:, :, 5] = 0  # scores of 0
    mask = fa.Mask(dense=torch.arange(40)[:, None].expand(40, 40) != 11)
    for weight in (
        lambda x, row, *places: torch.relu(x),
        lambda x, row, b, h, i, j: torch.where(i == 5, j % 2 * 2.0 - 1.0, torch.relu(x)),
        lambda x, row, *places: torch.exp(x) * (places[2] != 5),
    ):
        score = Score.from_function(weight, normalise="sum")
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = fa.attention(*leaves, score=score, mask=mask, backend=backend)
        out.sum().backward()
        for row in (5, 11):
            assert not out[:, :, row].any() and not leaves[0].grad[:, :, row].any()
        assert all(t.grad.isfinite().all() for t in leaves) and out[:, :, 6].any()
    nothing = fa.Mask(key_lengths=torch.tensor([0, 40]))
    out = fa.attention(
        q, k, v, score=Score.from_function(lambda x, row, *p: x * 0 + 1, normalise="sum"), mask=nothing
    )
    assert not out[0].any()
    torch.testing.assert_close(out[1, 0], v[1, 0].mean(0).expand(40, -1), rtol=1e-5, atol=1e-6)


def test_weights_below_0_are_divided_by_their_sum():
    qkv = inputs()
    negative = Score.from_function(lambda x, row, *places: -torch.exp(x), normalise="sum")
    positive = Score.from_function(lambda x, row, *places: torch.exp(x), normalise="sum")
    for a, b in zip(
        differentiated(lambda *t: fa.attention(*t, score=negative), qkv),
        differentiated(lambda *t: fa.attention(*t, score=positive), qkv),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("isa", testing.isas())
def test_the_first_of_equal_maxima_has_the_gradient(isa):
    q, k, v = (t.detach() for t in inputs(length=50, keys=300))
    k[:, :, 200:] = k[:, :, :100]  # some maxima are there twice
    score = Score.from_function(lambda x, row, *places: row.max * 0.01, normalise=None, statistics=("max",))
    with native.use_cpu_isa(isa):
        found = differentiated(lambda *t: fa.attention(*t, score=score, backend="cpu"), (q, k, v))
    true = differentiated(lambda *t: fa.attention(*t, score=score), [t.double() for t in (q, k, v)])
    first = true[2][:, :, :100].abs().sum(-1) > 0
    assert first.any() and not found[2][:, :, 200:].any()
    for a, b in zip(found, true, strict=True):
        testing.assert_close_to_truth(a, b, None, terms=300, magnitude=3.0 * float(b.abs().max()))


def test_softmax_has_a_lse():
    q, k, v = inputs()
    score = Score.from_function(lambda x, *places: 2 * x, before=lambda s, *places: s + 1)
    out, lse = fa.attention(q, k, v, score=score, return_lse=True)
    expected, of_rows = fa.attention(q, k, v, scale=2 / math.sqrt(DIM), bias=2.0, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)  # other roundings of 70 terms of size 1
    torch.testing.assert_close(lse, of_rows, rtol=1e-5, atol=2e-6)


def test_a_scale_of_each_query():
    q, k, v = inputs()
    scale = torch.rand(1, H, LENGTH, 1, requires_grad=True)
    score = Score.from_function(lambda x, row, *places: torch.relu(x), normalise=None)
    found = fa.attention(q, k, v, score=score, scale=scale)
    torch.testing.assert_close(found, fa.attention(q * scale, k, v, score=score, scale=1.0))
    found.sum().backward()
    assert scale.grad.any()


# --- what is asked and told ------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    q, k, v = inputs(length=8)
    with pytest.raises(TypeError, match=r"fastattn\.Score: weight must be a function, given int 3"):
        Score.from_function(3)
    with pytest.raises(TypeError, match="before must be a function or None"):
        Score.from_function(torch.relu, before="x")
    with pytest.raises(ValueError, match='normalise must be "softmax", "sum" or None, given True'):
        Score.from_function(torch.relu, normalise=True)
    with pytest.raises(ValueError, match="statistics must be of mean, max, count, given 'median'"):
        Score.from_function(torch.relu, normalise="sum", statistics=("median",))
    with pytest.raises(ValueError, match='statistics go with normalise="sum" and None'):
        Score.from_function(torch.relu, statistics=("mean",))
    score = Score.from_function(lambda x, row, *places: torch.relu(x), normalise="sum")
    options = {"bias": 1.0, "softcap": 2.0, "sink": 0.0, "dropout_p": 0.5}
    for name, value in options.items():
        with pytest.raises(NotImplementedError, match=f"fastattn.attention: {name} does not go with a Score"):
            fa.attention(q, k, v, score=score, **{name: value})
    with pytest.raises(ValueError, match="return_lse is not defined for a Score of normalise='sum'"):
        fa.attention(q, k, v, score=score, return_lse=True)
    with pytest.raises(NotImplementedError, match="the cpu backend does not serve a Score in float64"):
        fa.attention(q.double(), k.double(), v.double(), score=score, backend="cpu")
    with pytest.raises(AttributeError, match=r"row has no 'mean'; statistics=\('mean',\) of the Score asks"):
        fa.attention(q, k, v, score=Score.from_function(lambda x, row, *p: x - row.mean, normalise=None))
    with pytest.raises(ValueError, match=r"score must be one of 'softmax', 'sigmoid', 'softplus'"):
        fa.attention(q, k, v, score="relu")


def _branches(x, row, b, h, q, k):
    return x if q > k else -x


@pytest.mark.parametrize("place", ("weight", "before"))
def test_refusals_name_the_line(place):
    q, k, v = inputs(length=8)
    functions = {
        "weight": lambda x, row, *places: x,
        "before": None,
        place: _branches if place == "weight" else lambda *a: _branches(a[0], None, *a[1:]),
    }
    score = Score.from_function(**functions, normalise=None, statistics=("mean",))
    with pytest.raises(
        NotImplementedError, match=r"^fastattn.attention: the score \(.*test_score.py:\d+"
    ) as error:
        fa.attention(q, k, v, score=score)
    assert 'backend="reference"' in str(error.value)


def test_what_is_said_of_a_score():
    score = Score.from_function(_branches, normalise=None, statistics=("mean",))
    assert repr(score) == "Score.from_function(_branches, normalise=None, statistics=('mean',))"
    assert score == Score.from_function(_branches, normalise=None, statistics=["mean"]) and hash(score)
    q, k, v = inputs()
    relu = Score.from_function(
        lambda x, row, *places: torch.relu(x) - row.mean, normalise="sum", statistics="mean"
    )
    told = str(fa.explain(fa.attention, q, k, v, score=relu, mask=fa.Mask(causal=True)))
    assert told.startswith("score_attention: cpu backend")
    for words in ("mask: causal", "weights: divided by their row sum", "tables["):
        assert words in told
    assert fa.explain("attention", q, k, v, score=relu, backend="reference").backend == "reference"


def test_check_score():
    t = torch.rand(H, requires_grad=True)
    for make in SCORES.values():
        testing.check_score(make(t))
    with pytest.raises(NotImplementedError, match="a branch"):
        testing.check_score(Score.from_function(_branches, normalise=None))


def test_compiled_code_breaks_its_graph():
    score = Score.from_function(
        lambda x, row, *places: torch.relu(x - row.mean), normalise="sum", statistics=("mean",)
    )
    q, k, v = inputs()

    def call(q, k, v):
        return fa.attention(q * 2, k, v, score=score, mask=fa.Mask(causal=True)) + 1

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, backend="eager")(q, k, v), call(q, k, v))


def test_the_ops():
    q, k, v = (t.detach().requires_grad_() for t in inputs(length=9))
    t = torch.rand(H, requires_grad=True)
    from fastattn.ops.flex import by_function

    for normalised in (True, False):
        weight = SCORES["softplus"](t).of({})
        _, plan, tables, indices = by_function.prepared(weight, q, k, fa.Mask().args("test", q, k))
        members = (q, k, v, tables.detach().requires_grad_(), indices, plan.program, normalised, 0.25)
        torch.library.opcheck(torch.ops.fastattn.score_attention.default, (*members, *plan.mask, ""))
    members = (q.detach(), k.detach(), tables.detach(), indices, plan.program, 0.25)
    torch.library.opcheck(torch.ops.fastattn.row_maximum.default, (*members, *plan.mask, ""))


@pytest.mark.parametrize("statistics", [("count",), ("mean",), ("max",)])
def test_block_lists_are_the_mask_that_they_list(statistics):
    """The kernels refuse lists, and the definition serves them; a count is of the keys that are listed."""
    score = fa.Score.from_function(
        lambda x, row, b, h, q, k: torch.sigmoid(x - getattr(row, statistics[0])),
        normalise="sum",
        statistics=statistics,
    )
    q, k, v = testing.attention_inputs(2, 4, 2, 40, 50, 16)
    dense = torch.rand(2, 4, 3, 4) < 0.5
    blocks = fa.Blocks.from_dense(dense, block=(16, 16), q_length=40, k_length=50)
    results = [
        testing.differentiate(lambda *x, mask=mask: fa.attention(*x, score=score, mask=mask), (q, k, v))
        for mask in (fa.Mask(blocks=blocks), fa.Mask(dense=blocks.to_dense()))
    ]
    for listed, plain in zip(*([*outputs, *grads] for outputs, grads in results), strict=True):
        # sums of 50 terms, in one order or another
        torch.testing.assert_close(listed, plain, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="it does not serve block lists"):
        fa.attention(q, k, v, score=score, mask=fa.Mask(blocks=blocks), backend="cpu")
