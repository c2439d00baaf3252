"""An instruction-response set from the documentation that comes with Python: real text, no download.

Every public function, class, method, property and module of the standard library on this machine is asked
about in a few ways; the answers are its own docstring and signature.
"""

import collections
import contextlib
import hashlib
import importlib
import inspect
import io
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fastattn.train.data.jsonl import Example

# Importing these opens windows or browsers, touches the terminal, or brings only other modules' objects.
_SKIPPED = {
    *("antigravity", "this", "idlelib", "turtledemo", "turtle", "tkinter", "readline", "rlcompleter"),
    *("lib2to3", "test", "distutils", "ensurepip", "pydoc_data", "msilib"),
    *("posix", "nt", "posixpath", "ntpath", "genericpath", "sre_compile", "sre_constants", "sre_parse"),
}
_SKIPPED_PACKAGES = {"encodings"}  # their submodules are generated tables

_DESCRIBE = {
    "module": ("What is the module {name} for?", "Describe the module {name}.", "Why would I import {name}?"),
    "class": ("What is {name}?", "Describe the class {name}.", "What is {name} for?"),
    "exception": ("When is {name} raised?", "What does the exception {name} mean?", "Describe {name}."),
    "property": ("What is {name}?", "Describe the property {name}.", "What does {name} hold?"),
    "function": ("What does {name} do?", "Describe the function {name}.", "Explain {name} in a few words."),
    "method": ("What does {name} do?", "Describe the method {name}.", "Explain {name} in a few words."),
}
_SIGNATURE = ("Give the signature of {name}.", "How is {name} called?", "Show me how to call {name}.")
_ARGUMENTS = ("What arguments does {name} take?", "Which arguments do I pass to {name}?")
_KIND = ("What kind of object is {name}?", "Is {name} a function, a method or a class?")
_MODULE = ("Which module has {short}?", "Where do I find {short}?", "What do I import to use {short}?")

_LONGEST_SUMMARY = 240
_LONGEST_SIGNATURE = 90


class Documented(NamedTuple):
    """A public object of the standard library and what is written about it."""

    name: str  # as one writes it: os.path.join, str.split
    kind: str  # a key of _DESCRIBE
    module: str
    summary: str  # one line; "" where nothing usable is written
    signature: inspect.Signature | None  # without self and without annotations


def build(held_out: float = 0.05) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples), the same on every run of one Python.

    The split is by what is written: objects that share a docstring fall on the same side, so no held-out
    object and no held-out description was trained on. `held_out` is the fraction of objects kept back.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"fastattn.train.data.stdlib: held_out is {held_out}; it must be between 0 and 1")
    items = documented()
    namesakes = collections.Counter(_short(item) for item in items)
    train, test, seen = [], [], set()
    for item in items:
        side = test if _fraction(item.summary or item.name, "split") < held_out else train
        for example in examples_of(item, unique=namesakes[_short(item)] == 1):
            if example.instruction not in seen:
                seen.add(example.instruction)
                side.append(example)
    return train, test


def examples_of(item: Documented, unique: bool = True) -> list[Example]:
    """What is asked about one object; phrasings are chosen by its name.

    `unique`: no other object's last name is the same, so that "where is it" has one answer.
    """
    out = []

    def ask(phrasings: tuple[str, ...], answer: str, how_many: int = 1) -> None:
        first = int(_fraction(item.name, phrasings[0]) * len(phrasings))
        for i in range(how_many):
            text = phrasings[(first + i) % len(phrasings)]
            out.append(Example(text.format(name=item.name, short=_short(item)), answer))

    if item.summary:
        ask(_DESCRIBE[item.kind], item.summary, how_many=2)
    if item.signature is not None and item.kind in ("function", "method"):
        call = f"{_short(item)}{item.signature}"
        if len(call) <= _LONGEST_SIGNATURE:
            ask(_SIGNATURE, call)
            ask(_ARGUMENTS, _arguments(item.signature))
    if item.kind == "method":
        ask(_KIND, f"It is a method of the class {item.name.split('.')[-2]}.")
    elif item.kind != "module":
        ask(_KIND, f"It is {'an' if item.kind == 'exception' else 'a'} {item.kind}.")
    if unique and item.kind in ("function", "class", "exception"):
        ask(
            _MODULE, "It is built in." if item.module == "builtins" else f"It is in the module {item.module}."
        )
    return out


def documented() -> list[Documented]:
    """Every public object that the standard library of this Python holds, by name."""
    found: dict[int, tuple[str, str, object]] = {}  # id -> (name, module, object): an object counts once
    items = {}
    for module_name, module in _modules():
        items[module_name] = Documented(module_name, "module", module_name, summary_of(module.__doc__), None)
        for name, value in _members(module_name, module):
            known = found.get(id(value))
            if known is None or (name.count("."), len(name)) < (known[0].count("."), len(known[0])):
                found[id(value)] = (name, module_name, value)
    for name, module_name, value in found.values():
        item = _document(name, module_name, value)
        if item is not None:
            items.setdefault(name, item)
    return [items[name] for name in sorted(items)]


def summary_of(doc: object) -> str:
    """The first whole sentences of a docstring's first paragraph of prose, on one line; "" if it has none."""
    if not isinstance(doc, str):
        return ""
    for paragraph in inspect.cleandoc(doc).split("\n\n")[:3]:
        lines = paragraph.split("\n")
        while lines and _looks_like_a_call(lines[0]):
            lines = lines[1:]
        text = " ".join(" ".join(lines).split())
        if len(text) > _LONGEST_SUMMARY:
            end = max(text.rfind(mark, 0, _LONGEST_SUMMARY) for mark in (". ", "; "))
            text = text[: end + 1].rstrip(";") if end > 0 else ""
        words = re.findall(r"[A-Za-z]{2,}", text)
        odd = sum(not (c.isalnum() or c in " .,;:'\"()-_`/") for c in text)
        if len(words) >= 3 and odd <= 3 and text.isascii():
            text = text[0].upper() + text[1:]
            return text if text[-1] in ".!?:)" else text + "."
    return ""


def _short(item: Documented) -> str:
    return item.name.split(".")[-1]


def _looks_like_a_call(line: str) -> bool:
    return bool(re.match(r"\s*[\w.]+\(.*\)?\s*(->.*)?$", line)) or "->" in line or "<" in line


def _modules() -> Iterator[tuple[str, types.ModuleType]]:
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in _SKIPPED:
            continue
        module = _import(name)
        if module is None:
            continue
        yield name, module
        if name == "os":
            yield "os.path", module.path
        if name in _SKIPPED_PACKAGES:
            continue
        for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
            if not info.name.startswith("_") and info.name not in ("test", "tests"):
                submodule = _import(f"{name}.{info.name}")
                if submodule is not None:
                    yield submodule.__name__, submodule


def _import(name: str) -> types.ModuleType | None:
    # Modules of other platforms fail to import in ways of their own.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
    return None


def _members(module_name: str, module: types.ModuleType) -> Iterator[tuple[str, object]]:
    exported = set(getattr(module, "__all__", ()))
    prefix = "" if module_name == "builtins" else module_name + "."
    for name, value in vars(module).items():
        if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        home = getattr(value, "__module__", None)
        if name not in exported and home not in (module_name, f"_{module_name}"):
            continue
        if getattr(value, "__name__", name) != name:
            continue  # an alias kept for old callers
        yield prefix + name, value
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                kinds = (property, classmethod, staticmethod)
                if not attribute.startswith("_") and (inspect.isroutine(member) or isinstance(member, kinds)):
                    yield f"{prefix}{name}.{attribute}", member


def _document(name: str, module: str, value: object) -> Documented | None:
    if inspect.isclass(value):
        kind = "exception" if issubclass(value, BaseException) else "class"
        return Documented(name, kind, module, summary_of(value.__dict__.get("__doc__")), None)
    if isinstance(value, property):
        summary = summary_of(value.__doc__)
        return Documented(name, "property", module, summary, None) if summary else None
    function: Callable = getattr(value, "__func__", value)
    inside = 1 if module == "builtins" else module.count(".") + 2
    kind = "method" if name.count(".") >= inside else "function"
    signature = _signature(function, drop_first=kind == "method" and not isinstance(value, staticmethod))
    return Documented(name, kind, module, summary_of(function.__doc__), signature)


def _signature(function: Callable, drop_first: bool) -> inspect.Signature | None:
    try:
        signature = inspect.signature(function)
    except Exception:  # besides ValueError and TypeError: whatever a default written in C evaluates to
        return None
    parameters = list(signature.parameters.values())
    if drop_first and parameters and parameters[0].name in ("self", "cls", "$self", "type"):
        parameters = parameters[1:]
    parameters = [p.replace(annotation=p.empty) for p in parameters]
    signature = inspect.Signature(parameters, __validate_parameters__=False)
    # A default's repr may hold an address, which differs from run to run.
    return None if "<" in str(signature) else signature


def _arguments(signature: inspect.Signature) -> str:
    parameters = list(signature.parameters.values())
    if not parameters:
        return "It takes no arguments."
    required, optional = [], []
    for p in parameters:
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        (optional if stars or p.default is not p.empty else required).append(stars + p.name)
    if not required:
        return f"It takes no required arguments; {_listed(optional)} {_are(optional)} optional."
    text = f"It takes {_listed(required)}"
    return text + (f"; {_listed(optional)} {_are(optional)} optional." if optional else ".")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _fraction(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(f"{salt}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
