"""What a model takes and gives, as one tensor after the other: lists, dicts, dataclasses, None and numbers around them.

The engine itself goes from tensors to tensors. :class:`Flat` makes such a model of any other; :class:`Call` makes the
tensors of a call, and :class:`Node` what the model gives of the engine's. In a file they are JSON: of a class there is
the name alone, and nothing is imported for it.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

Kind = Literal["tensor", "number", "constant", "list", "tuple", "dict", "ordered", "object", "named", "result"]
_SEQUENCES: dict[str, type] = {"list": list, "tuple": tuple}
_MAPPINGS: dict[str, type] = {"dict": dict, "ordered": OrderedDict}
_DEEPEST = 64
_NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Node:
    """A tensor, a number or a constant (None, a string; a number among inputs), or what holds several of them.

    Attributes:
        kind: "object" is a dataclass, "named" a named tuple, "result" one of ``torch.return_types``.
        keys: of a mapping; the fields of a class.
        children: what it holds.
        value: of a constant.
        name: of a class, "module:Name".
        made: the class itself; where it is None a dict of the fields stands for it.
    """

    kind: Kind
    keys: tuple[str | int, ...] = ()
    children: tuple[Node, ...] = ()
    value: str | bool | int | float | None = None
    name: str = ""
    made: type | None = None

    @property
    def leaves(self) -> int:
        """How many tensors and numbers it holds."""
        return sum(child.leaves for child in self.children) + (self.kind in ("tensor", "number"))

    def build(self, leaves: Iterator[Tensor]) -> Any:
        """What it stands for, made of tensors in their order."""
        if self.kind == "tensor":
            return next(leaves)
        if self.kind == "number":
            return next(leaves).item()
        if self.kind == "constant":
            return self.value
        inside = [child.build(leaves) for child in self.children]
        if self.kind in _SEQUENCES:
            return _SEQUENCES[self.kind](inside)
        if self.kind in _MAPPINGS or self.made is None:
            return _MAPPINGS.get(self.kind, dict)(zip(self.keys, inside, strict=True))
        if self.kind == "result":
            return self.made(inside)
        return self.made(**dict(zip(map(str, self.keys), inside, strict=True)))

    def take(self, value: Any, found: list[Any], where: str) -> None:
        """Add the tensors of such a value to ``found``; raises TypeError, which names ``where``, for another."""
        if self.kind == "tensor":
            found.append(value)  # whether it is one is for the engine to say
            return
        if self.kind == "constant":
            # As they are written: NaN is the same as NaN, and -0.0 is not 0.0.
            if type(value) is not type(self.value) or repr(value) != repr(self.value):
                told = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
                raise TypeError(f"input {where!r} must be {self.value!r}, as it was compiled for, got {told}")
            return
        sequence = self.kind in ("list", "tuple", "named", "result")
        if sequence:
            right = isinstance(value, (list, tuple)) and len(value) == len(self.children)
        elif self.kind == "object":
            right = all(hasattr(value, str(key)) for key in self.keys)
        else:
            right = isinstance(value, Mapping) and {*value} == {*self.keys}
        if not right:
            keys = list(value) if isinstance(value, Mapping) else len(value) if isinstance(value, (list, tuple)) else ""
            raise TypeError(f"input {where!r} must be {self._words()}, got {type(value).__name__} {keys}".rstrip())
        for index, (key, child) in enumerate(zip(self.keys or range(len(self.children)), self.children, strict=True)):
            inside = value[index] if sequence else getattr(value, str(key)) if self.kind == "object" else value[key]
            child.take(inside, found, f"{where}.{key}")

    def _words(self) -> str:
        if self.kind in ("list", "tuple"):
            return f"a {self.kind} of {len(self.children)}"
        return f"a {self.name or self.kind} with {', '.join(map(str, self.keys))}"

    def labels(self, where: str) -> Iterator[str]:
        """Names of its tensors, in order."""
        if self.kind in ("tensor", "number"):
            yield where
        for key, child in zip(self.keys or range(len(self.children)), self.children, strict=True):
            yield from child.labels(f"{where}.{key}")

    def kinds(self) -> Iterator[Kind]:
        """Whether each of its leaves is a tensor or a number, in order."""
        if self.kind in ("tensor", "number"):
            yield self.kind
        for child in self.children:
            yield from child.kinds()

    def json(self) -> Any:
        """What a file has of it."""
        if self.kind in ("tensor", "number"):
            return self.kind
        if self.kind == "constant":
            finite = not isinstance(self.value, float) or math.isfinite(self.value)
            return {"constant": self.value if finite else {"float": repr(self.value)}}
        children = [child.json() for child in self.children]
        if self.kind in _SEQUENCES:
            return {self.kind: children}
        inside = [[key, child] for key, child in zip(self.keys, children, strict=True)]
        return {self.kind: inside, "name": self.name} if self.name else {self.kind: inside}


TENSOR, NUMBER = Node("tensor"), Node("number")


class StructureError(TypeError):
    """Something that cannot be taken apart, and made again."""


def flatten(value: Any, leaves: list[Any], where: str, *, constants: bool) -> Node:
    """What a value is made of; its tensors, and its numbers where these are no ``constants``, are added to ``leaves``.

    Raises StructureError, which names ``where``, for a class that could not be made again.
    """
    if isinstance(value, Tensor):
        leaves.append(value)
        return TENSOR
    if value is None or isinstance(value, str) or (constants and isinstance(value, (bool, int, float))):
        return Node("constant", value=value)
    if isinstance(value, _NUMBERS):
        leaves.append(value)
        return NUMBER
    kind = type(value)
    name = f"{kind.__module__}:{kind.__qualname__}"

    def inside(named: Mapping[Any, Any]) -> tuple[Node, ...]:
        return tuple(flatten(each, leaves, f"{where}.{key}", constants=constants) for key, each in named.items())

    if kind in (list, tuple):
        return Node("list" if kind is list else "tuple", children=inside(dict(enumerate(value))))
    if is_dataclass(kind):
        held = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        return Node("object", tuple(held), inside(held), name=name, made=kind)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return Node(
            "named", tuple(kind._fields), inside(dict(zip(kind._fields, value, strict=True))), name=name, made=kind
        )
    if isinstance(value, tuple) and kind.__module__ == "torch.return_types":
        held = {str(index): each for index, each in enumerate(value)}
        return Node("result", tuple(held), inside(held), name=name, made=kind)
    if isinstance(value, OrderedDict if not constants else Mapping) or kind is dict:
        if not all(type(key) in (str, int) for key in value):
            raise StructureError(f"{where!r} is a mapping whose keys are no strings and no whole numbers")
        return Node("ordered" if kind is OrderedDict else "dict", tuple(value), inside(value))
    raise StructureError(
        f"{where!r} is a {name.replace(':', '.')}: tensors, numbers, strings and None in tuples, lists, dicts and "
        "dataclasses are known"
    )


@dataclass(frozen=True)
class Call:
    """How a model is called: ``args`` by position, ``kwargs`` by name, and the names of what may go by either."""

    args: tuple[Node, ...]
    kwargs: tuple[tuple[str, Node], ...] = ()
    parameters: tuple[str, ...] = ()

    @staticmethod
    def plain(inputs: int) -> Call:
        """A call with so many tensors."""
        return Call((TENSOR,) * inputs)

    @property
    def is_plain(self) -> bool:
        """Whether it is one with tensors by position alone."""
        return not self.kwargs and all(each.kind == "tensor" for each in self.args)

    @property
    def leaves(self) -> int:
        """How many tensors it holds."""
        return sum(node.leaves for node in (*self.args, *dict(self.kwargs).values()))

    def labels(self) -> list[str]:
        """Names of its tensors, in order."""
        named = [*zip(self._places(), self.args, strict=True), *self.kwargs]
        return [label for name, node in named for label in node.labels(name)]

    def _places(self) -> list[str]:
        """Names of the arguments by position."""
        return [*self.parameters, *(f"argument {index}" for index in range(len(self.parameters), len(self.args)))][
            : len(self.args)
        ]

    def build(self, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, made of the tensors."""
        leaves = iter(tensors)
        return [node.build(leaves) for node in self.args], {name: node.build(leaves) for name, node in self.kwargs}

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The tensors of a call: what goes by position may go by name, and the other way round.

        Raises TypeError for one that is not like the example's. Constants may be left out.
        """
        given, found = dict(kwargs), list[Any]()
        for index, value in enumerate(args[len(self.args) :], len(self.args)):
            name = self.parameters[index] if index < len(self.parameters) else f"argument {index}"
            if name in given:
                raise TypeError(f"the engine was given {name!r} twice")
            given[name] = value
        named = [*zip(self._places(), self.args, strict=True), *self.kwargs]
        for index, (name, node) in enumerate(named):
            if index < len(self.args) and index < len(args):
                node.take(args[index], found, name)
            elif name in given:
                node.take(given.pop(name), found, name)
            elif node.leaves:
                raise TypeError(f"the engine takes {_listed(named)}; {name!r} is missing")
        if given:
            raise TypeError(f"the engine takes {_listed(named)}, and was given {', '.join(map(repr, given))} as well")
        return found

    def of_example(self, example: Any) -> tuple[Tensor, ...]:
        """The tensors of what :func:`rarefy.engine.compile` takes as an example. Raises as :meth:`tensors` does."""
        args, kwargs = arguments(example)
        return tuple(self.tensors(args, kwargs))

    def json(self) -> Any:
        """What a file has of it."""
        kwargs = [[name, node.json()] for name, node in self.kwargs]
        return {"args": [node.json() for node in self.args], "kwargs": kwargs, "parameters": list(self.parameters)}


def arguments(example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """What an example is a call with: a mapping by name, a tuple or list by position, else one argument."""
    if isinstance(example, Mapping):
        return (), example
    return (example if type(example) in (tuple, list) else (example,)), {}


def call_of(model: nn.Module, example: Any) -> tuple[Call, list[Tensor]]:
    """How an example calls a model, and the tensors in it. Raises TypeError for one that cannot be taken apart."""
    args, kwargs = arguments(example)
    names = inspect.signature(model.forward).parameters.values()
    known = tuple(each.name for each in names if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
    tensors = list[Tensor]()
    labels = [*known[: len(args)], *(f"argument {index}" for index in range(len(known), len(args)))]
    by_place = tuple(flatten(x, tensors, name, constants=True) for x, name in zip(args, labels, strict=True))
    if not all(isinstance(name, str) for name in kwargs):
        raise TypeError(
            "example_input is a dict of keyword arguments, whose names are strings: put a dict that is one "
            "argument into a tuple, (batch,)"
        )
    by_name = tuple((name, flatten(x, tensors, name, constants=True)) for name, x in kwargs.items())
    return Call(by_place, by_name, known), tensors


def _listed(named: Sequence[tuple[str, Node]]) -> str:
    return ", ".join(repr(name) for name, _ in named)


class _Seen:
    """What a model gave when it ran last."""

    gives: Node = TENSOR


class Flat(nn.Module):
    """A model as one from tensors to a tuple of tensors; numbers that it gives are tensors without axes."""

    PREFIX = "model."

    def __init__(self, model: nn.Module, takes: Call) -> None:
        super().__init__()
        self.model, self.takes, self.seen = model, takes, _Seen()
        self.training = model.training

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The model's tensors, in order; ``seen.gives`` tells what they were in."""
        args, kwargs = self.takes.build(tensors)
        leaves = list[Any]()
        self.seen.gives = flatten(self.model(*args, **kwargs), leaves, "output", constants=False)
        return tuple(x if isinstance(x, Tensor) else _as_tensor(x) for x in leaves)


def _as_tensor(number: Any) -> Tensor:
    if isinstance(number, (bool, torch.SymBool)):
        return torch.full((), cast(bool, number), dtype=torch.bool, device="cpu")
    whole = isinstance(number, (int, torch.SymInt))
    return torch.full((), number, dtype=torch.int64 if whole else torch.float64, device="cpu")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself."""
    return model.model if isinstance(model, Flat) else model


def title(model: nn.Module) -> str:
    """What a model is called in messages."""
    return type(unwrapped(model)).__name__


def read_call(about: Any, classes: Sequence[type]) -> Call:
    """The call that :meth:`Call.json` wrote; raises whatever comes of something else."""
    kwargs = tuple((_text(name), read(node, classes)) for name, node in about["kwargs"])
    parameters = tuple(map(_text, about["parameters"]))
    if len({name for name, _ in kwargs}) < len(kwargs):
        raise ValueError("an argument is there twice")
    found = Call(tuple(read(node, classes) for node in about["args"]), kwargs, parameters)
    if any(kind == "number" for node in (*found.args, *dict(kwargs).values()) for kind in node.kinds()):
        raise ValueError("an input is a number")
    return found


def read(about: Any, classes: Sequence[type], depth: int = 0) -> Node:
    """The node that :meth:`Node.json` wrote; raises whatever comes of something else.

    A class is one of ``classes``, or one of PyTorch's results or transformers' outputs that is there already; another
    comes back as a dict, with a warning.
    """
    if about in ("tensor", "number"):
        return TENSOR if about == "tensor" else NUMBER
    if not isinstance(about, dict) or depth > _DEEPEST:
        raise ValueError(f"a structure is {about!r:.80}")
    kind = next(iter(about))
    if kind == "constant":
        (value,) = about.values()
        if isinstance(value, dict):
            value = float(_text(value["float"]))
        if value is not None and type(value) not in (str, bool, int, float):
            raise ValueError(f"a constant is {value!r:.80}")
        return Node("constant", value=value)
    if kind not in get_args(Kind):
        raise ValueError(f"there is no structure of the kind {kind!r:.80}")
    if kind in _SEQUENCES:
        return Node(kind, children=tuple(read(each, classes, depth + 1) for each in about[kind]))
    keys = tuple(key for key, _ in about[kind])
    if not all(type(key) is str or (type(key) is int and kind in _MAPPINGS) for key in keys) or len({*keys}) < len(
        keys
    ):
        raise ValueError(f"the keys of a structure are {keys!r:.80}")
    children = tuple(read(each, classes, depth + 1) for _, each in about[kind])
    if kind in _MAPPINGS:
        return Node(kind, keys, children)
    name = _text(about["name"])
    return Node(kind, keys, children, name=name, made=_class(kind, name, keys, classes))


def _class(kind: str, name: str, keys: tuple[Any, ...], classes: Sequence[type]) -> type | None:
    """The class of that name, if it is known and has such fields."""
    module, _, own = name.partition(":")
    if kind == "result":
        found = getattr(torch.return_types, own, None)
        if module != "torch.return_types" or not isinstance(found, type) or getattr(found, "n_fields", 0) != len(keys):
            raise ValueError(f"PyTorch has no result {name!r:.80} of {len(keys)}")
        return found
    found = next((each for each in classes if f"{each.__module__}:{each.__qualname__}" == name), None)
    if found is None:
        # Such a class only holds its fields; what is not there yet is not imported for a file.
        base = getattr(sys.modules.get("transformers.utils.generic"), "ModelOutput", None)
        there = getattr(sys.modules.get(module), own, None) if module.startswith("transformers.") else None
        if base is None or not (isinstance(there, type) and issubclass(there, base)):
            warnings.warn(
                f"the engine's model gives or takes a {name:.200}, which is not known here: a dict of its fields "
                "stands for it. engine.load(path, classes=[...]) takes the class",
                stacklevel=2,
            )
            return None
        found = there
    fits = (
        getattr(found, "_fields", ()) == keys
        if kind == "named"
        else (is_dataclass(found) and {*keys} <= {field.name for field in fields(found) if field.init})
    )
    if not fits:
        raise ValueError(f"the class {name:.200} has no fields {', '.join(map(str, keys)):.200}")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a name is {value!r:.80}")
    return value
