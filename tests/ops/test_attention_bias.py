"""The gradient of attention's tensor bias: every shape that broadcasts, every option, what is shared out, and its memory."""

import itertools

import pytest
import torch
from attention_options import check, options
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.ops.attention import cpu, scores
from fastattn.runtime import native as _native
from fastattn.runtime import tuning as _config

SCORES = tuple(scores.SCORES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = tuple(itertools.product((False, True), repeat=4))


def small_tiles(patch, pack_kib):
    """Short sequences cross many edges of tiles; `pack_kib`, which nobody tunes so low: sums are panels of a task (0), in the gradient
    of several waves, or of one."""
    values = {"block_q": 24, "block_k": 32, "decode_rows": 8, "chunk_k": 64, "pack_kib": pack_kib}
    patch.setattr(
        cpu, "lookup", lambda name, *_, **more: _config.Choice(_values_of(name, values), "override")
    )


def _values_of(name, values):
    return {n: values[n] for n in _config.tunings()[name, "cpu"].parameters}


@pytest.mark.parametrize(
    "dims", PATTERNS, ids=lambda dims: "".join("BHqk"[i] if own else "1" for i, own in enumerate(dims))
)
@given(
    data=st.data(),
    score=st.sampled_from(SCORES),
    dtype=st.sampled_from(DTYPES),
    pack_kib=st.sampled_from((0, 40, 4096)),
    threads=st.sampled_from((1, 2, 5)),
)
@settings(max_examples=25)
def test_gradients_are_within_the_error_budget(isa, nan_outputs, dims, data, score, dtype, pack_kib, threads):
    problem = data.draw(testing.attention_problems())
    given_options = data.draw(st.just(({}, False)) | options(score))
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, pack_kib)
        patch.setattr(_native, "threads", lambda: threads)
        check("cpu", score, dtype, problem, given_options, bias_dims=dims)


def gradients(q, k, v, bias, **call):
    call.setdefault("backend", "cpu")
    out, lse = fa.attention(q, k, v, bias=bias, return_lse=True, **call)
    grads = [testing.random_tensor(*t.shape, dtype=t.dtype, seed=7 + i) for i, t in enumerate((out, lse))]
    return torch.autograd.grad((out, lse), (q, k, v, bias), grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dims", ((False, True, True, True), (False, False, True, True), (True, False, False, True))
)
def test_a_bias_of_many_entries_is_shared_out_and_repeats(isa, monkeypatch, dtype, dims):
    """Windows: many entries and heads, one tile of keys. Sums of their own for some of the entries, and the same bits again."""
    full = (12, 4, 40, 30)
    q, k, v = testing.attention_inputs(12, 4, 2, 40, 30, 16, dtype=dtype)
    shape = [n if own else 1 for n, own in zip(full, dims, strict=True)]
    bias = testing.random_tensor(*shape, dtype=dtype, seed=9, requires_grad=True)
    monkeypatch.setattr(_native, "threads", lambda: 3)
    first, again = gradients(q, k, v, bias), gradients(q, k, v, bias)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    true = gradients(*(t.detach().double().requires_grad_() for t in (q, k, v, bias)), backend="reference")
    for mine, exact in zip(first, true, strict=True):
        # sums over 12 * 4 * 40 rows at most, weights and dS of bf16 rounded before their products
        rounded = 0 if dtype == torch.float32 else 8
        bound = (rounded + 1) * torch.finfo(dtype).eps + (4 + (12 * 4 * 40) ** 0.5) * testing.EPS32
        assert testing.max_error(mine, exact) <= bound * testing.max_finite(exact)


def test_a_constant_of_a_row_has_the_gradient_of_its_lse(isa, nan_outputs):
    """Softmax does not change with it, so the gradient is dlse summed, and 0 to the last bit where lse has none."""
    q, k, v = testing.attention_inputs(2, 4, 2, 33, 47, 16)
    for shape in ((2, 4, 33, 1), (1, 4, 1, 1), (1, 1, 33, 1), (1, 1, 1, 1)):
        bias = testing.random_tensor(*shape, seed=9, requires_grad=True)
        out, lse = fa.attention(q, k, v, bias=bias, return_lse=True, backend="cpu")
        (of_out,) = torch.autograd.grad(out.sum(), bias, retain_graph=True)
        assert not of_out.any()
        grad = testing.random_tensor(*lse.shape, seed=8)
        (found,) = torch.autograd.grad(lse, bias, grad)
        true = grad.double()[..., None].sum_to_size(shape)
        assert torch.equal(found, true.float())


@pytest.mark.parametrize("dims", PATTERNS)
def test_what_no_row_attends_has_no_gradient(isa, nan_outputs, monkeypatch, dims):
    """Padding of NaN, documents, and what lies after the last of them."""
    q, k, v = testing.attention_inputs(1, 2, 1, 60, 70, 8)
    with torch.no_grad():
        k[:, :, 65:] = v[:, :, 65:] = torch.nan
    mask = fa.Mask(
        causal=True, cu_seqlens_q=torch.tensor([0, 11, 50]), cu_seqlens_k=torch.tensor([0, 21, 65])
    )
    shape = [n if own else 1 for n, own in zip((1, 2, 60, 70), dims, strict=True)]
    bias = testing.random_tensor(*shape, seed=9, requires_grad=True)
    small_tiles(monkeypatch, 4096)
    found = gradients(q, k, v, bias, mask=mask)
    assert all(t.isfinite().all() for t in found)
    d = found[3]
    if dims[2]:
        assert not d[:, :, 50:].any() and d[:, :, :50].any()
    if dims[3]:
        assert not d[..., 65:].any()
    if dims[2] and dims[3]:
        assert not d[:, :, :11, 21:].any() and not d[:, :, 11:50, :21].any() and not d[:, :, 0, 11:].any()


@pytest.mark.parametrize("mode", ("aot_eager", "inductor"))
def test_compiles(mode):
    q, k, v = testing.attention_inputs(2, 4, 2, 20, 30, 8)
    bias = testing.random_tensor(1, 4, 20, 30, seed=9, requires_grad=True)

    def call(q, k, v, bias):
        return fa.attention(q, k, v, bias=bias, backend="cpu")

    eager = testing.differentiate(call, (q, k, v, bias))
    found = testing.differentiate(torch.compile(call, fullgraph=True, backend=mode), (q, k, v, bias))
    for a, b in zip((*eager[0], *eager[1]), (*found[0], *found[1]), strict=True):
        assert torch.equal(a, b)


_CASE = """
import torch, fastattn as fa
torch.set_num_threads(2)
def problem(batch, heads, length, dtype, wanted):
    dtype = getattr(torch, dtype)
    q, k, v = (torch.randn(batch, heads, length, 32).to(dtype).requires_grad_() for _ in range(3))
    return q, k, v, torch.randn(1, heads, length, length).to(dtype).requires_grad_(wanted)
def run(q, k, v, bias):
    out = fa.attention(q, k, v, bias=bias, backend="cpu")
    return torch.autograd.grad(out, [t for t in (q, k, v, bias) if t.requires_grad], torch.ones_like(out))
"""


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_memory_beside_the_gradient(peak_bytes, dtype):
    """What the backward takes more with a gradient of the bias than without: the gradient, a tenth of it and some pages."""
    sizes = (4, 4, 1500, dtype)
    without, with_gradient = (
        peak_bytes(_CASE, (1, 1, 40, dtype, wanted), (*sizes, wanted)) for wanted in (False, True)
    )
    gradient = 4 * 1500 * 1500 * (4 if dtype == "float32" else 2)
    assert with_gradient - without < 1.1 * gradient + (2 << 20)
