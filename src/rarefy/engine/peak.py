"""What one core can do at most."""

from __future__ import annotations

import ctypes
import functools
import time

from rarefy import kernels

_SECONDS = 0.02


@functools.cache
def _measured(isa: str | None) -> float | None:
    with kernels.forced(isa):
        kernel = kernels.find("fma_peak_f32", ctypes.c_int64, ctypes.c_int64)
    if kernel is None:
        return None
    best, repeats, spent = 0.0, 1 << 12, 0.0
    while spent < _SECONDS:
        begun = time.thread_time()
        operations = kernel(repeats)
        took = time.thread_time() - begun
        if took < 1e-3:
            repeats *= 2
        else:
            best, spent = max(best, 1e-9 * operations / took), spent + took
    return best


def peak() -> float | None:
    """1e9 float32 operations a second of fused multiply-adds between registers, two an element; None without kernels.

    Measured once in a process, by the clock of the thread, and kept.
    """
    return _measured(kernels.isa())
