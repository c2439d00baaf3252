"""attention's scale of each query: a tensor with a gradient."""

import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.ops.attention import scores

SCORES = tuple(scores.SCORES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_definition():
    """The scores' own factor, in loops over nothing: s * (q k^T), before the soft cap; right where it is 0."""
    q, k, v = testing.attention_inputs(2, 4, 2, 5, 7, 3, dtype=torch.float64)
    scale = testing.random_tensor(2, 4, 5, 1, dtype=torch.float64, seed=3)
    scale[0, 0, 2] = 0.0
    scale.requires_grad_()

    def mine(q, k, v, scale):
        return fa.attention(q, k, v, scale=scale, softcap=2.0)

    def theirs(q, k, v, scale):
        s = scale * (q @ k.repeat_interleave(2, 1).mT)
        return (2 * torch.tanh(s / 2)).softmax(-1) @ v.repeat_interleave(2, 1)

    found, expected = (testing.differentiate(f, (q, k, v, scale)) for f in (mine, theirs))
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)  # float64 sums of 7 terms of size 1
    assert found[1][3][0, 0, 2].any()
    assert torch.autograd.gradcheck(mine, (q, k, v, scale))


@pytest.mark.parametrize("shape", ((2, 4, 33, 1), (4, 1, 1), (33, 1), (2, 1, 33, 1), (1,)))
@pytest.mark.parametrize("score", SCORES)
def test_results_are_within_the_error_budget(isa, nan_outputs, score, shape):
    inputs = testing.attention_inputs(2, 4, 2, 33, 47, 16)
    scale = testing.random_tensor(*shape, seed=4, scale=0.25, requires_grad=True)  # scores of size 1

    def run(backend):
        return lambda q, k, v, scale: fa.attention(
            q, k, v, score=score, scale=scale, mask=fa.Mask(causal=True), return_lse=scores.SCORES[score].normalised, backend=backend
        )  # fmt: skip

    # sums of 47 keys for two heads, of 33 * 2 rows, of 16 * 33 * 8 products for a scale
    testing.check_op(
        run("cpu"), run("reference"), (*inputs, scale), terms=16 * 33 * 8, names=("q", "k", "v", "scale")
    )


@pytest.mark.parametrize("wide", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_q_is_multiplied_and_rounded_once(dtype, wide):
    """As the documentation says it, bit for bit, with the gradient of the scale from float32 products."""
    q, k, v = testing.attention_inputs(2, 4, 2, 20, 30, 16, dtype=dtype)
    scale = testing.random_tensor(
        4, 20, 1, dtype=torch.float32 if wide else dtype, seed=4, requires_grad=True
    )
    scaled = (q.detach().float() * scale.detach().float()).to(dtype).requires_grad_()
    out = fa.attention(q, k, v, scale=scale)
    assert torch.equal(out, fa.attention(scaled, k, v, scale=1.0))
    grad = testing.random_tensor(*out.shape, dtype=dtype, seed=5)
    found = torch.autograd.grad(out, (q, k, v, scale), grad)
    of_scaled, *others = torch.autograd.grad(fa.attention(scaled, k, v, scale=1.0), (scaled, k, v), grad)
    assert all(torch.equal(a, b) for a, b in zip(found[1:3], others, strict=True))
    assert torch.equal(found[0], (of_scaled.float() * scale.detach().float()).to(dtype))
    true = (of_scaled.double() * q.detach().double()).sum((0, 3), keepdim=True)[0]
    # a sum of 32 float32 products, rounded once
    size = (of_scaled.double() * q.detach().double()).abs().sum((0, 3)).max()
    assert (
        testing.max_error(found[3], true)
        <= torch.finfo(scale.dtype).eps / 2 * testing.max_finite(true) + 33 * testing.EPS32 * size
    )


def test_a_scale_of_16_bits_is_no_worse_than_eager_attention():
    """Rounding scale * q to bf16 against rounding scale * (q k^T), as eager attention does: at most twice its error."""
    q, k, v = testing.attention_inputs(2, 4, 4, 64, 96, 64, dtype=torch.bfloat16)
    scale = (torch.rand(2, 4, 64, 1) * 0.25 + 0.05).bfloat16().requires_grad_()

    def eager(q, k, v, scale):
        return ((scale * (q @ k.mT)).softmax(-1)) @ v

    inputs = (q, k, v, scale)
    true = testing.differentiate(eager, testing.to_float64(inputs))
    mine, theirs = (
        testing.differentiate(f, inputs)
        for f in (lambda *x: fa.attention(*x[:3], scale=x[3], backend="cpu"), eager)
    )
    for a, b, t in zip((*mine[0], *mine[1]), (*theirs[0], *theirs[1]), (*true[0], *true[1]), strict=True):
        assert testing.max_error(a, t) <= 2 * testing.max_error(b, t)


def test_it_equals_a_number_and_compiles():
    q, k, v = testing.attention_inputs(1, 2, 2, 20, 30, 8)
    number = testing.differentiate(lambda *x: fa.attention(*x, scale=0.25), (q, k, v))
    for scale in (
        torch.tensor([0.25]),
        torch.full((1, 1, 20, 1), 0.25),
        torch.tensor(0.25, requires_grad=True),
    ):
        # a power of 2: nothing is rounded
        for call in (fa.attention, torch.compile(fa.attention, fullgraph=True, backend="aot_eager")):
            found = testing.differentiate(lambda *x, c=call, s=scale: c(*x, scale=s), (q, k, v))
            for a, b in zip((*number[0], *number[1]), (*found[0], *found[1]), strict=True):
                # where a score is formed of 0.25 * q, the kernel multiplies it by 1
                assert testing.max_error(a, b) <= testing.absolute_bound(
                    torch.float32, 30, 4 * testing.max_finite(a)
                )


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (
            torch.ones(3),
            ValueError,
            r"scale of shape \(3,\) does not broadcast to \(B, Hq, Lq, 1\) = \(1, 2, 3, 1\)",
        ),
        (torch.ones(1, 1, 1, 1, 1), ValueError, "scale of shape"),
        (
            torch.ones(3, 1, dtype=torch.float64),
            TypeError,
            "scale must be a number or a tensor of float32, given",
        ),
        (
            torch.ones(3, 1, dtype=torch.int32),
            TypeError,
            "scale must be a number or a tensor of float32, given",
        ),
    ],
)
def test_bad_scales(scale, error, message):
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(error, match=message):
        fa.attention(q, q, q, scale=scale)
