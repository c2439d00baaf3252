"""The look-up ladder, and every kind of file that must be a miss."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastattn.autotune import table as tables
from hypothesis import given
from hypothesis import strategies as st
from planted import STRUCTURAL, entry, look_up, table

from fastattn.runtime import device as _device
from fastattn.runtime import tables as _tables
from fastattn.runtime import tuning as _config

DEFAULT = {"tile": 32, "variant": "plain"}


@pytest.fixture
def put(tmp_path, target, synthetic):
    def write(contents, place="config"):
        path = tmp_path / place / f"{target.slug}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = contents if isinstance(contents, (bytes, str)) else json.dumps(contents)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        _config.reload()
        return path

    return write


def test_default_without_tables(synthetic):
    choice = look_up()
    assert dict(choice.values) == DEFAULT and choice.source == "default"


def test_shipped_tables_would_be_used():
    folder = Path(tables.__file__).parent / "configs"
    assert list(folder.glob("*.json"))
    _config.tunings()
    for path in folder.glob("*.json"):
        shipped = _tables.read_table(path)
        device = _device.Target(**shipped["device"])
        assert path.stem == device.slug and shipped == _tables.read_table(path, device)
        entries = list(tables.every_entry(shipped))
        assert entries and all(tables.refusal(*found, device) is None for found in entries)
        assert path.read_text() == tables.dumps(shipped)


def test_ladder(put, target):
    shipped = put(table(target, entry(tile=64)), "shipped")
    assert look_up().values["tile"] == 64 and look_up().source == str(shipped)
    ours = put(table(target, entry(tile=128)), "cache/tables")
    assert look_up().values["tile"] == 128 and look_up().source == str(ours)
    explicit = put(table(target, entry(tile=16)), "config")
    assert look_up().values["tile"] == 16 and look_up().source == str(explicit)


def relative(target, **changes):
    return dataclasses.replace(target, **{"name": "some relative", **changes})


def put_for(tmp_path, device, contents, place="shipped"):
    path = tmp_path / place / f"{device.slug}.json"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(contents))
    _config.reload()
    return str(path)


def test_a_table_of_the_same_instruction_set_comes_before_the_default(tmp_path, synthetic, target):
    other = relative(target, units=target.units + 6)
    path = put_for(tmp_path, other, table(other, entry(512, 64)))
    assert look_up(512).values["tile"] == 64 and look_up(512).source == path
    assert look_up(5000).source == "default"
    foreign = relative(target, arch="another")
    put_for(tmp_path, foreign, table(foreign, entry(8192, 128)))
    assert look_up(8192).source == "default"


def test_this_device_s_entry_comes_before_a_nearer_one_of_a_relative(tmp_path, put, target):
    put(table(target, entry(1024, 128)))
    other = relative(target)
    path = put_for(tmp_path, other, table(other, entry(512, 64), entry(64, 16)))
    assert look_up(512).values["tile"] == 128
    assert look_up(64).source == path


def test_among_relatives_the_same_name_comes_first_then_the_nearest_number_of_units(
    tmp_path, synthetic, target
):
    far, near = relative(target, units=target.units * 64), relative(target, units=target.units * 2)
    put_for(tmp_path, far, table(far, entry(512, 16)), "config")
    put_for(tmp_path, near, table(near, entry(512, 64)))
    assert look_up(512).values["tile"] == 64
    namesake = dataclasses.replace(target, units=target.units * 100)
    put_for(tmp_path, namesake, table(namesake, entry(512, 128)))
    assert look_up(512).values["tile"] == 128


def test_a_relative_s_entry_is_checked_for_this_device(tmp_path, synthetic, target, caplog):
    other = relative(target)
    put_for(tmp_path, other, table(other, entry(512, 128, "wide"), entry(1024, tile=77)))
    with caplog.at_level(logging.WARNING, "fastattn"):
        assert look_up(512).source == "default"
    assert len(caplog.records) == 2
    put_for(tmp_path, other, {**table(other), "device": {**other.describe(), "units": "many"}})
    assert look_up(512).source == "default"


def test_structure_exact_and_sizes_nearest(put, target):
    put(table(target, entry(512, 64), entry(2048, 128), entry(512, 16, head_dim=128)))
    assert look_up(512).values["tile"] == 64
    assert look_up(1000).values["tile"] == 64  # log2: 0.97 octaves from 512, 1.03 from 2048
    assert look_up(1100).values["tile"] == 128
    assert look_up(512, head_dim=128).values["tile"] == 16
    assert look_up(512, head_dim=96).source == "default"
    assert look_up(512, dtype="bfloat16").source == "default"


def test_far_sizes_keep_the_default(put, target):
    put(table(target, entry(512, 64)))
    assert look_up(512 * 4).values["tile"] == 64
    assert look_up(512 * 4 + 1).source == "default"
    assert look_up(0).source == "default"


def test_infeasible_neighbour_is_passed_over(put, target, synthetic):
    put(table(target, entry(512, 128, "wide"), entry(1024, 64)))
    assert dict(look_up(512).values) == {"tile": 64, "variant": "plain"}


BAD_FILES = {
    "empty": b"",
    "truncated": b'{"schema": 1, "device": {',
    "binary": bytes(range(256)) * 10,
    "list": b"[1, 2]",
    "number": b"7",
    "nested": b"[" * 200_000,
    "huge number": b'{"schema": ' + b"9" * 10_000 + b"}",
    "wrong schema": b'{"schema": 2}',
    "schema is true": b'{"schema": true}',
}


@pytest.mark.parametrize("contents", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file_is_a_miss_with_one_line(contents, put, target, caplog):
    put(table(target, entry(tile=128)), "cache/tables")
    put(contents)
    with caplog.at_level(logging.WARNING, "fastattn"):
        assert look_up().values["tile"] == 128
        look_up(77)
    assert len(caplog.records) == 1


def test_gigabyte_file_is_not_read(put, caplog):
    path = put(b"")
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    assert look_up().source == "default"
    assert "regular file" in caplog.text


def test_fifo_does_not_block(put):
    path = put(b"")
    path.unlink()
    os.mkfifo(path)
    assert look_up().source == "default"


def test_other_device(put, other_target, caplog):
    put(table(other_target, entry(tile=128)))
    assert look_up().source == "default"
    assert "another device" in caplog.text


HOSTILE = [0, -1, 2**63, 2**31, -(2**63), 64.0, True, None, "64", [64], {"a": 1}, 1e300, 17]


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_hostile_values(value, put, target):
    put(table(target, entry(tile=value), entry(variant=value)))
    assert dict(look_up().values) == DEFAULT
    put(table(target, entry(length=value)))
    assert look_up().source == "default" or value in (17, 2**31)


def test_config_with_missing_or_extra_names(put, target):
    missing, extra = entry(tile=128), entry(tile=128)
    del missing["config"]["variant"]
    extra["config"]["more"] = 1
    put(table(target, missing, extra))
    assert look_up().source == "default"


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.integers(), lambda x: st.lists(x)
                    | st.dictionaries(st.sampled_from(["ops", "planted", "cpu", "entries", "key", "sizes",
                                                       "config", "tile", "length"]), x)))  # fmt: skip
def test_any_json_is_harmless(put, target, junk):
    for contents in (junk, {"schema": 1, "device": target.describe(), "ops": junk}, table(target, junk)):
        put(contents)
        assert look_up().source == "default"
        _tables.effective("cpu")


def test_keys_are_checked(synthetic):
    with pytest.raises(KeyError, match="key fields are"):
        _config.lookup("planted", "cpu", structural={"dtype": "float32"}, sizes={"length": 1}, device="cpu")
    with pytest.raises(TypeError, match="must be a string"):
        look_up(head_dim=64.0)
    with pytest.raises(KeyError, match="declared no tuning"):
        _config.lookup("planted", "triton", structural={}, sizes={}, device="cpu")


def test_declare_checks():
    with pytest.raises(ValueError, match="not among"):
        _config.Parameter(3, (1, 2))
    with pytest.raises(TypeError, match="32-bit"):
        _config.Parameter(1, (1, 2**31))


def test_override_comes_first_and_ends(put, target):
    put(table(target, entry(tile=128)))
    with _config.override({("planted", "cpu"): {"tile": 16}}):
        assert dict(look_up().values) == {"tile": 16, "variant": "plain"}
        with _config.override({("planted", "cpu"): {"variant": "wide"}}):
            assert look_up().values["variant"] == "wide"
        assert look_up().values["tile"] == 16
    assert look_up().values["tile"] == 128
    with pytest.raises(ValueError, match="not allowed"), _config.override({("planted", "cpu"): {"tile": 17}}):
        pass


def test_watch_sees_keys(synthetic):
    with _config.watch() as seen:
        look_up(300)
    look_up(400)
    assert [(one.op, one.structural, one.sizes) for one in seen] == [("planted", STRUCTURAL, {"length": 300})]


def test_default_may_depend_on_the_key(synthetic):
    _config.declare(
        "planted", "cpu", parameters=synthetic.parameters, structural=synthetic.structural,
        sizes=synthetic.sizes, default=lambda key, target: {"tile": 16 if key["length"] < 100 else 64},
    )  # fmt: skip
    assert look_up(50).values["tile"] == 16 and look_up(100).values["tile"] == 64


def test_install_replaces_files(put, target, other_target):
    put(table(target, entry(tile=128)))
    _config.install("cpu", table(target, entry(tile=16)))
    assert look_up().values["tile"] == 16 and look_up().source == "synchronised"
    _config.install("cpu", table(other_target, entry(tile=16)))
    assert look_up().source == "default"
    _config.install("cpu", None)
    assert look_up().values["tile"] == 128


def test_effective_merges_the_ladder(put, target):
    put(table(target, entry(512, 64), entry(1024, 64)), "cache/tables")
    put(table(target, entry(512, 16)), "config")
    merged = _tables.effective("cpu")
    _config.install("cpu", merged)
    assert look_up(512).values["tile"] == 16 and look_up(1024).values["tile"] == 64
    _config.install("cpu", None)


def test_standard_library_only():
    """The modules themselves, with the package's own __init__ (which imports torch) stood aside."""
    package = os.path.dirname(os.path.dirname(_config.__file__))
    code = (
        "import sys, types\n"
        "package = sys.modules['fastattn'] = types.ModuleType('fastattn')\n"
        f"package.__path__ = [{package!r}]\n"
        "before = set(sys.modules)\n"
        "import fastattn.runtime.tuning\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert new <= {'fastattn', *sys.stdlib_module_names}, new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
