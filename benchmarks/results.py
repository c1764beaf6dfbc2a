"""Rows of results/*.csv: each says what machine, versions, date and command it came from."""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rarefy import environment
from rarefy._files import write_csv

FOLDER = Path(__file__).parent.parent / "results"


def commit() -> str:
    """The commit of the working tree, "-dirty" behind it where something but the results was changed.

    Where there is no git, RAREFY_COMMIT says it.
    """
    if "RAREFY_COMMIT" in os.environ:
        return os.environ["RAREFY_COMMIT"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(FOLDER.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{FOLDER.name}")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def provenance(about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The columns that every row ends with: of a run by its environment and commit, otherwise of this process."""
    columns = environment.provenance(shlex.join(["python", str(Path(sys.argv[0])), *sys.argv[1:]]), about)
    command = columns.pop("command")
    return {**columns, "commit": commit() if about is None else about["commit"], "command": command}


def processor(row: Mapping[str, Any]) -> str:
    """The processor of a row and the instructions that were used: a machine may show its guests fewer than it has."""
    isa = row["native_isa"]
    return f"{row['cpu'].removesuffix(' Processor')}, {'AVX-512' if isa.startswith('avx512') else isa.upper()}"


def read(name: str) -> list[dict[str, str]]:
    """The rows of results/NAME.csv; none if it is not there."""
    path = FOLDER / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Replace results/NAME.csv."""
    return write_csv(FOLDER / f"{name}.csv", rows)
