"""Each study in examples/ from its first step to its table and pictures, tiny; and the documents they feed."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # not installed

import _common
import focus_retrofit
import hierarchy
import length_extrapolation
import versatile_ffn
import vq_head

from fastattn.train.data import stdlib
from fastattn.train.data.jsonl import Example

DECODER = {"width": 32, "heads": 2, "layers": 1}
HRM_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}
STUDIES = {
    "vq_head": (vq_head, HRM_TEXT, {"vq_head_loss"}),
    "length_extrapolation": (length_extrapolation, DECODER, {"length_extrapolation"}),
    "focus_retrofit": (focus_retrofit, DECODER, {"focus_retrofit"}),
    "hierarchy": (
        hierarchy,
        {"hidden_size": 16, "num_heads": 2, "intermediate_size": 16},
        {"hierarchy", "hierarchy_time"},
    ),
}


@pytest.fixture(autouse=True)
def small_text(monkeypatch):
    """A text of a few thousand tokens, and fewer heads to try on it."""
    words = ["list", "tuple", "dict", "set", "str", "bytes", "int", "float"]

    def build():
        made = [Example(f"What is {w}{n}?", f"A {w} of {n} parts.") for n in range(60) for w in words]
        return made[:-40], made[-40:] * 2

    monkeypatch.setattr(stdlib, "build", build)
    monkeypatch.setattr(vq_head, "SIZES", (16,))
    monkeypatch.setattr(length_extrapolation, "LENGTHS", (32, 64))
    monkeypatch.setattr(focus_retrofit, "LENGTH", 64)
    monkeypatch.setattr(focus_retrofit, "WINDOW", 4)
    for name, value in {"PUZZLES": 8, "HELD_OUT": 4, "BATCH": 4, "SEEDS": 2, "POINTS": 2}.items():
        monkeypatch.setattr(hierarchy, name, value)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_stops_and_goes_on(name, tmp_path, capsys):
    module, shape, drawings = STUDIES[name]
    threads = torch.get_num_threads()
    options = ["--steps", "2", "--output", str(tmp_path), "--threads", "1"]
    try:
        with pytest.raises(SystemExit, match="goes on from here"):
            module.main([*options, "--minutes", "1e-9"], shape)
        whole = module.main(options, shape)
        again = module.main(options, shape)
    finally:
        torch.set_num_threads(threads)
    assert again.runs == whole.runs == json.loads((tmp_path / f"{name}.json").read_text())["runs"]
    assert module.table(whole.runs) in capsys.readouterr().out
    assert {path.stem for path in tmp_path.glob("*.svg")} == drawings
    with pytest.raises(SystemExit, match="remove it, or give another --output"):
        module.main([*options[2:], "--steps", "3"], shape)


def test_the_kinds_of_attention_differ(tmp_path):
    threads = torch.get_num_threads()
    study = length_extrapolation.main(["--steps", "1", "--output", str(tmp_path), "--threads", "1"], DECODER)
    torch.set_num_threads(threads)
    losses = [run["64"] for run in study.runs.values()]
    assert len(set(losses)) == len(losses) == 5


def test_the_versatile_layer_trains(capsys):
    threads = torch.get_num_threads()
    losses = versatile_ffn.main(["--steps", "2", "--threads", "1"], {"width": 16, "heads": 2, "layers": 1})
    torch.set_num_threads(threads)
    assert set(losses) == {"Plain", "VersatileFFN"} and "after 2 steps" in capsys.readouterr().out


def test_kept_pairs_are_those_that_grouped_attention_attends():
    signature = torch.tensor([[1, 2, 1, 3, 4, 1, 2, 0, 1]])
    window, length = focus_retrofit.WINDOW, signature.shape[1]
    groups = signature[0].tolist()
    kept = sum(i - j <= window or groups[i] & groups[j] != 0 for i in range(length) for j in range(i + 1)) / (
        length * (length + 1) / 2
    )
    assert focus_retrofit.kept_pairs(signature) == pytest.approx(kept)


def test_windows_and_chunks_are_pieces_of_the_stream():
    stream = torch.arange(100)
    for piece in next(_common.windows(stream, 10, 4, seed=0)):
        assert torch.equal(piece, torch.arange(11) + piece[0])
    pieces = _common.chunks(stream, 8, 32)
    assert torch.equal(pieces[:, :-1].flatten(), stream[:32]) and pieces.shape == (4, 9)


@pytest.mark.parametrize("name", STUDIES)
def test_the_document_holds_the_table_of_its_results(name, monkeypatch):
    module, _, drawings = STUDIES[name]
    monkeypatch.undo()
    runs = json.loads((_common.DOCS / f"{name}.json").read_text())["runs"]
    page = (_common.DOCS / f"{name}.md").read_text()
    assert _common.with_table(page, module.table(runs)) == page
    for drawing in drawings:
        assert f"({drawing}.svg)" in page
        assert (_common.DOCS / f"{drawing}.svg").stat().st_size < 100_000
