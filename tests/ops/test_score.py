"""fastattn.Score: scores as Python functions against the built-in ones and loops, gradients, statistics of rows, mistakes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import Score, testing
from fastattn.runtime import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
B, H, LENGTH, DIM = 2, 4, 70, 16

# each a function of a captured tensor (H,). Sums of weights that are divided by do not vanish: an error of the product dO.(v - out),
# whose terms cancel, is multiplied by a weight's derivative over that sum (`cancelling` has it where they do)
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
        lambda x, row, b, h, q, k: torch.relu(x + 2 + t[h]) ** 2, normalise="sum"
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


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_half_precision(score, dtype, nan_outputs):
    for isa in testing.isas():
        with native.use_cpu_isa(isa):
            check(score, fa.Mask(causal=True), dtype, inputs(dtype))


@pytest.mark.parametrize("queries, keys", ((1, 90), (2, 90), (90, 40), (0, 5), (5, 0), (33, 300)))
@pytest.mark.parametrize("score", ("softplus", "polynomial", "all of a function"))
def test_more_keys_than_queries_and_fewer(score, queries, keys, nan_outputs):
    check(
        score,
        fa.Mask(causal=True),
        torch.float32,
        inputs(length=queries, keys=keys or None)
        if keys
        else [t[:, :, : (queries if i == 0 else 0)] for i, t in enumerate(inputs(length=queries))],
    )


@given(
    st.sampled_from(list(SCORES)),
    st.sampled_from(list(MASKS)),
    st.integers(1, 150),
    st.integers(1, 150),
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
