"""Whatever is kept between calls is in docs/caches.md, with what makes it safe."""

import ast
import re
from pathlib import Path

import pytest

import fastattn

PACKAGE = Path(fastattn.__file__).parent
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "autotune" not in p.parts)
ROWS = (Path(__file__).parents[1] / "docs" / "caches.md").read_text()
KEEPERS = {"cache", "lru_cache", "cached_property", "remembered"}
CONTAINERS = {
    "dict",
    "list",
    "set",
    "OrderedDict",
    "defaultdict",
    "deque",
    "ContentsCache",
    "WeakKeyDictionary",
}
# modules whose variables say how to compute, and what was declared: no result of a call
SETTINGS = {"runtime/arithmetic.py"}


def last_name(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def is_container(value: ast.expr | None) -> bool:
    """Whether a value begins empty and can be filled."""
    if isinstance(value, ast.Dict):
        return not value.keys
    if isinstance(value, ast.List):
        return not value.elts
    return isinstance(value, ast.Call) and last_name(value) in CONTAINERS


def kept_by(source: str) -> list[str]:
    """What a module keeps: remembered functions, containers that it fills, variables that its functions set."""
    tree, found = ast.parse(source), []
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and is_container(node.value):
            found.append(ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and KEEPERS & set(map(last_name, node.decorator_list)):
            found.append(node.name)
        if isinstance(node, ast.Global):
            found += node.names
    return found


def listed() -> set[str]:
    """Modules in the table's second column, where a name without a folder has that of the name before it or is of `runtime`."""
    found, folder = set(), ""
    for row in re.findall(r"^\|[^|]*\|([^|]*)\|", ROWS, re.MULTILINE):
        for name in re.findall(r"`([\w/]+\.py)`", row):
            folder = name.rpartition("/")[0] if "/" in name else folder
            found |= {name, f"{folder}/{name}"}
        folder = ""
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_what_a_module_keeps_is_listed(path):
    name = path.relative_to(PACKAGE).as_posix()
    kept = kept_by(path.read_text())
    assert not kept or name in listed() | SETTINGS, (
        f"{name} keeps {kept}: say in docs/caches.md why that is safe"
    )


def test_modules_that_are_listed_are_there():
    names = {
        name for name in re.findall(r"`([\w/]+\.py)`", ROWS) if "/" in name and not name.startswith("tests/")
    }
    assert names and all((PACKAGE / name).exists() for name in names)


def test_caches_are_recognised():
    source = "a = {}\nb: list[int] = []\n@functools.lru_cache(maxsize=None)\ndef c(): pass\ndef d():\n    global e\n"
    assert kept_by(source) == ["a", "b", "c", "e"] and not kept_by("a = {1: 2}\nb = ()\ndef c(): d = {}")
