"""A synthetic op for the tuner's tests, and directories of its own for every test."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from fastattn.runtime import device as _device
from fastattn.runtime import tables as _tables
from fastattn.runtime import tuning as _config

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # `planted`, here and in the workers the tests start
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(autouse=True)
def own_directories(tmp_path, monkeypatch):
    """No test sees or touches the user's cache or the shipped tables, and none leaves a choice behind."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTATTN_CONFIG_DIR", str(tmp_path / "config"))
    (tmp_path / "config").mkdir()
    monkeypatch.setattr(_tables, "shipped_dir", lambda: tmp_path / "shipped")
    _config.reload()
    yield
    _config.reload()


@pytest.fixture
def target():
    return _device.target("cpu")


@pytest.fixture
def synthetic():
    """Declares planted.cpu for one test."""
    import planted

    before = dict(_config.tunings())  # all: a module imported during the test declares only once
    yield planted.declare()
    _config._declared.clear()
    _config._declared.update(before)
    _config.reload()


@pytest.fixture
def other_target(target):
    return dataclasses.replace(target, name="some other processor")
