"""What a training on a CPU does with memory that it frees."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed() -> None:
    """Let this process keep what it frees, for its next step: glibc gives large blocks back to the system.

    The system clears every page of a block that it gives, which can take a tenth of a step. It is for the whole
    process, and to where there is no ``mallopt`` it does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
