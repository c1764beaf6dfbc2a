"""The native engine (``native/include/rarefy_engine.h``) through ctypes: its structures, functions and errors."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from rarefy import kernels
from rarefy.act.kernels import aten, native
from rarefy.act.spec import formats, reference
from rarefy.kernels import _library

#: How the numbers of a value lie: ``rarefy_layout``.
CHANNELS_FIRST, CHANNELS_LAST = 0, 1
#: The modes of :mod:`rarefy.act` by their numbers in ``rarefy_mode``.
_MODES = {"exact": 1, "fast": 1, "hard": 2, "ktanh": 3}
_ERROR_BYTES = 512

_POINTER, _TEXT, INT32, INT64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int64
Int32x2, Int32x3, Int32x4 = INT32 * 2, INT32 * 3, INT32 * 4


class NativeError(ValueError):
    """What the native engine refused, in its words."""


class Depth(ctypes.Structure):
    """``rarefy_depth``."""

    _fields_ = (
        ("planes", INT32),
        ("kernel", INT32),
        ("stride", INT32),
        ("dilation", INT32),
        ("padding", Int32x2),
    )


class Conv(ctypes.Structure):
    """``rarefy_conv``."""

    _fields_ = (
        ("x", INT32),
        ("residual", INT32),
        ("out_channels", INT32),
        ("kernel", Int32x2),
        ("stride", Int32x2),
        ("dilation", Int32x2),
        ("padding", Int32x4),
        ("groups", INT32),
        ("activation", INT32),
        ("storage", INT32),
        ("choice", INT32),
        ("weight", _POINTER),
        ("weights", INT64),
        ("bias", _POINTER),
        ("biases", INT64),
        ("depth", Depth),
    )


class Pool(ctypes.Structure):
    """``rarefy_pool``."""

    _fields_ = (
        ("x", INT32),
        ("average", INT32),
        ("count_padding", INT32),
        ("kernel", Int32x2),
        ("stride", Int32x2),
        ("dilation", Int32x2),
        ("padding", Int32x4),
        ("depth", Depth),
    )


class Recurrence(ctypes.Structure):
    """``rarefy_recurrence``."""

    _fields_ = (
        ("x", INT32),
        ("h", INT32),
        ("c", INT32),
        ("hidden", INT32),
        ("reverse", INT32),
        ("cells", INT32),
        ("storage", INT32),
        ("choice", INT32),
        ("weight", _POINTER),
        ("weights", INT64),
        ("bias", _POINTER),
        ("biases", INT64),
    )


class Tensor(ctypes.Structure):
    """``rarefy_tensor``."""

    _fields_ = (
        ("function", INT32),
        ("xs", ctypes.POINTER(INT32)),
        ("x_count", INT64),
        ("numbers", ctypes.POINTER(INT64)),
        ("number_count", INT64),
        ("constants", _POINTER),
        ("constant_count", INT64),
    )


class Options(ctypes.Structure):
    """``rarefy_options``."""

    _fields_ = (
        ("isa", _TEXT),
        ("batch", INT32),
        ("threads", INT32),
        ("tune_seconds", ctypes.c_double),
        ("measured", _POINTER),
    )


class ProgramInfo(ctypes.Structure):
    """``rarefy_program_info``."""

    _fields_ = (
        ("inputs", INT32),
        ("outputs", INT32),
        ("steps", INT32),
        ("group", INT32),
        ("weight_bytes", INT64),
        ("scratch_bytes", INT64),
        ("tune_seconds", ctypes.c_double),
        ("isa", ctypes.c_char * 16),
    )


class StepInfo(ctypes.Structure):
    """``rarefy_step_info``."""

    _fields_ = (
        ("name", _TEXT),
        ("kind", _TEXT),
        ("kernel", ctypes.c_char * 48),
        ("shape", Int32x3),
        ("x_shape", Int32x3),
        ("weights", INT64),
        ("nonzeros", INT64),
        ("stored", INT64),
        ("macs", INT64),
        ("dense_macs", INT64),
        ("weight_bytes", INT64),
        ("tuned_seconds", ctypes.c_double),
        ("dense_seconds", ctypes.c_double),
    )


class Result(ctypes.Structure):
    """``rarefy_int8_result``."""

    _fields_ = (
        ("zero_point", INT32),
        ("floats", INT32),
        ("multiplier", ctypes.c_float),
        ("other", ctypes.c_float),
        ("bias", ctypes.c_float),
        ("ratio", ctypes.c_double),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("multipliers", _POINTER),
        ("biases", _POINTER),
        ("rows", INT64),
        ("table", _POINTER),
        ("layout", INT32),
    )


_BUFFERS = _POINTER  # rarefy_buffer, as bytes: structures of ctypes take longer to make than a small network to run

#: A program is run, of either kind.
_RUN = (INT32, (_POINTER, _BUFFERS, INT32, _BUFFERS, INT32, INT64, INT32, _POINTER, INT64), True)

#: The functions of the header: what they give back and take, without the error's two arguments where they have them.
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...], bool]] = {
    "builder_new": (_POINTER, (), False),
    "builder_free": (None, (_POINTER,), False),
    "builder_input": (INT32, (_POINTER, INT32, INT32, INT32, INT32, _TEXT), True),
    "builder_conv": (INT32, (_POINTER, ctypes.POINTER(Conv), _TEXT), True),
    "builder_pool": (INT32, (_POINTER, ctypes.POINTER(Pool), _TEXT), True),
    "builder_global_average": (INT32, (_POINTER, INT32, _TEXT), True),
    "builder_binary": (INT32, (_POINTER, INT32, INT32, INT32, INT32, _TEXT), True),
    "builder_affine": (INT32, (_POINTER, INT32, _POINTER, _POINTER, INT64, INT32, _TEXT), True),
    "builder_concat": (INT32, (_POINTER, ctypes.POINTER(INT32), INT32, _TEXT), True),
    "builder_upsample": (INT32, (_POINTER, INT32, INT32, INT32, _TEXT), True),
    "builder_flatten": (INT32, (_POINTER, INT32, _TEXT), True),
    "builder_lstm_cell": (INT32, (_POINTER, INT32, INT32, _TEXT), True),
    "builder_lstm_hidden": (INT32, (_POINTER, INT32, INT32, _TEXT), True),
    "builder_gru": (INT32, (_POINTER, INT32, INT32, INT32, _TEXT), True),
    "builder_recurrence": (INT32, (_POINTER, ctypes.POINTER(Recurrence), _TEXT), True),
    "builder_tensor": (INT32, (_POINTER, ctypes.POINTER(Tensor), _TEXT), True),
    "builder_mode": (INT32, (_POINTER, INT32, INT32, _POINTER), True),
    "builder_output": (INT32, (_POINTER, INT32, INT32), True),
    "builder_shape": (INT32, (_POINTER, INT32, ctypes.POINTER(Int32x3)), True),
    "builder_finish": (_POINTER, (_POINTER, ctypes.POINTER(Options)), True),
    "program_free": (None, (_POINTER,), False),
    "program_run": _RUN,
    "program_describe": (None, (_POINTER, ctypes.POINTER(ProgramInfo)), False),
    "program_step": (INT32, (_POINTER, INT32, ctypes.POINTER(StepInfo)), False),
    "program_port": (INT32, (_POINTER, INT32, INT32, ctypes.POINTER(Int32x3), ctypes.POINTER(INT32)), False),
    "program_size": (INT64, (_POINTER,), False),
    "program_save": (None, (_POINTER, _POINTER), False),
    "program_load": (_POINTER, (_POINTER, INT64, _TEXT), True),
    "int8_finish": (_POINTER, (_POINTER, ctypes.POINTER(Result), INT64, ctypes.POINTER(Options)), True),
    "int8_free": (None, (_POINTER,), False),
    "int8_run": _RUN,
    "int8_describe": (None, (_POINTER, ctypes.POINTER(ProgramInfo)), False),
    "int8_step": (INT32, (_POINTER, INT32, ctypes.POINTER(StepInfo)), False),
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
        function.restype, function.argtypes = restype, (*argtypes, *((_TEXT, INT64) if fails else ()))
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


def function(name: str) -> Callable[..., Any]:
    """The function of the library, which must be there, of that name without its ``rarefy_``; it raises NativeError."""
    functions = _functions()
    assert functions is not None
    return functions[name]


def call(name: str, *arguments: Any) -> Any:
    """What that function gives."""
    return function(name)(*arguments)


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
