"""Build the kernel package in the layout of Hugging Face's ``kernels``: ``python kernels/activation/build.py``.

It writes ``build/VARIANT/`` beside this file: ``torch-ext/activation`` and, since who loads a kernel has no rarefy,
what ``rarefy.act`` needs of it, with the native library, under a name that is made of the contents. Nothing there
depends on PyTorch's ABI, so that one variant serves every PyTorch from 2.10 on. Nothing is published.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shutil
from pathlib import Path

from rarefy import kernels

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "src" / "rarefy"
PARTS = ("act", "kernels", "_files.py")
INIT = '"""What the activations need of rarefy."""\n\nfrom rarefy import act, kernels\n\n__all__ = ["act", "kernels"]\n'
NAMED = re.compile(r"\brarefy\b(?=\.|::| import\b)")  # in imports, names of operators and of packages


def files(library: Path) -> dict[str, bytes]:
    """Return the files of rarefy that go along, by their path; those in Python as they are in the source."""
    found = {"__init__.py": INIT.encode(), f"kernels/{library.name}": library.read_bytes()}
    for part in PARTS:
        root = SOURCE / part
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if path.suffix in (".py", ".json"):
                found[str(path.relative_to(SOURCE))] = path.read_bytes()
    return found


def build(folder: Path) -> Path:
    """Write this machine's variant into a folder and return its path; raises FileNotFoundError without a library."""
    library = kernels.library_path()
    if library is None:
        raise FileNotFoundError("the kernel package holds rarefy's native library, and there is none: run make setup")
    found = files(library)
    digest = hashlib.sha256(b"".join(name.encode() + data for name, data in sorted(found.items()))).hexdigest()[:12]
    name = f"rarefy_{digest}"
    variant = folder / f"torch-stable-abi210-cpu-{platform.machine()}-{platform.system().lower()}"
    shutil.rmtree(variant, ignore_errors=True)
    shutil.copytree(HERE / "torch-ext" / "activation", variant, ignore=shutil.ignore_patterns("__pycache__"))
    for path, data in found.items():
        target = variant / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(NAMED.sub(name, data.decode()).encode() if path.endswith(".py") else data)
    metadata = {
        "name": "activation",
        "id": f"_activation_cpu_{digest}",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE / "build", help="where the variant goes")
    print(build(parser.parse_args().folder))
