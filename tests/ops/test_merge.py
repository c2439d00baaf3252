"""Merging attention over disjoint keys: the whole call and its gradients, in float64."""

import pytest
import torch

import fastattn as fa
from fastattn import testing


def disjoint(count, empty_row=False):
    """`count` disjoint masks (8, 10) that together are everything, but for row 2 where asked."""
    owner = torch.randint(0, count, (8, 10), generator=torch.Generator().manual_seed(count))
    masks = [owner == i for i in range(count)]
    masks[0] = masks[0] & (torch.arange(8) != 1)[:, None]  # a part without keys for row 1
    masks[-1] = masks[-1] | ((owner == 0) & (torch.arange(8) == 1)[:, None]) if count > 1 else masks[-1]
    if empty_row:
        masks = [mask & (torch.arange(8) != 2)[:, None] for mask in masks]
    return masks


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("sink", [None, 0.5, "tensor"])
@pytest.mark.parametrize("empty_row", [False, True])
def test_parts_merged_are_the_whole_with_its_gradients(count, sink, empty_row):
    q, k, v = testing.attention_inputs(2, 4, 2, 8, 10, 4, dtype=torch.float64)
    masks = disjoint(count, empty_row)
    leaves = [q, k, v]
    if sink == "tensor":
        sink = testing.random_tensor(4, dtype=torch.float64, seed=4, requires_grad=True)
        leaves.append(sink)
    parts = [fa.attention(q, k, v, mask=fa.Mask(dense=mask), return_lse=True) for mask in masks]
    whole = fa.Mask(dense=torch.stack(masks).any(0))
    want = fa.attention(q, k, v, mask=whole, sink=sink, return_lse=True)
    found = fa.merge(parts, sink=sink)
    live = want[1] > -torch.inf
    results = []
    for out, lse in (found, want):
        loss = (out * torch.arange(out.numel()).view(out.shape).cos()).sum() + lse[live].sin().sum()
        results.append((out, lse.masked_fill(~live, 0.0), *torch.autograd.grad(loss, leaves)))
    assert torch.equal(found[1] > -torch.inf, live)
    for a, b in zip(*results, strict=True):
        # sums of at most 80 terms of size 1 in float64
        assert testing.max_error(a, b) < 1e-13


def test_gradcheck_and_opcheck():
    outs = testing.random_tensor(3, 2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    lses = testing.random_tensor(3, 2, 2, 4, dtype=torch.float64, seed=1, requires_grad=True)
    sink = testing.random_tensor(2, dtype=torch.float64, seed=2, requires_grad=True)

    def call(outs, lses, sink):
        return fa.merge(list(zip(outs, lses, strict=True)), sink=sink)

    assert torch.autograd.gradcheck(call, (outs, lses, sink))
    torch.library.opcheck(torch.ops.fastattn.merge, (outs, lses, sink, ""))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(outs, lses, sink), call(outs, lses, sink), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype):
    parts = [
        (testing.random_tensor(1, 2, 5, 8, dtype=dtype, seed=i), torch.full((1, 2, 5), float(i)))
        for i in range(3)
    ]
    out, lse = fa.merge(parts)
    wide, _ = fa.merge([(o.double(), x.double()) for o, x in parts])
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert testing.max_error(out, wide) <= float(wide.abs().max()) * torch.finfo(dtype).eps


def test_a_part_without_keys_is_nothing_whatever_its_output():
    out, lse = torch.ones(1, 1, 2, 3), torch.zeros(1, 1, 2)
    nothing = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    found = fa.merge([(out, lse), nothing])
    assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    assert fa.merge([nothing])[0].abs().sum() == 0 and fa.merge([nothing])[1].max() == -torch.inf
    # a factor of c: its keys counted c times
    doubled = fa.merge([(out, lse), (3 * out, lse + torch.tensor(3.0).log())])
    assert testing.max_error(doubled[0], (out + 3 * 3 * out) / 4) < 1e-6


def test_sums_of_a_score_without_lse_add():
    w = torch.rand(2, 4, 6, dtype=torch.float64).requires_grad_()
    v = torch.randn(2, 6, 3, dtype=torch.float64)
    parts = [(w[..., s] @ v[:, s], w[..., s].sum(-1)) for s in (slice(0, 2), slice(2, 6))]
    out, total = fa.merge_sums(parts)
    want = w @ v / w.sum(-1, keepdim=True)
    assert testing.max_error(out, want) < 1e-14 and testing.max_error(total, w.sum(-1)) < 1e-14
    a, b = (torch.autograd.grad(x.sum(), w, retain_graph=True)[0] for x in (out, want))
    assert testing.max_error(a, b) < 1e-13
    assert fa.merge_sums([(torch.ones(2, 3), torch.zeros(2))])[0].abs().sum() == 0


PART = (torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4))


@pytest.mark.parametrize(
    ("parts", "options", "error", "message"),
    [
        ([], {}, TypeError, "parts must be a sequence of"),
        (torch.zeros(2), {}, TypeError, "parts must be a sequence of"),
        ([PART[0]], {}, TypeError, r"parts\[0\] must be \(out, lse\)"),
        ([PART, (PART[0][:, :1], PART[1])], {}, ValueError, r"parts\[1\]'s out must have shape \(1x2x4x3\)"),
        ([PART, (PART[0], PART[1].double())], {}, TypeError, r"parts\[1\]'s lse must be float32"),
        ([PART], {"sink": torch.zeros(3)}, ValueError, "one for each of 2 heads"),
        ([(torch.zeros(4, 3), torch.zeros(4))], {"sink": 0.0}, ValueError, "sink needs parts of heads"),
    ],
)
def test_bad_arguments(parts, options, error, message):
    with pytest.raises(error, match=message):
        fa.merge(parts, **options)
