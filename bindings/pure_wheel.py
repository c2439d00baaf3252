"""Makes the wheel for any platform, in which plain torch and Triton serve: `python bindings/pure_wheel.py WHEEL FOLDER`.

WHEEL: a wheel of this machine, whose fastattn is installed for the Python that runs this. The new wheel holds the same Python;
in place of the compiled module it has `pure/_core.py` and the facts that the compiled one states.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fastattn import _core


def main(wheel: str, folder: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        _wheel("unpack", wheel, "--dest", place)
        (root,) = Path(place).iterdir()
        package = root / "fastattn"
        without_kernels(package)
        shutil.rmtree(root / "fastattn.libs", ignore_errors=True)
        (info,) = root.glob("*.dist-info/WHEEL")
        text = re.sub(r"(?m)^Tag: .*\n", "", info.read_text()).rstrip()
        text = text.replace("Root-Is-Purelib: false", "Root-Is-Purelib: true")
        info.write_text(f"{text}\nTag: py3-none-any\n")
        _wheel("pack", str(root), "--dest-dir", folder)


def without_kernels(package: Path) -> None:
    """Puts the stand-in into a copy of the package, in place of the compiled module."""
    for compiled in package.glob("_core*"):
        compiled.unlink()
    shutil.copy(Path(__file__).parent / "pure" / "_core.py", package)
    facts = {
        "limits": {name: value for name, value in vars(_core.limits).items() if not name.startswith("_")},
        "fields": _core.fields,
        "score_ops": _core.score_ops,
    }
    (package / "_core.json").write_text(json.dumps(facts))


def _wheel(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "wheel", *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
