"""The checks of the decode step's arguments, run for every caller."""

import torch

from ...runtime import checks
from ...runtime.registry import refuse_gradients

PARTS = ("gqkv", "out", "gate_up", "down")  # the weights of a layer


def check_decode_step(
    z_h, z_l, weights, k_cache, v_cache, positions, position, h_cycles, l_cycles, theta, eps
) -> None:
    op = "decode_step"
    checks.check_floating(op, z_h=z_h, z_l=z_l, k_cache=k_cache, v_cache=v_cache)
    dtype, device = z_h.dtype, z_h.device
    if not all(isinstance(w, torch.Tensor) and w.dtype is dtype and w.device == device for w in weights):
        checks.check_floating(op, z_h=z_h, **{f"weights[{i}]": w for i, w in enumerate(weights)})
    checks.check_tensor(op, "z_h", z_h, dims=2)
    checks.check_shape(op, "z_l", z_l, z_h.shape, "as z_h")
    checks.check_tensor(op, "k_cache", k_cache, dims=6)
    checks.check_shape(op, "v_cache", v_cache, k_cache.shape, "as k_cache")
    calls, layers, batch, heads, capacity, head_dim = k_cache.shape
    hidden = z_h.shape[1]
    if 0 in z_h.shape or 0 in k_cache.shape or head_dim % 2:
        raise ValueError(
            f"fastattn.{op}: z_h and k_cache must not be empty and the head dim must be even, given z_h "
            f"{checks.describe(z_h)} and k_cache {checks.describe(k_cache)}"
        )
    if min(h_cycles, l_cycles) < 1 or calls != h_cycles * (l_cycles + 1) or batch != z_h.shape[0]:
        raise ValueError(
            f"fastattn.{op}: k_cache must have h_cycles * (l_cycles + 1) calls and z_h's {z_h.shape[0]} rows, given "
            f"{checks.describe(k_cache)} for h_cycles {h_cycles} and l_cycles {l_cycles}"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.check_written(op, name, cache)
    if positions is not None:
        checks.check_integer(op, "position", positions, dims=1)
        checks.check_shape(op, "position", positions, (batch,), "one a row")
        checks.check_same_device(op, z_h=z_h, position=positions)
    if not 0 <= position < capacity:
        name = "position" if positions is None else "bound"
        raise ValueError(
            f"fastattn.{op}: {name} must be from 0 to {capacity - 1}, k_cache's last, given {position}"
        )
    if len(weights) != 2 * layers * len(PARTS):
        raise ValueError(
            f"fastattn.{op}: weights must be {2 * layers * len(PARTS)} tensors, four a layer, given {len(weights)}"
        )
    checks.check_tensor(op, "weights[3]", weights[3], dims=2)
    inner = weights[3].shape[1]
    shapes = (
        (4 * heads * head_dim, hidden),
        (hidden, heads * head_dim),
        (2 * inner, hidden),
        (hidden, inner),
    )
    for i, weight in enumerate(weights):
        if weight.shape != shapes[i % 4]:
            checks.check_shape(op, f"weights[{i}]", weight, shapes[i % 4], f"{PARTS[i % 4]} of a layer")
    checks.check_positive(op, "theta", theta)
    checks.check_positive(op, "eps", eps, zero=True)
    refuse_gradients(op, (z_h, z_l, k_cache, v_cache, weights))


def check_decode_step_contents(z_h, z_l, weights, k_cache, v_cache, positions, position, *_) -> None:
    if positions is not None:
        checks.check_range("decode_step", "position", positions, 0, position + 1)
