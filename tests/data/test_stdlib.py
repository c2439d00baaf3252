"""The set built from Python's own documentation."""

import inspect

import pytest

from fastattn.train.data import stdlib
from fastattn.train.data.stdlib import Documented, examples_of, summary_of


@pytest.fixture(scope="module")
def built():
    return stdlib.build()


def test_size_and_shape(built):
    train, held_out = built
    assert len(train) > 15_000
    assert 0.02 < len(held_out) / len(train) < 0.10
    for example in train + held_out:
        instruction, response = example.instruction, example.response
        assert instruction.strip() and response.strip()
        assert "\n" not in instruction + response
        assert " at 0x" not in response  # an address differs from run to run


def test_held_out_objects_are_unseen(built):
    train, held_out = built
    assert not {e.instruction for e in train} & {e.instruction for e in held_out}
    described = (e for e in train if e.instruction.startswith("Describe"))
    descriptions = {e.response for e in described if len(e.response) > 60}
    assert not descriptions & {e.response for e in held_out}


def test_it_is_the_same_every_time(built):
    assert stdlib.build() == built


def test_it_tells_the_truth(built):
    answers = {e.instruction: e.response for e in built[0] + built[1]}

    def said(phrasings, name):
        return {answers[q] for q in (text.format(name=name) for text in phrasings) if q in answers}

    assert said(stdlib._DESCRIBE["function"], "os.path.join") == {
        answers["Describe the function os.path.join."]
    }
    assert answers["Describe the function os.path.join."].startswith("Join two or more pathname components")
    assert said(stdlib._SIGNATURE, "shutil.copyfile") == {"copyfile(src, dst, *, follow_symlinks=True)"}


def test_questions_about_one_object():
    def f(a, b, *rest, c=1, **kw): ...

    item = Documented("m.f", "function", "m", "Do a thing.", inspect.signature(f))
    answers = {e.response for e in examples_of(item)}
    assert answers == {
        "Do a thing.",
        "f(a, b, *rest, c=1, **kw)",
        "It takes a and b; *rest, c and **kw are optional.",
        "It is a function.",
        "It is in the module m.",
    }
    assert "It is in the module m." not in {e.response for e in examples_of(item, unique=False)}


@pytest.mark.parametrize(
    ("doc", "summary"),
    [
        (None, ""),
        ("", ""),
        ("x", ""),
        ("join(a, *p) -> str\n\nJoin the\n  parts of a path", "Join the parts of a path."),
        ("S.find(sub) -> int\nreturn the lowest index.", "Return the lowest index."),
        ("Open a file. " + "It is long and goes on. " * 20, None),
        ("+---+---+\n| a | b |", ""),
        ("word " * 200, ""),
    ],
)
def test_summaries(doc, summary):
    found = summary_of(doc)
    if summary is None:
        assert found.startswith("Open a file. It is long") and found.endswith(".") and len(found) <= 240
    else:
        assert found == summary


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_a_held_out_fraction_that_is_none(fraction):
    with pytest.raises(ValueError, match="held_out"):
        stdlib.build(fraction)
