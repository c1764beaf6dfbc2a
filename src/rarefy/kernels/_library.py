from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rarefy.kernels

_NAMES = ("librarefy.so", "librarefy.dylib", "rarefy.dll")

#: Set to "portable", "avx2", "avx512", ... to use no other instruction set, or to "pytorch" to use no native kernel.
ENVIRONMENT = "RAREFY_ISA"

#: Instruction sets that some kernels alone have a use for, and that of the other kernels.
BASE = {
    "amx_bf16": "avx512_vbmi2",
    "avx512_vbmi2": "avx512",
    "avx_vnni": "avx2",
    "neon_i8mm": "neon",
    "neon_dotprod": "neon",
}

_ASKED = os.environ.get(ENVIRONMENT)
_forced: ContextVar[str | None] = ContextVar("forced_isa", default=_ASKED)


class _Entry(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("isa", ctypes.c_char_p),
        ("supported", ctypes.c_int32),
        ("entry", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Kernel:
    """One entry of the native table: what it computes, for which instruction set, and whether this CPU has it."""

    name: str
    isa: str
    supported: bool
    address: int


def chain(isa: str) -> tuple[str, ...]:
    """Return an instruction set, that of the kernels that have no use for it, that of those left, and so on."""
    return (isa,) if isa not in BASE else (isa, *chain(BASE[isa]))


def library_path() -> Path | None:
    """Return where the native library lies, or None when the package was built without one."""
    folders = [Path(folder) for folder in rarefy.kernels.__path__]
    return next((folder / name for folder in folders for name in _NAMES if (folder / name).is_file()), None)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The native library; without one, or with one that is not whole, None and one warning that says why."""
    path = library_path()
    if path is None:
        why = "rarefy has no native library here (it was built without a C++ compiler)"
        warnings.warn(f"{why}, so everything runs in PyTorch", stacklevel=2)
        return None
    try:
        _check_whole(path)
        library = ctypes.CDLL(str(path))
        library.rarefy_kernels.restype = ctypes.c_int64
        return library
    except (OSError, AttributeError) as error:
        warnings.warn(f"{path} does not load, so everything runs in PyTorch: {error}", stacklevel=2)
        return None


def _check_whole(path: Path) -> None:
    """Raise OSError unless the file is the one that was installed: a part of a library may load, and end the process.

    Its SHA-256 was written beside it; a library that somebody put there alone is taken as it is.
    """
    beside = path.with_name(f"{path.name}.sha256")
    if beside.is_file() and beside.read_text(errors="replace").strip() != hashlib.sha256(path.read_bytes()).hexdigest():
        raise OSError(f"it is not what {beside.name} says; install rarefy again")


@functools.cache
def table() -> tuple[Kernel, ...]:
    """Every kernel of the native library, best instruction set first for each name; empty without the library."""
    library = _library()
    if library is None:
        return ()
    entries = ctypes.POINTER(_Entry)()
    count = library.rarefy_kernels(ctypes.byref(entries))
    return tuple(
        Kernel(entries[i].name.decode(), entries[i].isa.decode(), bool(entries[i].supported), entries[i].entry)
        for i in range(count)
    )


def _best(isa: str | None) -> dict[str, Kernel]:
    """The kernel of each name that runs here: the best there is, or the best of this instruction set and its bases."""
    if isa == "pytorch":
        return {}
    known = {kernel.isa for kernel in table()} | {"pytorch"}
    if isa is not None and table() and isa not in known:
        raise ValueError(f"{ENVIRONMENT} must be one of {', '.join(sorted(known))}, got {isa!r}")
    best: dict[str, Kernel] = {}
    for kernel in table():
        if kernel.supported and (isa is None or kernel.isa in chain(isa)):
            best.setdefault(kernel.name, kernel)
    return best


def in_use() -> dict[str, Kernel]:
    """Return the kernel that :func:`find` takes now for each name that it knows.

    Raises ValueError when ``RAREFY_ISA`` names an instruction set that the library was not built for.
    """
    return _best(_forced.get())


@functools.cache
def _function(name: str, isa: str | None, restype: Any, argtypes: tuple[Any, ...]) -> Any:
    kernel = _best(isa).get(name)
    return None if kernel is None else ctypes.CFUNCTYPE(restype, *argtypes)(kernel.address)


def find(name: str, restype: Any, *argtypes: Any) -> Any:
    """Find the best kernel of this name as a ctypes function, or None: then the caller computes it in PyTorch.

    Raises ValueError when ``RAREFY_ISA`` names an instruction set that the library was not built for.
    """
    return _function(name, _forced.get(), restype, argtypes)


def isa() -> str | None:
    """Return the instruction set that :func:`find` is held to now, or None for the best there is."""
    return _forced.get()


@contextlib.contextmanager
def forced(isa: str | None) -> Iterator[None]:
    """Within the block use this instruction set and, for kernels that have no use for it, what it builds on.

    "pytorch": no native kernel; None: the best there is.
    """
    token = _forced.set(isa)
    try:
        yield
    finally:
        _forced.reset(token)
