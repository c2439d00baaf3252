"""LSSA and LSSAR against the published equation, its closed-form gradient, and their edges."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import masks, testing
from fastattn.ops.lssa import reference
from fastattn.runtime import native as _native


def published(q, k, v, power, allowed):
    """Equation as printed (arXiv 2501.13428): both normalisers, no algebra. allowed: bool (..., Lq, Lk)."""
    n = allowed.sum(-1, keepdim=True).to(q.dtype)
    c = math.log(q.shape[-1]) * n.clamp(min=1).log()
    s = F.softplus(c * (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)))
    s = s.masked_fill(~allowed, 0.0)
    w = s / s.sum(-1, keepdim=True)
    if power is not None:
        offset = (n > 3).to(q.dtype)
        w = torch.relu(w * n - offset).masked_fill(~allowed, 0.0) ** power
        w = w / w.sum(-1, keepdim=True)
    return torch.nan_to_num(w) @ v


def causal(length, **options):
    return testing.attention_inputs(1, 2, 2, length, length, 8, dtype=torch.float64, **options), torch.ones(
        length, length, dtype=torch.bool
    ).tril()


def test_the_earlier_name_is_the_same_function():
    assert fa.softplus_attention is fa.lssa_attention


@pytest.mark.parametrize("power", [None, 1, 2.5, 3, 15])
def test_is_the_published_equation(power):
    (q, k, v), allowed = causal(23)
    actual = fa.lssa_attention(q, k, v, power=power, mask=fa.Mask(causal=True), backend="reference")
    # scores near the threshold lose digits in the quotient, times the power: 15 * n * eps64 of the result
    assert testing.max_error(actual, published(q, k, v, power, allowed)) < 1e-12


@given(problem=testing.attention_problems(max_len=20), power=st.sampled_from([None, 1.0, 3.0, 15.0]))
def test_masks_and_heads(problem, power):
    q, k, v = problem.inputs(torch.float64, requires_grad=False)
    mask = problem.mask() or fa.Mask()
    args = mask.args("test", q, k)
    allowed = masks.dense_allowed(q.shape[2], k.shape[2], q.device, args)
    wide = [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)]
    actual = fa.lssa_attention(q, k, v, power=power, mask=mask, backend="reference")
    if q.shape[3] == 1:  # log D = 0: every score equals log 2, and re-weighting leaves nothing
        assert actual.isfinite().all()
        return
    assert testing.max_error(actual, published(q, *wide, power, allowed)) < 1e-11


def test_gradcheck():
    q, k, v = testing.attention_inputs(1, 1, 1, 7, 7, 4, dtype=torch.float64)
    mask = fa.Mask(causal=True)
    for power in (None, 1.5, 3.0):

        def op(*x, power=power):
            return fa.lssa_attention(*x, power=power, mask=mask, backend="reference")

        # random scores keep clear of the threshold by more than gradcheck's step of 1e-6
        assert torch.autograd.gradcheck(op, (q, k, v), fast_mode=True)


def closed_form(q, k, v, power, allowed, grad_out):
    """The backward of the specification, for one head dim and every head at once."""
    n = allowed.sum(-1, keepdim=True).to(q.dtype)
    c = math.log(q.shape[-1]) * n.log()
    qn, kn = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
    qh, kh = q / qn, k / kn
    z = c * (qh @ kh.transpose(-1, -2))
    s = F.softplus(z).masked_fill(~allowed, 0.0)
    offset = (n > 3).to(q.dtype) if power is not None else torch.zeros_like(n)
    power = 1.0 if power is None else power
    threshold = offset * s.sum(-1, keepdim=True) / n
    w = torch.relu(s - threshold).masked_fill(~allowed, 0.0) ** power
    p = w / w.sum(-1, keepdim=True)
    delta = (grad_out * (p @ v)).sum(-1, keepdim=True)
    above = (s > threshold) & allowed
    r = torch.where(above, power * p * (grad_out @ v.transpose(-1, -2) - delta) / (s - threshold), 0.0)
    ds = (r - offset / n * r.sum(-1, keepdim=True)).masked_fill(~allowed, 0.0)
    dz = torch.sigmoid(z) * ds
    dqh, dkh = (c * dz) @ kh, (c * dz).transpose(-1, -2) @ qh
    dq = (dqh - qh * (qh * dqh).sum(-1, keepdim=True)) / qn
    dk = (dkh - kh * (kh * dkh).sum(-1, keepdim=True)) / kn
    return dq, dk, p.transpose(-1, -2) @ grad_out


@pytest.mark.parametrize("power", [None, 3, 15])
def test_closed_form_backward(power):
    inputs, allowed = causal(23)
    out, grads = testing.differentiate(
        lambda *x: fa.lssa_attention(*x, power=power, mask=fa.Mask(causal=True), backend="reference"),
        inputs,
    )
    with torch.no_grad():
        expected = closed_form(*inputs, power, allowed, testing.output_gradients(out)[0].double())
    for actual, wanted in zip(grads, expected, strict=True):
        assert testing.max_error(actual, wanted) < 1e-10 * (1 + testing.max_finite(wanted))


@pytest.mark.parametrize("power", [1, 15, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_power_overflows(power, dtype):
    """One aligned key among many: s/mean is about 60, whose 64th power is no float32."""
    length = 600
    k = torch.zeros(1, 1, length, 64, dtype=dtype)
    k[..., 1] = -1
    k[0, 0, 77] = torch.eye(64)[0]
    q = torch.eye(64, dtype=dtype)[:1].expand(1, 1, 1, 64)
    v = testing.random_tensor(1, 1, length, 16, dtype=dtype)
    out, grads = testing.differentiate(
        lambda *x: fa.lssa_attention(*x, power=power),
        (q.clone().requires_grad_(), k.requires_grad_(), v.requires_grad_()),
    )
    assert all(x.isfinite().all() for x in (*out, *grads))
    # scores: softplus(c) once and log 2 elsewhere, so the others have lost their weight to relu
    assert testing.max_error(out[0][0, 0, 0], v[0, 0, 77]) <= torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_scores_reweight_to_nothing(dtype):
    q = testing.random_tensor(1, 2, 40, 16, dtype=dtype, requires_grad=True)
    k = testing.random_tensor(1, 2, 1, 16, dtype=dtype).expand(1, 2, 40, 16).clone().requires_grad_()
    v = testing.random_tensor(1, 2, 40, 8, dtype=dtype, seed=1, requires_grad=True)
    (out,), grads = testing.differentiate(
        lambda *x: fa.lssa_attention(*x, power=15, mask=fa.Mask(causal=True)), (q, k, v)
    )
    assert (out[:, :, 3:] == 0).all()
    mean = v[:, :, :3].double().cumsum(2) / torch.arange(1, 4).view(1, 1, 3, 1)
    # the first three rows have no offset: equal weights, rounded once as weights and once as the sum
    assert testing.max_error(out[:, :, :3], mean) <= 2 * torch.finfo(dtype).eps * testing.max_finite(v)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, 3:] == 0).all()


def test_rows_without_keys_are_zero():
    q, k, v = testing.attention_inputs(2, 2, 1, 7, 9, 8)
    mask = fa.Mask(key_lengths=torch.tensor([0, 9]))
    for power in (None, 3):
        (out,), grads = testing.differentiate(
            lambda *x, power=power: fa.lssa_attention(*x, power=power, mask=mask), (q, k, v)
        )
        assert (out[0] == 0).all() and (out[1] != 0).any()
        assert all((g[0] == 0).all() and g.isfinite().all() for g in grads)


def test_zero_vectors_are_not_nan():
    for dtype in (torch.float32, torch.float16):
        q, k, v = testing.attention_inputs(1, 1, 1, 12, 12, 8, dtype=dtype)
        with torch.no_grad():
            q[0, 0, 5], k[0, 0, 7] = 0, 0
        (out,), grads = testing.differentiate(
            lambda *x: fa.lssa_attention(*x, power=3, mask=fa.Mask(causal=True)), (q, k, v)
        )
        assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
        assert (grads[0][0, 0, 5] == 0).all() and (grads[1][0, 0, 7] == 0).all()


def test_opcheck_and_compile():
    q, k, v = testing.attention_inputs(1, 4, 2, 12, 12, 8)
    mask = fa.Mask(causal=True, key_lengths=torch.tensor([11]))
    args = (q, k, v, 3.0, *mask.args("test", q, k), "")
    torch.library.opcheck(torch.ops.fastattn.softplus_attention.default, args)

    def layer(q, k, v):
        return fa.lssa_attention(q * 2, k, v, power=3, mask=mask).square()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, wanted = testing.differentiate(layer, (q, k, v))
    actual, grads = testing.differentiate(compiled, (q, k, v))
    for a, b in zip((*actual, *grads), (*expected, *wanted), strict=True):
        assert testing.max_error(a, b) <= 1e-6 * (1 + testing.max_finite(b))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"power": 0.5}, ValueError, "power must be None or a finite number of at least 1, given 0.5"),
        ({"power": math.inf}, ValueError, "power must be None or a finite number"),
        ({"power": "3"}, TypeError, "power must be a number"),
        ({"mask": "causal"}, TypeError, "mask must be a fastattn.Mask"),
        ({"backend": "cuda"}, NotImplementedError, "softplus_attention: there is no cuda backend"),
    ],
)
def test_errors_name_the_argument(options, error, message):
    q, k, v = testing.attention_inputs(1, 2, 2, 4, 4, 8)
    with pytest.raises(error, match=message):
        fa.lssa_attention(q, k, v, **options)


def test_empty_head_dim_is_refused():
    with pytest.raises(ValueError, match="q must have a head dim of 1 or more"):
        fa.lssa_attention(*(torch.zeros(1, 1, 2, 0),) * 3)


# --- native kernels -------------------------------------------------------------------------------------------------


@pytest.fixture(params=testing.isas())
def isa(request):
    with _native.use_cpu_isa(request.param):
        yield request.param


def native(power, mask):
    return lambda *x: fa.lssa_attention(*x, power=power, mask=mask, backend="cpu")


def defined(power, mask):
    return lambda *x: fa.lssa_attention(*x, power=power, mask=mask, backend="reference")


def conditioning(q, k, v, power, mask):
    """How far float32 scores can move the output.

    A score is off by ds <= (sqrt(D) + 4) eps (1 + c) (a sum of D products, its scale, one softplus), and so are the row's maximum
    and mean: x = 1 - (max - s) / (max - mean), at most 1, is off by dx <= 4 ds / (max - mean), its power by p x^(p-1) dx, and
    the output, a mean of v by these weights, by 2 max|v| p dx sum x^(p-1) / sum x^p.
    """
    args = mask.args("test", q, k)
    wide = q.double(), k.double(), v.double()
    *_, statistics = reference.softplus_attention(*wide, power, args)
    *_, lower = reference.softplus_attention(*wide, max(power - 1, 1e-9), args)
    n = masks.dense_allowed(q.shape[2], k.shape[2], q.device, args).sum(-1)
    c = math.log(q.shape[3]) * n.clamp(min=1).log()
    ds = (math.sqrt(q.shape[3]) + 4) * testing.EPS32 * (1 + c)
    spread = ds * statistics[..., 1] * lower[..., 2] / statistics[..., 2].clamp(min=1e-30)
    return float(8 * power * testing.max_finite(v) * spread.max()) if spread.numel() else 0.0


@given(
    problem=testing.attention_problems(head_dims=(2, 3, 8, 17, 64)), power=st.sampled_from([1.0, 2.5, 15.0])
)
def test_native_reweighting_under_every_mask(isa, problem, power):
    q, k, v = problem.inputs(requires_grad=False)
    mask = problem.mask() or fa.Mask()
    truth = defined(power, mask)(q.double(), k.double(), v.double())
    bound = testing.rounding_band(truth, torch.float32, k.shape[2]) + conditioning(q, k, v, power, mask)
    with testing.nan_filled_outputs():
        actual = native(power, mask)(q, k, v)
    assert testing.max_error(actual, truth) <= bound


@given(problem=testing.attention_problems(head_dims=(1, 3, 8, 17, 64)))
def test_native_lssa_under_every_mask(isa, problem):
    mask = problem.mask() or fa.Mask()
    with testing.nan_filled_outputs():
        testing.check_op(native(None, mask), defined(None, mask), problem.inputs(), terms=problem.k_len + 16)


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
def test_native_lssa_of_equal_values_is_that_value(isa, nan_outputs, dtype):
    """A row of one key among them, whose weight log 2 is rounded where weights are multiplied in bf16. The weights' common
    rounding would be up to eps / 2 of the value, which has the largest mantissa: more than half its last place."""
    q, k, v = testing.attention_inputs(1, 2, 2, 70, 70, 64, dtype=dtype, requires_grad=False)
    v = torch.full_like(v, 2 - torch.finfo(dtype).eps)
    out = native(None, fa.Mask(causal=True))(q, k, v)
    # float32 sums of up to 70 products, twice, and a quotient
    bound = 2 * 2 * 74 * testing.EPS32 if dtype == torch.float32 else 0
    assert testing.max_error(out, v) <= bound


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
@pytest.mark.parametrize(
    "mask",
    [
        fa.Mask(causal=True),
        fa.Mask(),
        fa.Mask(window=(20, 3)),
        fa.Mask(prefix_lengths=torch.tensor([30])),
        fa.Mask(causal=True, cu_seqlens_q=torch.tensor([0, 31, 31, 66])),
        fa.Mask(dense=(torch.arange(75)[:, None] * torch.arange(75)) % 3 != 1),
    ],
    ids=["causal", "full", "window", "prefix", "packed", "dense"],
)
def test_native_gradients(isa, nan_outputs, mask, dtype):
    inputs = testing.attention_inputs(1, 2, 1, 75, 75, 32, 24, dtype=dtype, layout="odd")
    for power in (3.0, 15.0):
        testing.check_op(native(power, mask), defined(power, mask), inputs, terms=75, names="qkv")


def test_native_decoding_continues_the_prefill(isa, nan_outputs):
    """A few rows against a cache take the path that packs a tile at a time."""
    q, k, v = testing.attention_inputs(2, 8, 2, 300, 300, 32, requires_grad=False)
    lengths = torch.tensor([300, 211])
    for power in (None, 15.0):
        for rows in (1, 3):
            mask = fa.Mask(causal=True, key_lengths=lengths)
            step = q[:, :, 300 - rows :]
            truth = defined(power, mask)(step.double(), k.double(), v.double())
            bound = testing.rounding_band(truth, torch.float32, 300)
            bound += conditioning(step, k, v, power, mask) if power else 0
            assert testing.max_error(native(power, mask)(step, k, v), truth) <= bound


@pytest.mark.parametrize(
    "mask",
    [
        fa.Mask(causal=True),
        fa.Mask(causal=True, key_lengths=torch.tensor([1601])),
        fa.Mask(window=(1100, 0)),
        fa.Mask(dense=(torch.arange(1700) % 3 != 1) & (torch.arange(1700) < 900)),
    ],
    ids=["causal", "key lengths", "window", "dense"],
)
def test_native_decoding_by_more_threads_than_heads(isa, nan_outputs, monkeypatch, mask):
    """The keys are shared out among threads, and what each finds about a row is put together."""
    monkeypatch.setattr(_native, "threads", lambda: 5)
    inputs = testing.attention_inputs(1, 4, 1, 3, 1700, 16, 24)
    for power in (None, 3.0, 15.0):
        testing.check_op(native(power, mask), defined(power, mask), inputs, terms=1700, names="qkv")
        runs = [native(power, mask)(*inputs) for _ in range(2)]
        assert torch.equal(*runs)


def test_native_is_deterministic(isa):
    """One key head on two threads: its gradients are summed from two parts, in order."""
    inputs = testing.attention_inputs(1, 4, 1, 200, 200, 16)
    runs = [testing.differentiate(native(3.0, fa.Mask(causal=True)), inputs) for _ in range(3)]
    for out, grads in runs[1:]:
        assert torch.equal(out[0], runs[0][0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, runs[0][1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_aligned_key_among_65536(isa, nan_outputs, dtype):
    length = 65536
    q = testing.random_tensor(1, 1, 2, 64, dtype=dtype)
    k = testing.random_tensor(1, 1, length, 64, dtype=dtype, seed=1)
    k[0, 0, 12345] = q[0, 0, 0]
    v = testing.random_tensor(1, 1, length, 8, dtype=dtype, seed=2)
    out = native(15, fa.Mask())(q, k, v)
    truth = defined(15, fa.Mask())(q.double(), k.double(), v.double())
    # the aligned key scores 46 where no other of 65,536 random ones reaches 30: its value, all but alone
    assert testing.max_error(truth[0, 0, 0], v[0, 0, 12345]) < 1e-2
    bound = testing.rounding_band(truth, dtype, 1) + conditioning(q, k, v, 15.0, fa.Mask())
    assert testing.max_error(out, truth) <= bound


def test_packed_documents_do_not_touch_each_other(isa):
    q, k, v = testing.attention_inputs(1, 2, 2, 90, 90, 16, requires_grad=False)
    mask = fa.Mask(causal=True, cu_seqlens_q=torch.tensor([0, 41, 90]))
    before = native(15, mask)(q, k, v)
    k[:, :, 41:], v[:, :, 41:] = 7, 9
    assert torch.equal(native(15, mask)(q, k, v)[:, :, :41], before[:, :, :41])


def test_strided_last_dims(isa):
    """Copied for the call, and kept while it runs: a freed copy would be overwritten by the output."""
    wide = testing.random_tensor(2, 2, 33, 16)
    q, k, v = (wide.roll(i, -1)[..., ::2] for i in range(3))
    assert torch.equal(
        native(3, fa.Mask())(q, k, v), native(3, fa.Mask())(*(x.contiguous() for x in (q, k, v)))
    )


# --- log-sum-exp ------------------------------------------------------------------------------------------------------


def test_lse_is_the_logarithm_of_the_denominator():
    q, k, v = testing.attention_inputs(1, 2, 1, 9, 9, 8, dtype=torch.float64)
    mask = fa.Mask(causal=True, key_lengths=torch.tensor([6]), window=(2, None))
    out, lse = fa.lssa_attention(q, k, v, mask=mask, return_lse=True, backend="reference")
    assert torch.equal(out, fa.lssa_attention(q, k, v, mask=mask, backend="reference"))
    for h, i in itertools.product(range(2), range(9)):
        keys = range(max(i - 2, 0), min(i + 1, 6))
        c = math.log(8) * math.log(max(len(keys), 1))
        cosine = [
            float(torch.nn.functional.cosine_similarity(q.detach()[0, h, i], k.detach()[0, 0, j], dim=0))
            for j in keys
        ]
        total = sum(math.log1p(math.exp(c * x)) for x in cosine)
        assert (
            abs(float(lse.detach()[0, h, i]) - math.log(total)) < 1e-12 if keys else lse[0, h, i] == -math.inf
        )
    assert torch.autograd.gradcheck(
        lambda *x: fa.lssa_attention(*x, mask=fa.Mask(causal=True), return_lse=True, backend="reference"),
        (q, k, v),
        fast_mode=True,
    )


@pytest.mark.parametrize("dtype", (torch.float32, *testing.LOW_DTYPES))
@pytest.mark.parametrize("lq", (150, 3))
def test_native_lse_and_its_gradient(isa, nan_outputs, dtype, lq):
    """Of tiles, and of few rows, whose keys are read as they lie."""
    inputs = testing.attention_inputs(2, 4, 2, lq, 150, 16, dtype=dtype)
    mask = fa.Mask(causal=True, key_lengths=torch.tensor([150, 0]))

    def call(backend):
        return lambda *x: fa.lssa_attention(*x, mask=mask, return_lse=True, backend=backend)

    outputs, _ = testing.differentiate(call("cpu"), inputs)
    assert outputs[1].dtype == torch.float32 and (outputs[1][1] == -torch.inf).all()
    testing.check_op(call("cpu"), call("reference"), inputs, terms=150 + 16)


def test_lssar_has_no_lse():
    q, k, v = testing.attention_inputs(1, 2, 2, 4, 4, 8)
    with pytest.raises(ValueError, match=r"return_lse is not defined for power=3.0: LSSAR has no"):
        fa.lssa_attention(q, k, v, power=3.0, return_lse=True)
    with pytest.raises(
        ValueError, match="return_lse is not defined for score='sigmoid', which has no normaliser"
    ):
        fa.attention(q, k, v, score="sigmoid", return_lse=True)
