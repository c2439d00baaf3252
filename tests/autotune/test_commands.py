"""`fastattn tune` and `fastattn cache` as typed."""

import json
from types import SimpleNamespace

import pytest
import typer
from fastattn.autotune import space
from fastattn.autotune import table as tables
from fastattn.autotune.report import outcome
from planted import entry, table
from typer.testing import CliRunner

from fastattn.cli import cache, main, tune
from fastattn.runtime import tables as _tables
from fastattn.runtime import tuning as _config

KEY = ["dtype=float32", "head_dim=64"]


@pytest.fixture
def run(synthetic, monkeypatch):
    app = typer.Typer()
    cache.register(app)
    tune.register(app)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*words, input=None):
        _config.reload()
        result = CliRunner().invoke(app, [str(word) for word in words], input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return command


@pytest.fixture
def filled(target, synthetic):
    entries = [entry(512, 64) | {"time_us": 750.0, "ratio": 0.75, "spread": 0.01}, entry(2048, 128)]
    tables.merge(tables.user_path(target), target, {("planted", "cpu"): entries})


def test_show(run, filled):
    code, text = run("cache", "show")
    assert code == 0 and "planted.cpu" in text and "tile=64" in text
    assert "750 µs" in text and "1.33×" in text and "± 1.0 %" in text
    assert "tile" not in run("cache", "show", "other")[1]


def test_show_without_tables(run):
    assert "built-in defaults" in run("cache", "show")[1]


def test_show_is_safe_against_control_characters(run, target, synthetic):
    spoilt = table(target, entry(512, "\x1b[2Jtile", "[red]plain"))
    tables.write(tables.user_path(target), spoilt)
    text = run("cache", "show")[1]
    assert "\x1b" not in text and "?[2Jtile" in text and "[red]plain" in text


def test_why(run, filled, target):
    code, text = run("cache", "why", "planted", *KEY, "length=600")
    assert code == 0 and text.startswith(f"tile=64 variant=plain  from {tables.user_path(target)}")
    assert "length=512: 0.2 octaves away in length" in text and "length=2048: 1.8 octaves" in text
    assert "is not there" in text
    assert (
        "more than the 2 that a tuned size reaches" in run("cache", "why", "planted.cpu", *KEY, "length=9")[1]
    )
    with pytest.raises(ValueError, match=r"planted\.cpu has no call to try on cpu; give the key of one"):
        run("cache", "why", "planted", *KEY)
    with pytest.raises(ValueError, match="no tuned op strange"):
        run("cache", "why", "strange")


def test_why_takes_the_words_of_tune_and_its_defaults(run, filled, target, monkeypatch):
    monkeypatch.setattr(space, "workload_modules", lambda: ["planted"])
    code, text = run("cache", "why", "planted", "length=600")
    key, _, rest = text.partition("\n")
    assert code == 0 and key == "dtype=float32 head_dim=32 length=600"
    assert rest.startswith(run("cache", "why", "planted", "dtype=float32", "head_dim=32", "length=600")[1])
    with pytest.raises(
        ValueError, match=r"cache why: planted\.cpu has no field 'lenght'; .* did you mean length"
    ):
        run("cache", "why", "planted", "lenght=600")


def test_tables_as_json(run, filled, target):
    shown = json.loads(run("cache", "show", "--json")[1])
    assert shown["device"] == target.describe()
    [one] = shown["tables"]
    assert one["table"] == str(tables.user_path(target))
    assert [(found["op"], found["config"]["tile"]) for found in one["entries"]] == [
        ("planted", 64),
        ("planted", 128),
    ]
    assert json.loads(run("cache", "show", "other", "--json")[1])["tables"][0]["entries"] == []


def test_a_narrow_terminal_shows_whole_words(run, filled, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = run("cache", "show")[1]
    assert "planted.cpu  750 µs 1.33× ± 1.0 %" in text
    assert all(len(line) <= 40 or "/" in line for line in text.splitlines())


def test_verify(run, filled, target):
    assert run("cache", "verify") == (0, "2 entries are good, 0 problems\n")
    tables.write(tables.user_path(target), table(target, entry(512, 63), entry(512, 64)))
    code, text = run("cache", "verify")
    assert code == 1 and "tile=63 is not allowed" in text and "1 entries are good, 1 problems" in text
    tables.user_path(target).write_text("{")
    code, text = run("cache", "verify")
    assert code == 1 and "not a table for this device" in text


def test_export_clear_import(run, filled, target, tmp_path):
    path = tmp_path / "table.json"
    assert run("cache", "export", path)[0] == 0
    assert "[y/N]" in run("cache", "clear", "planted")[1]  # nobody says yes
    assert "tile=64" in run("cache", "show")[1]
    assert run("cache", "clear", "planted", "--yes")[1] == "removed 2 tuned entries (planted)\n"
    assert "built-in defaults" in run("cache", "show")[1]
    assert "2 entries merged" in run("cache", "import", path)[1]
    code, text = run("cache", "clear", input="y\n")
    assert (
        code == 0
        and text.startswith("Remove 2 tuned entries for ")
        and text.endswith("removed 2 tuned entries\n")
    )
    assert not tables.user_path(target).exists()
    assert run("cache", "clear")[1] == "there was nothing to remove\n"
    with pytest.raises(ValueError, match="there is no table"):
        run("cache", "export", path)


def test_what_was_gained_is_said_plainly():
    def result(ratio):
        kept = "" if ratio < 1 else "not faster"
        return SimpleNamespace(comparison=SimpleNamespace(ratio=ratio), kept=kept)

    every = outcome([result(1.0)] * 3)
    assert every == "The defaults were already the fastest of what was tried, in all 3 buckets."
    some = outcome([result(0.5), result(1.0), result(0.8), result(1.0)])
    assert some.startswith(
        "2 of 4 buckets became faster, by 1.25× to 2.00×; geometric mean gain over all 1.26×."
    )
    assert some.endswith("In the other 2 the default was already the fastest of what was tried.")


def test_tune_and_measure_again(run, target, monkeypatch, tmp_path):
    monkeypatch.setattr(space, "workload_modules", lambda: ["planted"])
    words = ["--ops", "planted", "--shapes", "length=300", "--budget", "10m", "--threads", "1"]
    code, text = run("tune", *words, "--report", tmp_path / "report.html")
    assert code == 0 and "1 of 1 buckets became faster, by 2.67×; geometric mean gain over all 2.67×." in text
    assert "8 configurations tried in" in text and "<svg" in (tmp_path / "report.html").read_text()
    found = _tables.read_table(tables.user_path(target), target)["ops"]["planted"]["cpu"]["entries"]
    assert [one["sizes"] for one in found] == [{"length": 256}]
    slower = json.loads(json.dumps(found[0]))
    slower["sizes"]["length"] = 1024
    slower["config"] = {"tile": 16, "variant": "plain"}  # 3 ms against the default's 2
    same = {
        **slower,
        "sizes": {"length": 4096},
        "config": _config.declared()["planted", "cpu"].defaults({}, target),
    }
    tables.merge(tables.user_path(target), target, {("planted", "cpu"): [slower, same]})
    code, text = run("cache", "verify", "--measure")
    assert "length=4096: is the default" in text
    assert code == 1 and "length=256: 2.67× ± 0.0 %" in text and "length=1024: SLOWER" in text
    assert "measured 2 entries: geometric mean gain 1.33×, 1 slower" in text


@pytest.mark.parametrize("text,seconds", [("60s", 60), ("2m", 120), ("1.5h", 5400), ("7", 7)])
def test_budgets(text, seconds):
    assert tune.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "fast", "1d", "inf"])
def test_bad_budgets(text):
    with pytest.raises(ValueError, match="expected a time"):
        tune.seconds_of(text)


def test_fields():
    fields = tune.fields_of("length=4096,causal=true dtype=bfloat16")
    assert fields == {"length": 4096, "causal": True, "dtype": "bfloat16"}
    for bad in ("length", "=4", "length="):
        with pytest.raises(ValueError, match="expected fields"):
            tune.fields_of(bad)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cache", "show", "--device", "tpu"), "device is 'tpu', expected cpu, cuda or cuda:1"),
        (("cache", "show", "--device", "cuda:99"), "cache: there is no cuda:99: torch sees"),
        (("cache", "verify", "--device", "cuda:x"), "device is 'cuda:x'"),
        (("tune", "--device", "cuda:99"), "tune: there is no cuda:99"),
        (("tune", "--threads", "0"), "tune: threads is 0"),
        (("cache", "why", "attention"), "no tuned op attention; there is attention.cpu, attention.triton"),
        (("cache", "why", "attention.cpu", "lenght=4"), "has no field 'lenght'; it has batch, heads"),
        (("cache", "why", "attention.cpu", "length=x"), "cache why: length is 'x', expected a whole number"),
        (("tune", "--shapes", "length=abc"), "tune: length is 'abc', expected a whole number from 1 on"),
        (("tune", "--shapes", "causal=3"), "tune: causal is 3, expected true or false"),
        (
            ("tune", "--ops", "attention", "--shapes", "dtype=float61"),
            "expected float32, bfloat16, float16; did you",
        ),
        (
            ("tune", "--ops", "attention,fused_linear", "--shapes", "heads=4"),
            "fused_linear.cpu has no field 'heads'; --ops",
        ),
        (("tune", "--shapes", "lenght=4"), "did you mean length?"),
        (("cache", "why", "attention.cpu", "dtype"), "cache why: the key is 'dtype', expected fields"),
        (("cache", "import", "nowhere.json"), "nowhere.json: no such file"),
    ],
)
def test_mistakes_are_named(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    _, err = capsys.readouterr()
    assert ended.value.code == 2 and message in err and "Traceback" not in err


def test_heads_alone_are_key_heads_too():
    def found(shape, given):
        return space.with_fields(SimpleNamespace(name="one", shapes=lambda *_: [shape]), given, None)

    shape = {"heads": 8, "kv_heads": 8, "length": 512}
    given = [{"heads": 2}, {"heads": 16, "kv_heads": 4}, {"length": 64}]
    heads = [found(shape, fields) for fields in given]
    assert [(one["heads"], one["kv_heads"]) for one in heads] == [(2, 2), (16, 4), (8, 8)]
    assert found({"heads": 8}, {"heads": 2}) == {"heads": 2}


def test_written_tables_are_json(filled, target):
    stored = json.loads(tables.user_path(target).read_text())
    assert stored and "planted" in json.dumps(stored)
