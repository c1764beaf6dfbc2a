"""One training run as a process of its own, kept when finished and resumed when not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results
from rarefy._files import write_atomically

RECIPE = Path(__file__).parent.parent / "recipes" / "fashion-mnist.yaml"


#: What stands before the arguments of ``rarefy train``.
TRAIN = ("-m", "rarefy.cli", "train")


def run(folder: Path, changes: Sequence[str], program: Sequence[str] = TRAIN) -> dict[str, Any]:
    """The summary of recipes/fashion-mnist.yaml with these changes, trained into ``folder`` unless it is there."""
    summary = folder / "summary.json"
    if not summary.exists():
        command = [sys.executable, *program, str(RECIPE), "--run", str(folder), "--json"]
        command += [part for change in changes for part in ("--set", change)]
        resume = ["--resume"] if (folder / "checkpoints" / "last.pt").exists() else []
        subprocess.run([*command, *resume], check=True, stdout=subprocess.DEVNULL)
        about = {**json.loads((folder / "environment.json").read_text()), "commit": results.commit()}
        write_atomically(folder / "about.json", lambda path: path.write_text(json.dumps(about)))
    content: dict[str, Any] = json.loads(summary.read_text())
    return content


def provenance(folder: Path) -> dict[str, Any]:
    """The columns of a finished run's row that say where it came from."""
    return results.provenance(json.loads((folder / "about.json").read_text()))
