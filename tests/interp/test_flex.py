"""flex_attention in Triton: published and random functions, forward and back, against float64."""

import random
import sys
from pathlib import Path

import pytest
import torch
from flex_mods import BATCH, HEADS, MASKS, SCORES
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn import testing
from fastattn.ops.flex import triton_files
from fastattn.runtime import tuning as _config

sys.path.append(str(Path(__file__).parents[1] / "fuzz"))
import flex as fuzz

LENGTH = 40
pytestmark = [
    # nan_outputs asks for what repeats, and is told what does not
    pytest.mark.filterwarnings("ignore:fastattn.flex_attention. the triton backend adds up gradients"),
    # of numpy, in branches that are not taken
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def inputs(dtype=torch.float32, length=LENGTH, keys=None, dim=16, kv_heads=2, batch=BATCH):
    return testing.attention_inputs(
        batch, HEADS, kv_heads, length, length if keys is None else keys, dim, dtype=dtype
    )


def run(score_mod, mask, captured, qkv, **options):
    """(out, lse and the gradients of q, k, v and of what is captured), as tensors of one list. score_mod: of what is captured."""
    leaves = [t.detach().requires_grad_() for t in qkv]
    captured = [t.detach().requires_grad_(t.is_floating_point()) for t in captured]
    function = None if score_mod is None else score_mod(*captured)
    out, lse = fa.flex_attention(*leaves, function, mask, enable_gqa=True, return_lse=True, **options)
    of_rows = torch.arange(lse.numel(), dtype=lse.dtype).view(lse.shape).sin()
    weights = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).cos().to(out.dtype)
    loss = (out * weights).float().sum() + (lse.masked_fill(lse.isinf(), 0.0) * of_rows).sum()
    loss.backward()
    floating = [t for t in captured if t.is_floating_point()]
    # a function without its score gives q and k no gradient
    return [out, lse, *(torch.zeros_like(t) if t.grad is None else t.grad for t in (*leaves, *floating))]


def check(score_mod, mask, captured, qkv):
    """The kernels' results against float64, by what eager torch in the same dtype is off by (testing.budget)."""
    low = [t.float() if t.is_floating_point() else t for t in captured]
    wide = [t.double() if t.is_floating_point() else t for t in low]
    truth = run(score_mod, mask, wide, [t.double() for t in qkv])
    eager = run(score_mod, mask, low, qkv, backend="reference")
    found = run(score_mod, mask, low, qkv, backend="triton")
    length = max(qkv[0].shape[2], qkv[1].shape[2])
    for i, (mine, true, plain) in enumerate(zip(found, truth, eager, strict=True)):
        # a captured tensor's gradient is a sum over as many scores as read an element
        terms = length if i < 5 else qkv[0].shape[0] * HEADS * length * length
        factor = 2.0 if i < 2 else 3.0
        testing.assert_close_to_truth(mine, true, plain, factor=factor, terms=terms, name=f"result {i}")


@pytest.mark.parametrize("score", SCORES)
def test_scores(score, nan_outputs):
    captured, score_mod = SCORES[score]
    check(score_mod, None, captured(LENGTH), inputs())


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, nan_outputs):
    captured, score_mod = SCORES["alibi"]
    check(score_mod, MASKS[mask](LENGTH), captured(LENGTH), inputs())


@pytest.mark.parametrize("score", ("alibi", "learned cap", "relative table", "causal in the score"))
def test_half_precision(score, nan_outputs):
    captured, score_mod = SCORES[score]
    check(score_mod, MASKS["dilated"](LENGTH), captured(LENGTH), inputs(torch.float16))


@settings(max_examples=12)
@given(
    st.sampled_from([n for n in SCORES if n != "graph distances"]),
    st.sampled_from([None, *MASKS]),
    st.integers(31, 90),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([8, 24]),
)
def test_lengths_and_heads(score, mask, length, kv_heads, dim):
    captured, score_mod = SCORES[score]
    mask_mod = None if mask is None else MASKS[mask](length)
    with testing.nan_filled_outputs():
        check(score_mod, mask_mod, captured(length), inputs(length=length, kv_heads=kv_heads, dim=dim))


@pytest.mark.parametrize("queries, keys", ((1, 90), (5, 90), (90, 40), (0, 5), (5, 0), (33, 70)))
@pytest.mark.parametrize("mask", (None, "causal", "by head"))
def test_more_keys_than_queries_and_fewer(queries, keys, mask, nan_outputs):
    """Numbers count from the first query and the first key; a few queries are decoded, their heads in one tile."""
    table = testing.random_tensor(HEADS, 7, dtype=torch.float64)

    def score_mod(table):
        return lambda s, b, h, q, k: s * (1 + h) + table[h, (k + 2 * q) % 7] * (b + 1)

    check(score_mod, None if mask is None else MASKS[mask](0), [table], inputs(length=queries, keys=keys))


@pytest.mark.parametrize("tiles", ({"block_m": 16, "block_n": 64}, {"block_m": 64, "block_n": 16}), ids=str)
def test_tiles_of_other_sizes(tiles, nan_outputs):
    """Classes are of 64 x 64 scores; the kernels' tiles may be smaller, larger or wider."""
    captured, score_mod = SCORES["relative table"]
    both = {("attention", "triton"): tiles, ("attention_backward", "triton"): tiles}
    with _config.override(both):
        for mask in ("documents", "first keys and a window"):
            check(score_mod, MASKS[mask](150), captured(150), inputs(length=150, batch=2))


@pytest.mark.parametrize("scale", (0.0, -0.7))
def test_scales_of_either_sign(scale):
    def score_mod(table):
        return lambda s, b, h, q, k: s + torch.tanh(s) * table[k]

    leaves = inputs()
    table = testing.random_tensor(LENGTH)
    expected = run(score_mod, None, [table.double()], [t.double() for t in leaves], scale=scale)
    found = run(score_mod, None, [table], leaves, scale=scale, backend="triton")
    for a, b in zip(found, expected, strict=True):
        # float32's roundings of sums of scores of size 1
        torch.testing.assert_close(
            a.double(), b.double(), rtol=1e-4, atol=2e-5 * max(1.0, float(b.abs().max()))
        )


@pytest.mark.parametrize(
    "mask",
    (
        lambda: fa.Mask(causal=True, window=(7, None), key_lengths=torch.tensor([20])),
        lambda: fa.Mask(causal=True, cu_seqlens_q=torch.tensor([0, 13, LENGTH])),
        lambda: fa.Mask(
            dense=torch.rand(1, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.3
        ),
    ),
    ids=("causal", "documents", "dense"),
)
def test_masks_of_ours(mask, nan_outputs):
    """A row's and a key's numbers are those in the tensors, also in a packed document."""

    def score_mod(table):
        return lambda s, b, h, q, k: s * (q % 3) + table[q, k % 5]

    check(score_mod, mask(), [testing.random_tensor(LENGTH, 5, dtype=torch.float64)], inputs(batch=1))


def test_documents_of_a_function_are_packed(nan_outputs):
    of = torch.tensor([0] * 13 + [1] * 20 + [4] + [7] * 6)
    captured, score_mod = SCORES["relative table"]
    check(score_mod, lambda b, h, q, k: (of[q] == of[k]) & (q >= k), captured(LENGTH), inputs(batch=1))


@settings(max_examples=25)
@given(st.integers(0, 2**32))
def test_random_functions(seed):
    case = fuzz.draw(random.Random(seed))
    case |= {"queries": min(case["queries"], 40), "keys": min(case["keys"], 64)}
    fuzz.check(case, "triton")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    return tmp_path / "flex"


def capped(cap, length=LENGTH):
    qkv = inputs(length=length)
    return fa.flex_attention(
        *qkv, lambda s, b, h, q, k: cap * torch.tanh(s / cap), enable_gqa=True, backend="triton"
    )


def test_a_number_that_changes_has_the_same_file(folder):
    found = [capped(cap) for cap in (3.0, 5.0, 7.25)]
    [file] = folder.glob("*.py")
    assert "captured.numbers[0]" in file.read_text() and "5.0" not in file.read_text()
    for cap, out in zip((3.0, 5.0, 7.25), found, strict=True):
        torch.testing.assert_close(out, fa.attention(*inputs(), softcap=cap), rtol=1e-5, atol=2e-6)


def test_other_lengths_have_the_same_file(folder):
    for length in (40, 47, 90):
        captured, score_mod = SCORES["relative table"]
        check(score_mod, None, captured(length), inputs(length=length))
    # of the score, and of the score with its derivatives
    assert len(list(folder.glob("*.py"))) == 2


def test_a_file_that_was_changed_is_written_anew(folder):
    expected = capped(3.0)
    [file] = folder.glob("*.py")
    text = file.read_text()
    for other in ("raise RuntimeError('other code')\n", ""):
        file.write_text(other)
        triton_files._of_contents.cache_clear()
        assert torch.equal(capped(3.0), expected) and file.read_text() == text
    assert {p.name for p in folder.iterdir() if p.is_file()} == {file.name}


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "file"))
    torch.testing.assert_close(capped(3.0), fa.attention(*inputs(), softcap=3.0), rtol=1e-5, atol=2e-6)
    assert (tmp_path / "file").read_text() == ""


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic():
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_gradients_that_do_not_repeat_are_refused(deterministic):
    captured, score_mod = SCORES["alibi"]
    slopes = captured(LENGTH)[0].float().requires_grad_()
    out = fa.flex_attention(*inputs(), score_mod(slopes), enable_gqa=True, backend="triton")
    with pytest.raises(NotImplementedError, match=r'flex_attention: .*deterministic.*backend="reference"'):
        out.sum().backward()
    qkv = [t.requires_grad_() for t in inputs()]
    fa.flex_attention(*qkv, score_mod(slopes.detach()), enable_gqa=True, backend="triton").sum().backward()
    assert all(t.grad is not None for t in qkv)


def test_explain_names_the_file(folder):
    qkv = inputs()
    text = str(
        fa.explain(
            fa.flex_attention, *qkv, lambda s, b, h, q, k: torch.tanh(s), enable_gqa=True, backend="triton"
        )
    )
    [file] = folder.glob("*.py")
    assert "flex_attention: triton backend" in text and str(file) in text
