"""Rows of results/*.csv: each says what machine, versions, date and command it came from."""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rarefy import environment
from rarefy.train.run_folder import write_atomically

FOLDER = Path(__file__).parent.parent / "results"

_ABOUT = ("cpu", "native_isa", "torch", "rarefy", "python")


def provenance() -> dict[str, Any]:
    """The columns that every row ends with."""
    about = environment.describe()
    command = shlex.join(["python", str(Path(sys.argv[0])), *sys.argv[1:]])
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {**{key: about[key] for key in _ABOUT}, "threads": 1, "date": date, "command": command}


def read(name: str) -> list[dict[str, str]]:
    """The rows of results/NAME.csv; none if it is not there."""
    path = FOLDER / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Replace results/NAME.csv."""
    path = FOLDER / f"{name}.csv"

    def fill(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, fill)
    return path
