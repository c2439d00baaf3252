"""The commands as a person meets them: what they leave, what they print, what they refuse."""

import io
import json
import platform
import re
import shutil
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import fastattn
from fastattn.cli import build_app, main
from fastattn.runtime.files import write_tensors
from fastattn.train import state as training_state

APP = build_app()
COMMANDS = sorted(
    [(command.name or command.callback.__name__,) for command in APP.registered_commands]
    + [
        (group.name, command.name or command.callback.__name__)
        for group in APP.registered_groups
        for command in group.typer_instance.registered_commands
    ]
)


def train_args(data, config, output, *more):
    options = ("--vocab-size", 300, "--batch-tokens", 128, "--config", config)
    return ("train", "--data", data, "--output", output, *options, *more)


def test_help_lists_the_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    for name in ("train", "generate", "solve", "evaluate", "build", "convert", "doctor", "demo"):
        assert re.search(rf"^\W*{name}\s+\w", out, re.M), name
    assert run("--version")[1] == f"fastattn {fastattn.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0 and "Usage: fastattn" in out


def test_train_leaves_a_model_that_answers(run, trained):
    assert {path.name for path in trained.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json"),
        *("training.safetensors", "history.jsonl", "report.html"),
    }
    rows = [json.loads(line) for line in (trained / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["step"] == 0 and rows[0]["held_out"] > rows[-1]["held_out"]
    answer = ("generate", "--model", trained, "--max-new-tokens", 8)
    code, out, err = run(*answer, "What is list3?")
    assert (code, err) == (0, "") and out.endswith("\n")
    assert run(*answer, "What is list3?")[1] == out
    drawn = [run(*answer, "--temperature", 2.0, "--seed", seed, "What is list3?")[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_model_with_a_quantised_head_trains_and_answers(run, data, config, tmp_path):
    options = ("--vocab-size", 300, "--batch-tokens", 128, "--config", config, "--steps", 11)
    quantised = ("--head", "vq", "--codebook-size", 32)
    code, _, err = run("train", "--data", data, "--output", tmp_path, *options, *quantised)
    assert (code, err) == (0, "")
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["head"] == "vq" and values["codebook_size"] == 32
    assert values["codebook_assignment"] == "straight_through"
    assert run("generate", "--model", tmp_path, "--max-new-tokens", 4, "What is list3?")[0] == 0


def test_conditions_reach_samples_and_prompts(run, config, tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [
        {"instruction": f"n {n}", "response": f"{tag} {n}", "condition": tag}
        for n in range(30)
        for tag in ("a", "b")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = run(*train_args(path, config, tmp_path / "run", "--steps", 11))
    assert (code, err) == (0, "")
    answers = [
        run("generate", "--model", tmp_path / "run", "--max-new-tokens", 3, *options, "n 3")
        for options in ((), ("--condition", "a"), ("--condition", "<|b|>", "--condition", "a"))
    ]
    assert [answer[0] for answer in answers] == [0, 0, 0]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"condition": "c"}]))
    code, _, err = run(*train_args(path, config, tmp_path / "run", "--resume"))
    assert code == 2 and "data.jsonl:61: condition: 'c' is no special token" in err


def test_the_report_needs_no_network(trained):
    page = (trained / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<svg") == 4  # loss, speed, a step three ways, ops
    assert "What is" in page and "fastattn::" in page
    assert not re.search(r"""(src|href)\s*=\s*["']https?:""", page)


@pytest.mark.parametrize("path", [(), *COMMANDS, ("cache",)], ids=" ".join)
def test_help_is_asked_for_in_either_way(run, path):
    short, long = (run(*path, word) for word in ("-h", "--help"))
    assert short == long and short[0] == 0 and "Usage: fastattn" in short[1]
    flags = [line for line in short[1].splitlines() if "<bool>" in line]
    assert all("--help" in line or "completion" in line for line in flags), flags


def test_doctor_as_json(run):
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["environment"]["Python"] == platform.python_version()
    assert found["devices"]["cpu"]["ops"]["attention"]["float32"].startswith("cpu")


def test_doctor_on_a_narrow_terminal(run, monkeypatch):
    from fastattn.cli import _run

    monkeypatch.setattr(_run.console, "width", 40)
    code, out, _ = run("doctor")
    assert code == 0 and "- scaled_dot_product_attention: cpu" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--data", "sudoku"),
            "--data sudoku is for HRM: fastattn train --model hrm --data sudoku --output DIR",
        ),
        (("--data", "sudoko", "--output", "x"), "no such file; did you mean --model hrm --data sudoku?"),
        (("--model", "hrm", "--data", "sudoku"), "--output is missing"),
    ],
)
def test_a_training_that_cannot_be_meant_says_what_to_type(run, words, message):
    code, _, err = run("train", *words)
    assert code == 2 and message in err


def test_the_folder_around_a_model_is_named(run, trained, tmp_path):
    (tmp_path / "model").symlink_to(trained)
    code, _, err = run("generate", "--model", tmp_path, "What is list3?")
    assert code == 2 and f"give --model {tmp_path / 'model'}" in err


def test_the_demo_refuses_no_time_before_it_makes_data(run, tmp_path):
    code, out, err = run("demo", "--output", tmp_path / "x", "--minutes", 0)
    assert (code, out) == (2, "") and "--minutes is 0.0; it must be positive" in err


def test_doctor(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    for word in ("processor", "instruction set", "torch", "backends on cpu", "rms_norm", "tuned tables"):
        assert word in out


def test_a_prompt_from_standard_input(run, trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is list3?\n"))
    piped = run("generate", "--model", trained, "--max-new-tokens", 8, "-")
    assert piped == run("generate", "--model", trained, "--max-new-tokens", 8, "What is list3?")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "prompt: is empty"), ("long " * 200, "this model takes 64"), ("-", "prompt: is empty")],
    ids=["empty", "too long", "empty input"],
)
def test_prompts_that_cannot_be_answered(run, trained, monkeypatch, prompt, message):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, _, err = run("generate", "--model", trained, prompt)
    assert code == 2
    assert err.startswith("error: ") and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", -1), "temperature"),
        (("--top-k", -1, "--temperature", 1), "top_k"),
        (("--top-p", 1.5, "--temperature", 1), "top_p"),
        (("--top-k", 3), "--top-k is for drawing tokens; without --temperature the most likely is taken"),
        (("--top-p", 0.5, "--temperature", 0), "--top-p is for drawing tokens"),
        (("--seed", 1), "--seed is for drawing tokens"),
        (("--condition", "cot"), "condition: 'cot' is no special token of the tokenizer"),
        (("--max-new-tokens", 0), "max_new_tokens"),
    ],
)
def test_sampling_options_are_checked(run, trained, options, message):
    code, _, err = run("generate", "--model", trained, *options, "What is list3?")
    assert code == 2 and message in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "half written"),
        ("config.json", b'{"hidden_size": 32', "not readable as JSON"),
        ("config.json", b'{"vocab_size": 300, "hiden_size": 32}', "unknown key 'hiden_size'"),
        ("config.json", b'{"vocab_size": 300, "hidden_size": 64, "num_attention_heads": 2}', "do not fit"),
        ("config.json", b"[" * 100_000, "nested too deep"),
        ("config.json", b'{"vocab_size": 300, "head_dim": 9223372036854775808}', "head_dim"),
        ("config.json", b'{"vocab_size": 300, "num_hidden_layers": 2000000000}', "2000000000 layers"),
        ("config.json", b'{"vocab_size": 300, "L_cycles": 2000000000}', "at most 4096"),
        ("config.json", b'{"vocab_size": 300, "head": "vq", "codebook_size": "x"}', "codebook_size is 'x'"),
        ("config.json", b'{"vocab_size": 300, "rms_norm_eps": true}', "rms_norm_eps is True"),
        ("tokenizer.json", b"{}", "not a tokenizer"),
    ],
)
def test_a_model_that_cannot_be_read(run, trained, tmp_path, name, content, message):
    folder = shutil.copytree(trained, tmp_path / "copy")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    code, _, err = run("generate", "--model", folder, "What is list3?")
    assert code == 2 and message in err and str(folder) in err and err.count("\n") == 1


def test_a_model_folder_without_end(run, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    for name in ("tokenizer.json", "config.json"):
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        code, _, err = run("generate", "--model", folder, "What is list3?")
        assert code == 2 and str(folder / name) in err
        shutil.copy(trained / name, folder / "whole")
        (folder / "whole").replace(folder / name)


@pytest.mark.parametrize(("how", "words"), [("skip", "were left out"), ("cut", "were cut")])
def test_examples_that_are_too_long_are_counted_and_a_resumed_run_knows_them(
    run, config, tmp_path, how, words
):
    path = tmp_path / "data.json"
    rows = [
        {"prompt": f"What is {n}?", "completion": f"A number, {n}." * (40 if n % 3 == 2 else 1)}
        for n in range(30)
    ]
    path.write_text(json.dumps([*rows, {"prompt": "a", "completion": ""}]))
    command = train_args(path, config, tmp_path / "run", "--too-long", how, "--steps", 2)
    code, out, err = run(*command)
    assert code == 0, err
    assert f"{path}: 30 examples (31 with prompt and completion); 1 without a response were left out" in out
    assert f"10 examples of too many tokens {words} (--too-long)" in out
    assert run(*command, "--resume")[0] == 0
    code, _, err = run(
        "train", "--data", path, "--output", tmp_path / "run", "--resume", "--too-long", "refuse"
    )
    assert code == 2 and f"--too-long is refuse, but the run in {tmp_path / 'run'} has {how}" in err


def test_weights_that_are_not_numbers(run, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.fill_(torch.nan) for name, t in tensors.items()}, folder / "model.safetensors")
    code, _, err = run("generate", "--model", folder, "--temperature", 1, "What is list3?")
    assert code == 2 and "hold NaN" in err


def test_a_prompt_that_is_not_text(run, trained):
    code, _, err = run("generate", "--model", trained, "list\udcff")
    assert code == 2 and "prompt: is not UTF-8" in err


def test_no_model(run, tmp_path):
    code, _, err = run("generate", "--model", tmp_path / "none", "x")
    assert code == 2 and "no such folder" in err
    code, _, err = run("generate", "--model", tmp_path, "x")
    assert code == 2 and "no such file" in err


GOOD = '{"instruction": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + '{"instruction": "a"\n', ("bad.jsonl:2:", "not JSON")),
        (GOOD + GOOD + '{"instruction": "a"}\n', ("bad.jsonl:3:", "'response' is missing")),
        ('{"instruction": "a", "response": ""}\n', ("bad.jsonl", "no example with a response")),
        ("", ("bad.jsonl", "holds no example")),
        (
            '{"instruction": "a", "response": "' + "word " * 300 + '"}\n',
            ("no example has at most 64 tokens, the shortest has",),
        ),
    ],
    ids=["half a line", "no response", "empty response", "empty file", "too long"],
)
def test_training_data_that_cannot_be_used(run, config, tmp_path, text, words):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    code, _, err = run(*train_args(path, config, tmp_path / "run"))
    assert code == 2 and "Traceback" not in err
    assert all(word in err for word in words), err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 0), "steps is 0"),
        (("--minutes", 0), "--minutes is 0"),
        (("--minutes", "nan"), "--minutes is nan"),
        (("--threads", 0), "--threads is 0"),
        (("--vocab-size", 10), "vocab_size is 10"),
        (("--learning-rate", -1), "learning_rate is -1"),
        (("--head", "sparse"), "--head is 'sparse'; it must be dense or vq"),
        (("--codebook-size", 8), "--codebook-size is for --head vq"),
        (("--head", "vq", "--codebook-size", 0), "codebook_size"),
        (("--batch-tokens", 4), "no example has at most 4 tokens"),
        (("--batch-tokens", 4, "--too-long", "refuse"), "at most 4 are allowed"),
        (("--too-long", "trim"), "--too-long is 'trim'; it must be skip, cut or refuse"),
        (("--held-out", "none.jsonl"), "no such file"),
    ],
)
def test_training_options_are_checked(run, data, config, tmp_path, options, message):
    code, _, err = run(*train_args(data, config, tmp_path / "run", *options))
    assert code == 2 and message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hiden_size": 32}', "unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        ('{"hidden_size": 30, "num_attention_heads": 4}', "does not divide"),
        ('{"hidden_size": "32"}', "hidden_size"),
        ("[]", "must hold a JSON object"),
        ("{", "not readable as JSON"),
    ],
)
def test_a_config_that_cannot_be(run, data, tmp_path, text, message):
    path = tmp_path / "odd.json"
    path.write_text(text)
    code, _, err = run(*train_args(data, path, tmp_path / "run"))
    assert code == 2 and message in err and "odd.json" in err


def test_a_folder_that_cannot_be_written_is_told_before_training(run, data, config, tmp_path):
    (tmp_path / "file").write_text("")
    for output, message in (
        ("file", "is a file; a folder is needed"),
        ("file/run", "nothing can be written"),
    ):
        code, out, err = run(*train_args(data, config, tmp_path / output, "--steps", 1))
        assert code == 2 and message in err and "step" not in out


def test_a_run_is_not_overwritten(run, data, config, trained):
    before = (trained / "training.safetensors").read_bytes()
    code, _, err = run(*train_args(data, config, trained, "--steps", 2))
    assert code == 2 and "--resume" in err
    assert (trained / "training.safetensors").read_bytes() == before


def test_a_full_disk(run, data, config, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    code, _, err = run(*train_args(data, config, tmp_path / "run", "--steps", 1))
    assert code == 2 and "training.safetensors: cannot be written: No space left" in err
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"history.jsonl", "tokenizer.json"}


@pytest.mark.parametrize("kind", [MemoryError, RuntimeError, torch.OutOfMemoryError])
def test_too_little_memory(run, data, config, tmp_path, monkeypatch, kind):
    def start(*args):
        raise kind("DefaultCPUAllocator:\ncan't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("fastattn.cli._run.start", start)
    code, _, err = run(*train_args(data, config, tmp_path / "run", "--steps", 1))
    assert code == 2 and err.startswith("error: out of memory: ") and err.count("\n") == 1


def test_resuming_what_cannot_be(run, data, config, trained, tmp_path):
    def attempt(folder, source=data):
        code, _, err = run(*train_args(source, config, folder, "--resume"))
        assert code == 2 and "Traceback" not in err
        return err

    assert "no such file" in attempt(tmp_path)
    folder = shutil.copytree(trained, tmp_path / "copy")
    state = folder / "training.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 3])
    assert "half written" in attempt(folder)
    save_file(load_file(trained / "model.safetensors"), state)
    assert "not the state of a training run" in attempt(folder)
    tensors, meta = training_state.read_state(trained / "training.safetensors")
    for header in (
        5,
        meta | {"config": {"steps": []}},
        meta | {"model": meta["model"] | {"head_dim": 2**40}},
    ):
        write_tensors(state, tensors, {"fastattn_training": json.dumps(header)})
        assert str(state) in attempt(folder) or "head_dim" in attempt(folder)
    narrow = {name: t[:1] if name.endswith("proj.weight") else t for name, t in tensors.items()}
    training_state.write_state(state, narrow, meta)
    err = attempt(folder)
    assert "does not fit its own config" in err and err.count("\n") == 1
    state.write_bytes(whole)
    history = folder / "history.jsonl"
    rows = history.read_text()
    for row in ("5", "{}", '{"step": 1, "loss": 2.0, "seconds": 1}', "[" * 100_000):
        history.write_text(f"{rows}{row}\n")
        assert f"history.jsonl:{rows.count(chr(10)) + 1}" in attempt(folder)
    history.write_text(rows)
    other = tmp_path / "other.jsonl"
    other.write_text(GOOD * 30)
    assert "other data" in attempt(folder, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 7), "--steps is 7, but the run in {} has 6: leave the option out"),
        (("--seed", 3), "--seed is 3, but"),
        (("--learning-rate", 1e-3), "--learning-rate is 0.001, but the run in {} has 0.004"),
        (("--batch-tokens", 256), "--batch-tokens is 256"),
        (("--vocab-size", 290), "--vocab-size is 290, but the run in {} has 300"),
        (("--head", "vq"), "--head is vq, but the run in {} has dense"),
        (("--codebook-size", 8), "--codebook-size is 8, but the run in {} has none"),
        (("--config",), "a model of another shape"),
    ],
)
def test_a_resumed_run_keeps_its_options(run, data, config, trained, tmp_path, options, message):
    if options == ("--config",):
        other = tmp_path / "other.json"
        other.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 64}))
        options = ("--config", other)
    before = {path: path.read_bytes() for path in trained.iterdir()}
    code, out, err = run("train", "--data", data, "--output", trained, "--resume", *options)
    assert code == 2 and message.format(trained) in err and "resuming" not in out
    assert before == {path: path.read_bytes() for path in trained.iterdir()}


def test_a_resumed_run_takes_its_own_options(run, data, config, tmp_path):
    options = ["--head", "vq", "--codebook-size", 8, "--steps", 1, "--seed", 0, "--learning-rate", 4e-3]
    command = train_args(data, config, tmp_path, *options)
    assert run(*command)[0] == 0
    code, out, _ = run(*command, "--resume", "--minutes", 3)
    assert code == 0 and "--minutes planned the run's steps when it began" in out
    assert run("train", "--data", data, "--config", config, "--output", tmp_path, "--resume")[0] == 0


def test_a_terminal_gets_no_control_characters(run, trained, monkeypatch):
    text = "\x1b]0;title\x07 a\r\n\tb\x9b é"
    monkeypatch.setattr("fastattn.cli._run.respond", lambda *args, show, **options: show(text))
    assert run("generate", "--model", trained, "x")[1] == text + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    shown = run("generate", "--model", trained, "x")[1]
    assert shown == "\\x1b]0;title\\x07 a\\r\n\tb\\x9b é\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(**kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr("fastattn.cli.build_app", lambda: broken)
    with pytest.raises(TypeError):
        main(["doctor"])


def test_demo_goes_from_data_to_report(run, tiny, tmp_path, monkeypatch):
    from fastattn.cli import _run
    from fastattn.train.data import stdlib

    examples, held_out = stdlib.build()
    monkeypatch.setattr(stdlib, "build", lambda: (examples[::100], held_out[::25]))
    monkeypatch.setattr(_run, "SMALL_MODEL", tiny | {"max_position_embeddings": 256})
    folder = tmp_path / "demo-run"
    code, out, err = run("demo", "--output", folder, "--minutes", 1e-4)
    assert (code, err) == (0, "")
    assert re.search(
        r"held-out loss \d\.\d+ nats a token, -?\d\.\d+ below the untrained model's \d\.\d+", out
    )
    for part in (
        "[1/5] data",
        "[2/5] tokenizer",
        "[3/5] training",
        "[4/5] answers",
        "[5/5] report",
        "done in",
    ):
        assert part in out
    for name in (
        "train.jsonl",
        "held-out.jsonl",
        "report.html",
        "model/model.safetensors",
        "model/tokenizer.json",
    ):
        assert (folder / name).exists()
    assert "answers to held-out prompts" in (folder / "report.html").read_text().lower()
    assert (
        run("generate", "--model", folder / "model", "--max-new-tokens", 4, "What does os.stat do?")[0] == 0
    )
