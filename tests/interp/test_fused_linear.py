"""Triton fused products in the interpreter, against the reference: our tile kernel and torch's product between row kernels."""

import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.ops.fused_linear import reference, tuning  # noqa: F401  the second declares what is overridden
from fastattn.runtime import tuning as _config

TILES = {"product": "native", "block_m": 16, "block_n": 16, "block_k": 16}


def use(product):
    return _config.override(
        {("fused_linear", "triton"): TILES if product == "native" else {"product": product}}
    )


def check(rows, columns, inner, before, swiglu, residual, layout="odd", dtype=torch.float32, head_dim=None):
    """rows: the leading dims. Outputs and gradients of x, weight, gate and residual."""
    options = {"dtype": dtype, "requires_grad": True, "layout": layout}
    eps = 1e-6 if before == "norm" else None
    shape = (*rows, inner) if before != "gate" else (*rows, inner // head_dim, head_dim)
    inputs = (
        testing.random_tensor(*shape, seed=1, **options),
        testing.random_tensor(
            columns * (2 if swiglu else 1), inner, seed=2, scale=inner**-0.5, **options | {"layout": "odd"}
        ),
        testing.random_tensor(*shape, seed=3, **options) if before == "gate" else None,
        testing.random_tensor(*rows, columns, seed=4, **options) if residual else None,
    )

    def ours(x, weight, gate, residual):
        return fa.fused_linear(
            x, weight, norm_eps=eps, gate=gate, swiglu=swiglu, residual=residual, backend="triton"
        )

    def define(x, weight, gate, residual):
        return reference.fused_linear(x, weight, gate, residual, eps, swiglu, False)[0]

    testing.check_op(ours, define, inputs, terms=max(inner, *rows, 2 * columns))


@pytest.mark.parametrize("product", ("native", "library"))
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("swiglu", (False, True))
@pytest.mark.parametrize("before", (None, "norm", "gate"))
def test_is_the_definition(before, swiglu, residual, product, nan_outputs):
    """Rows, columns and steps that no tile divides; several bands of tiles."""
    rows = (2, 67) if before is None and product == "native" else (2, 9)
    with use(product):
        check(rows, 23, 48, before, swiglu, residual, head_dim=16)


@pytest.mark.parametrize("before", ("norm", "gate"))
def test_float16(before, nan_outputs):
    with use("native"):
        check((20,), 17, 40, before, True, True, dtype=torch.float16, head_dim=8)


def test_heads_that_lie_apart(nan_outputs):
    """(B, L, H, D) as a transpose of attention's output: no copy is needed."""
    with use("native"):
        check((2, 5), 9, 32, "gate", False, True, layout="swapped", head_dim=16)


@pytest.mark.parametrize("product", ("native", "library"))
def test_few_rows_and_none(product, nan_outputs):
    with use(product):
        check((), 7, 20, "norm", True, True)
        x = torch.empty(0, 20, requires_grad=True)
        weight = torch.ones(6, 20, requires_grad=True)
        out = fa.fused_linear(x, weight, norm_eps=1e-6, backend="triton")
        out.sum().backward()
        assert out.shape == (0, 6) and torch.equal(weight.grad, torch.zeros(6, 20))


def test_rows_of_zero_and_of_large_values(nan_outputs):
    x = testing.random_tensor(9, 20, seed=1)
    x[0], x[1] = 0, x[1] * 1e15
    weight = testing.random_tensor(14, 20, seed=2)

    def define(x, weight):
        return reference.fused_linear(x, weight, None, None, 1e-6, False, False)[0]

    with use("native"):
        found = fa.fused_linear(x, weight, norm_eps=1e-6, backend="triton")
        testing.assert_within_budget(found, define, (x, weight), terms=20)
