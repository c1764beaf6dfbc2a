"""The folder of a run: whole files replaced atomically, metrics appended a line at a time."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it: readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class RunFolder:
    """Where a run keeps what it did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace the file ``name``."""
        write_atomically(self.path / name, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))

    def write_yaml(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace the file ``name``."""
        write_atomically(self.path / name, lambda p: p.write_text(yaml.safe_dump(dict(content), sort_keys=False)))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record to the metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The metrics so far; a last line cut off by a crash is left out."""
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, step: int) -> None:
        """Forget the metrics of steps after ``step``: a resumed run writes them again."""
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        write_atomically(self.metrics, lambda p: p.write_text("".join(kept)))

    def checkpoint(self, name: str) -> Path:
        """Path of the checkpoint of this name ("last", "best")."""
        return self.path / "checkpoints" / f"{name}.pt"

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Replace a checkpoint."""
        write_atomically(self.checkpoint(name), lambda p: torch.save(dict(state), p))

    def load(self, name: str) -> dict[str, Any] | None:
        """A checkpoint, on the CPU; None if there is none."""
        path = self.checkpoint(name)
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
