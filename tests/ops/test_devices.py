"""Tensors of one call on two devices are an error that names the op and the argument, before anything is computed."""

import pytest
import torch

import fastattn as fa
from fastattn import testing
from fastattn.runtime.examples import examples
from fastattn.runtime.explain import collecting
from fastattn.runtime.registry import OPS

# torch's function serves what scaled_dot_product_attention does not
CALLS = {n: e for n, e in examples().items() if e.function is not fa.scaled_dot_product_attention}


THROUGH = {
    "score_attention": "attention"
}  # ops that a public function of another name checks the arguments of


def ops_of(name):
    with torch.no_grad(), collecting() as calls:
        CALLS[name].function(**CALLS[name].arguments)
    return [op.name for op, *_ in calls]


@pytest.mark.parametrize(
    ("name", "argument"), [(n, a) for n, e in CALLS.items() if len(e.tensors) > 1 for a in e.tensors]
)
def test_mixed_devices_are_refused(name, argument):
    example = CALLS[name]
    op = ops_of(name)[0]
    op = THROUGH.get(op, op)
    elsewhere = example.arguments | {argument: example.tensors[argument].to("meta")}
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=rf"^fastattn\.{op}: .* is on (meta|cpu) but .* is on (meta|cpu)"),
    ):
        example.function(**elsewhere)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_calls_run_on_one_device(name):
    with torch.no_grad():
        out = CALLS[name].function(**CALLS[name].arguments)
    assert all(t.device.type == "cpu" and not t.isnan().any() for t in testing.as_tuple(out))


def qkv(length=6):
    return {name: torch.ones(1, 2, length, 8) for name in ("q", "k", "v")}


@pytest.mark.parametrize("option", ("cu_seqlens_q", "prefix_lengths", "key_lengths", "dense"))
def test_masks_bring_their_indices_or_are_refused(option):
    """A mask's index tensors are kept on the host and copied where they are needed; a dense one has to be on the op's device."""
    value = {
        "cu_seqlens_q": torch.tensor([0, 2, 6]),
        "dense": torch.ones(1, 1, 6, 6, dtype=torch.bool, device="meta"),
    }
    mask = fa.Mask(**{option: value.get(option, torch.tensor([3]))})
    if option != "dense":
        fa.attention(**qkv(), mask=mask)
        return
    with pytest.raises(ValueError, match=r"fastattn.attention: .* is on meta"):
        fa.attention(**qkv(), mask=mask)


def test_every_op_has_an_example():
    assert {op for name in CALLS for op in ops_of(name)} == {name.removesuffix("_backward") for name in OPS}
