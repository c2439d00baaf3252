"""What the output layer must reach: losses over a vocabulary, dense and quantised, and the choice of a token.

Every contender has parameters of its own, so a row is a "step": forward and backward in one call.
"""

import torch
import torch.nn.functional as F

import fastattn as fa
from benchmarks.registry import Case, Problem, faster_than, time_at_most
from fastattn import testing

FP32, BF16 = torch.float32, torch.bfloat16


def _step(fn, *leaves):
    """A call of no arguments: fn(*leaves), then the gradients of all leaves."""
    leaves = tuple(x.detach().requires_grad_() for x in leaves)

    def step():
        out = fn(*leaves)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    return step


def _head(dtype, N, V, d, rows):
    """h (N, d), weight (rows, d) at logits of deviation 1, bias (V,), target (N,)."""
    generator = torch.Generator().manual_seed(0)
    return (
        testing.random_tensor(N, d, dtype=dtype, seed=1),
        testing.random_tensor(rows, d, dtype=dtype, seed=2, scale=d**-0.5),
        testing.random_tensor(V, seed=3),
        torch.randint(0, V, (N,), generator=generator),
    )


def _equal(step, reference):
    """Results of a step against those of a float64 one, within what sums of this size round to in float32."""

    def check():
        for i, (a, b) in enumerate(zip(step(), reference(), strict=True)):
            error, largest = testing.max_error(a, b), testing.max_finite(b)
            assert error <= 1e-5 * largest, f"result {i}: error {error:.2e}, largest value {largest:.2e}"

    return check


def vq_cross_entropy(dtype, N, V, d, K):
    h, codebook, bias, target = _head(dtype, N, V, d, K)
    codes = torch.randint(0, K, (V,), generator=torch.Generator().manual_seed(4))
    dense = testing.random_tensor(V, d, dtype=dtype, seed=5, scale=d**-0.5)
    beta = torch.full((K,), -torch.inf).scatter_reduce(0, codes, bias, "amax")
    beta = beta + torch.zeros(K).index_add(0, codes, torch.exp(bias - beta[codes])).log()

    def by_codes(h, codebook, bias):
        """The reduction to K classes, in plain torch."""
        e = torch.zeros(K, dtype=bias.dtype).index_add(0, codes, bias.exp())
        z = h @ codebook.T + e.log()
        chosen = (h * codebook[codes[target]]).sum(1) + bias[target]
        return (torch.logsumexp(z, 1) - chosen).mean()

    ours = _step(
        lambda h, codebook, bias: fa.vq_cross_entropy(h, codebook, codes, target, bias=bias),
        h,
        codebook,
        bias,
    )
    return Problem(
        inputs=(),
        contenders={
            "fastattn": ours,
            "torch over V": _step(
                lambda h, w, b: F.linear_cross_entropy(h, w, target, linear_bias=b), h, dense, bias
            ),
            "torch over K": _step(
                lambda h, c, b: F.linear_cross_entropy(h, c, codes[target], linear_bias=b), h, codebook, beta
            ),
            "three products": _step(F.linear, h, codebook),
        },
        check=_equal(ours, _step(by_codes, h.double(), codebook.double(), bias.double())),
        flops=6 * N * K * d,
    )


def _hrm_stablemax(logits, target):
    """HRM's loss: float64 throughout."""
    x = logits.double()
    s = torch.where(x < 0, 1 / (1 - x + 1e-30), x + 1)
    log_share = torch.log(s / s.sum(-1, keepdim=True))
    return -log_share.gather(-1, target[:, None])[:, 0].mean()


def stablemax_cross_entropy(dtype, N, V):
    logits = testing.random_tensor(N, V, dtype=dtype, seed=1)
    target = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
    ours = _step(lambda x: fa.stablemax_cross_entropy(x, target), logits)
    theirs = _step(lambda x: _hrm_stablemax(x, target), logits)
    return Problem(
        inputs=(),
        contenders={
            "fastattn": ours,
            "HRM's float64": theirs,
            "torch softmax": _step(lambda x: F.cross_entropy(x, target), logits),
        },
        check=_equal(ours, _step(lambda x: _hrm_stablemax(x, target), logits.double())),
    )


_CHECKED = 48  # rows of a large problem that are held against float64


def linear_cross_entropy(dtype, N, V, d, transform):
    h, weight, _, target = _head(dtype, N, V, d, V)

    def loss(h, weight, backend=None):
        return fa.linear_cross_entropy(h, weight, target[: h.shape[0]], transform=transform, backend=backend)

    few = h[:_CHECKED]
    return Problem(
        inputs=(),
        contenders={
            "fastattn": _step(loss, h, weight),
            "torch softmax": _step(lambda h, w: F.linear_cross_entropy(h, w, target), h, weight),
        },
        check=_equal(
            _step(loss, few, weight),
            _step(lambda h, w: loss(h, w, "reference"), few.double(), weight.double()),
        ),
        flops=6 * N * V * d,
    )


def ignored_rows(dtype, N, V, d, ignored):
    h, weight, _, target = _head(dtype, N, V, d, V)
    masked = target.clone()
    masked[torch.randperm(N, generator=torch.Generator().manual_seed(6))[: int(N * ignored)]] = -100
    few, some = h[:_CHECKED], masked[:_CHECKED]
    return Problem(
        inputs=(),
        contenders={
            "fastattn": _step(lambda h, w: fa.linear_cross_entropy(h, w, masked), h, weight),
            "none ignored": _step(lambda h, w: fa.linear_cross_entropy(h, w, target), h, weight),
        },
        check=_equal(
            _step(lambda h, w: fa.linear_cross_entropy(h, w, some), few, weight),
            _step(
                lambda h, w: fa.linear_cross_entropy(h, w, some, backend="reference"),
                few.double(),
                weight.double(),
            ),
        ),
    )


def vq_argmax(dtype, N, V, d, K):
    h, codebook, bias, _ = _head(dtype, N, V, d, K)
    codes = torch.randint(0, K, (V,), generator=torch.Generator().manual_seed(4))
    dense = testing.random_tensor(V, d, dtype=dtype, seed=5)

    def ours():
        return fa.vq_argmax(h, codebook, codes, bias=bias)

    def check():
        scores = (h.double() @ codebook.double().T)[:, codes] + bias
        assert torch.equal(ours(), scores.argmax(1)), "not the token of the largest logit"

    return Problem(
        inputs=(),
        contenders={"fastattn": ours, "dense head": lambda: F.linear(h, dense).argmax(1)},
        check=check,
        bytes=codebook.nbytes,
    )


HEAD = {"N": 2048, "V": 50257, "d": 768, "K": 1024}
CASES = [
    Case("vocab", "vq_cross_entropy", vq_cross_entropy, HEAD, FP32, "step",
         (faster_than("torch over V", 15.0), faster_than("torch over K", 1.0), time_at_most("three products", 1.25))),
    Case("vocab", "stablemax_cross_entropy", stablemax_cross_entropy, {"N": 512, "V": 32000}, FP32, "step",
         (faster_than("HRM's float64", 15.0),), quick=True),
    Case("vocab", "linear_cross_entropy stablemax", linear_cross_entropy, {"N": 2048, "V": 32000, "d": 768}, FP32,
         "step", (faster_than("torch softmax", 1.0),), options={"transform": "stablemax"}),
    Case("vocab", "linear_cross_entropy softmax", linear_cross_entropy, {"N": 2048, "V": 32000, "d": 768}, FP32,
         "step", options={"transform": None}),
    Case("vocab", "linear_cross_entropy ignored", ignored_rows, {"N": 2048, "V": 32000, "d": 768, "ignored": 0.75},
         FP32, "step", (time_at_most("none ignored", 0.35),)),
    Case("vocab", "vq_argmax", vq_argmax, {"N": 1, "V": 131072, "d": 1024, "K": 4096}, BF16, "step",
         (faster_than("dense head", 10.0),), quick=True),
]  # fmt: skip
