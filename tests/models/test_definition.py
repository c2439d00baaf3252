"""HrmText against HRM-Text as its paper states it: plain functions on a dictionary of weights, in float64."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from fastattn.models import HrmText
from fastattn.models.hrm_text import released_name


def rms(x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotate(x, positions, theta):
    """x (B, H, L, D), positions (L,)"""
    half = x.shape[-1] // 2
    frequency = theta ** -(torch.arange(half, dtype=x.dtype) / half)
    angle = positions[:, None].to(x.dtype) * frequency  # (L, D/2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def block(x, weights, name, config, allowed, positions):
    B, L, _ = x.shape
    H, D = config.num_attention_heads, config.head_dim
    projected = rms(x, config.rms_norm_eps) @ weights[f"{name}.attn.gqkv_proj.weight"].T
    g, q, k, v = (part.view(B, L, H, D).transpose(1, 2) for part in projected.chunk(4, -1))
    q, k = rotate(q, positions, config.rope_theta), rotate(k, positions, config.rope_theta)
    scores = (q @ k.transpose(-1, -2)) / D**0.5
    out = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    out = (torch.sigmoid(g) * out).transpose(1, 2).reshape(B, L, H * D)
    x = x + out @ weights[f"{name}.attn.o_proj.weight"].T
    gate, up = (rms(x, config.rms_norm_eps) @ weights[f"{name}.mlp.gate_up_proj.weight"].T).chunk(2, -1)
    return x + (F.silu(gate) * up) @ weights[f"{name}.mlp.down_proj.weight"].T


def stack(x, weights, name, config, allowed, positions):
    for i in range(config.num_hidden_layers):
        x = block(x, weights, f"{name}.layers.{i}", config, allowed, positions)
    return rms(x, config.rms_norm_eps)


def hrm_text(weights, config, ids, allowed, positions, bp_steps):
    """Logits (B, L, V); weights under the released names, allowed (.., L, L), positions (L,)."""
    zH = weights["model.embed_tokens.weight"][ids] * config.embedding_scale
    zL = weights["model.z_L_init"].expand_as(zH)
    H, L = config.H_cycles, config.L_cycles
    H_bp = min(H, bp_steps - 1)
    L_bp = bp_steps - H_bp
    k = 0
    for h in range(H):
        for _ in range(L):
            new = stack(zL + zH, weights, "model.L_module", config, allowed, positions)
            zL = new if k >= H * L - L_bp else new.detach()
            k += 1
        new = stack(zH + zL, weights, "model.H_module", config, allowed, positions)
        zH = new if h >= H - H_bp else new.detach()
    return zH @ weights["lm_head.weight"].T


def prefix_lm(length, prefix):
    """One sample's (L, L) permission: both ways before ``prefix``, causal after."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    return (j <= i) | ((i < prefix) & (j < prefix))


def packed(lengths, prefixes):
    """(allowed (T, T), positions (T,)) of samples laid end to end."""
    allowed = torch.block_diag(*(prefix_lm(n, p) for n, p in zip(lengths, prefixes, strict=True))).bool()
    return allowed, torch.cat([torch.arange(n) for n in lengths])


CONFIG = tiny.config()


def as_leaves(model):
    """The model's weights under the released names, as fresh leaves."""
    return {
        released_name(name): tensor.detach().clone().requires_grad_(name != "z_L_init")
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("bp_steps", [2, 3, 4, 5])
def test_packed_loss_and_every_gradient_equal_the_definition(bp_steps):
    torch.manual_seed(0)
    model = HrmText(CONFIG).double()
    lengths, prefixes = [5, 1, 9, 4], [3, 1, 0, 4]  # a sample of one token, a causal one, an empty response
    allowed, positions = packed(lengths, prefixes)
    ids = torch.randint(0, 40, (1, sum(lengths)))
    labels = ids.clone()
    start = 0
    for n, p in zip(lengths, prefixes, strict=True):
        labels[0, start : start + p] = -100
        start += n
    cu_seqlens = torch.tensor([0, 5, 6, 15, 19], dtype=torch.int32)
    out = model(
        ids,
        prefix_lengths=torch.tensor(prefixes, dtype=torch.int32),
        cu_seqlens=cu_seqlens,
        labels=labels,
        bp_steps=bp_steps,
        return_logits=True,
    )
    out.loss.backward()

    weights = as_leaves(model)
    logits = hrm_text(weights, CONFIG, ids, allowed, positions, bp_steps)
    # (t, t + 1) inside a sample, with a response token at t + 1
    targets = [(t, ids[0, t + 1]) for t in range(18) if positions[t + 1] > 0 and labels[0, t + 1] != -100]
    assert len(targets) == 2 + 8
    loss = -torch.stack([logits[0, t].log_softmax(-1)[y] for t, y in targets]).mean()
    loss.backward()

    # float64: some 200 operations deep, each of relative error 2^-53, amplified by the recurrence
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-11)
    torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-11)
    ours = {released_name(name): p.grad for name, p in model.named_parameters()}
    for name, weight in weights.items():
        if weight.requires_grad:
            expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
            got = torch.zeros_like(weight) if ours[name] is None else ours[name]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-11, msg=name)
    embedding = ours["model.embed_tokens.weight"]
    assert (embedding is None or not embedding.any()) == (bp_steps == 2)


def test_definition_of_the_mask():
    assert prefix_lm(3, 2).tolist() == [[True, True, False], [True, True, False], [True, True, True]]
