"""Score and mask functions for tests of flex_attention, written after the papers' formulas: {name: (captured tensors, function of them)}."""

import math

import torch

from fastattn import testing

HEADS, BATCH = 4, 2


def floats(*shape, seed=0):
    return testing.random_tensor(*shape, dtype=torch.float64, seed=seed + sum(shape))


def t5_bucket(distance, buckets=16, furthest=40):
    """mesh-tensorflow's: half of the buckets exact, half logarithmic, each direction its own half."""
    half = buckets // 2
    side = (distance > 0).to(torch.long) * half
    away = distance.abs()
    exact = half // 2
    far = exact + (torch.log(away.float() / exact) / math.log(furthest / exact) * (half - exact)).to(
        torch.long
    )
    return side + torch.where(away < exact, away, torch.clamp(far, max=half - 1))


# of s, b, h, q, k; length: of queries and keys
SCORES = {
    "alibi": (lambda L: (floats(HEADS),), lambda slopes: lambda s, b, h, q, k: s + slopes[h] * (k - q)),
    "soft cap": (lambda L: (), lambda: lambda s, b, h, q, k: 5.0 * torch.tanh(s / 5.0)),
    "learned cap": (
        lambda L: (floats(1)[0].abs() + 2,),
        lambda c: lambda s, b, h, q, k: c * torch.tanh(s / c),
    ),
    "relative table": (
        lambda L: (floats(HEADS, 2 * L - 1),),
        lambda t: lambda s, b, h, q, k: s + t[h, q - k + t.shape[1] // 2],
    ),
    "T5": (
        lambda L: (floats(16, HEADS),),
        lambda t: lambda s, b, h, q, k: s + t[t5_bucket(k - q), h],
    ),
    "full bias": (lambda L: (floats(1, HEADS, L, L),), lambda t: lambda s, b, h, q, k: s + t[0, h, q, k]),
    "bias of keys": (lambda L: (floats(BATCH, L),), lambda t: lambda s, b, h, q, k: s + t[b, k]),
    "bias of rows times score": (lambda L: (floats(L, HEADS),), lambda t: lambda s, b, h, q, k: s * t[q, h]),
    "temperature": (lambda L: (floats(1)[0].abs(),), lambda t: lambda s, b, h, q, k: s * t),
    "two tables": (
        lambda L: (floats(HEADS, L), floats(L, 3, seed=5)),
        lambda a, c: lambda s, b, h, q, k: s * a[h, q] + c[k, (q + k) % 3] * a[h, k],
    ),
    "log of distance": (
        lambda L: (floats(HEADS),),
        lambda t: lambda s, b, h, q, k: s - t[h].abs() * torch.log1p((q - k).abs().float()),
    ),
    "sandwich": (
        lambda L: (),
        lambda: lambda s, b, h, q, k: s + torch.cos((q - k) / 10.0 ** ((h + 1) / 4)) * 0.5,
    ),
    "gelu": (lambda L: (), lambda: lambda s, b, h, q, k: torch.nn.functional.gelu(s) * 2),
    "log of sigmoid": (lambda L: (), lambda: lambda s, b, h, q, k: torch.nn.functional.logsigmoid(s)),
    "elu": (lambda L: (), lambda: lambda s, b, h, q, k: torch.nn.functional.elu(s, 0.5)),
    "leaky": (lambda L: (), lambda: lambda s, b, h, q, k: torch.nn.functional.leaky_relu(s, 0.1)),
    "powers": (
        lambda L: (),
        lambda: lambda s, b, h, q, k: (s.abs() + 0.5) ** 1.5 - s**3 / 8 + (s**2 + 1) ** -1,
    ),
    "logaddexp": (lambda L: (floats(L),), lambda t: lambda s, b, h, q, k: torch.logaddexp(s, t[k])),
    "clamped": (lambda L: (), lambda: lambda s, b, h, q, k: s.clamp(-1, 1) + torch.maximum(s, s * 0.5)),
    "softplus": (lambda L: (), lambda: lambda s, b, h, q, k: torch.nn.functional.softplus(s)),
    "relu squared": (lambda L: (), lambda: lambda s, b, h, q, k: torch.relu(s) ** 2),
    "polynomial": (lambda L: (), lambda: lambda s, b, h, q, k: 4 * torch.log((s**2 + 1.0) / 2)),
    "causal in the score": (
        lambda L: (),
        lambda: lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
    ),
    "graph distances": (
        lambda L: (torch.arange(L * L).view(L, L) % 7, floats(7, HEADS)),
        lambda hops, t: lambda s, b, h, q, k: s + t[hops[q, k], h],
    ),
    "from the end": (lambda L: (floats(L),), lambda t: lambda s, b, h, q, k: s + t[-1 - k]),
    "of no score": (lambda L: (floats(L),), lambda t: lambda s, b, h, q, k: t[k] * (q % 3)),
}


def documents(L):
    return torch.arange(L) // 11


# of b, h, q, k
MASKS = {
    "causal": lambda L: lambda b, h, q, k: q >= k,
    "window": lambda L: lambda b, h, q, k: (q >= k) & (q - k <= 9),
    "both sides": lambda L: lambda b, h, q, k: (q - k).abs() < 13,
    "documents": lambda L: (lambda d: lambda b, h, q, k: (d[q] == d[k]) & (q >= k))(documents(L)),
    "prefixes": lambda L: (lambda p: lambda b, h, q, k: (k < p[b]) | (q >= k))(torch.tensor([5, 30])),
    "padding": lambda L: (lambda n: lambda b, h, q, k: k < n[b])(torch.tensor([L, L // 2])),
    "dilated": lambda L: lambda b, h, q, k: ((q - k) % 3 == 0) & (q >= k),
    "first keys and a window": lambda L: lambda b, h, q, k: (k < 4) | ((q - k < 6) & (q >= k)),
    "neighbours in 2-D": lambda L: (
        lambda b, h, q, k: ((q // 8 - k // 8).abs() <= 1) & ((q % 8 - k % 8).abs() <= 2)
    ),
    "Morton order": lambda L: lambda b, h, q, k: ((q ^ k) & 0b101010) == 0,
    "by head": lambda L: lambda b, h, q, k: k % (h + 2) != 1,
    "some rows nothing": lambda L: lambda b, h, q, k: (q > 30) & (q >= k),
    "blocks": lambda L: lambda b, h, q, k: (q // 16 == k // 16) | ((k // 16) % 3 == h),
    "shared prefix": lambda L: (lambda d: lambda b, h, q, k: ((k < 7) | (d[q] == d[k])) & ~(k > q))(
        documents(L)
    ),
}
