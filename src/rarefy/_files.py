"""Files are replaced whole or not at all."""

from __future__ import annotations

import csv
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

T = TypeVar("T")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Replace a table by these rows, at least one; the columns are the first row's. Gives the path."""

    def fill(beside: Path) -> None:
        with beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, fill)
    return path


def shipped_names(folder: Traversable) -> list[str]:
    """The names of a package's ``.json`` files, in order."""
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_shipped(name: str | Path, folder: Traversable, kind: str, about: str, parse: Callable[[str], T]) -> T:
    """Parse a shipped file by its name, or a ``.json`` file. Raises ValueError, as a ``kind``, for others.

    What ``parse`` raises ValueError for is told with the name of the file.
    """
    if str(name).endswith(".json"):
        try:
            return parse(Path(name).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{str(name)!r} is not {about}: it is not UTF-8 text") from None
        except ValueError as error:
            raise ValueError(f"{str(name)!r}: {error}") from None
    known = shipped_names(folder)
    if name not in known:
        raise ValueError(f"{kind} must be a .json file or one of {', '.join(known)}; got {str(name)!r}")
    return parse((folder / f"{name}.json").read_text(encoding="utf-8"))


class _Remembering:
    """A file that remembers why it could not be written: PyTorch's writer raises an error without a reason."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it: readers see the old file or the whole new one.

    Any number of processes may write one path at the same time; the last one's file stays. It has the permissions that
    ``open(path, "w")`` leaves: those of the file that is there, or what the user's umask gives.

    Raises OSError that names ``path`` where it cannot be written (a full disk, a folder in its place, ...).
    """
    target = Path(os.path.realpath(path))
    partial: Path | None = None
    try:
        if target.exists() and not target.is_file():
            raise FileExistsError(17, "there is something else than a file", str(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        short = os.fsencode(target.name)[:100].decode(errors="ignore")  # file systems count bytes
        beside = target.with_name(f".{short}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        partial = beside
        mode = (target if target.exists() else partial).stat().st_mode
        write(partial)
        partial.chmod(mode & 0o7777)  # some writers put a file of their own there, that nobody else may read
        with partial.open("r+b") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name without its content
        partial.replace(target)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def write_through(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """As :func:`write_atomically`, for a writer that takes an open file and has errors of its own for a full disk."""

    def fill(partial: Path) -> None:
        with partial.open("wb") as file:
            _through(file, write)

    write_atomically(path, fill)


def _through(file: IO[bytes], write: Callable[[IO[bytes]], object]) -> None:
    remembering = _Remembering(file)
    try:
        write(remembering)  # type: ignore[arg-type]
    except Exception:
        if remembering.error is not None:
            raise remembering.error from None
        raise
