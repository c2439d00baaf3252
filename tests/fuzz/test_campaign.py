"""A few minutes of the fuzzing campaign with fixed seeds; `make fuzz` runs hours with new ones."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import attention
import campaign

from fastattn.runtime import native

PARTS = 4  # of a family, each with a seed of its own, so that test processes share them
CASES = 250


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("family", campaign.FAMILIES)
def test_random_calls_are_within_their_bounds(family, part):
    count, failures = campaign.run(family, CASES, seed=part)
    assert count == CASES and not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("family", campaign.FAMILIES)
def test_many_random_calls_are_within_their_bounds(family):
    count, failures = campaign.run(family, 10_000, seed=100, seconds=240)
    assert count and not failures, "\n".join(failures)


def test_a_case_follows_from_its_seed():
    for family in campaign.FAMILIES:
        module = campaign.load(family)
        assert module.draw(random.Random(3)) == module.draw(random.Random(3)) != module.draw(random.Random(4))


def test_a_wrong_result_is_found_and_printed_as_a_test(monkeypatch):
    right = attention._run

    def wrong(*args):
        found, *rest = right(*args)
        return {name: t + 0.01 * t.abs().amax() if t.numel() else t for name, t in found.items()}, *rest

    monkeypatch.setattr(attention, "_run", wrong)
    _, failures = campaign.run("attention", 50, most=1)
    assert len(failures) == 1
    source = failures[0]
    assert "beyond their bound" in source
    scope = {"attention": attention}
    exec(source, scope)
    test = next(value for name, value in scope.items() if name.startswith("test_attention_case_"))
    with pytest.raises(AssertionError, match="beyond their bound"):
        test()


# A kernel, its output, and what a wrong kernel would store there
WRONG = {
    "a thousandth too large": lambda t: t.mul_(1.001),
    "of the wrong sign": torch.Tensor.neg_,
    "its first half left out": lambda t: t[..., : -(-t.shape[-1] // 2)].zero_(),
}
OUTPUTS = {
    "rows": (
        ("rms_norm", "normed"),
        ("rms_norm", "rstd"),
        ("rms_norm_backward", "grad"),
        ("rms_norm_backward", "weight_partials"),
        ("swiglu", "out"),
        ("swiglu_backward", "grad_a"),
        ("swiglu_backward", "grad_b"),
        ("gated", "out"),
        ("gated_backward", "grad_a"),
        ("gated_backward", "grad_b"),
        ("rotary", "out"),
        ("linear", "out"),
        ("linear", "rstd"),
    ),
    "grouped": (
        ("grouped_forward", "out"),
        ("grouped_backward", "grad_q"),
        ("grouped_backward", "grad_k"),
        ("grouped_backward", "grad_v"),
        ("gated_attention_forward", "out"),
        ("gated_attention_backward", "grad_q"),
        ("gated_attention_backward", "grad_query_assignment"),
        ("gated_attention_backward", "grad_key_assignment"),
        ("gated_attention_backward", "grad_sharpness"),
        ("lssa_forward", "out"),
        ("lssa_backward", "grad_v"),
        ("sinkhorn_forward", "out"),
    ),
    "vocab": (("linear", "out"), ("vocab_dots", "out")),
    "flex": (
        ("attention_forward", "out"),
        ("attention_forward", "lse"),
        ("attention_backward", "grad_q"),
        ("attention_backward", "grad_tables"),
    ),
    "attention": (
        ("attention_forward", "out"),
        ("attention_forward", "lse"),
        ("attention_backward", "grad_q"),
        ("attention_backward", "grad_k"),
        ("attention_backward", "grad_v"),
        ("attention_backward", "grad_bias"),
        ("attention_backward", "grad_row_bias"),
    ),
    "linear": (
        ("linear_attention_forward", "out"),
        ("linear_attention_forward", "state"),
        ("linear_attention_forward", "states"),
        ("linear_attention_backward", "grad_q"),
        ("linear_attention_backward", "grad_k"),
        ("linear_attention_backward", "grad_v"),
        ("linear_attention_backward", "grad_decay"),
        ("linear_attention_backward", "grad_channels"),
        ("linear_attention_backward", "grad_beta"),
        ("linear_attention_backward", "grad_initial"),
        ("linear_attention_step", "out"),
        ("linear_attention_step", "state"),
    ),
    "scans": (
        ("causal_conv1d_forward", "out"),
        ("causal_conv1d_forward", "state"),
        ("causal_conv1d_backward", "grad_x"),
        ("causal_conv1d_backward", "grad_sums"),
        ("causal_conv1d_backward", "grad_initial_state"),
        ("linear_scan_forward", "out"),
        ("linear_scan_backward", "grad_a"),
        ("linear_scan_backward", "grad_b"),
        ("linear_scan_backward", "grad_initial"),
        ("selective_scan_forward", "out"),
        ("selective_scan_forward", "state"),
        ("selective_scan_forward", "checkpoints"),
        ("selective_scan_backward", "grad_u"),
        ("selective_scan_backward", "grad_dt"),
        ("selective_scan_backward", "grad_A"),
        ("selective_scan_backward", "grad_B"),
        ("selective_scan_backward", "grad_C"),
        ("selective_scan_backward", "grad_D"),
        ("selective_scan_backward", "grad_z"),
        ("selective_scan_backward", "grad_dt_bias"),
        ("selective_scan_backward", "grad_initial_state"),
    ),
}
# A kernel and the term it would forget, by its operand
FORGOTTEN = {
    "rows": (
        ("rms_norm", "weight"),
        ("rms_norm_backward", "weight"),
        ("rms_norm_backward", "grad_total"),
    ),
    "attention": (
        ("attention_forward", "bias"),
        ("attention_backward", "bias"),
        ("attention_backward", "grad_lse"),
        ("attention_forward", "dense"),
    ),
    "flex": (
        ("attention_forward", "masked_program"),
        ("attention_backward", "masked_program"),
        ("attention_backward", "grad_lse"),
    ),
    "linear": (
        ("linear_attention_forward", "decay"),
        ("linear_attention_forward", "channels"),
        ("linear_attention_forward", "beta"),
        ("linear_attention_forward", "initial"),
        ("linear_attention_backward", "beta"),
        ("linear_attention_backward", "grad_state"),
        ("linear_attention_step", "decay"),
        ("linear_attention_step", "channels"),
        ("linear_attention_step", "beta"),
    ),
    "scans": (
        ("causal_conv1d_forward", "bias"),
        ("causal_conv1d_forward", "initial_state"),
        ("causal_conv1d_backward", "bias"),
        ("causal_conv1d_backward", "initial_state"),
        ("causal_conv1d_backward", "grad_state"),
        ("linear_scan_forward", "initial"),
        ("linear_scan_backward", "initial"),
        ("selective_scan_forward", "D"),
        ("selective_scan_forward", "z"),
        ("selective_scan_forward", "dt_bias"),
        ("selective_scan_forward", "initial_state"),
        ("selective_scan_backward", "dt_bias"),
        ("selective_scan_backward", "initial_state"),
        ("selective_scan_backward", "grad_state"),
    ),
}
# A kernel and a number that it would take for another one
MISTAKEN = {
    "linear": (
        ("linear_attention_forward", "delta_rule", lambda on: 0),
        ("linear_attention_forward", "qk_norm", lambda on: 0),
        ("linear_attention_forward", "scale", lambda scale: 1.001 * scale),
        ("linear_attention_backward", "qk_norm", lambda on: 0),
        ("linear_attention_backward", "scale", lambda scale: 1.001 * scale),
        ("linear_attention_step", "delta_rule", lambda on: 0),
    ),
    "scans": (
        ("causal_conv1d_backward", "silu", lambda on: 0),
        ("linear_scan_forward", "reverse", lambda on: 1 - on),
        ("linear_scan_backward", "reverse", lambda on: 1 - on),
        ("linear_scan_backward", "log_a", lambda on: 0),
        ("selective_scan_forward", "dt_softplus", lambda on: 0),
        ("selective_scan_backward", "dt_softplus", lambda on: 0),
    ),
}
DRAWN = 1000  # cases until one draws the mutant's kernel, and what is wrong with it is above a rounding


def found_wrong(monkeypatch, family, kernel, change):
    """Whether the campaign finds a failure where this kernel's run is change(run, fields)."""
    run = native.run

    def mutant(name, /, **fields):
        return change(run, fields) if name == kernel else run(name, **fields)

    monkeypatch.setattr(native, "run", mutant)
    _, failures = campaign.run(family, DRAWN, most=1)
    return bool(failures) and "AssertionError" in failures[0]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    ("family", "kernel", "output"), [(f, *pair) for f, pairs in OUTPUTS.items() for pair in pairs]
)
def test_a_wrong_kernel_is_found(monkeypatch, family, kernel, output, wrong):
    def change(run, fields):
        run(kernel, **fields)
        if (t := fields.get(output)) is not None:
            WRONG[wrong](
                t[tuple(slice(None if step else 1) for step in t.stride())]
            )  # of what is broadcast once

    assert found_wrong(monkeypatch, family, kernel, change)


@pytest.mark.parametrize(
    ("family", "kernel", "operand"), [(f, *pair) for f, pairs in FORGOTTEN.items() for pair in pairs]
)
def test_a_forgotten_term_is_found(monkeypatch, family, kernel, operand):
    def change(run, fields):
        run(kernel, **(fields | {operand: None}))

    assert found_wrong(monkeypatch, family, kernel, change)


@pytest.mark.parametrize(
    ("family", "kernel", "field", "other"),
    [(f, *triple) for f, triples in MISTAKEN.items() for triple in triples],
)
def test_a_mistaken_option_is_found(monkeypatch, family, kernel, field, other):
    def change(run, fields):
        run(kernel, **(fields | {field: other(fields[field])}))

    assert found_wrong(monkeypatch, family, kernel, change)


def test_a_state_lost_between_chunks_is_found(monkeypatch):
    """Tokens from the second chunk on begin with nothing."""
    chunk = native.limits.chunk

    def change(run, fields):
        run("linear_attention_forward", **fields)
        if fields["offsets"] is not None or not fields["causal"] or fields["q"].shape[2] <= chunk:
            return
        gates = {n: fields[n] if fields[n] is None else fields[n][..., chunk:] for n in ("decay", "beta")}
        rows = {
            n: fields[n] if fields[n] is None else fields[n][:, :, chunk:]
            for n in ("q", "k", "v", "channels", "out")
        }
        alone = {"initial": None, "states": None, "state": fields["state"].clone()}
        run("linear_attention_forward", **(fields | gates | rows | alone))

    assert found_wrong(monkeypatch, "linear", "linear_attention_forward", change)


@pytest.mark.parametrize(
    ("family", "kernel", "field", "dim"),
    (
        ("linear", "linear_attention_backward", "states", 1),
        ("scans", "linear_scan_backward", "out", 2),
        ("scans", "selective_scan_backward", "checkpoints", 1),
    ),
)
def test_a_state_of_another_time_is_found(monkeypatch, family, kernel, field, dim):
    """A backward that reads the next chunk's or token's state."""

    def change(run, fields):
        if not fields.get("pairs"):  # whose rows are views of complex numbers
            fields = fields | {field: fields[field].roll(-1, dim).contiguous()}
        run(kernel, **fields)

    assert found_wrong(monkeypatch, family, kernel, change)


@pytest.mark.parametrize("share", (0.0, 0.999, -1.0))
def test_a_wrong_projection_is_found(monkeypatch, share):
    """The term of a norm's gradient that cancels, left out, a thousandth short, or added."""

    def change(run, fields):
        run("rms_norm_backward", **fields)
        g, x, rstd = (fields[name].float() for name in ("grad_normed", "total", "rstd"))
        g = g if fields["weight"] is None else g * fields["weight"].float()
        term = x * rstd.pow(3) * (g * x).mean(-1, keepdim=True)
        fields["grad"].add_((1 - share) * term)

    assert found_wrong(monkeypatch, "rows", "rms_norm_backward", change)
