"""Where results will be written is looked at before they are made: nobody waits for what cannot be kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class NowhereToWriteError(OSError):
    """The results would have no place: nothing was done yet."""


_LONGEST = 255  # bytes that a file's name has at most


def check_file(path: Path | None, option: str, ending: str | None = None) -> None:
    """Refuse a path that a result cannot be written to; None, no path, is fine.

    Nothing is left on the disk. Raises ValueError, naming the option, for a path that has not the ``ending`` asked for,
    and NowhereToWriteError for a folder or a device, and where its folder is not there and cannot be made, or takes no
    files.
    """
    if path is None:
        return
    if ending is not None and path.suffix != ending:
        raise ValueError(f"{option} must be a {ending} file, got {path}")
    _check_names(path, option)
    if path.is_dir():
        raise NowhereToWriteError(f"{option} must be a file, and {path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise NowhereToWriteError(f"{option} must be an ordinary file, and {path} is none: name another")
    _check_above(path, option)


def check_folder(path: Path | None, option: str) -> None:
    """The same for a folder that results go into; one that is there must be writable."""
    if path is None:
        return
    _check_names(path, option)
    if path.is_dir():
        _try(path, path, option)
    elif path.exists():
        raise NowhereToWriteError(f"{option} must be a folder, and {path} is a file: name another")
    else:
        _check_above(path, option)


def _check_names(path: Path, option: str) -> None:
    """Whether the names on the way to ``path`` are such as files can have."""
    if "\0" in str(path):
        raise ValueError(f"{option} must be a path, got {str(path)!r}")
    longest = max(len(os.fsencode(part)) for part in path.parts or ("",))
    if longest > _LONGEST:
        raise ValueError(f"{option} must have names of at most {_LONGEST} bytes, got one of {longest}")


def _check_above(path: Path, option: str) -> None:
    """Whether the folders up to ``path`` are there or can be made."""
    above = path.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise NowhereToWriteError(f"{option} cannot be written: {above} on the way to {path} is not a folder")
    _try(above, path, option)


def _try(folder: Path, path: Path, option: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise NowhereToWriteError(
            f"{option} cannot be written: {folder} takes no new files ({error.strerror}); name another path than {path}"
        ) from error
