"""Triton attention in the interpreter, against the reference: every score, every kind of mask, gradients."""

import pytest
import torch
from hypothesis import given, settings

import fastattn as fa
from fastattn import testing
from fastattn.masks import Mask
from fastattn.ops.attention.scores import SCORES

MASKS = {
    "full": lambda: None,
    "causal": lambda: Mask(causal=True),
    "window": lambda: Mask(window=(9, 4)),
    "prefix": lambda: Mask(prefix_lengths=torch.tensor([7])),
    "key_lengths": lambda: Mask(causal=True, key_lengths=torch.tensor([13])),
    "packed_prefix": lambda: Mask(
        cu_seqlens_q=torch.tensor([0, 9, 9, 36]), prefix_lengths=torch.tensor([4, 0, 20])
    ),
    "dense": lambda: Mask(dense=torch.rand(1, 1, 37, 37, generator=torch.Generator().manual_seed(3)) > 0.8),
}


def compare(inputs, score="softmax", mask=None, terms=64, **options):
    returns = SCORES[score].normalised

    def run(backend):
        def fn(q, k, v, *bias):
            extra = {"bias": bias[0]} if bias else {}
            return fa.attention(
                q, k, v, score=score, mask=mask, return_lse=returns, backend=backend, **extra, **options
            )

        return fn

    testing.check_op(run("triton"), run("reference"), inputs, terms=terms, names=("q", "k", "v", "bias"))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("score", SCORES)
def test_masks(score, kind, nan_outputs):
    compare(testing.attention_inputs(1, 2, 1, 37, 37, 24, 12, layout="odd"), score, MASKS[kind]())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("score", SCORES)
def test_low_dtypes(score, dtype, nan_outputs):
    compare(testing.attention_inputs(1, 2, 2, 20, 35, 16, dtype=dtype), score, Mask(causal=True))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", [(1, 1, 20, 1), (1, 2, 20, 35)])
def test_tensor_bias(score, shape, nan_outputs):
    bias = testing.random_tensor(*shape, requires_grad=True)
    compare((*testing.attention_inputs(1, 2, 1, 20, 35, 16), bias), score, Mask(window=(20, None)))


@pytest.mark.parametrize("fill", (-1e9, -1e30, torch.finfo(torch.float32).min, 3e38))
@pytest.mark.parametrize("bias_grad", (False, True))
def test_rows_of_a_finite_mask(fill, bias_grad, nan_outputs):
    """A bias that takes in the scores: a row is the mean of what it attends, as in torch, and its gradient that of the mean.

    Keys 0 to 4 are padding: under the causal mask all that rows 0 to 4 attend is filled, of the others a part."""
    q, k, v = testing.attention_inputs(1, 2, 1, 20, 20, 16)
    bias = torch.zeros(1, 1, 20, 20)
    bias[..., :5] = fill if fill < 0 else 0.0
    bias[..., 3, :] = fill
    bias.requires_grad_(bias_grad)
    q = (q.detach() * 2.0**-6).requires_grad_()  # no score near the spacing of floats at 1e9
    testing.check_op(
        lambda *inputs: fa.attention(*inputs[:3], bias=inputs[3], mask=Mask(causal=True), backend="triton"),
        lambda *inputs: fa.attention(
            *inputs[:3], bias=inputs[3], mask=Mask(causal=True), backend="reference"
        ),
        (q, k, v, bias),
        terms=200,
    )
    out = fa.attention(q, k, v, bias=bias, mask=Mask(causal=True), backend="triton")
    mean = v[:, :, :4].double().mean(2).expand(1, 2, 16)
    assert testing.max_error(out[:, :, 3], mean) <= 4 * torch.finfo(torch.float32).eps * testing.max_finite(v)


@pytest.mark.parametrize("kind", ("full", "causal", "window", "key_lengths", "dense", "bias"))
@pytest.mark.parametrize("score", SCORES)
def test_decoding(score, kind, nan_outputs):
    """Few queries: keys are split over programs, some of which have none to attend."""
    mask = {
        "causal": Mask(causal=True),
        "window": Mask(window=(40, 0)),
        "key_lengths": Mask(key_lengths=torch.tensor([0, 71])),
        "dense": Mask(dense=torch.rand(2, 4, 2, 75, generator=torch.Generator().manual_seed(3)) > 0.7),
    }.get(kind)
    q, k, v = testing.attention_inputs(2, 4, 2, 2, 75, 16, 20, requires_grad=False)
    bias = testing.random_tensor(2, 1, 2, 75) if kind == "bias" else None
    returns = SCORES[score].normalised

    def run(backend):
        return lambda q, k, v: fa.attention(
            q,
            k,
            v,
            score=score,
            mask=mask,
            bias=None if bias is None else bias.to(q.dtype),
            return_lse=returns,
            backend=backend,
        )

    testing.assert_within_budget(run("triton")(q, k, v), run("reference"), (q, k, v), terms=75)


@settings(max_examples=8)
@given(problem=testing.attention_problems(max_len=40, head_dims=(1, 8, 17), max_heads=2))
def test_problems(problem):
    with testing.nan_filled_outputs():
        compare(problem.inputs(), "softmax", problem.mask())


@pytest.mark.slow
@settings(max_examples=60)
@given(problem=testing.attention_problems(max_len=40))
@pytest.mark.parametrize("score", SCORES)
def test_all_problems(score, problem):
    with testing.nan_filled_outputs():
        compare(problem.inputs(), score, problem.mask())


@pytest.mark.parametrize("config", [{"block_m": 64, "block_n": 16}, {"block_m": 16, "block_n": 64}])
def test_other_tiles(config):
    from fastattn.runtime import tuning as _config

    with _config.override({(op, "triton"): config for op in ("attention", "attention_backward")}):
        compare(testing.attention_inputs(1, 1, 1, 70, 37, 8), "softmax", Mask(causal=True, window=(50, None)))


@pytest.mark.parametrize("lengths", [(20, 1100), (1100, 20)])
def test_stretches_of_tiles_in_a_dense_mask(lengths, nan_outputs):
    """Tiles of nothing before, between and after those attended, and more tiles than one look at their classes."""
    from fastattn.runtime import tuning as _config

    along = torch.zeros(1100, dtype=torch.bool)
    for start, stop in ((40, 90), (170, 171), (1000, 1060)):
        along[start:stop] = True
    mask = Mask(dense=along.expand(20, -1) if lengths[1] == 1100 else along[:, None].expand(-1, 20))
    tiles = {"block_m": 16, "block_n": 16}
    with _config.override({(op, "triton"): tiles for op in ("attention", "attention_backward")}):
        compare(testing.attention_inputs(1, 1, 1, *lengths, 8), "softmax", mask, terms=1100)


def test_packed_documents_do_not_touch_each_other():
    offsets = torch.tensor([0, 11, 30])
    q, k, v = testing.attention_inputs(1, 1, 1, 30, 30, 16, requires_grad=False)
    mask = Mask(causal=True, cu_seqlens_q=offsets)
    before = fa.attention(q, k, v, mask=mask, backend="triton")
    for t in (q, k, v):
        t[:, :, 11:] = torch.randn_like(t[:, :, 11:])
    after = fa.attention(q, k, v, mask=mask, backend="triton")
    assert torch.equal(before[:, :, :11], after[:, :, :11])


@pytest.mark.parametrize("op", ("attention", "softplus_attention", "grouped_attention", "gated_attention"))
def test_documents_of_unknown_lengths(op, nan_outputs):
    """A mask made while tracing has its documents' offsets on the device alone: no length is known, every row is computed."""
    known, unknown = (Mask(causal=True, cu_seqlens_q=torch.tensor([0, 40, 41])) for _ in range(2))
    unknown.max_seqlen_q = unknown.max_seqlen_k = -1
    extra = {
        "grouped_attention": {"groups": torch.arange(44)[None] % 3},
        "gated_attention": {"assignment": testing.random_tensor(1, 44, 3).abs()},
    }.get(op, {})

    def run(mask):
        return testing.differentiate(
            lambda q, k, v: getattr(fa, op)(q, k, v, mask=mask, backend="triton", **extra),
            testing.attention_inputs(1, 2, 1, 44, 44, 8),
        )

    for found, expected in zip(run(unknown), run(known), strict=True):
        assert all(torch.equal(a, b) and b.any() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("queries", (44, 2))
@pytest.mark.parametrize("op", ("attention", "softplus_attention", "grouped_attention", "gated_attention"))
def test_padding_may_hold_anything(op, queries, nan_outputs):
    """Keys, values and assignments from key_lengths on: results and gradients are those of zeros there, theirs exactly 0."""
    if op == "gated_attention" and queries != 44:
        pytest.skip("it has as many queries as keys")
    mask = Mask(key_lengths=torch.tensor([0, 21]))
    q, k, v = testing.attention_inputs(2, 2, 1, queries, 44, 8)
    extra = {
        "grouped_attention": lambda: {
            "groups": torch.ones(2, queries, dtype=torch.int64), "key_groups": (torch.arange(44) % 2).expand(2, 44),
        },
        "gated_attention": lambda: {"assignment": testing.random_tensor(2, 44, 3).abs(), "window": 4},
    }.get(op, dict)()  # fmt: skip

    def run(fill):
        inputs = [t.detach().clone() for t in (q, k, v)]
        for t in inputs[1:]:
            t[0], t[1, :, 21:] = fill, fill
        return testing.differentiate(
            lambda q, k, v: getattr(fa, op)(q, k, v, mask=mask, backend="triton", **extra),
            [t.requires_grad_() for t in inputs],
        )

    (out,), grads = run(torch.nan)
    (clean,), expected = run(0.0)
    assert torch.equal(out, clean) and out[1].any() and not out[0].any()
    if op == "softplus_attention":  # a key of NaN has no direction: its own gradient is NaN, that of the norm
        grads[1][0], grads[1][1, :, 21:] = 0, 0
    assert all(map(torch.equal, grads, expected))
    assert not any(g[0].any() or g[1, :, 21:].any() for g in grads[1:])


@pytest.mark.parametrize("shape", [(2, 2, 40, 50), (1, 1, 40, 50), (2, 1, 1, 50)])
def test_classes_of_a_dense_mask_follow_its_memory(shape, nan_outputs):
    """Written through `.data` between two calls, as a replayed graph writes its static inputs."""
    inputs = testing.attention_inputs(2, 2, 1, 40, 50, 16)
    held = Mask(dense=torch.zeros(shape, dtype=torch.bool))
    from fastattn.runtime import tuning as _config

    tiles = {("attention", "triton"): {"block_m": 16, "block_n": 16}}
    for which in (0, 1):
        allowed = torch.zeros(shape, dtype=torch.bool)
        allowed[..., which * (shape[2] // 2) :, which * (shape[3] // 2) :] = True
        held.dense.data.copy_(allowed)
        with _config.override(tiles):
            compare(inputs, mask=held, terms=50)


def test_products_follow_every_way_to_ask_for_tf32():
    from fastattn.runtime import triton as _triton

    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for way, value in ((matmul, "tf32"), (torch.backends, "tf32"), (matmul, "ieee")):
            matmul.fp32_precision = torch.backends.fp32_precision = "none"
            way.fp32_precision = value
            assert _triton.precision(torch.float32) == ("tf32" if value == "tf32" else "tf32x3")
        for name in ("high", "highest"):
            matmul.fp32_precision = torch.backends.fp32_precision = "none"
            torch.set_float32_matmul_precision(name)
            assert _triton.precision(torch.float32) == ("tf32" if name == "high" else "tf32x3")
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


def test_small_sigmoid_weights_keep_relative_accuracy():
    # One key and v = 1 give the weight itself: 1/(1 + exp2(-s2)) has four roundings, s2 = s * log2(e) two more,
    # whose absolute error |s2| * 1.5 eps the exponential turns into a relative one: (4 + 1.5 * 60) eps at s = -40.
    s = torch.linspace(-40, -2, 16).view(1, 1, 16, 1)
    one = torch.ones(1, 1, 1, 1)
    out = fa.attention(s, one, one, score="sigmoid", scale=1.0, bias=0.0, backend="triton")
    assert testing.relative_error(out, torch.sigmoid(s.double())) < 94 * testing.EPS32


def test_explain_names_the_configuration():
    q, k, v = testing.attention_inputs(1, 1, 1, 20, 20, 16, requires_grad=False)
    found = fa.explain("attention", q, k, v, backend="triton")
    # the first is the interpreter's, the other a GPU's
    assert found.backend == "triton" and found.config["block_m"] in (32, 64)


def test_refused_clearly():
    q, k, v = testing.attention_inputs(1, 1, 1, 4, 4, 300, requires_grad=False)
    with pytest.raises(NotImplementedError, match="head dims 1 to 256"):
        fa.attention(q, k, v, backend="triton")
    q, k, v = testing.attention_inputs(1, 1, 1, 4, 4, 8, dtype=torch.float64, requires_grad=False)
    with pytest.raises(NotImplementedError, match="float64"):
        fa.attention(q, k, v, backend="triton")
