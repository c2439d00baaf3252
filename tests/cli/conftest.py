"""A data file and a model small enough that a run takes a second."""

import json

import pytest
import torch

from fastattn.cli import main
from fastattn.train.data.jsonl import Example, write_jsonl

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys):
    """Runs `fastattn ARGS...`; returns (exit code, stdout, stderr)."""

    def call(*args):
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return call


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    words = ["list", "tuple", "dict", "set", "str", "bytes", "int", "float"]
    write_jsonl(path, [Example(f"What is {w}{n}?", f"A {w} of {n} parts.") for w in words for n in range(10)])
    return path


@pytest.fixture
def tiny():
    """HrmTextConfig keys of a model that trains in a moment."""
    return dict(TINY)


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "model.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data, config):
    """A folder that `fastattn train` made."""
    folder = tmp_path_factory.mktemp("run") / "model"
    options = ["--vocab-size", "300", "--batch-tokens", "128", "--steps", "6", "--config", str(config)]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--data", str(data), "--output", str(folder), *options])
    assert not ended.value.code
    return folder
