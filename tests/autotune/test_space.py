"""Feasible points, neighbours and buckets."""

import pytest
from fastattn.autotune import space

from fastattn.runtime import tuning as _config


@pytest.fixture
def points(synthetic, target):
    return space.Space(synthetic, [{"dtype": "float32", "head_dim": 64, "length": 512}], target)


def test_feasible_points_only(points):
    assert points.total == 8 and len(points) == 7
    assert (128, "wide") not in points and (64, "wide") in points
    assert points.refused == {"tile does not fit": 1}
    assert points.default == (32, "plain")


def test_a_point_must_be_feasible_for_every_shape(synthetic, target):
    keys = [{"dtype": "float32", "head_dim": dim, "length": 512} for dim in (64, 128)]
    assert (64, "wide") not in space.Space(synthetic, keys, target)


def test_neighbours_are_one_step_away(points):
    assert set(points.neighbours((32, "plain"))) == {(16, "plain"), (64, "plain"), (32, "wide")}
    assert set(points.neighbours((64, "wide"))) == {(32, "wide"), (64, "plain")}
    assert set(points.neighbours((128, "plain"))) == {(64, "plain")}


def test_huge_products_are_refused(target):
    parameters = {f"p{i}": _config.Parameter(1, tuple(range(1, 9))) for i in range(8)}
    declaration = _config.Declaration("huge", "cpu", parameters, (), ())
    with pytest.raises(ValueError, match="too many"):
        space.Space(declaration, [{}], target)


def test_calls_of_one_key_and_size_class_share_a_bucket():
    calls = [({"n": n}, {"dtype": dtype}, {"length": n}) for dtype in "ab" for n in (480, 512, 800, 1024)]
    buckets = space.make_buckets("op", "cpu", calls)
    assert [(one.structural["dtype"], one.sizes["length"], len(one.shapes)) for one in buckets] == [
        ("a", 512, 2),
        ("a", 1024, 2),
        ("b", 512, 2),
        ("b", 1024, 2),
    ]
    assert buckets[0].keys == ({"dtype": "a", "length": 480}, {"dtype": "a", "length": 512})


@pytest.mark.parametrize("size,rounded", [(0, 1), (1, 1), (3, 4), (90, 64), (91, 128), (4096, 4096)])
def test_round_size(size, rounded):
    assert space.round_size(size) == rounded
