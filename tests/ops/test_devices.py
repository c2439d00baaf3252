"""Tensors of one call on two devices are an error that names the op and the argument, before anything is computed."""

import pytest
import torch

import fastattn as fa
from fastattn.ops.fused_linear import fused_linear
from fastattn.ops.matvec import matvec
from fastattn.ops.rowwise import rotary_append


def qkv(length=6):
    return {name: torch.ones(1, 2, length, 8) for name in ("q", "k", "v")}


ROWS = {"h": torch.ones(3, 8), "codebook": torch.ones(4, 8), "codes": torch.zeros(9, dtype=torch.int64)}
TARGET = torch.zeros(3, dtype=torch.int64)
POSITIONS = torch.zeros(1, 6, dtype=torch.int64)
CACHE = {"keys": torch.zeros(1, 2, 9, 8), "values": torch.zeros(1, 2, 9, 8)}
PACKED = torch.tensor([0, 2, 6])
STEP = {
    "z_h": torch.ones(1, 16),
    "z_l": torch.ones(1, 16),
    "k_cache": torch.zeros(2, 1, 1, 2, 4, 8),
    "v_cache": torch.zeros(2, 1, 1, 2, 4, 8),
    "gqkv": torch.ones(64, 16),
    "position": torch.tensor([0]),
}

# op: (the call, its tensors)
CALLS = {
    "attention": (fa.attention, qkv() | {"bias": torch.ones(1, 2, 6, 6)}),
    "softplus_attention": (fa.softplus_attention, qkv()),
    "sinkhorn": (
        fa.sinkhorn,
        {"scores": torch.ones(1, 6, 3), "lengths": torch.tensor([6, 0]), "cu_seqlens": torch.tensor([0, 6, 6])},
    ),
    "grouped_attention": (
        fa.grouped_attention,
        qkv() | {"groups": torch.ones(1, 6, dtype=torch.int64), "key_groups": torch.ones(1, 6, dtype=torch.int64)},
    ),
    "gated_attention": (fa.gated_attention, qkv() | {"assignment": torch.ones(1, 6, 3), "sharpness": torch.tensor(1.0)}),
    "linear_cross_entropy": (
        fa.linear_cross_entropy,
        {"h": torch.ones(3, 8), "weight": torch.ones(9, 8), "target": TARGET, "bias": torch.ones(9), "temperature": torch.ones(3)},
    ),
    "stablemax_cross_entropy": (fa.stablemax_cross_entropy, {"logits": torch.ones(3, 9), "target": TARGET}),
    "vq_logits": (fa.vq_logits, ROWS | {"bias": torch.ones(9)}),
    "vq_cross_entropy": (fa.vq_cross_entropy, ROWS | {"target": TARGET, "bias": torch.ones(9), "shadow": torch.ones(9, 8)}),
    "vq_argmax": (fa.vq_argmax, ROWS | {"bias": torch.ones(9)}),
    "vq_sample": (fa.vq_sample, ROWS | {"bias": torch.ones(9)}),
    "nearest_codes": (fa.nearest_codes, {"x": torch.ones(3, 8), "codebook": torch.ones(4, 8)}),
    "rms_norm": (fa.rms_norm, {"x": torch.ones(3, 8), "residual": torch.ones(3, 8), "weight": torch.ones(8)}),
    "gated": (fa.gated, {"x": torch.ones(3, 8), "gate": torch.ones(3, 8)}),
    "rotary": (fa.rotary, {"q": torch.ones(1, 2, 6, 8), "k": torch.ones(1, 2, 6, 8), "positions": POSITIONS}),
    "rotary_append": (rotary_append, qkv() | {"positions": POSITIONS, "slots": POSITIONS} | CACHE),
    "fused_linear": (
        fused_linear,
        {"x": torch.ones(3, 2, 4), "weight": torch.ones(5, 8), "gate": torch.ones(3, 2, 4), "residual": torch.ones(3, 5)},
    ),
    "matvec": (matvec, {"x": torch.ones(3, 8), "weight": torch.ones(5, 8)}),
    "decode_step": (
        lambda gqkv, **rest: fa.decode_step(
            weights=[gqkv, torch.ones(16, 16), torch.ones(6, 16), torch.ones(16, 3)] * 2,
            h_cycles=1, l_cycles=1, **rest,
        ),
        STEP,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("op", "argument"), [(op, name) for op, (_, tensors) in CALLS.items() for name in tensors]
)
def test_mixed_devices_are_refused(op, argument):
    call, tensors = CALLS[op]
    elsewhere = tensors | {argument: tensors[argument].to("meta")}
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=rf"^fastattn\.{op}: .* is on (meta|cpu) but .* is on (meta|cpu)"),
    ):
        call(**elsewhere)


@pytest.mark.parametrize("op", CALLS)
def test_the_same_calls_run_on_one_device(op):
    call, tensors = CALLS[op]
    with torch.no_grad():
        out = call(**tensors)
    found = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
    assert all(t.device.type == "cpu" and not t.isnan().any() for t in found)
    assert found or op == "rotary_append"


@pytest.mark.parametrize("option", ("cu_seqlens_q", "prefix_lengths", "key_lengths", "dense"))
def test_masks_bring_their_indices_or_are_refused(option):
    """A mask's index tensors are kept on the host and copied where they are needed; a dense one has to be on the op's device."""
    value = {"cu_seqlens_q": PACKED, "dense": torch.ones(1, 1, 6, 6, dtype=torch.bool, device="meta")}
    mask = fa.Mask(**{option: value.get(option, torch.tensor([3]))})
    if option != "dense":
        fa.attention(**qkv(), mask=mask)
        return
    with pytest.raises(ValueError, match=r"fastattn.attention: .* is on meta"):
        fa.attention(**qkv(), mask=mask)


def test_every_op_of_several_tensors_is_here():
    """`swiglu` and `focus_groups` take one tensor; scaled_dot_product_attention is attention's."""
    from fastattn.runtime import registry as _registry

    ops = {name.removesuffix("_backward") for name in _registry._OPS}
    assert ops - set(CALLS) <= {"swiglu", "attention_forward"} and "attention" in CALLS
