"""What the tests of losses over a vocabulary share: problems, and the CPU compared with the definition in float64."""

import itertools

import torch

from fastattn import testing

# Relative to the largest value of the float64 result. Loss and gradients are sums of at most 600 products or exponentials in
# float32, whose errors (each under 4 eps of the largest term) add up to under 600 * 4 * eps32 / 2 = 7e-5 if all had
# one sign; random signs leave far less, and 1e-5 is asked for. A loss is a difference of two logits and a gradient one of
# probabilities, each rounded at eps32 of itself: where they cancel to less than a tenth, a tenth is what counts.
RELATIVE = 1e-5


def relative(actual, truth):
    return testing.max_error(actual, truth) / max(testing.max_finite(truth), 0.1)


def compare(op, leaves, grad, tolerance=RELATIVE, allowed=(), **options):
    """op and its reference, outputs and gradients, the second in float64. allowed: an error of each element of the first
    gradients, beside the tolerance."""
    found, gradients = testing.differentiate(lambda *a: op(*a, backend="cpu", **options), leaves, (grad,))
    truth, true = testing.differentiate(
        lambda *a: op(*a, backend="reference", **options), testing.to_float64(leaves), (grad,)
    )
    assert relative(found[0], truth[0]) <= tolerance
    assert len(gradients) == len(true)
    # A gradient sums over rows what may cancel, a probability of 1 less its target. Forming such a term costs 4 eps of what it is
    # made of (`testing.absolute_bound`): two for the exponential, and half of one each for its argument, the division, the
    # difference and the product. A row's probabilities add up to 1, so its terms to `grad` times the largest factor.
    rows = leaves[0].shape[0] if options.get("reduction") == "sum" else 1
    summed = rows * float(grad.abs().sum()) * max(testing.max_finite(t) for t in leaves)
    for a, b, more in itertools.zip_longest(gradients, true, allowed, fillvalue=0):
        bound = tolerance * max(testing.max_finite(b), 0.1) + 4 * testing.EPS32 * summed
        assert ((a.double() - b).abs() <= bound + more).all()
    return found, gradients


def rounded_logit_gradients(op, leaves, grad):
    """What gradients of h and weight may be off by for those of the logits having been rounded to bfloat16, before any sum:
    half a unit of each, times what it is multiplied by. The gradients of logits are those of h where weight is 1."""
    h, weight, *rest = testing.to_float64(leaves)
    logits = (h @ weight.T).detach().requires_grad_()
    one = torch.eye(weight.shape[0], dtype=torch.float64)
    op(logits, one, *rest, backend="reference").backward(grad)
    half = logits.grad.abs() * torch.finfo(torch.bfloat16).eps / 2
    return half @ weight.detach().abs(), half.T @ h.detach().abs()


def dense_problem(n, v, d, seed, ignored, dtype=torch.float32, index=torch.int64):
    h = testing.random_tensor(n, d, seed=seed, dtype=dtype, requires_grad=True)
    weight = testing.random_tensor(v, d, seed=seed + 1, dtype=dtype, requires_grad=True)
    bias = testing.random_tensor(v, seed=seed + 2, requires_grad=True)
    g = torch.Generator().manual_seed(seed)
    tau = (torch.rand(n, generator=g) + 0.5).requires_grad_()
    target = torch.randint(0, v, (n,), generator=g).to(index)
    target[torch.rand(n, generator=g) < ignored] = -100
    upstream = torch.rand(n, generator=g) - 0.3  # per row, of either sign
    return h, weight, bias, tau, target, upstream


def check_low_precision(op, leaves, grad, *, rounded=False):
    """Losses are float32 and as exact as float32's; gradients are rounded once to their tensor's dtype, and those of the logits
    before where they are multiplied as bfloat16 (`rounded`)."""
    dtype = leaves[0].dtype
    allowed = rounded_logit_gradients(op, leaves, grad) if rounded else ()
    found, gradients = compare(
        op, leaves, grad, tolerance=torch.finfo(dtype).eps / 2 + RELATIVE, allowed=allowed
    )
    assert found[0].dtype == torch.float32
    assert [g.dtype for g in gradients] == [leaf.dtype for leaf in leaves]
    truth = op(*testing.to_float64(leaves), backend="reference")
    assert relative(found[0], truth) <= RELATIVE
    return gradients
