"""The native engine (``native/include/rarefy_engine.h``) through ctypes: builders and programs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from rarefy import kernels
from rarefy.act.kernels import aten, native
from rarefy.act.spec import formats, reference
from rarefy.engine.plan import ACTIVATIONS, OF_ONE, OF_TWO, Activation, parts
from rarefy.kernels import _library

CHANNELS_FIRST, CHANNELS_LAST = 0, 1
#: Functions of whole values, in the order of ``rarefy_function``.
Function = Literal[
    "layer norm",
    "rms norm",
    "group norm",
    "matmul",
    "softmax",
    "attention",
    "pointwise",
    "view",
    "resize",
    "reduce",
    "embedding",
]
FUNCTIONS: tuple[Function, ...] = get_args(Function)
#: Operations of expressions, in the order of ``rarefy_operation``.
OPERATIONS: tuple[str, ...] = (*OF_TWO, *OF_ONE, *ACTIVATIONS)
#: What a convolution may be computed by.
CHOICES = {"measure": 0, "sparse": 1, "dense": 2}
#: The modes of :mod:`rarefy.act` by their numbers in ``rarefy_mode``.
_MODES = {"exact": 1, "fast": 1, "hard": 2, "ktanh": 3}
#: Threads that a program runs on at most.
MOST_THREADS = 1024
#: How weights are stored.
STORAGES = {"float32": 0, "bfloat16": 1}

_ERROR_BYTES, _ALIGNMENT = 512, 64
_LARGE, _POPULATE = 1 << 21, 23  # a large page, and MADV_POPULATE_WRITE, which Python's mmap does not name
_POINTER, _TEXT, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64
_Int32x2, _Int32x3, _Int32x4 = _INT32 * 2, _INT32 * 3, _INT32 * 4


class NativeError(ValueError):
    """What the native engine refused, in its words."""


def _function(activation: Activation) -> int:
    """The number of an activation's function in ``rarefy_activation``."""
    return ACTIVATIONS.index(parts(activation)[0])


def native_mode(function: str, mode: str, table: str) -> tuple[int, int | None]:
    """A mode of :mod:`rarefy.act` in float32 as kernels take it: ``rarefy_mode``, and the address of its table.

    Raises NativeError for a table that they do not have.
    """
    block = None
    if mode == "ktanh":
        block = _table(function, table)
        if block is None:
            raise NativeError("its table is none of tanh in 32 rows of shifts")
    return _MODES[mode], None if block is None else block.ctypes.data


@functools.lru_cache(maxsize=64)
def _table(function: str, text: str) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """A ``rarefy_shift32``, which lives as long as it is in the cache: kernels copy it at once or run in the call."""
    given = aten.given_table(text)
    if given is not None and given.function != "tanh":
        return None
    return native.shift(reference.core(formats.FP32, given))


class _Depth(ctypes.Structure):
    _fields_ = (
        ("planes", _INT32),
        ("kernel", _INT32),
        ("stride", _INT32),
        ("dilation", _INT32),
        ("padding", _Int32x2),
    )


class _Conv(ctypes.Structure):
    _fields_ = (
        ("x", _INT32),
        ("residual", _INT32),
        ("out_channels", _INT32),
        ("kernel", _Int32x2),
        ("stride", _Int32x2),
        ("dilation", _Int32x2),
        ("padding", _Int32x4),
        ("groups", _INT32),
        ("activation", _INT32),
        ("storage", _INT32),
        ("choice", _INT32),
        ("weight", _POINTER),
        ("weights", _INT64),
        ("bias", _POINTER),
        ("biases", _INT64),
        ("depth", _Depth),
    )


class _Pool(ctypes.Structure):
    _fields_ = (
        ("x", _INT32),
        ("average", _INT32),
        ("count_padding", _INT32),
        ("kernel", _Int32x2),
        ("stride", _Int32x2),
        ("dilation", _Int32x2),
        ("padding", _Int32x4),
        ("depth", _Depth),
    )


class _Recurrence(ctypes.Structure):
    _fields_ = (
        ("x", _INT32),
        ("h", _INT32),
        ("c", _INT32),
        ("hidden", _INT32),
        ("reverse", _INT32),
        ("cells", _INT32),
        ("storage", _INT32),
        ("choice", _INT32),
        ("weight", _POINTER),
        ("weights", _INT64),
        ("bias", _POINTER),
        ("biases", _INT64),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("function", _INT32),
        ("xs", ctypes.POINTER(_INT32)),
        ("x_count", _INT64),
        ("numbers", ctypes.POINTER(_INT64)),
        ("number_count", _INT64),
        ("constants", _POINTER),
        ("constant_count", _INT64),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("isa", _TEXT),
        ("batch", _INT32),
        ("threads", _INT32),
        ("tune_seconds", ctypes.c_double),
        ("measured", _POINTER),
    )


class _ProgramInfo(ctypes.Structure):
    _fields_ = (
        ("inputs", _INT32),
        ("outputs", _INT32),
        ("steps", _INT32),
        ("group", _INT32),
        ("weight_bytes", _INT64),
        ("scratch_bytes", _INT64),
        ("tune_seconds", ctypes.c_double),
        ("isa", ctypes.c_char * 16),
    )


class _StepInfo(ctypes.Structure):
    _fields_ = (
        ("name", _TEXT),
        ("kind", _TEXT),
        ("kernel", ctypes.c_char * 48),
        ("shape", _Int32x3),
        ("x_shape", _Int32x3),
        ("weights", _INT64),
        ("nonzeros", _INT64),
        ("stored", _INT64),
        ("macs", _INT64),
        ("dense_macs", _INT64),
        ("weight_bytes", _INT64),
        ("tuned_seconds", ctypes.c_double),
        ("dense_seconds", ctypes.c_double),
    )


class _Result(ctypes.Structure):
    _fields_ = (
        ("zero_point", _INT32),
        ("floats", _INT32),
        ("multiplier", ctypes.c_float),
        ("other", ctypes.c_float),
        ("bias", ctypes.c_float),
        ("ratio", ctypes.c_double),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("multipliers", _POINTER),
        ("biases", _POINTER),
        ("rows", _INT64),
        ("table", _POINTER),
        ("layout", _INT32),
    )


_BUFFERS = _POINTER  # rarefy_buffer, as bytes: structures of ctypes take longer to make than a small network to run

#: The functions of the header: what they give back and take, without the error's two arguments where they have them.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...], bool]] = {
    "builder_new": (_POINTER, (), False),
    "builder_free": (None, (_POINTER,), False),
    "builder_input": (_INT32, (_POINTER, _INT32, _INT32, _INT32, _INT32, _TEXT), True),
    "builder_conv": (_INT32, (_POINTER, ctypes.POINTER(_Conv), _TEXT), True),
    "builder_pool": (_INT32, (_POINTER, ctypes.POINTER(_Pool), _TEXT), True),
    "builder_global_average": (_INT32, (_POINTER, _INT32, _TEXT), True),
    "builder_binary": (_INT32, (_POINTER, _INT32, _INT32, _INT32, _INT32, _TEXT), True),
    "builder_affine": (_INT32, (_POINTER, _INT32, _POINTER, _POINTER, _INT64, _INT32, _TEXT), True),
    "builder_concat": (_INT32, (_POINTER, ctypes.POINTER(_INT32), _INT32, _TEXT), True),
    "builder_upsample": (_INT32, (_POINTER, _INT32, _INT32, _INT32, _TEXT), True),
    "builder_flatten": (_INT32, (_POINTER, _INT32, _TEXT), True),
    "builder_lstm_cell": (_INT32, (_POINTER, _INT32, _INT32, _TEXT), True),
    "builder_lstm_hidden": (_INT32, (_POINTER, _INT32, _INT32, _TEXT), True),
    "builder_gru": (_INT32, (_POINTER, _INT32, _INT32, _INT32, _TEXT), True),
    "builder_recurrence": (_INT32, (_POINTER, ctypes.POINTER(_Recurrence), _TEXT), True),
    "builder_tensor": (_INT32, (_POINTER, ctypes.POINTER(_Tensor), _TEXT), True),
    "builder_mode": (_INT32, (_POINTER, _INT32, _INT32, _POINTER), True),
    "builder_output": (_INT32, (_POINTER, _INT32, _INT32), True),
    "builder_shape": (_INT32, (_POINTER, _INT32, ctypes.POINTER(_Int32x3)), True),
    "builder_finish": (_POINTER, (_POINTER, ctypes.POINTER(_Options)), True),
    "program_free": (None, (_POINTER,), False),
    "program_run": (
        _INT32,
        (_POINTER, _BUFFERS, _INT32, _BUFFERS, _INT32, _INT64, _INT32, _POINTER, _INT64),
        True,
    ),
    "program_describe": (None, (_POINTER, ctypes.POINTER(_ProgramInfo)), False),
    "program_step": (_INT32, (_POINTER, _INT32, ctypes.POINTER(_StepInfo)), False),
    "program_port": (_INT32, (_POINTER, _INT32, _INT32, ctypes.POINTER(_Int32x3), ctypes.POINTER(_INT32)), False),
    "program_size": (_INT64, (_POINTER,), False),
    "program_save": (None, (_POINTER, _POINTER), False),
    "program_load": (_POINTER, (_POINTER, _INT64, _TEXT), True),
    "int8_finish": (_POINTER, (_POINTER, ctypes.POINTER(_Result), _INT64, ctypes.POINTER(_Options)), True),
    "int8_free": (None, (_POINTER,), False),
    "int8_run": (
        _INT32,
        (_POINTER, _BUFFERS, _INT32, _BUFFERS, _INT32, _INT64, _INT32, _POINTER, _INT64),
        True,
    ),
    "int8_describe": (None, (_POINTER, ctypes.POINTER(_ProgramInfo)), False),
    "int8_step": (_INT32, (_POINTER, _INT32, ctypes.POINTER(_StepInfo)), False),
}


@functools.cache
def _functions() -> dict[str, Callable[..., Any]] | None:
    """The functions of the library, by name; None without one."""
    library = _library._library()
    if library is None or not all(hasattr(library, f"rarefy_{name}") for name in _FUNCTIONS):
        return None
    found = {}
    for name, (restype, argtypes, fails) in _FUNCTIONS.items():
        function = getattr(library, f"rarefy_{name}")
        function.restype, function.argtypes = restype, (*argtypes, *((_TEXT, _INT64) if fails else ()))
        found[name] = _checked(function) if fails else function
    return found


class _Errors(threading.local):
    """Where the functions of each thread say what is wrong."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(_ERROR_BYTES)


_errors = _Errors()


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, raising NativeError with the reason where it fails."""

    def call(*arguments: Any) -> Any:
        error = _errors.buffer
        result = function(*arguments, error, _ERROR_BYTES)
        if result is None or result == -1:
            raise NativeError(error.value.decode(errors="replace"))
        return result

    return call


def _call(name: str, *arguments: Any) -> Any:
    functions = _functions()
    assert functions is not None
    return functions[name](*arguments)


def available() -> bool:
    """Whether there is a native engine that may be used (see :func:`rarefy.kernels.forced`)."""
    return _functions() is not None and kernels.isa() != "pytorch"


def isa(*, whole: bool = False) -> bytes | None:
    """The instruction set to use, as the header takes it: for float32, or with ``whole`` for int8, which has more."""
    asked = kernels.isa()
    if asked is None:
        return None
    built = {kernel.isa for kernel in kernels.table() if kernel.name == ("int8" if whole else "engine")}
    return next((each for each in kernels.chain(asked) if each in built), asked).encode()


class Depth(NamedTuple):
    """A third axis of windows, before rows and columns: the rows of x are those of so many ``planes``."""

    planes: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    padding: tuple[int, int] = (0, 0)


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
        self._address = address
        self._keep = keep
        self._run = (_functions() or {})[f"{self._kind}_run"]
        self._finalizer = weakref.finalize(self, _call, f"{self._kind}_free", address)
        about = _ProgramInfo()
        _call(f"{self._kind}_describe", address, ctypes.byref(about))
        self.facts = ProgramFacts(
            about.steps, about.group, about.weight_bytes, about.scratch_bytes, about.tune_seconds, about.isa.decode()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy through the program's bytes: its address means nothing to anybody else."""
        return _again, (bytes(self.save()), self.facts.isa)

    def steps(self) -> list[StepFacts]:
        """What is known of its steps."""
        found, info = [], _StepInfo()
        for index in range(self.facts.steps):
            _call(f"{self._kind}_step", self._address, index, ctypes.byref(info))
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
        if self._run(self._address, *ports, batch, threads, *clock):
            raise MemoryError(f"no memory for the scratch of a batch of {batch}")

    def ports(self, *, outputs: bool) -> list[tuple[tuple[int, int, int], int]]:
        """Channels, height and width, and the layout, of every input or output."""
        about = _ProgramInfo()
        _call("program_describe", self._address, ctypes.byref(about))
        found, shape, layout = [], _Int32x3(), _INT32()
        for index in range(about.outputs if outputs else about.inputs):
            _call("program_port", self._address, int(outputs), index, ctypes.byref(shape), ctypes.byref(layout))
            found.append(((shape[0], shape[1], shape[2]), layout.value))
        return found

    def save(self) -> bytearray:
        """Its bytes, for :func:`load`."""
        data = bytearray(_call("program_size", self._address))
        _call("program_save", self._address, (ctypes.c_char * len(data)).from_buffer(data))
        return data


#: How an int8 layer takes its weights: any four that are not zero, those of four channels together, all of them, or, in
#: layers of vectors, those that are not zero of some rows in windows of columns or behind a bitmask.
Layout = Literal["quads", "blocks", "dense", "windows", "bitmask"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True, kw_only=True)
class Result:
    """How the results of a step of an int8 program become bytes; see ``rarefy_int8_result``.

    ``layout`` None chooses by rule.
    """

    zero_point: int = 0
    floats: bool = False
    multiplier: float = 0.0
    other: float = 0.0
    bias: float = 0.0
    ratio: float = 0.0
    low: float = 0.0
    high: float = 255.0
    multipliers: Tensor | None = None
    biases: Tensor | None = None
    table: Tensor | None = None
    layout: Layout | None = None


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
    if not available():
        raise NativeError("a native program needs the native engine, and there is none here (rarefy info says why)")
    memory = aligned(len(data))
    memory[:] = np.frombuffer(data, np.uint8)
    there = any(each.name == "engine" and each.isa == saved_under and each.supported for each in _library.table())
    return load(memory, saved_under.encode() if there else None)


def load(data: np.ndarray[Any, np.dtype[np.uint8]], under: bytes | None = None) -> Program:
    """The program whose bytes these are, read in place: 64-byte aligned, and not changed while it lives.

    It runs under the instruction set ``under``; without it, under the one to use here. Raises NativeError for bytes
    that are no program.
    """
    return Program(_call("program_load", data.ctypes.data, data.nbytes, under or isa()), data)


def bits(number: float) -> int:
    """A double as the numbers of a function have it."""
    return int(np.float64(number).view(np.int64))


def _depth(depth: Depth | None) -> _Depth:
    return _Depth() if depth is None else _Depth(*depth[:-1], _Int32x2(*depth.padding))


def _label(name: str) -> bytes:
    return name.encode()


def _float32(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().to(torch.float32).contiguous()


def _address(values: Tensor | None) -> int | None:
    return None if values is None else kernels.address(values)


class Builder:
    """Takes the steps of a program one after the other; values are numbers. Every method raises NativeError."""

    def __init__(self) -> None:
        self._address: int = _call("builder_new")
        self._finalizer = weakref.finalize(self, _call, "builder_free", self._address)

    def __reduce__(self) -> tuple[Any, ...]:
        """Raise TypeError: a copy would hold the same address."""
        raise TypeError("a Builder cannot be copied or pickled: copy the Program that finish() makes")

    def input(self, shape: tuple[int, int, int], layout: int, name: str) -> int:
        """An input of so many channels, rows and columns."""
        return self._add("input", *shape, layout, name=name)

    def conv(
        self,
        x: int,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        depth: Depth | None = None,
        groups: int = 1,
        residual: int = -1,
        activation: Activation = "none",
        storage: str,
        choice: str,
        name: str,
    ) -> int:
        """A convolution: weight (out, in / groups, [depth,] height, width); padding is top, bottom, left, right."""
        weights, biases = _float32(weight), _float32(bias)
        assert weights is not None
        about = _Conv(
            x=x,
            residual=residual,
            out_channels=weights.shape[0],
            kernel=_Int32x2(*weights.shape[-2:]),
            stride=_Int32x2(*stride),
            dilation=_Int32x2(*dilation),
            padding=_Int32x4(*padding),
            groups=groups,
            activation=_function(activation),
            storage=STORAGES[storage],
            choice=CHOICES[choice],
            weight=_address(weights),
            weights=weights.numel(),
            bias=_address(biases),
            biases=0 if biases is None else biases.numel(),
            depth=_depth(depth),
        )
        return self._moded(self._add("conv", ctypes.byref(about), name=name), activation)

    def pool(
        self,
        x: int,
        *,
        average: bool,
        count_padding: bool,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        dilation: tuple[int, int],
        padding: tuple[int, int, int, int],
        depth: Depth | None = None,
        name: str,
    ) -> int:
        """The maximum or average over windows; padding is top, bottom, left, right."""
        about = _Pool(
            x=x,
            average=average,
            count_padding=count_padding,
            kernel=_Int32x2(*kernel),
            stride=_Int32x2(*stride),
            dilation=_Int32x2(*dilation),
            padding=_Int32x4(*padding),
            depth=_depth(depth),
        )
        return self._add("pool", ctypes.byref(about), name=name)

    def global_average(self, x: int, *, name: str) -> int:
        """The mean over rows and columns."""
        return self._add("global_average", x, name=name)

    def binary(self, x: int, y: int, *, multiply: bool, activation: Activation, name: str) -> int:
        """The sum or the product of two values."""
        return self._moded(self._add("binary", x, y, multiply, _function(activation), name=name), activation)

    def affine(self, x: int, scale: Tensor | None, shift: Tensor | None, activation: Activation, *, name: str) -> int:
        """A factor and a summand for every channel."""
        scales, shifts = _float32(scale), _float32(shift)
        counts = {each.numel() for each in (scales, shifts) if each is not None}
        if len(counts) > 1:
            raise NativeError(f"scale and shift must have one number a channel, got {sorted(counts)}")
        given = (_address(scales), _address(shifts), max(counts, default=0))
        return self._moded(self._add("affine", x, *given, _function(activation), name=name), activation)

    def concat(self, xs: Sequence[int], *, name: str) -> int:
        """The channels of all."""
        return self._add("concat", (_INT32 * len(xs))(*xs), len(xs), name=name)

    def upsample(self, x: int, factor: tuple[int, int], *, name: str) -> int:
        """Every pixel so many times down and across."""
        return self._add("upsample", x, *factor, name=name)

    def flatten(self, x: int, *, name: str) -> int:
        """All numbers as a vector."""
        return self._add("flatten", x, name=name)

    def lstm_cell(self, gates: int, c: int, *, mode: str = "exact", table: str = "", name: str) -> int:
        """An LSTM's new cell, of the gates before their activations and the cell before."""
        return self._moded(self._add("lstm_cell", gates, c, name=name), f"tanh {mode} {table}")

    def lstm_hidden(self, gates: int, c: int, *, mode: str = "exact", table: str = "", name: str) -> int:
        """An LSTM's result, of the same gates and the new cell."""
        return self._moded(self._add("lstm_hidden", gates, c, name=name), f"tanh {mode} {table}")

    def gru(self, x: int, h: int, state: int, *, mode: str = "exact", table: str = "", name: str) -> int:
        """A GRU's result, of the products of input and state with their weights, and the state before."""
        return self._moded(self._add("gru", x, h, state, name=name), f"tanh {mode} {table}")

    def recurrence(
        self,
        x: int,
        states: Sequence[int],
        weight: Tensor,
        bias: Tensor | None,
        *,
        reverse: bool,
        cells: bool,
        mode: str = "exact",
        table: str = "",
        storage: str,
        choice: str,
        name: str,
    ) -> int:
        """A layer over a sequence, of an LSTM (weight: 4 n x n) or a GRU (3 n x n); without states it begins at 0."""
        weights, biases = _float32(weight), _float32(bias)
        assert weights is not None
        about = _Recurrence(
            x=x,
            h=states[0] if states else -1,
            c=states[1] if len(states) > 1 else -1,
            hidden=weights.shape[1],
            reverse=reverse,
            cells=cells,
            storage=STORAGES[storage],
            choice=CHOICES[choice],
            weight=_address(weights),
            weights=weights.numel(),
            bias=_address(biases),
            biases=0 if biases is None else biases.numel(),
        )
        return self._moded(self._add("recurrence", ctypes.byref(about), name=name), f"tanh {mode} {table}")

    def tensor(
        self,
        function: Function,
        xs: Sequence[int],
        numbers: Sequence[int] = (),
        constants: Sequence[Tensor] = (),
        *,
        name: str,
    ) -> int:
        """A function of whole values; ``rarefy_function`` says what its numbers and constants are."""
        given = [_float32(each.reshape(-1)) for each in constants]
        flat = torch.cat([each for each in given if each is not None]) if given else None
        about = _Tensor(
            function=FUNCTIONS.index(function),
            xs=(_INT32 * len(xs))(*xs),
            x_count=len(xs),
            numbers=(_INT64 * len(numbers))(*numbers),
            number_count=len(numbers),
            constants=_address(flat),
            constant_count=0 if flat is None else flat.numel(),
        )
        return self._add("tensor", ctypes.byref(about), name=name)

    def output(self, x: int, layout: int) -> None:
        """Make a value a result."""
        _call("builder_output", self._address, x, layout)

    def shape(self, x: int) -> tuple[int, int, int]:
        """Channels, rows and columns of a value."""
        shape = _Int32x3()
        _call("builder_shape", self._address, x, ctypes.byref(shape))
        return (shape[0], shape[1], shape[2])

    def finish(self, *, batch: int, threads: int, tune_seconds: float, measured: Program | None = None) -> Program:
        """The program, its kernels chosen for this batch size and number of threads.

        Layers like those of ``measured``, which was made for the same, take its kernels.
        """
        options = _Options(isa(), batch, threads, tune_seconds, None if measured is None else measured._address)
        return Program(_call("builder_finish", self._address, ctypes.byref(options)))

    def finish_int8(self, results: Sequence[Result], *, batch: int, threads: int) -> Int8Program:
        """The program on bytes of these steps, whose weights are whole numbers; a result for every step, in order."""
        own = [[_float32(each) for each in (r.multipliers, r.biases)] for r in results]
        given = (_Result * len(results))(
            *(
                _Result(
                    *(r.zero_point, r.floats, r.multiplier, r.other, r.bias, r.ratio, r.low, r.high),
                    *(_address(multipliers), _address(biases), 0 if multipliers is None else multipliers.numel()),
                    _address(r.table),
                    0 if r.layout is None else 1 + LAYOUTS.index(r.layout),
                )
                for r, (multipliers, biases) in zip(results, own, strict=True)
            )
        )
        options = _Options(isa(whole=True), batch, threads, 0.0, None)
        return Int8Program(_call("int8_finish", self._address, given, len(results), ctypes.byref(options)))

    def _moded(self, value: int, activation: Activation) -> int:
        """The value, whose step has now the mode of the activation."""
        function, mode, table = parts(activation)
        if mode:
            _call("builder_mode", self._address, value, *native_mode(function, mode, table))
        return value

    def _add(self, function: str, *arguments: Any, name: str) -> int:
        result: int = _call(f"builder_{function}", self._address, *arguments, _label(name))
        return result
