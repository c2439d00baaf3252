"""A few minutes of the fuzzing campaign with fixed seeds; `make fuzz` runs hours with new ones."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import attention
import campaign

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
