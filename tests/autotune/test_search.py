"""The search on a sweep that is played back: no device, no clock."""

import statistics

import optuna
import pytest
import replay
from fastattn.autotune import search, study
from fastattn.autotune.worker import Failure


def explore(sweep, seed=0, **options):
    trials = study.Trials(optuna.storages.InMemoryStorage(), "test", sweep.space, seed=seed)
    search.explore(sweep.space, trials, sweep, search.Clock(1e9), seed=seed, **options)
    return trials


def gap(sweep, trials):
    return sweep.times[trials.best(1)[0]] / sweep.fastest - 1


@pytest.mark.parametrize("sweep_of", [replay.modelled, replay.recorded])
def test_near_the_optimum_after_25_evaluations(sweep_of):
    """Within 5 % in the median of 20 seeds, and no point is evaluated twice."""
    gaps = []
    for seed in range(20):
        sweep = sweep_of()
        trials = explore(sweep, seed, most=25, every=False)
        assert len(sweep.calls) == len(set(sweep.calls)) == 25
        assert sweep.calls[0] == sweep.space.default
        gaps.append(gap(sweep, trials))
    assert statistics.median(gaps) <= 0.05


def test_a_seed_repeats_itself():
    one, two, other = replay.modelled(), replay.modelled(), replay.modelled()
    explore(one, 3, most=20, every=False)
    explore(two, 3, most=20, every=False)
    explore(other, 4, most=20, every=False)
    assert one.calls == two.calls != other.calls


def test_model_ends_when_everything_is_known():
    sweep = small()
    trials = explore(sweep, every=False)
    assert set(sweep.calls) == set(sweep.space.points) and len(sweep.calls) == len(sweep.space)
    assert gap(sweep, trials) == 0


def small():
    parameters = {"tile": [16, 32, 64], "variant": ["a", "b"], "only": [1]}
    times = {
        (16, "a", 1): 5.0,
        (32, "a", 1): 4.0,
        (64, "a", 1): "crashed",
        (32, "b", 1): 2.0,
        (64, "b", 1): 3.0,
    }
    return replay.Sweep(parameters, {"tile": 16, "variant": "a", "only": 1}, times)


def test_small_spaces_are_swept():
    sweep = small()
    trials = explore(sweep)
    assert len(sweep.calls) == len(set(sweep.calls)) == 5 and gap(sweep, trials) == 0
    assert trials.known[64, "a", 1].reason == "crashed"


def decide(sweep, trials):
    return search.decide(sweep.space, trials, sweep, search.Clock(1e9))


def test_winner_beats_the_default():
    sweep = small()
    winner = decide(sweep, explore(sweep))
    assert winner.config == {"tile": 32, "variant": "b", "only": 1} and not winner.kept
    assert winner.comparison.ratio == pytest.approx(0.4)


@pytest.mark.parametrize("other", [5.0, 4.95, 6.0, "wrong"])
def test_default_stays_unless_beaten_by_enough(other):
    sweep = replay.Sweep({"tile": [16, 32]}, {"tile": 16}, {(16,): 5.0, (32,): other})
    winner = decide(sweep, explore(sweep))
    assert winner.config == {"tile": 16} and winner.kept


def test_default_stays_within_the_spread():
    class Noisy(replay.Sweep):
        def race(self, configs, rounds, seconds):
            """The other is 3 % faster in the median and anything from half to double in a round."""
            swing = [0.5, 0.97, 2.0] * (rounds // 3 + 1)
            return [
                [[5e-6 * (1.0 if config["tile"] == 16 else swing[i]) for i in range(rounds)]]
                for config in configs
            ]

    sweep = Noisy({"tile": [16, 32]}, {"tile": 16}, {(16,): 5.0, (32,): 4.0})
    assert decide(sweep, explore(sweep)).config == {"tile": 16}


def test_finalist_that_disagrees_at_full_size_never_wins():
    class Disagrees(replay.Sweep):
        def agree(self, config):
            if config["tile"] == 32:
                raise Failure("wrong", "differs from the default")

    sweep = Disagrees({"tile": [16, 32, 64]}, {"tile": 16}, {(16,): 5.0, (32,): 1.0, (64,): 2.0})
    assert decide(sweep, explore(sweep)).config == {"tile": 64}


def test_finalist_that_crashes_in_the_race_drops_out():
    class Crashes(replay.Sweep):
        racing = False

        def trial(self, config, hopeless):
            if self.racing and config["tile"] == 32:
                return study.Outcome(None, "crashed")
            return super().trial(config, hopeless)

        def race(self, configs, rounds, seconds):
            self.racing = True
            if {"tile": 32} in configs:
                raise Failure("crashed")
            return super().race(configs, rounds, seconds)

    sweep = Crashes({"tile": [16, 32, 64]}, {"tile": 16}, {(16,): 5.0, (32,): 1.0, (64,): 2.0})
    assert decide(sweep, explore(sweep)).config == {"tile": 64}


@pytest.mark.parametrize("every", [True, False])
def test_a_default_that_fails_is_an_error(every):
    broken = replay.Sweep({"tile": [16, 32]}, {"tile": 16}, {(16,): "wrong", (32,): 1.0})
    with pytest.raises(Failure, match="the default fails"):
        explore(broken, every=every)
    infeasible = replay.Sweep({"tile": [16, 32]}, {"tile": 16}, {(32,): 1.0})
    with pytest.raises(Failure, match="not feasible"):
        explore(infeasible, every=every)


def test_no_time_left_is_a_failure_not_a_guess():
    sweep = small()
    trials = explore(sweep)
    with pytest.raises(Failure, match="out of time"):
        search.decide(sweep.space, trials, sweep, search.Clock(-1.0))
