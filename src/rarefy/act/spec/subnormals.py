"""Subnormal numbers kept, whatever ``torch.set_flush_denormal`` said: what is cached must not depend on that mode."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept() -> Iterator[None]:
    """Let this thread compute with subnormal numbers in the block, and as before after it; a decorator too.

    The native kernels do the same for themselves.
    """
    flushed = sys.float_info.min / 2 == 0.0
    if flushed:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(True)
