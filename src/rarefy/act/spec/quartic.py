"""tanh in float32 as 32 quartics: the one exact mode that is arithmetic and not a table of integers.

With ``w = |x| + 1`` the segment is ``bits(w) >> 20 mod 32``: eight segments for each doubling of w, so they are 1/8
wide up to |x| = 1, 1/4 up to 3, 1/2 up to 7, then 1. In a segment that begins at ``a``

    y = c0 + f (c1 + f (c2 + f (c3 + f c4))),   f = |x| - a

where each bracket is a fused multiply-add, rounded to float32 once. NumPy and PyTorch have no such operation, so the
reference makes it from float64: the product is exact there, the sum is rounded to odd, and rounding that to float32
is then the only rounding. So every path gives the same bits. The first segment has c0 = 0 and c1 = 1, which keeps the
relative error small down to the subnormals.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from rarefy.act.spec import subnormals
from rarefy.act.spec.formats import FP32

SEGMENTS = 32
#: |x| is clamped to the largest float32 below 15, so that |x| + 1 stays below 16.
LIMIT = float(np.nextafter(np.float32(15.0), np.float32(0.0)))

#: The bounds that the tests enforce: absolute, and in units of the last place of the true value (subnormals included).
MAX_ABS = 1.3e-7
MAX_ULP = 6.0

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Quartic:
    """Coefficients ``[5][32]`` as the bits of float32 numbers, lowest power first."""

    coefficients: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.coefficients) != 5 or any(len(row) != SEGMENTS for row in self.coefficients):
            raise ValueError(f"a quartic table holds 5 rows of {SEGMENTS} coefficients")

    def values(self) -> Floats:
        """Return the coefficients as float32, shape [5, 32]."""
        return np.array(self.coefficients, dtype=np.uint32).view(np.float32)

    @subnormals.kept()
    def compute(self, bits: npt.ArrayLike) -> npt.NDArray[Any]:
        """Compute the function of float32 bit patterns, any shape: the reference of the kernels. A NaN stays a NaN."""
        given = np.asarray(bits, dtype=np.uint32)
        sign = given & np.uint32(FP32.sign)
        a = (given & np.uint32(FP32.sign - 1)).view(np.float32)
        with np.errstate(invalid="ignore"):
            a = np.minimum(a, np.float32(LIMIT))  # keeps NaN
            row = ((a + np.float32(1.0)).view(np.uint32) >> np.uint32(20)) & np.uint32(SEGMENTS - 1)
            f = a - begins()[row]
            c = self.values()
            y = c[4][row]
            for k in (3, 2, 1, 0):
                y = fused(y, f, c[k][row])
        result: npt.NDArray[Any] = (y.view(np.uint32) & np.uint32(FP32.sign - 1)) | sign
        return np.where(np.isnan(a), given, result)

    def to_json(self) -> str:
        """Write one line of hexadecimal coefficients a power."""
        rows = ",\n ".join(json.dumps([f"{c:08x}" for c in row]) for row in self.coefficients)
        return f'{{"rarefy_quartic": 1, "coefficients": [\n {rows}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Quartic:
        """Read what :meth:`to_json` wrote."""
        return cls(tuple(tuple(int(c, 16) for c in row) for row in json.loads(text)["coefficients"]))


def begins() -> Floats:
    """Return where each segment begins, shape [32], in the order of the rows."""
    values = np.zeros(SEGMENTS)
    for segment in range(SEGMENTS):
        values[row_of(segment)] = span(segment)[0]
    return values.astype(np.float32)


def span(segment: int) -> tuple[float, float]:
    """Return begin and width of a segment, counted from 0 up."""
    octave, part = divmod(segment, 8)
    return 2.0**octave * (1 + part / 8) - 1.0, 2.0**octave / 8


def row_of(segment: int) -> int:
    """Return the row of a segment: the low two bits of the exponent field 127 + octave of w, then the part."""
    octave, part = divmod(segment, 8)
    return ((127 + octave) & 3) * 8 + part


def fused(a: Floats, b: Floats, c: Floats) -> Floats:
    """Return the float32 nearest to ``a * b + c``, for finite numbers."""
    p, d = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    s = p + d
    back = s - p
    error = (p - (s - back)) + (d - back)  # what the sum lost, exactly
    bits = s.view(np.int64)  # to odd: then rounding to float32 is the only rounding
    odd = np.where((error != 0) & (bits & 1 == 0), bits + np.where((error > 0) == (s > 0), 1, -1), bits)
    return odd.view(np.float64).astype(np.float32)


@cache
def tanh() -> Quartic:
    """Return the shipped coefficients of tanh."""
    return Quartic.from_json((resources.files("rarefy.act") / "tables" / "quartic" / "tanh_fp32.json").read_text())
