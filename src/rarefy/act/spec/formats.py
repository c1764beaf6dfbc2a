"""Floating-point formats as (exponent bits, mantissa bits, bias), and exact conversion between bits and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: sign, ``exponent_bits``, ``mantissa_bits``; value (1 + M / 2^m) * 2^(E - bias).

    ``infinities`` tells whether the highest exponent holds infinity and NaN (IEEE 754); without it only the pattern of
    all ones is NaN (e4m3fn). Bits are held in int64 arrays, so that sums and differences of them cannot wrap.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    infinities: bool = True

    @property
    def bits(self) -> int:
        """Width of the format in bits, the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << (self.bits - 1)

    @property
    def mantissa_mask(self) -> int:
        """The bits of the mantissa field."""
        return (1 << self.mantissa_bits) - 1

    @property
    def one(self) -> int:
        """The bits of 1.0."""
        return self.bias << self.mantissa_bits

    @property
    def last(self) -> int:
        """The largest magnitude that is not NaN: infinity, or the largest finite number where there is no infinity."""
        if self.infinities:
            return ((1 << self.exponent_bits) - 1) << self.mantissa_bits
        return self.sign - 2

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The NumPy type that holds one value's bits."""
        types: dict[int, type[np.unsignedinteger[Any]]] = {8: np.uint8, 16: np.uint16, 32: np.uint32}
        return types[self.bits]

    def all_bits(self) -> Bits:
        """List every bit pattern of a format of at most 16 bits, 0 up."""
        if self.bits > 16:
            raise ValueError(f"{self.name} has 2^{self.bits} bit patterns; only formats of 16 bits or less are listed")
        return np.arange(1 << self.bits, dtype=np.int64)

    def is_nan(self, bits: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Tell which bit patterns are NaN."""
        return (np.asarray(bits, dtype=np.int64) & (self.sign - 1)) > self.last

    def decode(self, bits: npt.ArrayLike) -> Values:
        """Return the values of bit patterns in float64, exactly (NaN patterns give NaN)."""
        b = np.asarray(bits, dtype=np.int64)
        exponent = (b & (self.sign - 1)) >> self.mantissa_bits
        mantissa = (b & self.mantissa_mask).astype(np.float64)
        implicit = np.where(exponent > 0, float(1 << self.mantissa_bits), 0.0)
        scale = np.maximum(exponent, 1) - self.bias - self.mantissa_bits
        value = np.ldexp(implicit + mantissa, scale.astype(np.int32))
        if self.infinities:
            value = np.where((b & (self.sign - 1)) == self.last, np.inf, value)
        value = np.where(self.is_nan(b), np.nan, value)
        return np.where(b & self.sign, -value, value)

    def encode(self, values: npt.ArrayLike, residual: npt.ArrayLike = 0.0) -> Bits:
        """Return the bits of the number nearest to ``values + residual``, ties to even: one rounding, subnormals too.

        ``residual`` is too small to change a float64 value; its sign alone decides where ``values`` is a tie. What is
        too large becomes infinity, or NaN in a format without one. NaN becomes the quiet NaN of positive sign.
        """
        v = np.asarray(values, dtype=np.float64)
        a = np.abs(v)
        with np.errstate(invalid="ignore", over="ignore"):
            units, fraction, exponent = self._units(a)
            toward = np.asarray(residual, dtype=np.float64) * np.where(np.signbit(v), -1.0, 1.0)
            up = (fraction > 0.5) | ((fraction == 0.5) & ((toward > 0) | ((toward == 0) & (np.mod(units, 2.0) == 1.0))))
            magnitude = (units + up).astype(np.int64)
            # a normal number's units hold the implicit bit, which is one step of the exponent field
            field = np.maximum(exponent + self.bias, 1).astype(np.int64)
            b = magnitude + ((field - 1) << self.mantissa_bits)
        quiet = self.sign - 1 if not self.infinities else self.last | (1 << (self.mantissa_bits - 1))
        b = np.where(b > self.last, self.last if self.infinities else quiet, b)
        b = np.where(np.isinf(v), self.last if self.infinities else quiet, b)
        return np.where(np.isnan(v), quiet, np.where(np.signbit(v), b | self.sign, b))

    def tie_distance(self, values: npt.ArrayLike) -> Values:
        """Return how far each value is from the nearest tie of two neighbours, in units of the last place, 0 to 0.5."""
        _, fraction, _ = self._units(np.abs(np.asarray(values, dtype=np.float64)))
        return np.abs(fraction - 0.5)

    def _units(self, magnitude: Values) -> tuple[Values, Values, npt.NDArray[np.int32]]:
        """Whole units of the last place, the fraction that is left, and the exponent of the leading bit."""
        exponent = np.where(magnitude > 0, np.frexp(magnitude)[1] - 1, 1 - self.bias)
        exponent = np.maximum(exponent, 1 - self.bias).astype(np.int32)
        scaled = np.ldexp(magnitude, self.mantissa_bits - exponent)
        units = np.floor(scaled)
        return units, scaled - units, exponent


BF16 = Format("bf16", 8, 7, 127)
FP16 = Format("fp16", 5, 10, 15)
FP32 = Format("fp32", 8, 23, 127)
E4M3 = Format("e4m3fn", 4, 3, 7, infinities=False)
E5M2 = Format("e5m2", 5, 2, 15)

#: Every format by its name.
FORMATS = {f.name: f for f in (BF16, FP16, FP32, E4M3, E5M2)}


def get(name: str | Format) -> Format:
    """Return the format of this name; raises ValueError for a name that is none."""
    if isinstance(name, Format):
        return name
    try:
        return FORMATS[name]
    except KeyError:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}") from None


def patterns(fmt: Format, bits: npt.ArrayLike) -> Bits:
    """Give bit patterns of a format as int64; raises TypeError for other than integers, ValueError for wider ones."""
    given = np.asarray(bits)
    if given.dtype.kind not in "ui":
        raise TypeError(f"compute takes bit patterns as integers, got {given.dtype}; view floats as integers first")
    x = given.astype(np.int64)
    if x.size and (x.min() < 0 or x.max() >= 1 << fmt.bits):
        raise ValueError(f"bit patterns of {fmt.name} lie in 0 to {(1 << fmt.bits) - 1:#x}")
    return x
