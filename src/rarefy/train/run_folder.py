"""The folder of a run: whole files replaced atomically, metrics appended a line at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
import yaml
from torch import Tensor

from rarefy._files import write_atomically, write_through
from rarefy._json import Fields, read_fields, read_lines

#: The file of a finished model, and that which tells what a run learns from.
MODEL, ABOUT = "model.safetensors", "data.json"

#: What a checkpoint holds, and of what type.
_STATE: dict[str, Any] = {
    "step": int,
    "total_steps": int,
    "processes": int,
    "seconds": float,
    "seconds_saved": float | None,
    "best": float | None,
    "losses": Tensor,
    "recipe": dict,
    "model": dict,
    "optimizer": dict,
    "sparsifier": dict | None,
    "scaler": dict | None,
    "average": dict | None,
}

_DELETE = "delete that line to go on without it"


@dataclass(frozen=True)
class _Logged:
    """What a record of the metrics must say of a layer, since the training's FLOPs are counted from it."""

    name: str
    density: float
    weight_grad_density: float


class RunFolder:
    """Where a run keeps what it did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"

    @contextmanager
    def held(self, *, new: bool) -> Iterator[None]:
        """Within it no other process of this machine trains here; ``new`` where a run begins.

        Raises BlockingIOError where one does, FileExistsError where a new run finds another's checkpoint.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                reason = "another process trains in this folder: wait for it, or name another"
                raise BlockingIOError(error.errno, reason, str(self.path)) from None
            except OSError:
                pass  # not every file system has locks
            if new and self.checkpoint("last").exists():
                raise FileExistsError(
                    errno.EEXIST, "it holds a run already: resume it, or name another folder", str(self.path)
                )
            yield
        finally:
            os.close(folder)

    def summary(self) -> dict[str, Any] | None:
        """What a finished run came to; None for one that has not finished, or of which a file is lost."""
        if not (self.path / MODEL).is_file():
            return None
        try:
            found = dict(read_fields(self.path / "summary.json", "resume the run").value)
        except (FileNotFoundError, ValueError):
            return None
        return found if "steps" in found else None

    def write_text(self, name: str, text: str) -> None:
        """Replace the file ``name``."""
        write_atomically(self.path / name, lambda p: p.write_text(text, encoding="utf-8"))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace the file ``name``."""
        self.write_text(name, json.dumps(content, indent=1) + "\n")

    def write_yaml(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace the file ``name``."""
        self.write_text(name, yaml.safe_dump(dict(content), sort_keys=False))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record to the metrics."""
        self.append_line(self.metrics.name, json.dumps(record))

    def append_line(self, name: str, line: str) -> None:
        """Add a line to the file ``name``, in the place of a last one that a crash cut off."""
        with (self.path / name).open("ab+") as file:
            if end := file.seek(0, os.SEEK_END):
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(f"{line}\n".encode())

    def compare(self, name: str, now: Mapping[str, Any], what: str) -> None:
        """Refuse to go on with other data than the file ``name`` tells of: batches follow from what the data are.

        Raises ValueError, for a damaged file too.
        """
        path = self.path / name
        if path.is_file() and read_fields(path, "put the file back, or start a new run").value != now:
            raise ValueError(
                f"{what} are not those that the run began with ({path} says what they were): bring them back, or start "
                "a new run"
            )

    def records(self) -> list[dict[str, Any]]:
        """The metrics so far; a last line cut off by a crash is left out. Raises ValueError for another that is wrong.

        Each has its ``step``, and of the layers that it tells of what the training's FLOPs are counted from.
        """
        found = [Fields(line, where, _DELETE, finite=False) for where, line in read_lines(self.metrics, _DELETE)]
        for record in found:
            if record.integer("step") is None:
                raise record.wrong("step is missing")
            for layer in record.objects("layers"):
                layer.read(_Logged)
        return [dict(record.value) for record in found]

    def rewind(self, step: int) -> None:
        """Forget the metrics of steps after ``step``, and all at step 0: the run writes them again.

        Forgets what a process was writing when it was killed, too.
        """
        for half in self.checkpoint("last").parent.glob(".*.partial"):
            half.unlink()
        kept = [json.dumps(record) + "\n" for record in (self.records() if step else []) if record["step"] <= step]
        write_atomically(self.metrics, lambda p: p.write_text("".join(kept)))

    def checkpoint(self, name: str) -> Path:
        """Path of the checkpoint of this name ("last", "best")."""
        return self.path / "checkpoints" / f"{name}.pt"

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Replace a checkpoint."""
        write_through(self.checkpoint(name), lambda file: torch.save(dict(state), file))

    def load(self, name: str) -> dict[str, Any] | None:
        """A checkpoint, on the CPU; None if there is none. Raises ValueError for one that is cut off or altered."""
        path = self.checkpoint(name)
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
                altered = archive.testzip()
            state = None if altered else torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # there is no end to what a reader stumbles over in a damaged file
            raise self.damaged(name) from error
        if not _is_checkpoint(state):
            raise self.damaged(name)
        return state

    def damaged(self, name: str, why: object = None) -> ValueError:
        """The error that says that this checkpoint cannot be gone on from, and what can."""
        path, best = self.checkpoint(name), self.checkpoint("best")
        reason = "" if why is None else f" ({' '.join(str(why).split()):.200})"
        other = f", or put {best.name} in its place to go on from there" if best.exists() else ""
        return ValueError(
            f"{path} is cut off, altered or not a checkpoint of a run{reason}; delete it to train from the start{other}"
        )


def _is_checkpoint(state: Any) -> TypeGuard[dict[str, Any]]:
    """Whether this has what a checkpoint has, of the right types and within its range."""
    if not isinstance(state, dict) or not all(
        key in state and isinstance(state[key], kind) for key, kind in _STATE.items()
    ):
        return False
    numbers = [state[key] for key in ("seconds", "seconds_saved", "best") if state[key] is not None]
    return (
        0 <= state["step"] <= state["total_steps"]
        and state["processes"] >= 1
        and all(math.isfinite(number) for number in numbers)
        and state["losses"].dim() == 1
        and isinstance(state["recipe"].get("data"), dict)
    )


class Writer:
    """Writes in a thread of its own while training goes on; one thing at a time."""

    def __init__(self) -> None:
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: futures.Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Let ``write`` run aside, when what was started before is written; raises as :meth:`wait`."""
        self.wait()
        self._writing = self._thread.submit(write)

    def settle(self) -> None:
        """Wait until nothing is being written, whether or not that went well."""
        futures.wait([] if self._writing is None else [self._writing])

    def wait(self) -> None:
        """Wait until nothing is being written. Raises, once, the error of what could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
