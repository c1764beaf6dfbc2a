"""Native programs: loaded, described, run and saved."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy import kernels
from rarefy.engine import binding
from rarefy.engine.binding import NativeError

#: Threads that a program runs on at most.
MOST_THREADS = 1024

_ALIGNMENT = 64
_LARGE, _POPULATE = 1 << 21, 23  # a large page, and MADV_POPULATE_WRITE, which Python's mmap does not name


@dataclass(frozen=True)
class StepFacts:
    """One step of a program; see ``rarefy_step_info``."""

    name: str
    kind: str
    kernel: str
    shape: tuple[int, int, int]
    weights: int
    nonzeros: int
    stored: int
    macs: int
    dense_macs: int
    weight_bytes: int
    tuned_seconds: float
    dense_seconds: float


@dataclass(frozen=True)
class ProgramFacts:
    """A program as a whole; see ``rarefy_program_info``."""

    steps: int
    group: int
    weight_bytes: int
    scratch_bytes: int
    tune_seconds: float
    isa: str


class Program:
    """A program; any number of threads may run it at the same time.

    ``keep`` is what its memory lies in, where it was loaded. A copy (``copy``, ``pickle``) is a program of its own,
    made of the bytes of this one, which computes the same bits under the same instruction set.
    """

    _kind = "program"  # as its functions are called

    def __init__(self, address: int, keep: object = None) -> None:
        self.address = address
        self._keep = keep
        self._run = binding.function(f"{self._kind}_run")
        self._finalizer = weakref.finalize(self, binding.call, f"{self._kind}_free", address)
        about = binding.ProgramInfo()
        binding.call(f"{self._kind}_describe", address, ctypes.byref(about))
        self.facts = ProgramFacts(
            about.steps, about.group, about.weight_bytes, about.scratch_bytes, about.tune_seconds, about.isa.decode()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy through the program's bytes: its address means nothing to anybody else."""
        return _again, (bytes(self.save()), self.facts.isa)

    def steps(self) -> list[StepFacts]:
        """What is known of its steps."""
        found, info = [], binding.StepInfo()
        for index in range(self.facts.steps):
            binding.call(f"{self._kind}_step", self.address, index, ctypes.byref(info))
            found.append(
                StepFacts(
                    *(
                        (info.name or b"").decode(errors="replace"),
                        info.kind.decode(),
                        info.kernel.decode(),
                        tuple(info.shape),
                    ),
                    *(info.weights, info.nonzeros, info.stored, info.macs, info.dense_macs, info.weight_bytes),
                    *(info.tuned_seconds, info.dense_seconds),
                )
            )
        return found

    def run(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        batch: int,
        threads: int,
        seconds: np.ndarray[Any, np.dtype[np.float64]] | None = None,
        *,
        known: bool = False,
    ) -> None:
        """Fill ``outputs`` from ``inputs``, all contiguous float32; the time of each step is added to ``seconds``.

        The tensors are not looked at where they are ``known`` to be that, and plain ones.

        Raises NativeError where a tensor has not ``batch`` times the numbers of its port, and for a number of threads
        outside 1 to 1024; MemoryError without memory for the scratch.
        """
        ports, clock = _ports(inputs, outputs, batch, threads, seconds, known)
        if self._run(self.address, *ports, batch, threads, *clock):
            raise MemoryError(f"no memory for the scratch of a batch of {batch}")

    def ports(self, *, outputs: bool) -> list[tuple[tuple[int, int, int], int]]:
        """Channels, height and width, and the layout, of every input or output."""
        about = binding.ProgramInfo()
        binding.call("program_describe", self.address, ctypes.byref(about))
        found, shape, layout = [], binding.Int32x3(), binding.INT32()
        for index in range(about.outputs if outputs else about.inputs):
            binding.call("program_port", self.address, int(outputs), index, ctypes.byref(shape), ctypes.byref(layout))
            found.append(((shape[0], shape[1], shape[2]), layout.value))
        return found

    def save(self) -> bytearray:
        """Its bytes, for :func:`load`."""
        data = bytearray(binding.call("program_size", self.address))
        binding.call("program_save", self.address, (ctypes.c_char * len(data)).from_buffer(data))
        return data


class Int8Program(Program):
    """A program on bytes, whose inputs and outputs are float32. It is not saved: it is made of its steps again."""

    _kind = "int8"

    def __reduce__(self) -> tuple[Any, ...]:
        """Raise TypeError: a copy would hold the same address."""
        raise TypeError("an int8 program cannot be copied or pickled: copy the segment, which makes it again")


def _ports(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    batch: int,
    threads: int,
    seconds: np.ndarray[Any, np.dtype[np.float64]] | None,
    known: bool,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs and outputs, and the clock, as the functions that run a program take them."""
    if not (0 <= batch < 1 << 31 and 0 <= threads < 1 << 31):
        raise NativeError(f"batch and threads must be between 0 and 2^31, got {batch} and {threads}")
    if seconds is not None and (seconds.dtype != np.float64 or not seconds.flags.c_contiguous):
        raise NativeError("seconds must be contiguous float64")
    clock = (None, 0) if seconds is None else (seconds.ctypes.data, seconds.size)
    return (_buffers(inputs, known), len(inputs), _buffers(outputs, known), len(outputs)), clock


def _buffers(tensors: Sequence[Tensor], known: bool) -> bytes:
    """Where the numbers of each lie, and how many there are."""
    places: list[int] = []
    for x in tensors:
        if known:
            places += (x.data_ptr(), x.numel())
            continue
        if x.dtype is not torch.float32 or not x.is_contiguous():
            raise NativeError(f"inputs and outputs must be contiguous float32, got {x.dtype} of strides {x.stride()}")
        places += (kernels.address(x), x.numel())
    return struct.pack("Pq" * len(tensors), *places)


def aligned(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Memory for so many bytes that begins where :func:`load` wants it to.

    All pages of much are asked for at once, and large ones where the system gives them: finding 512 small ones missing
    one by one takes longer than filling them.
    """
    if size >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, size + _LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = np.frombuffer(pages, np.uint8)
        begin = -memory.ctypes.data % _LARGE
        for wish, at, length in ((mmap.MADV_HUGEPAGE, 0, len(pages)), (_POPULATE, begin, size)):
            with contextlib.suppress(OSError):  # they need not be granted: pages then come as they are written
                pages.madvise(wish, at, length)
        return memory[begin : begin + size]
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % _ALIGNMENT
    return memory[skip : skip + size]


def _again(data: bytes, saved_under: str) -> Program:
    """The copy of a program, under the same instruction set where this CPU has it."""
    if not binding.available():
        raise NativeError("a native program needs the native engine, and there is none here (rarefy info says why)")
    memory = aligned(len(data))
    memory[:] = np.frombuffer(data, np.uint8)
    there = any(each.name == "engine" and each.isa == saved_under and each.supported for each in kernels.table())
    return load(memory, saved_under.encode() if there else None)


def load(data: np.ndarray[Any, np.dtype[np.uint8]], under: bytes | None = None) -> Program:
    """The program whose bytes these are, read in place: 64-byte aligned, and not changed while it lives.

    It runs under the instruction set ``under``; without it, under the one to use here. Raises NativeError for bytes
    that are no program.
    """
    return Program(binding.call("program_load", data.ctypes.data, data.nbytes, under or binding.isa()), data)
