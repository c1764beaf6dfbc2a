"""Running an engine: its items become one Python function, so that a step costs what it calls and nothing more."""

from __future__ import annotations

import keyword
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rarefy.engine.building import NativeSegment
from rarefy.engine.eager import Eager
from rarefy.engine.lowering import Item, uses
from rarefy.engine.onednn import PackedConv
from rarefy.engine.plan import Ref, last_uses, refs
from rarefy.engine.reference import bind

_NATIVE = "program"
_Seconds: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


_forked = False


def _after_fork() -> None:
    global _forked  # noqa: PLW0603 - it is the process that changed
    _forked = True


# A forked child has OpenMP's list of threads without the threads: PyTorch would wait for them without end.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def most_in_torch(threads: int) -> int:
    """How many of so many threads PyTorch may use: one in a process that was forked, and all elsewhere."""
    return 1 if _forked else threads


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Within the block PyTorch uses that many threads, in the thread that enters it."""
    before = torch.get_num_threads()
    torch.set_num_threads(most_in_torch(threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Timed(NamedTuple):
    """Seconds of the steps of each item, (rounds, steps), and of whole calls, (rounds,)."""

    steps: list[_Seconds]
    calls: _Seconds


class Runner:
    """Items that run one after the other; any number of threads may call it.

    They are written as the source of a function: a line an item, a variable a value, deleted after its last use. So
    networks of many small operators run as fast as the model's own Python, or faster::

        def run(threads, v0):
            v1, = program0(threads, v0)
            v2 = f1(v1, c0)  # an operator of PyTorch, and a plain argument or a constant
            del v1
            return (v2,)

    No text of a plan gets into it but the names of keyword arguments, which are checked to be names.
    """

    def __init__(
        self, items: Sequence[Item], inputs: Sequence[str], outputs: Sequence[str], constants: Mapping[str, Tensor]
    ) -> None:
        self._made_of = (items, inputs, outputs, constants)
        self._items = tuple(items)
        source = _Source(inputs, constants)
        for number, (item, freed) in enumerate(zip(items, _freed(items, outputs), strict=True)):
            source.add(item, freed, number)
        self._source = source
        self._run = source.function(outputs, timed=False)

    @cached_property
    def _timed(self) -> Callable[..., Any]:
        return self._source.function(self._made_of[2], timed=True)

    def __reduce__(self) -> Any:
        return Runner, self._made_of  # a function made of source has no name to be found by

    def __call__(self, inputs: Sequence[Tensor], threads: int) -> tuple[Any, ...]:
        """The outputs."""
        return self._run(threads, *inputs)  # type: ignore[no-any-return]

    def timed(self, inputs: Sequence[Tensor], rounds: int) -> Timed:
        """Time every step on one thread, and whole calls beside that.

        All items run in every round, so that each finds the caches as it does in the network. What reading the clock
        takes is taken off, but not what native programs read it for: whole calls are timed without.
        """
        steps = [np.zeros((rounds, i.program.facts.steps if isinstance(i, NativeSegment) else 1)) for i in self._items]
        whole, calls = np.zeros((rounds, len(self._items))), np.zeros(rounds)
        tick = _tick()
        for done in range(rounds):
            begun = time.thread_time()
            self(inputs, 1)
            calls[done] = time.thread_time() - begun
            self._timed(1, *inputs, took=whole[done], steps=[each[done] for each in steps], clock=time.thread_time)
        whole = (whole - tick).clip(min=0)
        for item, each, seconds in zip(self._items, steps, whole.T, strict=True):
            if not isinstance(item, NativeSegment):
                each[:, 0] = seconds
        return Timed(steps, (calls - tick).clip(min=0))


def _freed(items: Sequence[Item], outputs: Sequence[str]) -> list[tuple[str, ...]]:
    """The values that are not needed any more after each item, of those that the items make."""
    made = {name for item in items for name in uses(item)[1]}
    return [tuple(name for name in freed if name in made) for freed in last_uses([*map(uses, items)], {*outputs})]


class _Source:
    """The function's lines, and what its names stand for."""

    def __init__(self, inputs: Sequence[str], constants: Mapping[str, Tensor]) -> None:
        self.known: dict[str, Any] = {}  # functions, plain arguments and constants, by the name that they have in it
        self.variables: dict[str, str] = {}
        self.lines: list[tuple[int, str, str, tuple[str, ...]]] = []  # item, call, what is assigned, what is deleted
        self.arguments = [self._variable(name) for name in inputs]
        self.variables |= {name: self._name("c", value) for name, value in constants.items()}

    def add(self, item: Item, freed: Sequence[str], number: int) -> None:
        """Add the line of an item."""
        if isinstance(item, NativeSegment | Eager):
            function: Callable[..., Any] = item.run
            threads = ["threads"] if isinstance(item, NativeSegment) else []
            given = ", ".join([*threads, *(self.variables[name] for name in item.reads)])
            made = "".join(f"{self._variable(name)}, " for name in item.makes)
        else:
            function, args, kwargs = (
                (item.run, tuple(map(Ref, item.inputs)), {}) if isinstance(item, PackedConv) else bind(item)
            )
            for name in kwargs:
                if not name.isidentifier() or keyword.iskeyword(name):
                    raise ValueError(f"{item.output} has an argument of the name {name!r}")
            named = (f"{name}={self._argument(value)}" for name, value in kwargs.items())
            given = ", ".join([*map(self._argument, args), *named])
            made = self._variable(item.output)
        call = f"{self._name(_NATIVE if isinstance(item, NativeSegment) else 'f', function)}({given}"
        self.lines.append((number, call, made, tuple(self.variables[name] for name in freed)))

    def function(self, outputs: Sequence[str], *, timed: bool) -> Callable[..., Any]:
        """The function; a timed one also takes where to put the times, and the clock."""
        more = ", *, took, steps, clock" if timed else ""
        source = [f"def run(threads, {', '.join(self.arguments)}{more}):"]
        for item, call, made, freed in self.lines:
            if timed:
                seconds = f", seconds=steps[{item}]" if call.startswith(_NATIVE) else ""
                source += ["begun = clock()", f"{made} = {call}{seconds})", f"took[{item}] = clock() - begun"]
            else:
                source.append(f"{made} = {call})")
            if freed:
                source.append(f"del {', '.join(freed)}")
        results = "".join(f"{self.variables[name]}, " for name in outputs)
        source.append(f"return ({results})")
        namespace = dict(self.known)
        exec("\n    ".join(source), namespace)
        # out of the names that it sees: with itself among them, a dropped engine would keep its memory for a while
        result: Callable[..., Any] = namespace.pop("run")
        return result

    def _variable(self, name: str) -> str:
        return self.variables.setdefault(name, f"v{len(self.variables)}")  # a model may give a value twice

    def _name(self, kind: str, value: Any) -> str:
        name = f"{kind}{len(self.known)}"
        self.known[name] = value
        return name

    def _argument(self, argument: Any) -> str:
        """How an argument is written: a variable, a list or tuple of arguments, or the name of a plain one."""
        if isinstance(argument, Ref):
            return self.variables[argument.name]
        if any(True for _ in refs(argument)):
            parts = "".join(f"{self._argument(each)}, " for each in argument)
            return f"[{parts}]" if isinstance(argument, list) else f"({parts})"
        return self._name("c", argument)


def _tick() -> float:
    """Seconds that reading the clock takes, the median."""
    return float(np.median(np.diff([time.thread_time() for _ in range(101)])))
