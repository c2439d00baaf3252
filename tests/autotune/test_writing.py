"""Writing tables: merging, concurrent writers, files in the way, import and export."""

import json
import multiprocessing
import os
import stat
import subprocess
import sys
import time

import pytest
from fastattn.autotune import table as tables
from planted import entry, look_up, table

from fastattn.runtime import tables as _tables
from fastattn.runtime import tuning as _config

WRITER = """
import sys
import planted
from fastattn.runtime import device as _device
from fastattn.autotune import table
first = int(sys.argv[1])
target = _device.target("cpu")
for length in range(first, first + 200, 2):
    table.merge(table.user_path(target), target, {("planted", "cpu"): [planted.entry(length, 64)]})
"""


def merge(target, *entries):
    return tables.merge(tables.user_path(target), target, {("planted", "cpu"): entries})


def lengths(target):
    found = _tables.read_table(tables.user_path(target), target)
    return [entry["sizes"]["length"] for entry in found["ops"]["planted"]["cpu"]["entries"]]


def test_two_processes_write_a_hundred_entries_each(target):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(first)]) for first in (1, 2)]
    path, seen = tables.user_path(target), set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():  # what a reader sees meanwhile is always a whole table
            json.loads(path.read_text())
            seen.update(lengths(target))
        time.sleep(0.02)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert lengths(target) == list(range(1, 201)) and len(seen) > 0
    assert {file.name for file in path.parent.iterdir()} <= {path.name, f"{path.name}.lock"}


def test_merge_replaces_the_same_key(target, synthetic):
    merge(target, entry(512, 64), entry(1024, 64))
    merge(target, entry(512, 128), entry(512, 16, head_dim=128))
    found = _tables.read_table(tables.user_path(target), target)["ops"]["planted"]["cpu"]
    assert [
        (one["key"]["head_dim"], one["sizes"]["length"], one["config"]["tile"]) for one in found["entries"]
    ] == [
        (128, 512, 16),
        (64, 512, 128),
        (64, 1024, 64),
    ]
    assert found["default"] == {"tile": 32, "variant": "plain"}
    assert look_up(512).values["tile"] == 128


def test_table_is_readable_and_stable(target, synthetic):
    whole = merge(target, entry(1024, 64), entry(512, 64))
    text = tables.user_path(target).read_text()
    assert json.loads(text) == whole and tables.dumps(json.loads(text)) == text
    assert '      "config": {"tile": 64, "variant": "plain"},\n' in text
    assert stat.S_IMODE(os.stat(tables.user_path(target)).st_mode) == 0o644


@pytest.mark.parametrize("contents", [b"", b"\x00\xff", b"[]", b'{"schema": 99}'])
def test_unusable_file_is_set_aside_not_lost(contents, target, synthetic):
    path = tables.user_path(target)
    path.parent.mkdir(parents=True)
    path.write_bytes(contents)
    merge(target, entry(512, 64))
    assert look_up(512).values["tile"] == 64
    (aside,) = path.parent.glob("*.unusable-*")
    assert aside.read_bytes() == contents


def test_odd_contents_survive_a_merge(target, synthetic):
    path = tables.user_path(target)
    tables.write(path, {"schema": 1, "device": target.describe(), "ops": [], "more": 1})
    assert merge(target, entry(512, 64))["more"] == 1
    broken = table(target, entry(512, 64))
    broken["ops"]["planted"] = "text"
    tables.write(path, broken)
    merge(target, entry(512, 128))
    assert look_up(512).values["tile"] == 128


def test_interrupted_write_leaves_the_old_table(target, synthetic, monkeypatch):
    merge(target, entry(512, 64))

    def fail(*paths):
        raise OSError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="planted"):
            merge(target, entry(512, 128))
    _config.reload()
    assert lengths(target) == [512]
    assert not list(tables.user_path(target).parent.glob(".*"))


def _hold(path, held, release):
    from filelock import FileLock

    with FileLock(f"{path}.lock"):
        held.set()
        release.wait(60)


# Python 3.12 and later warn of forks; the child makes no call of torch
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_held_lock_times_out(target, synthetic, monkeypatch):
    monkeypatch.setattr(tables, "LOCK_SECONDS", 0.2)
    path = tables.user_path(target)
    path.parent.mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(path, held, release))
    holder.start()
    held.wait(60)
    with pytest.raises(TimeoutError, match="held by another process"):
        merge(target, entry(512, 64))
    release.set()
    holder.join()


def test_export_and_import(target, synthetic, tmp_path):
    merge(target, entry(512, 64))
    exported = tmp_path / "exported.json"
    tables.write(exported, _tables.read_table(tables.user_path(target), target))
    assert tables.remove(tables.user_path(target), target)
    assert look_up(512).source == "default"
    assert tables.import_table(exported) == (tables.user_path(target), 1)
    assert look_up(512).values["tile"] == 64


def test_import_for_another_device(other_target, synthetic, tmp_path):
    source = tmp_path / "other.json"
    tables.write(source, table(other_target, entry(512, 64)))
    path, count = tables.import_table(source)
    assert path.name == f"{other_target.slug}.json" and count == 1
    assert look_up(512).source == str(path)  # of the same instruction set


@pytest.mark.parametrize(
    "spoil,message",
    [
        (lambda t: t.update(schema=2), "is not a table"),
        (lambda t: t["device"].pop("name"), "describe its device"),
        (lambda t: t["device"].update(name=7), "describe its device"),
        (lambda t: t["device"].update(more=7), "describe its device"),
        (lambda t: t["ops"]["planted"]["cpu"]["entries"][0]["config"].update(tile=2**63), "not allowed"),
        (lambda t: t["ops"]["planted"]["cpu"]["entries"][0]["sizes"].update(length=-1), "positive"),
        (lambda t: t["ops"]["planted"]["cpu"]["entries"][0]["key"].pop("dtype"), "key fields"),
        (lambda t: t["ops"].update(strange=t["ops"].pop("planted")), "no such op"),
    ],
)
def test_import_refuses(spoil, message, target, synthetic, tmp_path):
    bad = table(target, entry(512, 64))
    spoil(bad)
    source = tmp_path / "bad.json"
    source.write_text(json.dumps(bad))
    with pytest.raises(ValueError, match=message):
        tables.import_table(source)
    assert not tables.user_path(target).exists()


def test_remove_one_op(target, synthetic):
    merge(target, entry(512, 64))
    assert not tables.remove(tables.user_path(target), target, ["other"])
    assert tables.remove(tables.user_path(target), target, ["planted"])
    assert look_up(512).source == "default"
