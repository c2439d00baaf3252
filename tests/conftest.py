"""Fixtures of the whole suite: repeatable hypothesis runs, NaN-filled outputs, two threads."""

import os
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

from fastattn import _native, testing

# What a person has tuned on this machine is not what is tested; inherited by the processes that tests start.
_cache = tempfile.TemporaryDirectory(prefix="fastattn-tests-")
os.environ["FASTATTN_CACHE_DIR"] = _cache.name

settings.register_profile(
    "fastattn",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("fastattn")


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """At most two: more than one, so that the split of work is tested, and few enough for a small machine."""
    torch.set_num_threads(2)


@pytest.fixture
def nan_outputs():
    """torch.empty gives NaN inside the test: an output that a kernel leaves unwritten fails it."""
    with testing.nan_filled_outputs():
        yield


@pytest.fixture(params=testing.isas())
def isa(request):
    """Runs the test once for each instruction set this machine has."""
    with _native.use_cpu_isa(request.param):
        yield request.param
