"""YAML that people and other machines wrote: plain values of a bounded size, or one ValueError in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

#: Characters and entries of a text, every alias written out.
_LARGEST = 1 << 20

#: Digits of a whole number, in any base: every float holds it, and Python writes it.
_DIGITS = 200

#: What PyYAML raises for text that is none: a tag that does not fit its node ends in Python's own errors.
_NO_YAML = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises ValueError, in one line, for one that is not valid or endless by its aliases."""
    try:
        return _parsed(path.read_text(encoding="utf-8"))
    except _NO_YAML as error:
        raise ValueError(f"{path} is not valid YAML: {_line(error)}") from error


def parse_yaml(text: str, what: str) -> Any:
    """What a YAML text holds; ``what`` is its name in the message of the ValueError, as :func:`read_yaml`."""
    try:
        return _parsed(text)
    except _NO_YAML as error:
        raise ValueError(f"{what} is not valid YAML: {_line(error)}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's, which takes the last of keys that stand twice and numbers of any length, without that."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _DIGITS:
            mark = node.start_mark
            begun = (mark.buffer or "")[mark.pointer - mark.column : mark.pointer + 20]
            raise ValueError(f"line {mark.line + 1}, {begun!r}..., has a number of more than {_DIGITS} digits")
        value: int = super().construct_yaml_int(node)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        known = []
        for key in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            if (name := self.construct_object(key)) in known:
                raise ValueError(f"the key {name!r} stands twice, again in line {key.start_mark.line + 1}")
            known.append(name)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _parsed(text: str) -> Any:
    value = yaml.load(text, _Loader)  # a safe loader
    if _size(value, {}) > _LARGEST:
        raise ValueError(f"its aliases make more than {_LARGEST} characters and entries of it")
    return value


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _size(value: Any, known: dict[int, int]) -> int:
    """Characters and entries, as a message or a copy would have them: aliases make few bytes endless."""
    if isinstance(value, str):
        return 1 + len(value)
    if not isinstance(value, (Mapping, list, tuple)):
        return 1
    if id(value) not in known:
        known[id(value)] = _LARGEST  # while it is looked at: what holds itself has no end
        inner = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(value)]
