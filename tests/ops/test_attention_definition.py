"""The definition of attention against an independent loop in float64, its gradients, registration and errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import masks, testing
from fastattn.ops.attention.scores import SCORES

WEIGHTS = {
    "softmax": torch.exp,
    "sigmoid": lambda s: 1 / (1 + torch.exp(-s)),
    "softplus": lambda s: torch.log1p(torch.exp(s)),
}


def by_rows(q, k, v, score, allowed, scale, bias):
    """Row by row over the keys it attends: (out, lse)."""
    batch, heads, lq, _ = q.shape
    group = heads // k.shape[1]
    out, lse = q.new_zeros(batch, heads, lq, v.shape[3]), q.new_full((batch, heads, lq), -math.inf)
    for b in range(batch):
        for h in range(heads):
            for i in range(lq):
                keys = allowed[b, i].nonzero()[:, 0]
                if len(keys) == 0:
                    continue
                w = WEIGHTS[score](scale * (k[b, h // group, keys] @ q[b, h, i]) + bias)
                total = w.sum() if SCORES[score].normalised else w.new_ones(())
                out[b, h, i] = (w / total) @ v[b, h // group, keys]
                lse[b, h, i] = total.log()
    return out, lse


@pytest.mark.parametrize("score", WEIGHTS)
@given(
    problem=testing.attention_problems(
        (*testing.MASK_KINDS, "blocks"), max_len=12, head_dims=(1, 3, 8), block_sizes=(1, 2, 5)
    ),
    scale=st.sampled_from((None, 0.5)),
)
def test_definition(score, problem, scale):
    q, k, v = problem.inputs(torch.float64, requires_grad=False)
    mask = problem.mask() or fa.Mask()
    allowed = masks.dense_allowed(q.shape[2], k.shape[2], q.device, mask.args("attention", q, k))
    allowed = allowed.expand(q.shape[0], q.shape[1], -1, -1)
    factor = 1 / math.sqrt(problem.head_dim) if scale is None else scale
    bias = 0.25  # a number of the caller's replaces every default
    outputs = fa.attention(
        q,
        k,
        v,
        score=score,
        scale=scale,
        bias=bias,
        mask=mask,
        return_lse=SCORES[score].normalised,
        backend="reference",
    )
    for h in range(q.shape[1]):
        kv = h // (q.shape[1] // k.shape[1])
        one = (q[:, h : h + 1], k[:, kv : kv + 1], v[:, kv : kv + 1])
        out, lse = by_rows(*one, score, allowed[:, h], factor, bias)
        found = outputs if not SCORES[score].normalised else outputs[0]
        # sums of at most 12 terms below e^4 in float64
        assert testing.max_error(found[:, h : h + 1], out) < 1e-12
        if SCORES[score].normalised:
            assert testing.max_error(outputs[1][:, h : h + 1], lse) < 1e-12


def test_softmax_is_torchs_attention():
    q, k, v = testing.attention_inputs(2, 4, 2, 9, 11, 8, dtype=torch.float64, requires_grad=False)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert testing.max_error(fa.attention(q, k, v, backend="reference"), expected) < 1e-14


def test_sigmoids_default_bias_is_minus_log_of_the_sequences_keys():
    q, k, v = testing.attention_inputs(2, 1, 1, 3, 7, 4, dtype=torch.float64, requires_grad=False)
    with fa.set_backend("reference"):
        assert torch.equal(fa.sigmoid_attention(q, k, v), fa.sigmoid_attention(q, k, v, bias=-math.log(7)))
        lengths = fa.Mask(key_lengths=torch.tensor([5, 2]))
        found = fa.sigmoid_attention(q, k, v, mask=lengths)
        for b, n in ((0, 5), (1, 2)):
            row = fa.sigmoid_attention(
                q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], bias=-math.log(n)
            )
            assert testing.max_error(found[b : b + 1], row) < 1e-14


@pytest.mark.parametrize("score", WEIGHTS)
def test_a_tensor_bias_is_added_and_has_a_gradient(score):
    q, k, v = testing.attention_inputs(2, 2, 2, 3, 4, 3, dtype=torch.float64)
    bias = testing.random_tensor(2, 1, 3, 4, dtype=torch.float64, seed=9, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: fa.attention(*x[:3], score=score, bias=x[3], backend="reference"), (q, k, v, bias)
    )


@pytest.mark.parametrize("score", WEIGHTS)
def test_gradcheck_with_lse_grouped_queries_and_an_empty_row(score):
    q, k, v = testing.attention_inputs(2, 4, 2, 5, 4, 3, 2, dtype=torch.float64)
    mask = fa.Mask(causal=True, window=(2, None))  # row 0 attends nothing
    lse = SCORES[score].normalised

    def call(q, k, v):
        found = fa.attention(q, k, v, score=score, mask=mask, return_lse=lse, backend="reference")
        return (found[0], found[1][:, :, 1:]) if lse else found

    assert torch.autograd.gradcheck(call, (q, k, v))
    out = fa.attention(q, k, v, score=score, mask=mask, backend="reference")
    assert not out[:, :, 0].any()
    (grad,) = torch.autograd.grad(out[:, :, 0].sum(), (q,), materialize_grads=True)
    assert not grad.any()


@pytest.mark.parametrize("backend", ["reference", ""])
@pytest.mark.parametrize("score", WEIGHTS)
def test_opcheck(score, backend):
    q, k, v = testing.attention_inputs(2, 4, 2, 5, 6, 8)
    mask = fa.Mask(
        prefix_lengths=torch.tensor([2, 3]), window=(4, None), dense=torch.ones(5, 6, dtype=torch.bool)
    )
    code = SCORES[score].code
    sink = torch.tensor([0.5, -1.0, 0.0, 2.0], requires_grad=True) if score == "softmax" else None
    rng = torch.tensor([7, 1])
    options = (code, 0.5, None, 3.0, 9000, rng, *mask.args("attention", q, k))
    torch.library.opcheck(torch.ops.fastattn.attention.default, (q, k, v, None, sink, *options, backend))
    detached = [t if t is None else t.detach() for t in (q, k, v, None, sink)]
    out, *saved = torch.ops.fastattn.attention(*detached, *options, backend)
    grad_lse = None if not SCORES[score].normalised else torch.ones_like(saved[0])
    torch.library.opcheck(
        torch.ops.fastattn.attention_backward.default,
        (torch.ones_like(out), grad_lse, *detached, out, *saved, *options, 2 * (sink is not None), backend),
    )


@pytest.mark.parametrize("mask_inside", [True, False])
@pytest.mark.parametrize("score", WEIGHTS)
def test_compiles_without_a_graph_break(score, mask_inside):
    q, k, v = testing.attention_inputs(1, 2, 1, 8, head_dim=8)
    outside = fa.Mask(cu_seqlens_q=torch.tensor([0, 3, 8]), prefix_lengths=torch.tensor([1, 4]))

    def call(q, k, v):
        mask = fa.Mask(causal=True, window=(3, None)) if mask_inside else outside
        return fa.attention(q, k, v, score=score, mask=mask) * 2

    eager, eager_gradients = testing.differentiate(call, (q, k, v))
    found, gradients = testing.differentiate(
        torch.compile(call, fullgraph=True, backend="aot_eager"), (q, k, v)
    )
    assert all(
        torch.equal(a, b) for a, b in zip((*eager, *eager_gradients), (*found, *gradients), strict=True)
    )


@pytest.mark.parametrize("score", WEIGHTS)
@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (3, 0)])
def test_empty_lengths(score, lengths):
    q, k, v = testing.attention_inputs(2, 2, 1, *lengths, head_dim=4)
    (out,), gradients = testing.differentiate(lambda *x: fa.attention(*x, score=score), (q, k, v))
    assert out.shape == (2, 2, lengths[0], 4)
    assert not out.any()
    assert all(not g.any() for g in gradients)


Q = torch.zeros(2, 4, 3, 8)
K = torch.zeros(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fa.attention(Q[0], K, K),
            ValueError,
            "attention: q must have 4 dimensions, given a float32 tensor",
        ),
        (lambda: fa.attention(Q, K.tolist(), K), TypeError, "k must be a tensor, given list"),
        (
            lambda: fa.attention(Q.int(), K.int(), K.int()),
            TypeError,
            "q must be one of float32, bfloat16, float16",
        ),
        (
            lambda: fa.attention(Q, K.bfloat16(), K),
            TypeError,
            "k is bfloat16 but q is float32; convert one of them",
        ),
        (lambda: fa.attention(Q, K.to("meta"), K), ValueError, "k is on meta but q is on cpu"),
        (lambda: fa.attention(Q, K[:1], K[:1]), ValueError, "k has a batch of 1, q has 2"),
        (lambda: fa.attention(Q[:, :3], K, K), ValueError, "k has 2 heads, which does not divide q's 3"),
        (lambda: fa.attention(Q, K[..., :4], K), ValueError, "k has head dim 4, q has 8"),
        (lambda: fa.attention(Q, K, K[:, :, :4]), ValueError, "v must have k's batch, heads and length"),
        (
            lambda: fa.attention(Q, K, K, score="relu"),
            ValueError,
            "score must be one of 'softmax', 'sigmoid', 'softplus'",
        ),
        (
            lambda: fa.attention(Q, K, K, score="sigmoid", return_lse=True),
            ValueError,
            "return_lse is not defined",
        ),
        (
            lambda: fa.attention(Q, K, K, mask=torch.ones(3, 5)),
            TypeError,
            "mask must be a fastattn.Mask or None",
        ),
        (
            lambda: fa.attention(Q, K, K, bias=torch.zeros(3, 4)),
            ValueError,
            r"bias of shape \(3, 4\) does not broadcast",
        ),
        (lambda: fa.attention(Q, K, K, bias="big"), TypeError, "bias must be a number, given str 'big'"),
        (lambda: fa.attention(Q, K, K, scale="big"), TypeError, "scale must be a number"),
        (lambda: fa.attention(Q, K, K, backend="gpu"), ValueError, "backend must be None or one of"),
        (lambda: fa.attention(Q, K, K, backend="cuda"), NotImplementedError, "attention"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(
        error, match=f"fastattn.attention: .*{message}" if "attention" not in message else message
    ):
        call()
