"""``Table``: one object that is the specification of an activation unit, its software model and its file.

Tables map the bits of a number to the bits of the function's value, with integer operations alone, in four forms:

``shift`` and ``carry``, :class:`ShiftTable` and :class:`CarryTable` (K-TanH, arXiv 1909.07729, algorithm 1)
    ``u`` is the magnitude's bits, ``M`` its mantissa field of ``m`` bits. The low ``exponent_bits`` of the exponent and
    the high ``mantissa_bits`` of the mantissa are the row ``t``, whose parameters are (E, r, b):
    ``y = E << m | ((M >> r) + b)`` (``shift``; the sum stays inside the mantissa field), or the same with a plus, so
    that a row may cross into the next exponent (``carry``). Below T1 y is the input, above T2 it is 1.

``linear``, :class:`LinearTable`
    ``d = clamp(u - start, 0, length)``, row ``t = d * factor >> 16`` with parameters (S, B):
    ``y = offset + (((B + S * d) mod 2^16) >> fraction_bits)``; below ``identity_below`` y is the input. A table without
    symmetry has as many rows again for negative inputs, above the others.

``segments``, :class:`SegmentsTable`
    Row (first, S, B) holds from the pattern ``first`` up to the next row's: ``y = (B + S * (u - first)) >> f`` with
    ``f = fraction_bits``. With odd symmetry ``u`` is the magnitude, else the whole pattern, the sign bit included.

In every form a NaN passes unchanged, and under odd symmetry y takes the sign of the input.
"""

from __future__ import annotations

import json
from abc import ABCMeta, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from rarefy._files import load_shipped, shipped_names, write_atomically
from rarefy.act.spec import formats
from rarefy.act.spec.formats import Bits, Format, patterns

FILE_VERSION = 1
_NUMBERS = ("identity_below", "saturate_above", "fraction_bits", "offset")
#: Keys that every file holds, and their value in a table whose form has no such field.
_OPTIONAL: dict[str, Any] = {"symmetry": "odd", **dict.fromkeys(_NUMBERS, 0)}


@dataclass(frozen=True)
class BitIndex:
    """Row index of ``shift`` and ``carry``: low bits of the exponent, then high bits of the mantissa."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def rows(self) -> int:
        """How many rows such an index addresses."""
        return 1 << (self.exponent_bits + self.mantissa_bits)


@dataclass(frozen=True)
class MultiplyIndex:
    """Row index of ``linear``: ``clamp(u - start, 0, length) * factor >> 16``."""

    start: int
    length: int
    factor: int

    @property
    def rows(self) -> int:
        """How many rows such an index addresses."""
        return (self.length * self.factor >> 16) + 1


@dataclass(frozen=True)
class CutIndex:
    """Row index of ``segments``: the last row whose first pattern is not above the input's."""


Index: TypeAlias = BitIndex | MultiplyIndex | CutIndex


class _ByForm(ABCMeta):
    """Lets ``Table(name, function, format, form, index, rows, ...)`` make the table of that form."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if cls is not Table:
            return super().__call__(*args, **options)
        form = options.pop("form", args[3] if len(args) > 3 else None)
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        return FORMS[form](*args[:3], *args[4:], **options)


@dataclass(frozen=True)
class Table(metaclass=_ByForm):
    """A function in a format as rows of integers: what the forms share; see the module for what they compute.

    Make one by its form, ``Table(name, function, format, form, index, rows, ...)`` or :class:`ShiftTable`,
    :class:`CarryTable`, :class:`LinearTable` and :class:`SegmentsTable`, by a fit (:mod:`rarefy.act.fit`), or from a
    file (:func:`load`).

    Args:
        name: what files and messages call it.
        function: the function it stands for: "tanh", "sigmoid", "silu", "gelu", "gelu_tanh", or a name of your own.
        format: name of the format of input and output ("bf16", "fp16", "fp32", "e4m3fn", "e5m2").
        index: how a row is chosen.
        rows: the parameters, one tuple of integers a row.

    Raises ValueError, naming the row, when the table is not one that its form can hold.

    """

    #: What files and messages call the form.
    form: ClassVar[str]
    #: What the integers of a row are called.
    columns: ClassVar[tuple[str, ...]]
    _index_type: ClassVar[type[BitIndex] | type[MultiplyIndex] | type[CutIndex]]

    name: str
    function: str
    format: str
    index: Index
    rows: tuple[tuple[int, ...], ...]
    #: The table as JSON: what an operator of PyTorch takes, and an attribute since a traced program can read one.
    text: str = field(init=False, repr=False, compare=False, default="")

    # What some forms have as fields, and what it is in those that have not.

    @property
    def symmetry(self) -> str:
        """Either "odd" (f(-x) = -f(x), rows hold magnitudes) or "none"."""
        return "odd"

    @property
    def identity_below(self) -> int:
        """T1 as bits: magnitudes below give themselves."""
        return 0

    @property
    def saturate_above(self) -> int:
        """T2 as bits: magnitudes above give 1.0."""
        return 0

    @property
    def fraction_bits(self) -> int:
        """Fraction bits of the sum."""
        return 0

    @property
    def offset(self) -> int:
        """What is added after the shift."""
        return 0

    @cached_property
    def fmt(self) -> Format:
        """The format of input and output."""
        return formats.get(self.format)

    def __post_init__(self) -> None:
        for key in ("name", "function", "format", "symmetry"):
            if not isinstance(getattr(self, key), str):
                raise ValueError(f"{key} of a table must be a string, got {_short(getattr(self, key))}")
        numbers = {key: getattr(self, key) for key in _NUMBERS}
        for key, value in (numbers | vars(self.index)).items():
            if type(value) is not int or abs(value) >= 1 << 32:
                raise ValueError(f"{self.name}: {key} must be an integer of at most 32 bits, got {_short(value)}")
        formats.get(self.format)  # raises for a name that is none
        if self.symmetry not in ("odd", "none"):
            raise ValueError(f'{self.name}: symmetry must be "odd" or "none", got {self.symmetry!r}')
        if not isinstance(self.index, self._index_type):
            raise ValueError(f"{self.name}: form {self.form} needs a {self._index_type.__name__}, got {self.index}")
        if not self.rows:
            raise ValueError(f"{self.name}: a table needs rows")
        columns = len(self.columns)
        for t, row in enumerate(self.rows):
            if len(row) != columns or not all(type(value) is int for value in row):
                raise ValueError(f"{self.name}: row {t} must be {columns} integers, got {_short(row)}")
            if any(abs(value) >= 1 << 62 for value in row):
                raise ValueError(f"{self.name}: row {t} must hold integers of at most 62 bits, got {_short(row)}")
        self._check()
        object.__setattr__(self, "text", self._json())

    @abstractmethod
    def _check(self) -> None:
        """Raise ValueError where the numbers are none that the form can compute with."""

    @abstractmethod
    def _results(self, x: Bits) -> Bits:
        """Return the results of patterns, before the sign that odd symmetry gives them."""

    def _changes(self, new: Format, extra: int) -> dict[str, Any] | None:
        """Return what differs in a format with ``extra`` more bits of mantissa; None for a form that does not move."""
        return None

    def compute(self, bits: npt.ArrayLike) -> npt.NDArray[Any]:
        """Compute the function of an array of bit patterns, any shape, as unsigned integers of the format's width.

        This is the reference: every kernel, the PyTorch fallback and the hardware equal it bit for bit.
        Raises TypeError for an array that does not hold integers, ValueError for patterns wider than the format.
        """
        x = patterns(self.fmt, bits)
        result: npt.NDArray[Any] = np.where(self.fmt.is_nan(x), x, self.arithmetic(x)).astype(self.fmt.dtype)
        return result

    def arithmetic(self, bits: npt.ArrayLike) -> npt.NDArray[Any]:
        """Compute as :meth:`compute`, but let a NaN pass through the arithmetic like any other pattern.

        Results are modulo the format's bits. This is what hardware without logic for NaN gives.
        """
        x, fmt = patterns(self.fmt, bits), self.fmt
        y = self._results(x)
        if self.symmetry == "odd":
            y = y & (fmt.sign - 1) | (x & fmt.sign)
        return (y & ((1 << fmt.bits) - 1)).astype(fmt.dtype)

    def _columns(self) -> tuple[Bits, ...]:
        return tuple(np.array(column, dtype=np.int64) for column in zip(*self.rows, strict=True))

    def to_format(self, fmt: str | Format, name: str | None = None) -> Table:
        """Return the same table in a format with at least as many mantissa bits (bf16 to fp16 or fp32).

        ``shift`` and ``carry``: E moves by the difference of the biases; b, T1 and T2 gain zeros at their low end. T2
        keeps its value. ``segments``: only between formats of as many exponent bits (bf16 to fp32). Patterns and B gain
        zeros at their low end; a falling line of slope up to -1 is moved so that it rounds as before. In rows of slope
        0 or a power of two of at most 1, the result's high bits are the narrow table's for the input's high bits.
        """
        new = formats.get(fmt)
        extra = new.mantissa_bits - self.fmt.mantissa_bits
        changes = None if extra < 0 else self._changes(new, extra)
        if changes is None:
            raise ValueError(f"{self.name}: only shift, carry and segments tables move, and to no shorter mantissa")
        return replace(self, name=name or f"{self.name}_{new.name}", format=new.name, **changes)

    def to_json(self) -> str:
        """Return the table as JSON, one line a row, rows last; :meth:`from_json` gives an equal table back."""
        return self.text

    def _json(self) -> str:
        head: dict[str, Any] = {"rarefy_table": FILE_VERSION}
        head |= {key: getattr(self, key) for key in ("name", "function", "format", "form", *_OPTIONAL)}
        head["index"] = {f.name: getattr(self.index, f.name) for f in fields(self.index)}
        text = json.dumps(head, indent=1)[:-2]
        rows = ",\n  ".join(json.dumps(row) for row in self.rows)
        return f'{text},\n "rows": [\n  {rows}\n ]\n}}\n'

    @staticmethod
    def from_json(text: str) -> Table:
        """Read the table of a JSON text; raises ValueError when the text is none or the table is not valid."""
        try:
            data = json.loads(text)
        except RecursionError:
            raise ValueError("not a table: its JSON is nested too deeply") from None
        except ValueError as error:  # no JSON, or an integer of thousands of digits
            raise ValueError(f"not a table: {error}") from None
        if not isinstance(data, Mapping) or data.get("rarefy_table") != FILE_VERSION:
            raise ValueError(f"not a table of version {FILE_VERSION}")
        values = {key: value for key, value in data.items() if key != "rarefy_table"}
        _check_kinds(values)
        kind = FORMS[values.pop("form")]
        own = {f.name for f in fields(kind)}
        for key, only in _OPTIONAL.items():
            if key not in own and (given := values.pop(key, only)) != only:
                raise ValueError(f"{values.get('name')}: form {kind.form} needs {key} {only!r}, got {_short(given)}")
        try:
            index: Any = kind._index_type(**values.pop("index"))
            rows = tuple(tuple(row) for row in values.pop("rows"))
            return kind(index=index, rows=rows, **values)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:  # a key too many, or one that is missing
            raise ValueError(f"not a table: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the table to a file: beside it first, then renamed, so that no half-written file is left."""
        write_atomically(Path(path), lambda beside: beside.write_text(self.to_json(), encoding="utf-8"))


@dataclass(frozen=True)
class ShiftTable(Table):
    """K-TanH: between T1 and T2 a row (E, r, b) gives ``y = (E, (M >> r) + b)``, inside the mantissa field."""

    form: ClassVar[str] = "shift"
    columns: ClassVar[tuple[str, ...]] = ("E", "r", "b")
    #: Whether a row may cross into the next exponent.
    carries: ClassVar[bool] = False
    _index_type = BitIndex

    index: BitIndex
    identity_below: int = 0
    saturate_above: int = 0

    def _check(self) -> None:
        fmt, index = self.fmt, self.index
        if not (0 < index.exponent_bits <= fmt.exponent_bits and 0 <= index.mantissa_bits <= fmt.mantissa_bits):
            raise ValueError(f"{self.name}: {index} does not fit {fmt.name}")
        if len(self.rows) != index.rows:
            raise ValueError(f"{self.name}: {index} addresses {index.rows} rows, got {len(self.rows)}")
        if not 0 <= self.identity_below <= self.saturate_above <= fmt.last:
            raise ValueError(
                f"{self.name}: needs 0 <= T1 <= T2, got {self.identity_below:#x} and {self.saturate_above:#x}"
            )
        for t, (e, r, _) in enumerate(self.rows):
            if not 0 <= e < 1 << fmt.exponent_bits or not 0 <= r <= fmt.mantissa_bits:
                raise ValueError(f"{self.name}: row {t} must have E in {fmt.name} and 0 <= r <= {fmt.mantissa_bits}")
        # Only rows that inputs between T1 and T2 reach must stay in range; the rest are never read.
        m, low = fmt.mantissa_bits, fmt.mantissa_bits - index.mantissa_bits
        for chunk in range(self.identity_below >> low, (self.saturate_above >> low) + 1):
            t = chunk & (index.rows - 1)
            e, r, b = self.rows[t]
            first = max(chunk << low, self.identity_below) & fmt.mantissa_mask
            last = min((chunk << low) + (1 << low) - 1, self.saturate_above) & fmt.mantissa_mask
            least, most = (first >> r) + b, (last >> r) + b
            if not self.carries and not (least >= 0 and most <= fmt.mantissa_mask):
                raise ValueError(f"{self.name}: row {t} {self.rows[t]} leaves the mantissa field ({least} to {most})")
            if (e << m) + least < 0 or (e << m) + most > fmt.last:
                raise ValueError(f"{self.name}: row {t} {self.rows[t]} leaves the range of {fmt.name}")

    def _results(self, x: Bits) -> Bits:
        fmt = self.fmt
        u = x & (fmt.sign - 1)
        exponents, shifts, biases = self._columns()
        t = (u >> (fmt.mantissa_bits - self.index.mantissa_bits)) & (self.index.rows - 1)
        # y = (E, (M >> r) + b)
        y = (exponents[t] << fmt.mantissa_bits) + ((u & fmt.mantissa_mask) >> shifts[t]) + biases[t]
        y = np.where(u < self.identity_below, u, y)
        return np.where(u > self.saturate_above, fmt.one, y)

    def _changes(self, new: Format, extra: int) -> dict[str, Any]:
        rebias = new.bias - self.fmt.bias
        return {
            "rows": tuple((e + rebias, r, b << extra) for e, r, b in self.rows),
            "identity_below": (self.identity_below << extra) + (rebias << new.mantissa_bits),
            "saturate_above": (self.saturate_above << extra) + (rebias << new.mantissa_bits),
        }


@dataclass(frozen=True)
class CarryTable(ShiftTable):
    """As :class:`ShiftTable`, but ``y = E << m + (M >> r) + b``: a row may cross into the next exponent."""

    form: ClassVar[str] = "carry"
    carries: ClassVar[bool] = True


@dataclass(frozen=True)
class LinearTable(Table):
    """``y = offset + (((B + S * d) mod 2^16) >> fraction_bits)``, ``d = clamp(u - start, 0, length)``; x below T1."""

    form: ClassVar[str] = "linear"
    columns: ClassVar[tuple[str, ...]] = ("S", "B")
    _index_type = MultiplyIndex

    index: MultiplyIndex
    symmetry: str = "odd"
    identity_below: int = 0
    fraction_bits: int = 0
    offset: int = 0

    def _check(self) -> None:
        fmt, i = self.fmt, self.index
        if fmt.bits != 16:
            raise ValueError(f"{self.name}: form linear is for formats of 16 bits, got {fmt.name}")
        if not (i.start >= 0 and i.length > 0 and i.start + i.length <= fmt.last and 0 < i.factor < 1 << 16):
            raise ValueError(f"{self.name}: {i} does not fit {fmt.name}")
        rows = i.rows * (1 if self.symmetry == "odd" else 2)
        if len(self.rows) != rows:
            raise ValueError(
                f"{self.name}: {i} with symmetry {self.symmetry!r} needs {rows} rows, got {len(self.rows)}"
            )
        if not 0 <= self.fraction_bits < 16 or not 0 <= self.identity_below <= fmt.last:
            raise ValueError(f"{self.name}: fraction_bits must be 0 to 15, and T1 a magnitude")
        for t, row in enumerate(self.rows):
            if not all(0 <= value < 1 << 16 for value in row):
                raise ValueError(f"{self.name}: row {t} must be two 16-bit numbers, got {row!r}")
        if not 0 <= self.offset <= fmt.last - (0xFFFF >> self.fraction_bits):
            raise ValueError(f"{self.name}: offset {self.offset:#x} lets values leave the range of {fmt.name}")

    def _results(self, x: Bits) -> Bits:
        u = x & (self.fmt.sign - 1)
        slopes, bases = self._columns()
        d = np.clip(u - self.index.start, 0, self.index.length)
        t = d * self.index.factor >> 16
        if self.symmetry == "none":
            t = np.where(x & self.fmt.sign, t + self.index.rows, t)
        # y = offset + (B + S d mod 2^16) / 2^f
        y = self.offset + (((bases[t] + slopes[t] * d) & 0xFFFF) >> self.fraction_bits)
        return np.where(u < self.identity_below, u, y)


@dataclass(frozen=True)
class SegmentsTable(Table):
    """Row (first, S, B) holds up to the next row's first: ``y = (B + S * (u - first)) >> fraction_bits``."""

    form: ClassVar[str] = "segments"
    columns: ClassVar[tuple[str, ...]] = ("first", "S", "B")
    _index_type = CutIndex

    index: CutIndex
    symmetry: str = "odd"
    fraction_bits: int = 0

    def _check(self) -> None:
        fmt = self.fmt
        if not 0 <= self.fraction_bits <= 31:
            raise ValueError(f"{self.name}: form segments needs 0 to 31 fraction bits")
        firsts = [row[0] for row in self.rows]
        if firsts[0] != 0 or any(a >= b for a, b in pairwise(firsts)) or firsts[-1] >= 1 << fmt.bits:
            raise ValueError(f"{self.name}: rows must begin at 0 and ascend within {fmt.bits} bits")
        ends = [*firsts[1:], 1 << fmt.bits if self.symmetry == "none" else fmt.sign]
        for t, ((first, slope, base), end) in enumerate(zip(self.rows, ends, strict=True)):
            if max(abs(slope) << fmt.bits, abs(base)) >= 1 << 62:
                raise ValueError(f"{self.name}: row {t} {self.rows[t]} needs sums of more than 63 bits")
            # a line is extreme at its ends: those of the numbers, NaN left out, of either sign
            for low, high in ((0, fmt.last), (fmt.sign, fmt.sign + fmt.last)):
                for u in (max(first, low), min(end - 1, high)):
                    y = base + slope * (u - first) >> self.fraction_bits
                    if max(first, low) <= min(end - 1, high) and not 0 <= y < 1 << fmt.bits:
                        raise ValueError(f"{self.name}: row {t} {self.rows[t]} leaves the range of {fmt.name}")

    def _results(self, x: Bits) -> Bits:
        u = x & (self.fmt.sign - 1) if self.symmetry == "odd" else x
        firsts, slopes, bases = self._columns()
        t = np.searchsorted(firsts, u, side="right") - 1
        # y = (B + S d) / 2^f
        return (bases[t] + slopes[t] * (u - firsts[t])) >> self.fraction_bits

    def _changes(self, new: Format, extra: int) -> dict[str, Any]:
        if self.fmt.exponent_bits != new.exponent_bits:
            raise ValueError(f"{self.name}: a segments table in {self.format} does not move to {new.name}: fit it anew")
        one = 1 << self.fraction_bits
        rows = (
            (first << extra, slope, (base << extra) + (-slope * ((1 << extra) - 1) if -one <= slope < 0 else 0))
            for first, slope, base in self.rows
        )
        return {"rows": tuple(rows)}


#: Every form by what files call it.
FORMS: dict[str, type[ShiftTable] | type[LinearTable] | type[SegmentsTable]] = {
    kind.form: kind for kind in (ShiftTable, CarryTable, LinearTable, SegmentsTable)
}
#: What the integers of a row are called, by form.
COLUMNS = {form: kind.columns for form, kind in FORMS.items()}


def _check_kinds(values: Mapping[str, Any]) -> None:
    """Raise ValueError where a table's text has other kinds of values than its fields, or more than any table has."""
    for key, kind in (("form", str), ("index", dict), ("rows", list)):
        if not isinstance(values.get(key), kind):
            raise ValueError(f"not a table: {key!r} must be a {kind.__name__}, got {_short(values.get(key))}")
    if values["form"] not in FORMS:
        raise ValueError(f"not a table: form must be one of {', '.join(FORMS)}, got {_short(values['form'])}")
    rows = values["rows"]
    for t, row in enumerate(rows):
        if not isinstance(row, list):
            raise ValueError(f"not a table: row {t} must be a list of integers, got {_short(row)}")
    integers = [values.get(key, 0) for key in _NUMBERS]
    integers += values["index"].values()
    if not all(type(number) is int and abs(number) < 1 << 63 for number in integers):
        raise ValueError("not a table: thresholds, bits, offset and index must be integers of at most 63 bits")
    for key in ("name", "function", "format", "symmetry"):
        if not isinstance(values.get(key, ""), str):
            raise ValueError(f"not a table: {key} must be text, got {values[key]!r:.80}")
    if len(rows) > 1 << 20:
        raise ValueError("not a table: rows must be a list of at most 2^20 lists")
    if not all(type(number) is int and abs(number) < 1 << 63 for row in rows for number in row):
        raise ValueError("not a table: rows hold integers of at most 63 bits")


def _short(value: object) -> str:
    """Show a value in a message: one line of a length to read."""
    if isinstance(value, int) and abs(value) >= 1 << 128:
        return f"an integer of {value.bit_length()} bits"
    text = ascii(value) if not isinstance(value, (tuple, list, dict)) else ascii(str(value)[:200])[1:-1]
    return text if len(text) <= 100 else f"{text[:100]}..."


_SHIPPED = resources.files("rarefy.act") / "tables"


def list_tables() -> list[str]:
    """List the names of the shipped tables."""
    return shipped_names(_SHIPPED)


def load(name: str | Path) -> Table:
    """Load a shipped table by its name, or a table from a ``.json`` file; raises ValueError when there is none."""
    return load_shipped(name, _SHIPPED, "table", "a table", _parsed)


@lru_cache(maxsize=64)
def _parsed(text: str) -> Table:
    """Return a table by what its file holds: a file that is named in every call is read, not parsed, each time."""
    return Table.from_json(text)
