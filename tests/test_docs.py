"""The Python of README.md, of the pages in docs/ and of docstrings runs, and the pages' links lead somewhere."""

import doctest
import functools
import re
from pathlib import Path

import pytest
import torch

import fastattn

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
WITH_PYTHON = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.fixture(autouse=True)
def as_a_reader(monkeypatch):
    """What a block leaves behind goes with it, and what it would download or compile for long is small."""
    transformers = pytest.importorskip("transformers")
    tiny = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )

    def pretrained(name, *, attn_implementation):
        return transformers.AutoModelForCausalLM.from_config(tiny, attn_implementation=attn_implementation)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", pretrained)
    functional = torch.nn.functional
    monkeypatch.setattr(functional, "scaled_dot_product_attention", functional.scaled_dot_product_attention)
    # tracing is what the ops take part in; inductor's code for the rest takes a compiler half a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_blocks_run_in_order(page):
    text = page.read_text(encoding="utf-8")
    names = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), names)


FUNCTIONS = [name for name in fastattn.__all__ if callable(getattr(fastattn, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_of_docstrings_run(name):
    names = {"torch": torch, "fastattn": fastattn}
    finder = doctest.DocTestFinder(recurse=False)
    for example in finder.find(getattr(fastattn, name), name, module=False, globs=names):
        assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
