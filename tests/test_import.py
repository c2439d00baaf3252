"""`import fastattn` in a clone's root, where the folder `fastattn` is source and first on the path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fastattn.autotune import space

import fastattn as fa

ROOT = Path(__file__).parents[1]
CALL = """
import torch, fastattn, fastattn.autotune.space
fastattn.rms_norm(torch.ones(2, 8))
print(fastattn.rms_norm.__code__.co_filename, fastattn.autotune.space.__file__, sep="\\n")
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The Python sources alone, as git has them."""
    if not (ROOT / "autotune" / "__init__.py").exists():
        pytest.skip("the sources are not here")
    root = tmp_path_factory.mktemp("clone")
    for name in ("fastattn", "autotune"):
        shutil.copytree(
            ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "autotune", "__pycache__")
        )
    return root


def run(folder, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_installed_package_is_imported(clone):
    done = run(clone, "-c", CALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [fa.rms_norm.__code__.co_filename, space.__file__]


def test_modules_run_as_commands(clone):
    done = run(clone, "-m", "fastattn.cli", "--help")
    assert done.returncode == 0 and "doctor" in done.stdout, done.stderr


def test_without_an_installed_package_one_sentence_says_what_to_do(clone):
    done = run(clone, "-S", "-c", "import fastattn", PYTHONPATH="")
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: fastattn: ") and f"run `pip install .` in {clone}" in message


def test_the_installed_package_says_that_it_has_types():
    assert (Path(fa.__file__).parent / "py.typed").exists()
