"""Typical calls of these ops."""

import torch

from ...runtime.examples import Example, Make
from . import linear_attention, linear_attention_step


def examples(make: Make) -> dict[str, Example]:
    L = make.length(67)
    heads = {"q": make.normal(1, 2, L, 8), "k": make.normal(1, 2, L, 8), "v": make.normal(1, 4, L, 6)}
    gates = {"decay": -make.shares(1, 4, L), "beta": make.shares(1, 4, L)}
    channels = {"decay": -make.shares(1, 4, L, 8), "beta": make.shares(1, 4, L)}
    positive = {"q": make.shares(1, 2, L, 8), "k": make.shares(1, 2, L, 8), "v": heads["v"]}
    packed = {"cu_seqlens": make.count(3) * 30}
    token = {"q": make.normal(1, 2, 8), "k": make.normal(1, 2, 8), "v": make.normal(1, 4, 6)}
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32
    state = torch.zeros(1, 4, 8, 6, dtype=wide, device=make.device)
    delta = {"qk_norm": True, "return_state": True}
    return {
        "linear_attention": Example(linear_attention, heads | gates, delta),
        "linear_attention, channels": Example(linear_attention, heads | channels, delta),
        "linear_attention, packed": Example(linear_attention, heads | gates | packed, {"delta_rule": False}),
        "linear_attention, normalized": Example(linear_attention, positive, {"normalize": True}),
        "linear_attention, of all tokens": Example(
            linear_attention, positive, {"normalize": True, "causal": False}
        ),
        "linear_attention_step": Example(
            linear_attention_step, token | {"state": state}, {"qk_norm": True}, gradients=False
        ),
    }
