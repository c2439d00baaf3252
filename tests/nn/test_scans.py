"""Layers made of a scan, in float64 against their papers' other forms."""

import pytest
import torch
from recurrences import random, same

import fastattn as fa
from fastattn import testing
from fastattn.nn.scans import S4D, MambaBlock, aaren, dechunk


def test_aaren_is_softmax_over_each_prefix():
    def definition(scores, v):
        rows = [
            (scores[:, : t + 1].softmax(1)[..., None] * v[:, : t + 1]).sum(1) for t in range(scores.shape[1])
        ]
        return torch.stack(rows, 1)

    same(aaren, definition, (random(2, 9), random(2, 9, 3, seed=2)))


def test_dechunk_is_the_moving_average_of_the_chunks():
    boundaries = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool()

    def definition(chunks, probabilities):
        p, out, z = probabilities[boundaries], [], chunks[0]
        for m in range(len(chunks)):
            z = z if m == 0 else p[m] * chunks[m] + (1 - p[m]) * z
            out.append(z)
        return torch.stack([out[int(boundaries[: t + 1].sum()) - 1] for t in range(8)])

    probabilities = torch.rand(
        8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    same(lambda c, p: dechunk(c, p, boundaries), definition, (random(4, 3), probabilities))
    with pytest.raises(
        ValueError, match="boundaries must begin with one and be as many as the 3 chunks, given 4"
    ):
        dechunk(torch.zeros(3, 3), probabilities.detach().float(), boundaries)


def test_s4d_is_the_convolution_with_its_kernel():
    torch.manual_seed(0)
    layer = S4D(3, states=4).double()

    def definition(u):
        A = torch.complex(-layer.log_decay.exp(), layer.frequency)
        exponent = layer.log_dt.exp()[:, None] * A
        C = torch.view_as_complex(layer.C)
        powers = (exponent[..., None] * torch.arange(u.shape[1], dtype=torch.float64)).exp()  # (D, N, L)
        kernel = 2 * torch.einsum("dn,dnl->dl", C * (exponent.exp() - 1) / A, powers).real
        rows = [(kernel[:, : t + 1].flip(1).T * u[:, : t + 1]).sum(1) for t in range(u.shape[1])]
        return torch.stack(rows, 1) + layer.D * u

    same(layer, definition, (random(2, 11, 3),))
    assert all(p.grad is None for p in layer.parameters())
    layer(random(2, 11, 3)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_mamba_block_is_transformers():
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    from transformers import MambaConfig

    torch.manual_seed(0)
    mixer = modeling.MambaMixer(
        MambaConfig(hidden_size=8, state_size=4, num_hidden_layers=1, vocab_size=8), 0
    ).double()
    block = MambaBlock(8, states=4, rank=mixer.time_step_rank).double()
    block.load_state_dict(mixer.state_dict())
    x = testing.random_tensor(2, 20, 8, seed=1).double()
    with torch.no_grad():
        out, expected = block(x), mixer(x)
    # transformers has B in float32 inside
    assert testing.max_error(out, expected) < 20 * 2**-24 * (1 + testing.max_finite(expected))


def test_a_mamba_block_trains_on_packed_documents():
    torch.manual_seed(0)
    block, x = MambaBlock(8, states=4), testing.random_tensor(1, 30, 8)
    out = block(x, cu_seqlens=torch.tensor([0, 11, 30]))
    assert torch.equal(out[:, 11:], block(x[:, 11:]))
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in block.parameters())
    with fa.set_backend("reference"):
        assert testing.max_error(block(x[:, :11]), out[:, :11]) < 64 * 2**-24 * testing.max_finite(out)
