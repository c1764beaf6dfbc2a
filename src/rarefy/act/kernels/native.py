"""Tables as the native kernels read them, and the kernels that can run a table (see ``native/include/rarefy.h``)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rarefy import kernels
from rarefy.act.spec import formats
from rarefy.act.spec.quartic import LIMIT, Quartic
from rarefy.act.spec.quartic import begins as quartic_begins
from rarefy.act.spec.table import LinearTable, ShiftTable, Table

Block = npt.NDArray[np.uint8]

_SIGNATURE = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32)


def find(name: str) -> Any:
    """Return the best kernel ``name(x, y, n, table, threads)`` that may run here, or None."""
    return kernels.find(name, None, *_SIGNATURE)


@dataclass(frozen=True, eq=False)
class KernelSteps:
    """The kernels that compute one function, best first, each with the block of table that it reads.

    ``dtype`` is the NumPy type of the bits. The blocks live as long as this object.
    """

    dtype: type[np.unsignedinteger[Any]]
    steps: tuple[tuple[str, Block], ...]

    def kernel(self) -> tuple[Any, int] | None:
        """Return the first kernel that may run here as (ctypes function, address of its table), or None."""
        for name, block in self.steps:
            function = find(name)
            if function is not None:
                return function, block.ctypes.data
        return None

    def run(self, x: npt.NDArray[Any], out: npt.NDArray[Any], threads: int = 1) -> None:
        """Compute contiguous arrays of bits; raises RuntimeError when no kernel may run here."""
        kernel = self.kernel()
        if kernel is None:
            raise RuntimeError(f"no native kernel among {', '.join(name for name, _ in self.steps)} may run here")
        kernel[0](x.ctypes.data, out.ctypes.data, x.size, kernel[1], threads)


def _block(*parts: npt.NDArray[Any]) -> Block:
    """Return the parts one after another in 64-byte aligned memory."""
    data = np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])
    room = np.zeros(data.size + 64, dtype=np.uint8)
    begin = -room.ctypes.data % 64
    block = room[begin : begin + data.size]
    block[:] = data
    return block


def _padded(values: list[int], size: int, dtype: type[np.unsignedinteger[Any]]) -> npt.NDArray[Any]:
    wide = np.zeros(size, dtype=np.int64)
    wide[: len(values)] = values
    return wide.astype(dtype)  # two's complement: a negative b wraps


def linear16(table: Table) -> Block | None:
    """Return a ``rarefy_linear16``, or None when the kernel cannot run the table."""
    if not isinstance(table, LinearTable) or table.symmetry != "odd":
        return None
    if table.fraction_bits != 6 or len(table.rows) > 64:
        return None
    i = table.index
    slopes, bases = ([row[k] for row in table.rows] for k in (0, 1))
    u = np.arange(i.start, i.start + i.length + 1)
    minimum_is_identity = table.identity_below == i.start and bool((table.compute(u) <= u).all())
    if table.offset % 1024 or max(slopes) > 255 or not minimum_is_identity:
        return None
    header = np.array([i.start, i.length, i.factor, table.offset, table.fmt.last, 0, 0, 0], dtype=np.uint16)
    return _block(header, _padded(slopes, 64, np.uint16), _padded(bases, 64, np.uint16))


def shift(table: Table) -> Block | None:
    """Return a ``rarefy_shift16`` or ``rarefy_shift32``, or None when the kernel cannot run the table."""
    fmt = table.fmt
    if (
        not isinstance(table, ShiftTable)
        or table.index.rows != 32
        or fmt.bits not in (16, 32)
        or not 0 < table.identity_below <= fmt.one
    ):
        return None
    header = [table.identity_below, table.saturate_above, fmt.one, fmt.last]
    header += [fmt.mantissa_bits - table.index.mantissa_bits, fmt.mantissa_mask, 0, 0]
    base = [(e << fmt.mantissa_bits) + b for e, _, b in table.rows]
    shifts = [r for _, r, _ in table.rows]
    return _block(np.array(header, dtype=fmt.dtype), _padded(shifts, 32, fmt.dtype), _padded(base, 32, fmt.dtype))


def for_table(table: Table, answers: npt.NDArray[Any] | None = None) -> KernelSteps:
    """Return the kernels for a table of integers; none for a table in float32 that is not of the paper's size.

    ``answers`` are its results for all inputs, where they are known already.
    """
    fmt = table.fmt
    steps: list[tuple[str, Block]] = []
    linear, shifted = linear16(table), shift(table)
    if linear is not None:
        steps.append(("act_linear16", linear))
    if shifted is not None:
        steps.append((f"act_shift{fmt.bits}", shifted))
    if fmt.bits <= 16:
        steps += lookup(fmt.name, table.compute(fmt.all_bits()) if answers is None else answers).steps
    return KernelSteps(fmt.dtype, tuple(steps))


def lookup(fmt: str, answers: npt.NDArray[Any], first: str | None = None) -> KernelSteps:
    """Look answers up by the bits of the input; ``first`` names a kernel to try before, on them too."""
    f = formats.get(fmt)
    block = _block(answers.astype(f.dtype))
    names = [first] if first is not None else []
    return KernelSteps(f.dtype, tuple((name, block) for name in [*names, f"act_lut{f.bits}"]))


def gate(function: str, answers: npt.NDArray[Any]) -> KernelSteps:
    """Compute exact sigmoid, silu, gelu and gelu_tanh in bf16, by float32 where a kernel can, else looked up."""
    return lookup("bf16", answers, f"act_{function}_bf16")


def float32(function: str, mode: str) -> KernelSteps:
    """Compute mode "exact" or "fast" of all but tanh in float32; the kernels read no table."""
    # what is exact in the others is fast enough
    quick = mode == "fast" and function in ("sigmoid", "silu", "gelu")
    name = f"act_{function}32_fast" if quick else f"act_{function}32"
    return KernelSteps(np.uint32, ((name, _block(np.zeros(16, dtype=np.uint32))),))


def hard16(fmt: str) -> Block:
    """Return the table of ``act_hard16``."""
    f = formats.get(fmt)
    return _block(np.array([f.one, f.last], dtype=np.uint16))


def hard(fmt: str, answers: npt.NDArray[Any]) -> KernelSteps:
    """Compute HardTanh of a 16-bit format."""
    return KernelSteps(np.uint16, (("act_hard16", hard16(fmt)), *lookup(fmt, answers).steps))


def quartic(table: Quartic) -> KernelSteps:
    """Return the kernel of a float32 quartic."""
    header = np.zeros(16, dtype=np.float32)
    header[0] = LIMIT
    return KernelSteps(np.uint32, (("act_tanh32", _block(header, quartic_begins(), table.values())),))
