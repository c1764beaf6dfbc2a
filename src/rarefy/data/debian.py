"""Debian's packages as a source of data: fetched by apt-get, which needs no root, and kept for the next time."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run(command: Sequence[str], folder: Path) -> bytes:
    """Run a command in a folder; gives what it writes.

    Raises FileNotFoundError, saying what it said, for one that is not on this machine or that fails.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{command[0]} is not on this machine: the data set is built on Debian") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise FileNotFoundError(f"{' '.join(command[:6])} ... failed, so the data set has no source: {said}")
    return done.stdout


def apt(folder: Path, languages: str = "none") -> list[str]:
    """Give the beginning of an apt-get command with lists of packages of its own, in ``folder``."""
    for each in (folder / "lists" / "partial", folder / "cache"):
        each.mkdir(parents=True, exist_ok=True)
    # As root, apt would hand the download to a user who cannot write into a private folder; for others nothing changes.
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "-o", f"Dir::State::lists={(folder / 'lists').resolve()}"]
    return [*command, "-o", f"Dir::Cache={(folder / 'cache').resolve()}", "-o", f"Acquire::Languages={languages}"]


def found(folder: Path) -> dict[str, Path]:
    """Give the packages in the folder, by name; of several versions the last in order."""
    return {path.name.split("_")[0]: path for path in sorted(folder.glob("*.deb"))}


def require(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Give these packages. Raises FileNotFoundError with the names of those that the folder lacks."""
    have = found(folder)
    missing = [name for name in names if name not in have]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the packages {', '.join(missing)}")
    return {name: have[name] for name in names}


def sha256(path: Path) -> str:
    """Give the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
