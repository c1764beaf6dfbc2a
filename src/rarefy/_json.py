"""JSON that was left behind and anybody may have changed: values of their type, or a ValueError that says where."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")


class Fields:
    """A JSON object and where it stands, so that a value of the wrong type is named in the error, a ValueError.

    Args:
        value: what is there; anything but an object is refused. Tuples stand for lists.
        where: the file, and the place in it.
        advice: what to do about a wrong value.
        finite: whether NaN and infinite numbers are wrong, too.
    """

    def __init__(self, value: object, where: str, advice: str = "", *, finite: bool = True) -> None:
        self.where, self.advice, self.finite = where, advice, finite
        if not isinstance(value, Mapping):
            raise self.wrong(f"expected a JSON object, got {value!r:.80}")
        self.value = value

    def wrong(self, what: str) -> ValueError:
        """The error that says what is wrong here."""
        return ValueError(f"{self.where}: {what}" + (f"; {self.advice}" if self.advice else ""))

    def _number(self, value: object) -> float | None:
        """A JSON number as a float; None for anything else, and for one that no float holds."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            with suppress(OverflowError):
                return float(value) if math.isfinite(value) or not self.finite else None
        return None

    def number(self, key: str) -> float | None:
        value = self.value.get(key)
        found = self._number(value)
        if found is None and value is not None:
            raise self.wrong(f"{key} must be a number, got {value!r:.80}")
        return found

    def integer(self, key: str) -> int | None:
        value = self.number(key)
        if value is None or value.is_integer():
            return None if value is None else int(value)
        raise self.wrong(f"{key} must be a whole number, got {value!r}")

    def text(self, key: str) -> str | None:
        value = self.value.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self.wrong(f"{key} must be text, got {value!r:.80}")

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.value.get(key)
        found = [self._number(item) for item in value] if isinstance(value, (list, tuple)) else [None]
        numbers = tuple(item for item in found if item is not None)
        if len(numbers) == len(found):
            return numbers
        raise self.wrong(f"{key} must be a list of numbers, got {value!r:.80}")

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.value.get(key)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise self.wrong(f"{key} must be a list of texts, got {value!r:.80}")

    def rows(self, key: str, count: int, width: int) -> tuple[tuple[float, ...], ...]:
        value = self.value.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.wrong(f"{key} must be a list of {count} rows, got {value!r:.80}")
        rows = tuple(self._inner({key: row}, self.where).numbers(key) for row in value)
        if any(len(row) != width for row in rows):
            raise self.wrong(f"{key} must have {width} numbers in each row, got {value!r:.80}")
        return rows

    def objects(self, key: str) -> list[Fields]:
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, (list, tuple)):
            raise self.wrong(f"{key} must be a list, got {value!r:.80}")
        return [self._inner(item, f"{self.where}: {key}[{i}]") for i, item in enumerate(value)]

    def _inner(self, value: object, where: str) -> Fields:
        return Fields(value, where, self.advice, finite=self.finite)

    def read(self, kind: type[_T], /, **given: object) -> _T:
        """A dataclass of this object's values: those not given are read by the type of their field."""
        readers = {"float": self.number, "int": self.integer, "str": self.text}
        values = dict(given)
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # every kind here is a dataclass
            if field.name not in given:
                wanted, optional, _ = str(field.type).partition(" | None")
                values[field.name] = readers[wanted](field.name)
                if values[field.name] is None and not optional:
                    raise self.wrong(f"{field.name} is missing")
        return kind(**values)


def parse_json(text: str | bytes, where: str, advice: str) -> Any:
    """What a JSON text holds. Raises ValueError, with the advice, for one that is none or has no end of brackets."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); {advice}") from error


def read_json(path: Path, advice: str) -> Any:
    """What a JSON file holds, as :func:`parse_json`. Raises FileNotFoundError without it."""
    return parse_json(path.read_bytes(), str(path), advice)


def read_fields(path: Path, advice: str) -> Fields:
    """The object that a JSON file holds, as :func:`read_json`; its numbers are finite."""
    return Fields(read_json(path, advice), str(path), advice)


def read_lines(path: Path, advice: str) -> list[tuple[str, Any]]:
    """What the lines of a file hold, each after the words for its place, as :func:`parse_json`; none without a file.

    A last line that a crash cut off is left out.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    places = ((f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.endswith(b"\n"))
    return [(where, parse_json(line, where, advice)) for where, line in places]
