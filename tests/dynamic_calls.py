"""Calls of every op whose sizes or numbers differ from step to step, for test_dynamic.py."""

import torch

import fastattn as fa
from fastattn import testing
from fastattn.ops.matvec import matvec
from fastattn.ops.rowwise import rotary_append


def floats(*shape):
    return testing.random_tensor(*shape, seed=sum(shape))


def integers(high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def qkv(step, *, batch=None):
    batch, length = 5 + step % 5 if batch is None else batch, 20 + step
    return [floats(batch, heads, length, 8) for heads in (4, 2, 2)]


def offsets(step):
    """Of 2 to 13 documents in 20 + step tokens."""
    return torch.tensor([*range(2 + step), 20 + step])


def weights(*shape):
    return [floats(*shape[i : i + 2]) for i in range(len(shape) - 1)]


def decode_inputs(step):
    batch, capacity = 4 + step % 5, 20 + step  # up to 8 rows
    layer = [floats(32, 8), floats(8, 8), floats(24, 8), floats(8, 12)]
    caches = [floats(2, 1, batch, 2, capacity, 4), floats(2, 1, batch, 2, capacity, 4)]
    return [floats(batch, 8), floats(batch, 8), *layer, *layer, *caches, torch.arange(batch)]


def decode(z_h, z_l, *rest):
    *weights, keys, values, position = rest
    with torch.no_grad():
        return fa.decode_step(
            z_h, z_l, weights, keys.clone(), values.clone(), position, h_cycles=1, l_cycles=1, backend="cpu"
        )


def append(q, k, v, positions, slots, keys, values):
    with torch.no_grad():
        keys, values = keys.clone(), values.clone()
        return rotary_append(q, k, v, positions, slots, keys, values), keys, values


def append_inputs(step):
    batch, length = 5 + step % 5, 20 + step
    place = torch.arange(length).expand(batch, length).contiguous()
    cache = floats(batch, 2, length + 9, 8)
    return [*qkv(step), place, place, cache, cache.clone()]


def rows(step):
    return 20 + step


# name: (function, its inputs at a step); tensors of floats get gradients
SIZES = {
    "attention": (fa.attention, qkv),
    "attention, causal, with lse": (
        lambda *t: fa.attention(*t, mask=fa.Mask(causal=True), return_lse=True),
        qkv,
    ),
    "attention, sigmoid": (fa.sigmoid_attention, qkv),
    "attention, bias": (
        lambda q, k, v, bias: fa.attention(q, k, v, score="softplus", bias=bias),
        lambda step: [*qkv(step), floats(20 + step, 20 + step)],
    ),
    "attention, dense mask": (
        lambda q, k, v, dense: fa.attention(q, k, v, mask=fa.Mask(dense=dense)),
        lambda step: [*qkv(step), floats(20 + step, 20 + step) > 0],
    ),
    "attention, prefixes and key lengths": (
        lambda q, k, v, prefix, keys: fa.attention(
            q, k, v, mask=fa.Mask(prefix_lengths=prefix, key_lengths=keys)
        ),
        lambda step: [*qkv(step), integers(9, 5 + step % 5), 9 + integers(9, 5 + step % 5)],
    ),
    "attention, packed": (
        lambda q, k, v, starts: fa.attention(q, k, v, mask=fa.Mask(causal=True, cu_seqlens_q=starts)),
        lambda step: [*qkv(step, batch=1), offsets(step)],
    ),
    "attention, more keys than queries": (
        lambda q, k, v: fa.attention(q, k, v, mask=fa.Mask(causal=True, window=(9, None))),
        lambda step: [qkv(step)[0][:, :, 7:], *qkv(step)[1:]],
    ),
    "scaled_dot_product_attention": (
        lambda q, k, v, mask: fa.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
        lambda step: [*qkv(step), floats(20 + step, 20 + step)],
    ),
    "scaled_dot_product_attention, causal": (
        lambda *t: fa.scaled_dot_product_attention(*t, is_causal=True, enable_gqa=True),
        qkv,
    ),
    "softplus_attention": (
        lambda *t: fa.softplus_attention(*t, power=3.0, mask=fa.Mask(causal=True)),
        qkv,
    ),
    "grouped_attention": (
        lambda q, k, v, groups: fa.grouped_attention(q, k, v, groups, window=4),
        lambda step: [*qkv(step), integers(8, 5 + step % 5, 20 + step)],
    ),
    "gated_attention": (
        lambda *t: fa.gated_attention(*t, window=4),
        lambda step: [*qkv(step), floats(5 + step % 5, 20 + step, 4).softmax(-1)],
    ),
    "sinkhorn": (
        lambda s, lengths: fa.sinkhorn(s, lengths=lengths),
        lambda step: [floats(5 + step % 5, 20 + step, 4), 9 + integers(9, 5 + step % 5)],
    ),
    "sinkhorn, packed": (
        lambda s, starts: fa.sinkhorn(s, cu_seqlens=starts, causal=True),
        lambda step: [floats(1, 20 + step, 4), offsets(step)],
    ),
    "sinkhorn, of potentials": (
        lambda s, v: fa.sinkhorn(s, potentials=v),
        lambda step: [floats(5 + step % 5, 20 + step, 4), floats(5 + step % 5, 1, 4)],
    ),
    "causal_conv1d": (
        lambda x, w, state: fa.causal_conv1d(x, w, initial_state=state, activation="silu", return_state=True),
        lambda step: [floats(5 + step % 5, 20 + step, 4), floats(4, 3), floats(5 + step % 5, 2, 4)],
    ),
    "causal_conv1d, packed": (
        lambda x, w, starts: fa.causal_conv1d(x, w, cu_seqlens=starts, return_state=True),
        lambda step: [floats(1, 20 + step, 4), floats(4, 3), offsets(step)],
    ),
    "linear_scan": (
        lambda a, b, h: fa.linear_scan(a, b, initial=h),
        lambda step: [
            floats(5 + step % 5, 20 + step, 1),
            floats(5 + step % 5, 20 + step, 4),
            floats(5 + step % 5, 4),
        ],
    ),
    "linear_scan, packed": (
        lambda a, b, starts: fa.linear_scan(a, b, cu_seqlens=starts, reverse=True),
        lambda step: [floats(4), floats(1, 20 + step, 4), offsets(step)],
    ),
    "selective_scan": (
        lambda u, A, B, z, h: fa.selective_scan(
            u, u, -A.abs(), B, B, z=z, initial_state=h, return_state=True
        ),
        lambda step: [
            floats(5 + step % 5, 20 + step, 4),
            floats(4, 3),
            floats(5 + step % 5, 20 + step, 3),
            floats(5 + step % 5, 20 + step, 4),
            floats(5 + step % 5, 4, 3),
        ],
    ),
    "selective_scan, packed": (
        lambda u, A, B, starts: fa.selective_scan(u, u, -A.abs(), B, B, cu_seqlens=starts, return_state=True),
        lambda step: [floats(1, 20 + step, 4), floats(4, 3), floats(1, 20 + step, 3), offsets(step)],
    ),
    "linear_attention": (
        lambda q, k, v, decay, beta: fa.linear_attention(
            q[:, :2], k, v, decay=decay, beta=beta, qk_norm=True, return_state=True
        ),
        lambda step: [
            *qkv(step),
            -floats(5 + step % 5, 2, 20 + step).abs(),
            floats(5 + step % 5, 2, 20 + step).abs(),
        ],
    ),
    "linear_attention, packed": (
        lambda q, k, v, starts: fa.linear_attention(q[:1, :2], k[:1], v[:1], cu_seqlens=starts),
        lambda step: [*qkv(step), offsets(step)],
    ),
    "focus_groups": (fa.focus_groups, lambda step: [floats(5 + step % 5, 20 + step, 4)]),
    "linear_cross_entropy": (
        lambda h, w, target: fa.linear_cross_entropy(h, w, target, softcap=9.0, temperature=0.7),
        lambda step: [
            floats(5 + step % 5, 20 + step, 8),
            floats(30, 8),
            integers(30, 5 + step % 5, 20 + step),
        ],
    ),
    "linear_cross_entropy, a loss a row": (
        lambda h, w, target, b: fa.linear_cross_entropy(h, w, target, bias=b, reduction="none"),
        lambda step: [floats(20 + step, 8), floats(30 + step, 8), integers(30, 20 + step), floats(30 + step)],
    ),
    "stablemax_cross_entropy": (
        fa.stablemax_cross_entropy,
        lambda step: [floats(5 + step % 5, 20 + step, 30 + step), integers(30, 5 + step % 5, 20 + step)],
    ),
    "vq_logits": (
        fa.vq_logits,
        lambda step: [floats(5 + step % 5, 20 + step, 8), floats(7, 8), integers(7, 30 + step)],
    ),
    "vq_cross_entropy": (
        lambda h, c, codes, target, shadow: fa.vq_cross_entropy(h, c, codes, target, shadow=shadow),
        lambda step: [
            floats(5 + step % 5, 20 + step, 8),
            floats(7, 8),
            integers(7, 30 + step),
            integers(30, 5 + step % 5, 20 + step),
            floats(30 + step, 8),
        ],
    ),
    "vq_argmax": (fa.vq_argmax, lambda step: [floats(20 + step, 8), floats(7, 8), integers(7, 30 + step)]),
    "nearest_codes": (fa.nearest_codes, lambda step: [floats(20 + step, 8), floats(7 + step, 8)]),
    "rms_norm": (
        lambda x, r, w: fa.rms_norm(x, residual=r, weight=w),
        lambda step: [floats(5 + step % 5, 20 + step, 8), floats(5 + step % 5, 20 + step, 8), floats(8)],
    ),
    "swiglu": (fa.swiglu, lambda step: [floats(5 + step % 5, 20 + step, 8)]),
    "gated": (
        fa.gated,
        lambda step: [floats(5 + step % 5, 20 + step, 8), floats(5 + step % 5, 20 + step, 8)],
    ),
    "rotary": (
        fa.rotary,
        lambda step: [*qkv(step)[:2], torch.arange(20 + step).expand(5 + step % 5, -1).contiguous()],
    ),
    "rotary_append": (append, append_inputs),
    "fused_linear": (
        lambda x, w: fa.fused_linear(x, w, norm_eps=1e-6, swiglu=True),
        lambda step: [floats(5 + step % 5, 20 + step, 8), floats(24, 8)],
    ),
    "matvec": (matvec, lambda step: [floats(5 + step % 5, 8), floats(30 + step, 8)]),
    "decode_step": (decode, decode_inputs),
}


X, WEIGHT, TARGET, CODES = floats(9, 16), floats(30, 16), integers(30, 9), integers(7, 30)
CODEBOOK, GROUPS = floats(7, 16), integers(8, 5, 20)


def masked(**options):
    return lambda q, k, v, n: fa.attention(
        q, k, v, mask=fa.Mask(**{name: of(n) for name, of in options.items()})
    )


def sampled(h, codebook, n):
    """The uniforms are torch's, and not those of another compilation: of one token, what is drawn is known."""
    return fa.vq_sample(h, codebook, CODES[:1] * 0, temperature=0.5 + n)


# name: (function of the inputs and a number from 0 to 11, inputs)
OPTIONS = {
    "attention, scale": (lambda q, k, v, n: fa.attention(q, k, v, scale=0.1 + n), qkv(0)),
    "attention, bias": (lambda q, k, v, n: fa.attention(q, k, v, score="sigmoid", bias=n - 5.5), qkv(0)),
    "attention, left window": (masked(window=lambda n: (n, None)), qkv(0)),
    "attention, both windows": (masked(causal=lambda n: False, window=lambda n: (n, 2 * n + 1)), qkv(0)),
    "sigmoid_attention": (lambda q, k, v, n: fa.sigmoid_attention(q, k, v, scale=0.1 + n), qkv(0)),
    "scaled_dot_product_attention, scale": (
        lambda q, k, v, n: fa.scaled_dot_product_attention(q, k, v, scale=0.1 + n, enable_gqa=True),
        qkv(0),
    ),
    "softplus_attention, power": (lambda q, k, v, n: fa.softplus_attention(q, k, v, power=1.5 + n), qkv(0)),
    "grouped_attention, window": (
        lambda q, k, v, n: fa.grouped_attention(q, k, v, GROUPS, window=n),
        qkv(0),
    ),
    "grouped_attention, scale": (
        lambda q, k, v, n: fa.grouped_attention(q, k, v, GROUPS, scale=0.1 + n),
        qkv(0),
    ),
    "gated_attention, window": (
        lambda *t: fa.gated_attention(*t[:4], window=t[4]),
        [*qkv(0), floats(5, 20, 4)],
    ),
    "gated_attention, sharpness and scale": (
        lambda *t: fa.gated_attention(*t[:4], window=2, sharpness=0.5 + t[4], scale=0.1 + t[4]),
        [*qkv(0), floats(5, 20, 4)],
    ),
    "sinkhorn, temperature": (lambda s, n: fa.sinkhorn(s, temperature=0.1 + n), [floats(5, 20, 4)]),
    "sinkhorn, iterations": (lambda s, n: fa.sinkhorn(s, iterations=1 + n), [floats(5, 20, 4)]),
    "sinkhorn, temperature of potentials": (
        lambda s, v, n: fa.sinkhorn(s, temperature=0.1 + n, potentials=v),
        [floats(5, 20, 4), floats(5, 1, 4)],
    ),
    "linear_cross_entropy, temperature": (
        lambda h, w, n: fa.linear_cross_entropy(h, w, TARGET, temperature=0.5 + n),
        [X, WEIGHT],
    ),
    "linear_cross_entropy, softcap and z_loss": (
        lambda h, w, n: fa.linear_cross_entropy(h, w, TARGET, softcap=5.5 + n, z_loss=n / 100),
        [X, WEIGHT],
    ),
    "linear_cross_entropy, ignore_index": (
        lambda h, w, n: fa.linear_cross_entropy(h, w, TARGET, ignore_index=n),
        [X, WEIGHT],
    ),
    "vq_cross_entropy, ignore_index": (
        lambda h, c, n: fa.vq_cross_entropy(h, c, CODES, TARGET, ignore_index=n),
        [X, CODEBOOK],
    ),
    "vq_sample, temperature": (sampled, [X, CODEBOOK]),
    "rms_norm, eps": (lambda x, n: fa.rms_norm(x, eps=0.1 + n), [X]),
    "rotary, theta": (lambda q, k, n: fa.rotary(q, k, torch.arange(20), theta=100.5 + n), qkv(0)[:2]),
    "fused_linear, eps": (lambda x, w, n: fa.fused_linear(x, w, norm_eps=0.1 + n), [X, WEIGHT]),
    "decode_step, position": (
        lambda *t: decode(*t[:-2], t[-1]),
        decode_inputs(0),
    ),
}
