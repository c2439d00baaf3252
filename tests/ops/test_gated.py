"""Gated attention, the form that trains a router, against its equation and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.runtime import native as _native


def published(q, k, v, assignment, sharpness, window, gate, prefix=0):
    """Row by row, without masks or tensor algebra beyond dot products; float64."""
    q, k, v, a = (x.double() for x in (q, k, v, assignment))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[3]).clone()
    for i in range(q.shape[2]):
        end = max(i + 1, prefix)
        s = torch.einsum("bhd,bhjd->bhj", q[:, :, i], k[:, :, :end]) / q.shape[3] ** 0.5
        g = torch.sigmoid(sharpness * torch.einsum("bg,bjg->bj", a[:, i], a[:, :end]))
        g = torch.where((i - torch.arange(end)).abs() <= window, 1.0, g)[:, None]
        s = s * g if gate == "multiply" else s + g.log()
        out[:, :, i] = torch.einsum("bhj,bhjd->bhd", s.softmax(-1), v[:, :, :end])
    return out


def inputs(length=20, groups=4, dtype=torch.float64, heads=4, kv_heads=2, head_dim=8):
    q, k, v = testing.attention_inputs(2, heads, kv_heads, length, length, head_dim, dtype=dtype)
    scores = testing.random_tensor(2, length, groups, dtype=torch.float64, seed=5)
    assignment = fa.sinkhorn(scores, temperature=1.0).to(dtype).requires_grad_()
    return q, k, v, assignment, torch.tensor(3.0, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("gate", ["multiply", "log"])
@pytest.mark.parametrize("window", [0, 3, 50])
@pytest.mark.parametrize("prefix", [None, 0, 13, 20])
def test_is_the_published_equation(gate, window, prefix):
    q, k, v, a, sharpness = inputs()
    with torch.no_grad():
        expected = published(q, k, v, a, 3.0, window, gate, prefix or 0)
    options = {"window": window, "gate": gate, "backend": "reference"}
    if prefix is not None:
        options["mask"] = fa.Mask(prefix_lengths=torch.tensor([prefix, prefix]))
    actual = fa.gated_attention(q, k, v, a, sharpness=sharpness, **options)
    assert testing.max_error(actual, expected) < 1e-13
    number = fa.gated_attention(q, k, v, a, sharpness=3.0, **options)
    assert torch.equal(number, actual)


@pytest.mark.parametrize("gate", ["multiply", "log"])
@pytest.mark.parametrize("prefix", [None, 5])
def test_gradcheck(gate, prefix):
    q, k, v, a, sharpness = inputs(7, 3, heads=2, kv_heads=1, head_dim=4)
    mask = None if prefix is None else fa.Mask(prefix_lengths=torch.tensor([prefix, 0]))
    assert torch.autograd.gradcheck(
        lambda q, k, v, a, s: fa.gated_attention(q, k, v, a, window=2, sharpness=s, gate=gate, mask=mask),
        (q, k, v, a, sharpness),
        fast_mode=True,
    )


def test_a_window_of_everything_is_causal_attention():
    """With every key inside the window no gate acts, and the op is plain causal attention."""
    q, k, v, a, _ = inputs()
    actual = fa.gated_attention(q, k, v, a, window=20)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert testing.max_error(actual, expected) < 1e-13


def test_packed_documents():
    q, k, v, a, _ = (x[:1] if x.dim() else x for x in inputs())
    mask = fa.Mask(cu_seqlens_q=torch.tensor([0, 8, 20]))
    whole = fa.gated_attention(q, k, v, a, window=2, mask=mask)
    parts = [
        fa.gated_attention(*(x[:, :, span] for x in (q, k, v)), a[:, span], window=2)
        for span in (slice(0, 8), slice(8, 20))
    ]
    assert testing.max_error(whole, torch.cat(parts, 2)) < 1e-14


def test_opcheck_and_compile():
    q, k, v, a, sharpness = inputs(9, dtype=torch.float32)
    mask = fa.Mask(causal=True).args("test", q, k)
    torch.library.opcheck(
        torch.ops.fastattn.gated_attention.default, (q, k, v, a, sharpness, 2, 0, 0.3, *mask, "")
    )

    def layer(q, k, v, a, sharpness):
        return fa.gated_attention(q * 2, k, v, a, window=2, sharpness=sharpness).square()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, wanted = testing.differentiate(layer, (q, k, v, a, sharpness))
    actual, grads = testing.differentiate(compiled, (q, k, v, a, sharpness))
    for x, y in zip((*actual, *grads), (*expected, *wanted), strict=True):
        assert testing.max_error(x, y) <= 1e-6 * (1 + testing.max_finite(y))


def test_assignment_keeps_its_own_dtype():
    q, k, v, a, sharpness = inputs(9)
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    (out,), grads = testing.differentiate(
        lambda *x: fa.gated_attention(*x[:3], x[3], sharpness=x[4], window=2),
        (q, k, v, a.detach().float().requires_grad_(), sharpness),
    )
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3 + [torch.float32, torch.float64]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"assignment": torch.zeros(1, 5, 3)}, ValueError, r"assignment must have shape \(B, L, G\)"),
        ({"assignment": torch.zeros(1, 4, 3, dtype=torch.int64)}, TypeError, "assignment must be one of"),
        ({"sharpness": torch.zeros(2)}, ValueError, "sharpness must be a number or a tensor of one element"),
        ({"sharpness": "soft"}, TypeError, "sharpness must be a number or a tensor"),
        ({"gate": "hard"}, ValueError, "gate must be one of 'multiply', 'log', given 'hard'"),
    ],
)
def test_errors_name_the_argument(options, error, message):
    q, k, v = testing.attention_inputs(1, 2, 2, 4, 4, 8)
    options = {"assignment": torch.zeros(1, 4, 3), **options}
    with pytest.raises(error, match=f"fastattn.gated_attention: {message}"):
        fa.gated_attention(q, k, v, **options)


# --- native kernels -------------------------------------------------------------------------------------------------


@pytest.fixture(params=testing.isas())
def isa(request):
    with _native.use_cpu_isa(request.param):
        yield request.param


def call(backend, **options):
    return lambda q, k, v, a, s: fa.gated_attention(q, k, v, a, sharpness=s, backend=backend, **options)


def sharpness_magnitude(q, k, v, assignment, sharpness, **options) -> float:
    """Of sharpness' gradient, the sum over pairs of weight * (dweight - delta) * dscore/dsharpness, whose terms cancel.

    The roundings of a row may have one sign (its delta and lse are in all of its terms), those of rows are independent:
    magnitudes within rows, the root of the sum of squares over rows. Pairs near the diagonal count as distant ones.
    """
    q, k, v, a, s = (t.detach().double() for t in (q, k, v, assignment, sharpness))
    weights = testing.attention_weights(
        lambda *qkv: fa.gated_attention(*qkv, a, sharpness=s, backend="reference", **options), q, k, v
    )
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    (grad,) = testing.output_gradients((torch.empty(*q.shape[:3], v.shape[3]),))
    dweight = grad.double() @ v.transpose(-1, -2)
    delta = (weights * dweight).sum(-1, keepdim=True)
    alike = (a @ a.transpose(-1, -2))[:, None]
    gate = torch.sigmoid(s * alike)
    if options["gate"] == "multiply":
        slope = q.shape[3] ** -0.5 * (q @ k.transpose(-1, -2)) * gate * (1 - gate) * alike
    else:
        slope = (1 - gate) * alike
    rows = (weights * (dweight.abs() + delta.abs()) * slope.abs()).sum(-1)
    return float(rows.square().sum().sqrt())


@given(data=st.data())
def test_native_under_every_mask(isa, data):
    # some row has two keys: where none has, every true gradient is 0 and so is its budget
    lengths = data.draw(st.lists(st.just(0) | st.integers(2, 60), min_size=1, max_size=3))
    packed, length = len(lengths) > 1, sum(lengths)
    batch, kv_heads = 1 if packed else data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    options = {
        "window": data.draw(st.integers(0, 40)),
        "gate": data.draw(st.sampled_from(["multiply", "log"])),
    }
    mask = {}
    if packed:
        mask["cu_seqlens_q"] = torch.tensor([0, *lengths]).cumsum(0)
    if data.draw(st.booleans()):
        mask["key_lengths"] = torch.tensor(
            [data.draw(st.integers(min(n, 2), n)) for n in (lengths if packed else lengths * batch)]
        )
    if data.draw(st.booleans()):
        mask["prefix_lengths"] = torch.tensor(
            [data.draw(st.integers(0, n)) for n in (lengths if packed else lengths * batch)]
        )
    if data.draw(st.booleans()):
        mask["window"] = (data.draw(st.integers(1, 60)), data.draw(st.none() | st.integers(0, 60)))
    if data.draw(st.booleans()):
        mask["dense"] = torch.rand(length, length, generator=torch.Generator().manual_seed(0)) < 0.7
    options["mask"] = fa.Mask(**mask) if mask else None
    head_dim, value_dim = data.draw(st.sampled_from([(1, 3), (17, 33), (64, 16)]))
    q, k, v = testing.attention_inputs(
        batch, kv_heads * 2, kv_heads, length, length, head_dim, value_dim, layout="odd"
    )
    groups = data.draw(st.sampled_from([1, 3, 8, 20]))
    a = fa.sinkhorn(testing.random_tensor(batch, length, groups), temperature=1.0).requires_grad_()
    sharpness = torch.tensor(data.draw(st.sampled_from([-2.0, 0.0, 1.0, 30.0])), requires_grad=True)
    with testing.nan_filled_outputs():
        testing.check_op(
            call("cpu", **options),
            call("reference", **options),
            (q, k, v, a, sharpness),
            terms=length + 16,
            names=("q", "k", "v", "assignment", "sharpness"),
            magnitudes=(0.0, 0.0, 0.0, 0.0, sharpness_magnitude(q, k, v, a, sharpness, **options)),
        )


@pytest.mark.parametrize("dtype", testing.LOW_DTYPES)
@pytest.mark.parametrize("gate", ["multiply", "log"])
def test_native_dtypes(isa, nan_outputs, dtype, gate):
    q, k, v = testing.attention_inputs(2, 4, 2, 150, 150, 32, dtype=dtype)
    a = fa.sinkhorn(testing.random_tensor(2, 150, 8), temperature=1.0).to(dtype).requires_grad_()
    # one number whose terms cancel: eager's own error is luck in a low dtype and makes no budget
    sharpness = torch.tensor(3.0, requires_grad=dtype == torch.float32)
    options = {"window": 20, "gate": gate}
    testing.check_op(
        call("cpu", **options), call("reference", **options), (q, k, v, a, sharpness), terms=150 * 4
    )


@pytest.mark.parametrize("gate", ["multiply", "log"])
def test_native_prefix_over_several_tiles(isa, nan_outputs, gate):
    q, k, v = testing.attention_inputs(2, 4, 2, 330, 330, 32)
    a = fa.sinkhorn(testing.random_tensor(2, 330, 8), temperature=1.0).requires_grad_()
    sharpness = torch.tensor(3.0, requires_grad=True)
    options = {"window": 20, "gate": gate, "mask": fa.Mask(prefix_lengths=torch.tensor([170, 330]))}
    testing.check_op(
        call("cpu", **options), call("reference", **options), (q, k, v, a, sharpness), terms=330 * 4
    )


@pytest.mark.parametrize("gate", ["multiply", "log"])
def test_native_prefix_of_nothing_changes_nothing(isa, gate):
    q, k, v = testing.attention_inputs(2, 4, 2, 200, 200, 16)
    a = fa.sinkhorn(testing.random_tensor(2, 200, 8), temperature=1.0).requires_grad_()
    inputs = (q, k, v, a, torch.tensor(3.0, requires_grad=True))
    empty = fa.Mask(prefix_lengths=torch.zeros(2, dtype=torch.int64))
    options = {"window": 9, "gate": gate}
    (out,), grads = testing.differentiate(call("cpu", **options), inputs)
    (same,), alike = testing.differentiate(call("cpu", mask=empty, **options), inputs)
    assert torch.equal(out, same) and all(torch.equal(x, y) for x, y in zip(grads, alike, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("kv_heads", "group"), [(1, 6), (3, 2), (5, 1)])
def test_native_for_any_heads_and_threads(isa, nan_outputs, monkeypatch, threads, kv_heads, group):
    """Heads share gates in sets that depend on both; sets may be ragged, and some query heads of one key head."""
    monkeypatch.setattr(_native, "threads", lambda: threads)
    q, k, v = testing.attention_inputs(2, kv_heads * group, kv_heads, 110, 110, 8)
    a = fa.sinkhorn(testing.random_tensor(2, 110, 3), temperature=1.0).requires_grad_()
    sharpness = torch.tensor(3.0, requires_grad=True)
    testing.check_op(
        call("cpu", window=9), call("reference", window=9), (q, k, v, a, sharpness), terms=110 * 4
    )


def test_native_is_deterministic(isa):
    q, k, v = testing.attention_inputs(1, 4, 1, 200, 200, 16)
    a = fa.sinkhorn(testing.random_tensor(1, 200, 8), temperature=1.0).requires_grad_()
    inputs = (q, k, v, a, torch.tensor(3.0, requires_grad=True))
    runs = [testing.differentiate(call("cpu", window=20), inputs) for _ in range(3)]
    for out, grads in runs[1:]:
        assert torch.equal(out[0], runs[0][0][0])
        assert all(torch.equal(x, y) for x, y in zip(grads, runs[0][1], strict=True))


def test_key_heads_that_serve_no_query_head():
    q, k, v = torch.zeros(1, 0, 5, 4), *torch.ones(2, 1, 2, 5, 4)
    inputs = [t.requires_grad_() for t in (q, k.clone(), v.clone(), torch.ones(1, 5, 3), torch.tensor(2.0))]
    out = fa.gated_attention(*inputs[:4], sharpness=inputs[4], window=1)
    assert out.shape == q.shape
    for grad, t in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(t))


# --- log-sum-exp ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["multiply", "log"])
def test_lse_is_that_of_the_gated_scores(gate):
    q, k, v, a, sharpness = inputs(9, 3, heads=2, kv_heads=1, head_dim=4)
    mask = fa.Mask(prefix_lengths=torch.tensor([5, 0]))
    options = {"window": 2, "gate": gate, "mask": mask, "return_lse": True, "backend": "reference"}
    _, lse = fa.gated_attention(q, k, v, a, sharpness=sharpness, **options)
    # a value of 1 at one key only: its weight, e^(score - lse)
    i, j = 8, 1
    one = torch.zeros_like(v)
    one[:, :, j] = 1
    weight, _ = fa.gated_attention(q, k, one, a, sharpness=sharpness, **options)
    score = (q[:, :, i] * k[:, :, j]).sum(-1) / 2
    g = torch.sigmoid(sharpness * (a[:, i] * a[:, j]).sum(-1))[:, None]
    score = score * g if gate == "multiply" else score + g.log()
    assert testing.max_error(weight[:, :, i, 0].log(), score - lse[:, :, i]) < 1e-12
    assert torch.autograd.gradcheck(
        lambda q, k, v, a, s: fa.gated_attention(q, k, v, a, sharpness=s, **options),
        (q, k, v, a, sharpness),
        fast_mode=True,
    )


@pytest.mark.parametrize("dtype", (torch.float32, *testing.LOW_DTYPES))
@pytest.mark.parametrize("gate", ["multiply", "log"])
def test_native_lse_and_its_gradient(isa, nan_outputs, dtype, gate):
    q, k, v = testing.attention_inputs(2, 4, 2, 150, 150, 32, dtype=dtype)
    a = fa.sinkhorn(testing.random_tensor(2, 150, 8), temperature=1.0).to(dtype).requires_grad_()
    sharpness = torch.tensor(3.0, requires_grad=dtype == torch.float32)
    mask = fa.Mask(prefix_lengths=torch.tensor([90, 0]), key_lengths=torch.tensor([150, 0]))
    options = {"window": 20, "gate": gate, "mask": mask, "return_lse": True}
    (_, lse), _ = testing.differentiate(call("cpu", **options), (q, k, v, a, sharpness))
    assert lse.dtype == torch.float32 and (lse[1] == -torch.inf).all()
    testing.check_op(
        call("cpu", **options), call("reference", **options), (q, k, v, a, sharpness), terms=150 * 4
    )
