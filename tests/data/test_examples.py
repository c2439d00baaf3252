"""Files of instructions and responses as people have them."""

import csv
import functools
import gzip
import io
import json

import pytest

from fastattn.train.data import records
from fastattn.train.data.examples import read_examples
from fastattn.train.data.jsonl import Example

ROWS = [
    {"instruction": "What is a list?", "response": "A mutable\nsequence, é."},
    {"instruction": "a", "response": "b"},
]
zipped = functools.partial(gzip.compress, mtime=0)  # the same bytes in every process, which names the tests
EXAMPLES = [Example(row["instruction"], row["response"]) for row in ROWS]


def lines(rows=ROWS, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def table(delimiter):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["instruction", "response"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", lines()),
        ("data", lines()),
        ("windows.jsonl", b"\xef\xbb\xbf" + lines(end="\r\n")),
        ("data.json", lines()),
        ("array.json", json.dumps(ROWS, indent=2).encode()),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("data.csv", table(",")),
        ("bom.csv", b"\xef\xbb\xbf" + table(",")),
        ("data.tsv", table("\t")),
        ("data.jsonl.gz", zipped(lines())),
        ("data.JSON.GZ", zipped(json.dumps(ROWS).encode())),
        ("data.csv.gz", zipped(table(","))),
    ],
)
def test_every_kind_of_file_gives_the_same_examples(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    read = read_examples(tmp_path / name)
    assert read.examples == EXAMPLES
    assert str(read) == "2 examples (2 with instruction and response)"
    assert all(example.where.startswith(str(tmp_path / name)) for example in read.examples)


def pyarrow_table(rows):
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra [data] is not installed")

    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow_table(ROWS), path)
    read = read_examples(path)
    assert read.examples == EXAMPLES and read.examples[1].where == f"{path}[1]"
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="not parquet"):
        read_examples(path)


def test_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="the extra [data] is not installed")
    path = tmp_path / "data.jsonl.zst"
    path.write_bytes(zstandard.compress(lines()))
    assert read_examples(path).examples == EXAMPLES


@pytest.mark.parametrize(("name", "module"), [("data.parquet", "pyarrow"), ("data.jsonl.zst", "zstandard")])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, name, module):
    monkeypatch.setattr(records.importlib.util, "find_spec", lambda name: None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        ModuleNotFoundError, match=f"{module} is not installed: pip install {module}, or the extra"
    ):
        read_examples(tmp_path / name)


def test_the_usual_fields(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [
        {"instruction": "i", "input": "more", "output": "o"},
        {"instruction": "i", "input": "", "output": "o"},
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "response": "c"},
        {"question": "q", "answer": "a", "condition": "cot"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "u"},
                {"from": "gpt", "value": "a"},
                {"from": "human", "value": "v"},
                {"from": "gpt", "value": "b"},
            ]
        },
    ]
    path.write_bytes(lines(rows))
    read = read_examples(path)
    assert read.examples == [
        Example("i\n\nmore", "o"),
        Example("i", "o"),
        Example("p", "c"),
        Example("p", "c"),
        Example("q", "a", ("cot",)),
        Example("u", "a"),
        Example("s\n\nu", "a"),
        Example("s\n\nu\n\na\n\nv", "b"),
    ]
    assert str(read).startswith("8 examples (2 with instruction and output, ")


def test_empty_responses_are_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        lines([*ROWS, {"instruction": "a", "response": " "}, {"instruction": "a", "response": None}])
    )
    read = read_examples(path)
    assert read.examples == EXAMPLES and str(read).endswith("; 2 without a response were left out")
    path.write_bytes(lines([{"instruction": "a", "response": ""}]))
    with pytest.raises(ValueError, match="holds no example with a response, in 1 rows"):
        read_examples(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", "{}".encode("utf-16"), "data.jsonl:1: is UTF-16; save the file as UTF-8"),
        ("data.csv", "a,b".encode("utf-16"), "data.csv: is UTF-16"),
        (
            "data.csv",
            b"instruction,response\na,b,c\n",
            "data.csv:2: has more cells than the first line has names",
        ),
        ("data.csv", b'instruction,response\n"a,b\n', "not CSV"),
        ("data.csv", b"a,b\n1,2\n", "data.csv:2: no instruction and response; the row has ['a', 'b']"),
        ("data.json", b"[{}, 3]", "data.json[0]: no instruction and response"),
        (
            "data.json",
            b'[{"instruction": "a", "response": "b"}, 3]',
            "data.json[1]: a JSON number; an object is needed",
        ),
        (
            "data.json",
            b"[{},\n{]",
            "not JSON: Expecting property name enclosed in double quotes (line 2, column 2)",
        ),
        ("data.jsonl.gz", zipped(lines())[:-9], "data.jsonl.gz: not whole or not gzip"),
        ("data.jsonl.gz", lines(), "data.jsonl.gz: not whole or not gzip"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_examples(tmp_path / name)
    assert message in str(caught.value)
