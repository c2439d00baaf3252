"""Linear attention: the reference against loops over its documentation, the CPU kernels against the reference in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.runtime import native as _native

NAMES = ("q", "k", "v", "decay", "beta", "initial_state")


def published(q, k, v, decay, beta, state, scale, delta_rule, normalize=False, qk_norm=False):
    """The documentation's equations for one batch and head: q, k (L, dk), v (L, dv), decay (L, 1 or dk), state (dk, dv)."""
    outputs = []
    for t in range(len(q)):
        if qk_norm:
            q_t, k_t = (x[t] / torch.sqrt((x[t] * x[t]).sum() + 1e-6) for x in (q, k))
        else:
            q_t, k_t = q[t], k[t]
        v_t = torch.cat([v[t], v.new_ones(1)]) if normalize else v[t]
        state = torch.diag(decay[t].exp().expand(len(k_t))) @ state
        u_t = v_t - state.T @ k_t if delta_rule else v_t
        state = state + torch.outer(k_t, beta[t] * u_t)
        o_t = scale * (state.T @ q_t)
        outputs.append(o_t[:-1] / o_t[-1] if normalize else o_t)
    return torch.stack(outputs), state


def make(
    length,
    key_heads=1,
    heads=2,
    dk=5,
    dv=3,
    *,
    batch=1,
    decay="token",
    beta=True,
    state=True,
    normalize=False,
    documents=None,
    dtype=torch.float32,
    seed=0,
    layout="contiguous",
):
    """The tensors of a call by name. Keys have norms of about one, so that the delta rule is stable."""
    options = {"layout": layout, "dtype": dtype}
    q, k = (
        testing.random_tensor(batch, key_heads, length, dk, seed=seed + i, scale=dk**-0.5, **options)
        for i in range(2)
    )
    if normalize:
        q, k = q.abs() + 0.05, k.abs() + 0.05
    inputs = {"q": q, "k": k, "v": testing.random_tensor(batch, heads, length, dv, seed=seed + 2, **options)}
    rows = (batch, heads, length)
    shapes = {
        "head": (heads,),
        "token": rows,
        "strong": rows,
        "reset": rows,
        "channel": (*rows, dk),
        "resets": (*rows, dk),
    }
    if decay != "none":
        a = testing.random_tensor(*shapes[decay], seed=seed + 3).abs().neg()
        if decay == "strong":
            a = a * 30
        if decay in ("reset", "resets"):
            chosen = testing.random_tensor(*shapes[decay], seed=seed + 5)
            a = torch.where(chosen > 1.5, -math.inf, torch.where(chosen < -1.5, 0.0, a))
        inputs["decay"] = a.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if beta is not False:
        strength = torch.sigmoid(testing.random_tensor(*rows, seed=seed + 4))
        inputs["beta"] = (strength if beta is True else torch.full_like(strength, float(beta))).to(dtype)
    if state:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sequences = batch if documents is None else documents
        s = testing.random_tensor(sequences, heads, dk, dv + int(normalize), seed=seed + 6, dtype=wide)
        inputs["initial_state"] = s.abs() if normalize else s
    return {name: t.requires_grad_() for name, t in inputs.items()}


def call(names, backend=None, **options):
    options = {"return_state": True, "backend": backend} | options
    return lambda *tensors: fa.linear_attention(**dict(zip(names, tensors, strict=True)), **options)


def norm_magnitudes(inputs, **options):
    """With y = r x, a row's gradient is r (dy - y (y.dy)): what is along y cancels, of r |dy|."""
    if not options.pop("qk_norm", False):
        return ()
    wide = {name: t.detach().double() for name, t in inputs.items()}
    factors = [(wide[n].square().sum(-1, keepdim=True) + 1e-6).rsqrt() for n in ("q", "k")]
    wide |= {n: wide[n] * r for n, r in zip(("q", "k"), factors, strict=True)}
    given = tuple(t.requires_grad_(n in ("q", "k")) for n, t in wide.items())
    _, grads = testing.differentiate(call(wide, "reference", **options), given)
    return tuple(
        testing.max_finite(r * g.norm(dim=-1, keepdim=True)) for r, g in zip(factors, grads, strict=True)
    )


def check(inputs, **options):
    """The kernels' outputs and gradients within their budgets of the definition."""
    q, v = inputs["q"], inputs["v"]
    # of a decay's gradient, which sums over the products of tokens, channels and columns
    terms = max(q.shape[2], 1) * q.shape[3] * v.shape[3]
    names = tuple(inputs)
    testing.check_op(
        call(names, "cpu", **options),
        call(names, "reference", **options),
        tuple(inputs.values()),
        terms=terms,
        names=names,
        magnitudes=norm_magnitudes(inputs, **options),
    )


# --- the definition -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["none", "head", "token", "channel", "resets"])
@pytest.mark.parametrize("delta_rule", [False, True])
def test_reference_is_the_documented_recurrence(decay, delta_rule):
    x = make(9, 2, 4, decay=decay, dtype=torch.float64, batch=2)
    out, state = fa.linear_attention(
        **x, delta_rule=delta_rule, scale=0.7, qk_norm=delta_rule, return_state=True
    )
    for b in range(2):
        for h in range(4):
            a = x.get("decay", torch.zeros(2, 4, 9, dtype=torch.float64))
            a = a[h].expand(9, 1) if a.dim() == 1 else a[b, h].reshape(9, -1)
            expected, after = published(
                x["q"][b, h // 2], x["k"][b, h // 2], x["v"][b, h], a, x["beta"][b, h], x["initial_state"][b, h],
                0.7, delta_rule, qk_norm=delta_rule,
            )  # fmt: skip
            assert testing.max_error(out[b, h], expected) < 1e-13
            assert testing.max_error(state[b, h], after) < 1e-13


def test_normalized_reference_divides_by_the_sum_of_keys():
    x = make(7, heads=1, decay="none", beta=False, normalize=True, dtype=torch.float64)
    out, state = fa.linear_attention(**x, normalize=True, return_state=True)
    ones = torch.ones(7, dtype=torch.float64)
    tensors = (x[n][0, 0] for n in ("q", "k", "v"))
    expected, after = published(*tensors, ones[:, None] * 0, ones, x["initial_state"][0, 0], 0.3, False, True)
    assert testing.max_error(out[0, 0], expected) < 1e-13 and testing.max_error(state[0, 0], after) < 1e-13


def test_without_order_every_token_reads_the_last_state():
    x = make(7, decay="none", beta=False, dtype=torch.float64)
    out, state = fa.linear_attention(**x, causal=False, return_state=True)
    _, after = fa.linear_attention(**x, return_state=True)
    assert testing.max_error(state, after) < 1e-14
    assert testing.max_error(out, 5**-0.5 * (x["q"] @ state)) < 1e-14


def test_defaults():
    x = make(6, decay="none", state=False, dtype=torch.float64)
    plain = fa.linear_attention(x["q"], x["k"], x["v"])
    assert torch.equal(
        plain,
        fa.linear_attention(x["q"], x["k"], x["v"], beta=torch.ones(1, 2, 6).double(), delta_rule=False),
    )
    assert torch.equal(fa.linear_attention(**x), fa.linear_attention(**x, delta_rule=True, scale=5**-0.5))


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
@pytest.mark.parametrize("delta_rule", [False, True])
def test_gradcheck(decay, delta_rule):
    x = make(5, dk=3, dv=2, decay=decay, dtype=torch.float64)
    options = {"delta_rule": delta_rule, "qk_norm": delta_rule}
    assert torch.autograd.gradcheck(call(x, **options), tuple(x.values()), fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_normalized_and_packed(causal):
    cuts = torch.tensor([0, 2, 2, 5])
    x = make(6, dk=3, dv=2, decay="none", beta=False, normalize=True, documents=3, dtype=torch.float64)
    options = {"normalize": True, "cu_seqlens": cuts, "causal": causal}
    assert torch.autograd.gradcheck(call(x, **options), tuple(x.values()), fast_mode=True)


# --- the kernels ----------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_native_computes_the_definition(data):
    draw = data.draw
    packed = draw(st.booleans())
    lengths = (
        draw(st.lists(st.sampled_from([0, 1, 5, 63, 64, 65]), min_size=1, max_size=4)) if packed else None
    )
    length = (
        sum(lengths) + draw(st.sampled_from([0, 3]))
        if packed
        else draw(st.sampled_from([0, 1, 15, 63, 64, 65, 129]))
    )
    key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["plain", "delta", "normalize", "all"]))
    plain = kind == "all"
    x = make(
        length,
        key_heads,
        key_heads * group,
        *draw(st.sampled_from([(1, 1), (8, 5), (20, 33), (16, 16), (3, 8)])),
        batch=1 if packed else draw(st.integers(1, 2)),
        decay="none"
        if plain
        else draw(st.sampled_from(["none", "head", "token", "strong", "reset", "channel", "resets"])),
        beta=False if plain else draw(st.sampled_from([False, True, 0, 2 if kind == "delta" else 1])),
        state=draw(st.booleans()),
        normalize=kind == "normalize",
        documents=len(lengths) if packed else None,
        layout=draw(st.sampled_from(testing.LAYOUTS)),
        seed=draw(st.integers(0, 3)),
    )
    options = {"delta_rule": kind == "delta", "normalize": kind == "normalize", "causal": kind != "all"}
    options["qk_norm"] = kind != "normalize" and draw(st.booleans())
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    with _native.use_cpu_isa(draw(st.sampled_from(testing.isas()))), testing.nan_filled_outputs():
        check(x, **options)


@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_are_computed_with_in_float32(isa, nan_outputs, dtype, decay):
    """One rounding of a result whose sums are in float32: nothing of an eager run's error."""
    x = make(100, 1, 2, 16, 24, decay=decay, dtype=dtype)
    options = {"delta_rule": True, "qk_norm": True}
    outputs, grads = testing.differentiate(call(x, "cpu", **options), tuple(x.values()))
    truth, expected = testing.differentiate(
        call(x, "reference", **options), testing.to_float64(x.values()), testing.output_gradients(outputs)
    )
    for name, a, t in zip(("out", "state", *x), (*outputs, *grads), (*truth, *expected), strict=True):
        # 16 * 24 terms a token of up to 100 tokens; gradients of decays sum what is larger than they are
        testing.assert_close_to_truth(a, t, None, terms=100 * 16 * 24, name=name)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("key_heads", "heads"), [(1, 1), (1, 3), (2, 4)])
def test_native_for_any_threads(isa, nan_outputs, monkeypatch, threads, key_heads, heads):
    """Tasks are key heads, parts of their value heads, or parts of the columns of one."""
    monkeypatch.setattr(_native, "threads", lambda: threads)
    for decay in ("token", "channel"):
        check(make(70, key_heads, heads, 20, 72, decay=decay), delta_rule=True, qk_norm=True)


def test_native_with_typical_head_dims(isa, nan_outputs):
    check(make(130, 1, 2, 128, 128, decay="token"), delta_rule=True, qk_norm=True)


def test_native_is_deterministic(isa):
    x = make(150, 2, 4, 16, 24, decay="token")
    runs = [testing.differentiate(call(x, "cpu", qk_norm=True), tuple(x.values())) for _ in range(2)]
    for a, b in zip(*((*outputs, *grads) for outputs, grads in runs), strict=True):
        assert torch.equal(a, b)


def test_no_token_depends_on_a_later_one(isa):
    """Whatever a later token holds, a NaN too, in its own chunk as in others."""
    for decay in ("token", "channel"):
        x = {name: t.detach() for name, t in make(80, dk=8, decay=decay).items()}
        whole = fa.linear_attention(**x, qk_norm=True, backend="cpu")
        for cut in (1, 5, 64, 70):
            changed = {n: t.clone() for n, t in x.items()}
            for name in ("q", "k", "v", "decay", "beta"):
                changed[name][:, :, cut:] = math.nan
            out = fa.linear_attention(**changed, qk_norm=True, backend="cpu")
            assert torch.equal(out[:, :, :cut], whole[:, :, :cut])
            assert out[:, :, cut:].isnan().all()


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_a_decay_of_minus_infinity_starts_anew(isa, decay):
    x = {name: t.detach() for name, t in make(140, decay=decay, state=False).items()}
    x["decay"][:, :, 70] = -math.inf
    out, state = fa.linear_attention(**x, qk_norm=True, return_state=True, backend="cpu")
    rest = {n: t[:, :, 70:] for n, t in x.items()}
    alone, after = fa.linear_attention(**rest, qk_norm=True, return_state=True, backend="cpu")
    bound = testing.rounding_band(alone, torch.float32, 140 * 5)
    assert testing.max_error(out[:, :, 70:], alone) <= bound and testing.max_error(state, after) <= bound
    leaf = x["decay"].requires_grad_()
    (grad,) = torch.autograd.grad(fa.linear_attention(**x, qk_norm=True, backend="cpu").square().sum(), leaf)
    assert torch.equal(grad[:, :, 70], torch.zeros_like(grad[:, :, 70])) and grad.isfinite().all()


def test_padding_changes_nothing(isa):
    x = {name: t.detach() for name, t in make(75, decay="token").items()}
    longer = {n: torch.nn.functional.pad(t, (0, 0, 0, 9) if t.dim() == 4 else (0, 9)) for n, t in x.items()}
    longer["initial_state"] = x["initial_state"]
    out, state = fa.linear_attention(**x, return_state=True, backend="cpu")
    padded, same = fa.linear_attention(**longer, return_state=True, backend="cpu")
    assert torch.equal(padded[:, :, :75], out)
    assert testing.max_error(same, state) <= testing.rounding_band(state, torch.float32, 75)


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_a_state_goes_on_where_it_was_left(isa, decay):
    x = {name: t.detach() for name, t in make(100, 1, 2, 16, 8, decay=decay).items()}
    whole, after = fa.linear_attention(**x, qk_norm=True, return_state=True, backend="cpu")

    def part(begin, end, state):
        cut = {n: t[:, :, begin:end] for n, t in x.items() if n != "initial_state" and t.dim() > 1}
        return fa.linear_attention(
            **x | cut | {"initial_state": state}, qk_norm=True, return_state=True, backend="cpu"
        )

    first, state = part(0, 37, x["initial_state"])
    second, end = part(37, 100, state)
    bound = testing.rounding_band(whole, torch.float32, 100 * 16)
    assert testing.max_error(torch.cat([first, second], 2), whole) <= bound
    assert testing.max_error(end, after) <= testing.rounding_band(after, torch.float32, 100)
    state = x["initial_state"].clone()
    for t in range(100):
        token = {n: y[:, :, t] for n, y in x.items() if n != "initial_state" and y.dim() > 1}
        token = {n: y for n, y in x.items() if n == "decay"} | token
        out = fa.linear_attention_step(**token, state=state, qk_norm=True, backend="cpu")
        assert testing.max_error(out, whole[:, :, t]) <= bound
    assert testing.max_error(state, after) <= testing.rounding_band(after, torch.float32, 100)


def test_equal_keys_with_a_strength_of_two_are_reflections(isa):
    """The state goes back and forth between two; an inverse by squaring would be off by many powers of ten."""
    key = torch.nn.functional.normalize(torch.ones(8), dim=0).expand(1, 1, 130, 8)
    v = torch.ones(1, 1, 1, 4).expand(1, 1, 130, 4)
    out = fa.linear_attention(key, key, v, beta=torch.full((1, 1, 130), 2.0), scale=1.0, backend="cpu")
    expected = torch.tensor([2.0, 0.0]).repeat(65)[None, None, :, None].expand_as(out)
    # each of the 130 reflections adds a few roundings of a number of at most 2
    assert testing.max_error(out, expected) <= 130 * 4 * testing.EPS32


def test_a_divisor_of_zero_gives_zero(isa):
    x = make(3, decay="none", beta=False, state=False, normalize=True)
    x["k"].detach()[:, :, :2] = 0
    for backend in ("cpu", "reference"):
        (out, _), grads = testing.differentiate(call(x, backend, normalize=True), tuple(x.values()))
        assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))
        assert all(g.isfinite().all() for g in grads)
        assert torch.equal(grads[0][:, :, :2], torch.zeros_like(grads[0][:, :, :2]))


def test_strides(isa):
    """(B, L, H, D) projections, an expanded strength, and a state of the other order, as views."""
    x = {name: t.detach() for name, t in make(20, 2, 2, 8, 8, decay="token").items()}
    views = {n: x[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("q", "k", "v", "decay")}
    views["v"] = x["v"].mT.contiguous().mT
    views["beta"] = torch.full((), 0.5).expand(1, 2, 20)
    views["initial_state"] = x["initial_state"].mT.contiguous().mT
    plain = x | {"beta": torch.full((1, 2, 20), 0.5)}
    for a, b in zip(
        *(fa.linear_attention(**y, return_state=True, backend="cpu") for y in (plain, views)), strict=True
    ):
        assert torch.equal(a, b)


def test_gradient_through_the_state_alone(isa):
    x = make(70, 1, 2, 8, 6, decay="token")
    options = {"qk_norm": True}

    def state(backend):
        return lambda *tensors: call(x, backend, **options)(*tensors)[1]

    testing.check_op(state("cpu"), state("reference"), tuple(x.values()), terms=70 * 48, names=tuple(x))


def test_key_heads_that_serve_no_value_head():
    q = torch.ones(1, 2, 3, 4, requires_grad=True)
    v = torch.ones(1, 0, 3, 5, requires_grad=True)
    out, state = fa.linear_attention(q, q, v, return_state=True)
    assert out.shape == v.shape and state.shape == (1, 0, 4, 5)
    for grad, t in zip(torch.autograd.grad(out.sum() + state.sum(), (q, v)), (q, v), strict=True):
        assert torch.equal(grad, torch.zeros_like(t))


def test_one_channel_and_column_is_a_scan(isa):
    x = {name: t.detach() for name, t in make(90, 1, 1, 1, 1, decay="token", beta=False).items()}
    out = fa.linear_attention(**x, delta_rule=False, scale=1.0, backend="cpu")
    h, expected = x["initial_state"].double().flatten(), []
    for t in range(90):
        h = x["decay"][0, 0, t].double().exp() * h + x["k"][0, 0, t].double() * x["v"][0, 0, t].double()
        expected.append(x["q"][0, 0, t].double() * h)
    assert testing.max_error(out.flatten(), torch.cat(expected)) <= testing.rounding_band(
        out, torch.float32, 90
    )


@pytest.mark.parametrize("step", [False, True])
def test_is_the_gated_delta_rule_of_transformers(step):
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    name = "torch_recurrent_gated_delta_rule" if step else "torch_chunk_gated_delta_rule"
    function = getattr(module, name)
    x = {name: t.detach() for name, t in make(90, 2, 4, 16, 16, decay="token").items()}
    g, beta = (x[n].transpose(1, 2) for n in ("decay", "beta"))
    q, k = (x[n].repeat_interleave(2, 1).transpose(1, 2) for n in ("q", "k"))
    theirs, after = function(
        q, k, x["v"].transpose(1, 2), g=g, beta=beta, initial_state=x["initial_state"],
        output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    out, state = fa.linear_attention(**x, qk_norm=True, return_state=True)
    # theirs takes exponentials of differences of sums of 64 logarithms of about 1: 64 roundings of numbers up to 64
    for a, b in ((out, theirs.transpose(1, 2)), (state, after)):
        assert testing.max_error(a, b) <= 64 * testing.EPS32 * testing.max_finite(b)


# --- the step -------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_native_step_computes_the_definition(data):
    draw = data.draw
    batch, key_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    dk, dv = draw(st.sampled_from([(1, 1), (8, 5), (20, 33), (64, 130)]))
    heads, normalize = key_heads * group, draw(st.booleans())
    dtype = draw(st.sampled_from(testing.LOW_DTYPES))
    q, k = (testing.random_tensor(batch, key_heads, dk, seed=i, dtype=dtype).abs() for i in range(2))
    v = testing.random_tensor(batch, heads, dv, seed=2, dtype=dtype)
    state = testing.random_tensor(batch, heads, dk, dv + int(normalize), seed=3).abs()
    if draw(st.booleans()):
        state = state.mT.contiguous().mT
    shape = draw(st.sampled_from([None, (heads,), (batch, heads), (batch, heads, dk)]))
    gates = {} if shape is None else {"decay": -testing.random_tensor(*shape, seed=4).abs()}
    if draw(st.booleans()):
        gates["beta"] = torch.sigmoid(testing.random_tensor(batch, heads, seed=5))
    options = {
        "delta_rule": not normalize and draw(st.booleans()),
        "normalize": normalize,
        "qk_norm": draw(st.booleans()),
    }

    def run(backend, kind):
        written = state.to(torch.float64 if kind == torch.float64 else torch.float32)
        written = written.clone(memory_format=torch.preserve_format)
        given = [t.to(kind) for t in (q, k, v)]
        out = fa.linear_attention_step(*given, written, **gates, **options, backend=backend)
        return out, written

    with _native.use_cpu_isa(draw(st.sampled_from(testing.isas()))):
        actual = run("cpu", dtype)
    truth = run("reference", torch.float64)
    # what cancels in u, a value less what the state has for the key, and in o, are sums of dk products
    size = testing.max_finite(state) * testing.max_finite(k) * dk + testing.max_finite(v)
    reads = max(1.0, testing.max_finite(q) * testing.max_finite(k) * dk)
    for a, t in zip(actual, truth, strict=True):
        testing.assert_close_to_truth(a, t, None, terms=dk, magnitude=0 if normalize else size * reads)


def test_step_refuses_what_it_cannot_write_to_or_differentiate():
    q, v, state = torch.ones(1, 1, 4), torch.ones(1, 1, 3), torch.zeros(1, 1, 4, 3)
    with pytest.raises(ValueError, match="state is written in place and must not be an expanded tensor"):
        fa.linear_attention_step(q, q, v, state[:, :, :1].expand(1, 1, 4, 3))
    with pytest.raises(NotImplementedError, match="it has no gradients"):
        fa.linear_attention_step(q.clone().requires_grad_(), q, v, state)
    with pytest.raises(TypeError, match="state must be float32"):
        fa.linear_attention_step(q, q, v, state.double())


# --- torch ----------------------------------------------------------------------------------------------------------


def test_opcheck_and_compile():
    x = make(70, 1, 2, 8, 6, decay="token")
    values = (*(x[n] for n in NAMES), None, 0.3, True, False, True, True, "")
    torch.library.opcheck(torch.ops.fastattn.linear_attention.default, values)
    state = x["initial_state"].detach()
    tokens = [x[n].detach()[:, :, 0] for n in ("q", "k", "v", "decay", "beta")]
    torch.library.opcheck(
        torch.ops.fastattn.linear_attention_step.default, (*tokens, state.clone(), 0.3, True, False, True, "")
    )

    def layer(*tensors):
        out, state = call(x, qk_norm=True)(*tensors)
        return out.square(), state * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, wanted = testing.differentiate(layer, tuple(x.values()))
    actual, grads = testing.differentiate(compiled, tuple(x.values()))
    for a, b in zip((*actual, *grads), (*expected, *wanted), strict=True):
        assert torch.equal(a, b)


def test_compiled_step_writes_its_state():
    q, v, state = torch.rand(2, 1, 4), torch.rand(2, 2, 3), torch.rand(2, 2, 4, 3)
    first, second = state.clone(), state.clone()
    out = fa.linear_attention_step(q, q, v, first)
    compiled = torch.compile(fa.linear_attention_step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, q, v, second), out) and torch.equal(first, second)
    assert not torch.equal(first, state)


BAD = [
    ({"k": torch.zeros(1, 2, 5, 3)}, ValueError, r"k must have shape \(1x2x5x4\)"),
    ({"v": torch.zeros(1, 3, 5, 3)}, ValueError, "v's heads must be a multiple of k's, given 3 and 2"),
    ({"v": torch.zeros(1, 2, 6, 3)}, ValueError, "v must have q's batch and tokens"),
    ({"v": torch.zeros(1, 2, 5, 3, dtype=torch.float16)}, TypeError, "v is float16 but q is float32"),
    ({"decay": torch.zeros(1, 2)}, ValueError, "decay must have one of the shapes 2, 1x2x5, 1x2x5x4"),
    ({"decay": torch.zeros(2, dtype=torch.int64)}, TypeError, "decay must be one of"),
    ({"beta": torch.zeros(1, 2, 5, 1)}, ValueError, r"beta must have shape \(1x2x5\)"),
    ({"normalize": True, "delta_rule": True}, ValueError, "normalize is not defined with the delta rule"),
    ({"causal": False, "decay": torch.zeros(2)}, ValueError, "decay is not defined with causal=False"),
    ({"causal": False, "delta_rule": True}, ValueError, "delta_rule is not defined with causal=False"),
    ({"initial_state": torch.zeros(1, 2, 4, 3), "normalize": True}, ValueError, "a column of sums of keys"),
    ({"initial_state": torch.zeros(1, 2, 4, 3).double()}, TypeError, "initial_state must be float32"),
    ({"cu_seqlens": torch.tensor([0, 3, 2])}, ValueError, r"cu_seqlens must start at 0, not decrease"),
    ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "end at most at 5"),
    ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be int32 or int64"),
    ({"scale": math.nan}, TypeError, "scale must be a finite number"),
    ({"qk_norm": 1}, TypeError, "qk_norm must be a bool"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[m[:24] for *_, m in BAD])
def test_errors_name_the_argument(options, error, message):
    inputs = {
        "q": torch.zeros(1, 2, 5, 4),
        "k": torch.zeros(1, 2, 5, 4),
        "v": torch.zeros(1, 2, 5, 3),
    } | options
    with pytest.raises(error, match=f"fastattn.linear_attention: .*{message}"):
        fa.linear_attention(**inputs)


def test_kernels_check_what_they_are_given():
    q, out, state = torch.zeros(1, 2, 5, 4), torch.empty(1, 2, 5, 4), torch.empty(1, 2, 4, 4)
    fields = {"q": q, "k": q, "v": q, "out": out, "state": state}
    for wrong, message in (
        ({"offsets": torch.tensor([0, 3, 9])}, "cu_seqlens must lie in"),
        ({"state": state[:, :1]}, "state must have sizes"),
        ({"beta": torch.zeros(2, 6)}, "beta must have sizes"),
        ({"normalize": 1, "delta_rule": 1}, "normalize is not served with the delta rule"),
        ({"head_parts": 2}, "head_parts must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.run("linear_attention_forward", **fields | wrong)


@pytest.mark.parametrize("causal", [True, False])
def test_a_divisor_that_has_no_reciprocal_divides(isa, nan_outputs, causal):
    """1 / 2^-140 is no float32. Sums of small integers times 2^-140 are exact, and so is their mean but for one rounding."""
    tiny = 2.0**-70
    v = torch.arange(12.0).view(1, 1, 4, 3)
    q, k = (torch.full((1, 1, 4, 1), tiny) for _ in range(2))
    mean = v.cumsum(2) / torch.arange(1.0, 5)[:, None] if causal else v.mean(2, keepdim=True).expand_as(v)
    options = {"normalize": True, "causal": causal, "backend": "cpu"}
    out = fa.linear_attention(q, k, v, **options)
    assert ((out - mean).abs() <= testing.EPS32 * mean).all()
    # a row that no gradient comes to has none, whatever it is divided by
    q = torch.cat([q[:, :, :1], torch.ones(1, 1, 3, 1)], 2)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    grad = torch.ones(v.shape)
    grad[:, :, 0] = 0
    found, true = (
        torch.autograd.grad(fa.linear_attention(*x, **options | {"backend": b}), x, grad.to(x[0].dtype))
        for x, b in ((leaves, "cpu"), ([t.detach().double().requires_grad_() for t in leaves], "reference"))
    )
    for a, t in zip(found, true, strict=True):
        testing.assert_close_to_truth(a, t, None, terms=12, magnitude=testing.max_finite(t))
    if causal:
        state = torch.zeros(1, 1, 1, 4)
        step = fa.linear_attention_step(
            k[:, :, 0].detach(), k[:, :, 0].detach(), v[:, :, 1].detach(), state, **{"normalize": True}
        )
        assert torch.equal(step, v[:, :, 1])
