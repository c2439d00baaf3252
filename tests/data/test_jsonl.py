"""What a reader of instruction-response files refuses, and how it says so."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn.runtime import files as _files
from fastattn.train.data.examples import read_examples
from fastattn.train.data.jsonl import Example, write_jsonl


def read_jsonl(path):
    return read_examples(path).examples


GOOD = '{"instruction": "What is a list?", "response": "A mutable sequence."}\n'


def test_reads_in_order_and_leaves_other_fields_alone(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD + "\n" + '{"response": "b", "instruction": "a", "source": 3}\n')
    assert read_jsonl(path) == [Example("What is a list?", "A mutable sequence."), Example("a", "b")]


text = st.text(min_size=1).filter(lambda s: s.strip() and not any(0xD800 <= ord(c) < 0xE000 for c in s))


@given(st.lists(st.builds(Example, text, text), min_size=1, max_size=5))
def test_round_trip(tmp_path_factory, examples):
    path = tmp_path_factory.mktemp("jsonl") / "data.jsonl"
    write_jsonl(path, examples)
    assert read_jsonl(path) == examples


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a", "response": ', "not JSON"),
        ("[" * 100_000, "not JSON: nested too deep"),
        ('{"instruction": "\\ud800", "response": "b"}', "field 'instruction' holds half of a surrogate pair"),
        ("[1, 2]", "a JSON array; an object is needed"),
        ("3", "a JSON number"),
        ('{"instruction": "a"}', "field 'response' is missing"),
        ('{"response": "a"}', "no instruction and response; the row has ['response'], expected"),
        ('{"prompt": "a"}', "field 'completion' is missing"),
        ('{"instruction": " \\n", "response": "b"}', "field 'instruction' is empty"),
        ('{"instruction": ["a"], "response": "b"}', "field 'instruction' holds a JSON array; text is needed"),
        ('{"instruction": "a", "response": 3}', "field 'response' holds a JSON number"),
        ('{"messages": "a"}', "field 'messages' holds a JSON string; a list of objects is needed"),
        (
            '{"messages": [{"role": "tool", "content": "b"}]}',
            "messages[0] has role 'tool'; allowed are user, human",
        ),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', "messages[0] answers nothing"),
        (
            '{"conversations": [{"from": "human", "value": 3}]}',
            "field 'conversations[0].value' holds a JSON number",
        ),
        ('{"instruction": "a", "response": true}', "field 'response' holds a JSON boolean"),
        (b'{"instruction": "\xff", "response": "b"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(GOOD.encode() + b"\n" + line + b"\n" + GOOD.encode())
    with pytest.raises(ValueError) as caught:
        read_jsonl(path)
    assert f"{path}:3: " in str(caught.value)
    assert message in str(caught.value)


def test_input_and_condition(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [
        {"instruction": "a", "response": "b", "input": "c", "condition": "cot"},
        {"instruction": "a", "response": "b", "input": "", "condition": ["<|synth|>", "cot "]},
        {"instruction": "a", "response": "b", "input": None, "condition": None},
        {"instruction": "a", "response": "b", "condition": "synth, cot"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    examples = read_jsonl(path)
    assert examples == [
        Example("a\n\nc", "b", ("cot",)),
        Example("a", "b", ("<|synth|>", "cot")),
        Example("a", "b"),
        Example("a", "b", ("synth", "cot")),
    ]
    assert [example.where for example in examples] == [f"{path}:{n}" for n in (1, 2, 3, 4)]
    write_jsonl(path, examples)
    assert read_jsonl(path) == examples
    for field, value, message in (
        ("input", 3, "'input' holds a JSON number"),
        ("condition", {"a": 1}, "'condition' must be a tag"),
        ("condition", ["a", ""], "'condition' must be a tag"),
        ("input", "\ud800", "'input' holds half of a surrogate pair"),
        ("condition", "\ud800", "'condition' holds half of a surrogate pair"),
    ):
        path.write_text(json.dumps({"instruction": "a", "response": "b", field: value}))
        with pytest.raises(ValueError, match=f":1: field {message}"):
            read_jsonl(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_with_no_example(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="holds no example"):
        read_jsonl(path)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        read_jsonl(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [Example("a", "b")])

    def broken():
        yield Example("c", "d")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, broken())
    assert read_jsonl(path) == [Example("a", "b")]

    def no_rename(*args):
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError, match="disk gone"):
        _files.write_text(path, "{}")
    assert read_jsonl(path) == [Example("a", "b")]
    assert os.listdir(tmp_path) == ["data.jsonl"]  # no temporary file stays


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a file is needed"):
        _files.write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo() and list(tmp_path.iterdir()) == [tmp_path / "pipe"]


def test_the_written_file_has_ordinary_permissions(tmp_path):
    path = tmp_path / "a.json"
    _files.write_text(path, json.dumps({}))
    plain = tmp_path / "b.json"
    plain.write_text("{}")
    assert path.stat().st_mode == plain.stat().st_mode
