"""A program that is being built, as its steps find it: its values, their shapes and layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from rarefy.engine.binding import CHANNELS_FIRST, CHANNELS_LAST
from rarefy.engine.builder import Builder, Layout
from rarefy.engine.building.copies import as_it_is, described
from rarefy.engine.building.segments import SegmentPort
from rarefy.engine.places import geometry
from rarefy.engine.plan import Concat, Conv, GlobalAverage, Linear, Norm, Plan, Pool, Recurrence, Step, Upsample, View

#: What adding a step gives: the layout, as :func:`laid` has it, and the number of the value that it makes.
Made: TypeAlias = tuple[int | None, int]


@dataclass(frozen=True)
class Options:
    """How programs are made.

    Attributes:
        choice: "measure", or what alone may compute convolutions: "sparse", "dense".
        storage: how weights are stored: "float32" or "bfloat16".
        threads: the number to choose kernels for.
        tune_seconds: at most about so much time for measuring in the whole plan; 0 chooses by rule.
        shapes: of the values, batch and all, when the plan runs on the example.
        samples: how many the example holds.
        layouts: how int8 layers take their weights, by the value that they make; the others are measured, or by rule.
    """

    choice: str
    storage: str
    threads: int
    tune_seconds: float
    shapes: Mapping[str, tuple[int, ...]]
    samples: int
    layouts: Mapping[str, Layout] = field(default_factory=dict)


class CannotError(Exception):
    """A step does not go into the program that is being built."""


def laid(sizes: Sequence[int], layout: int) -> int | None:
    """The layout of samples of that shape in a program; None for vectors, which have any."""
    return None if len(sizes) == 1 else layout


@dataclass
class Draft:
    """What a program that is being built has so far: its values, where each comes from and how it lies."""

    plan: Plan
    options: Options
    builder: Builder = field(default_factory=Builder)
    inputs: dict[tuple[str, int], SegmentPort] = field(default_factory=dict)
    ids: dict[tuple[str, int], int] = field(default_factory=dict)
    layouts: dict[str, int | None] = field(default_factory=dict)  # of what its steps make, as :func:`laid` has them
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rows: bool = False  # all axes but the last count as batch
    sequences: bool = False  # dimension 0 counts as batch where the graph has it elsewhere: recurrences alone

    @cached_property
    def users(self) -> Mapping[str, Sequence[Step]]:
        """The steps that read each value."""
        return self.plan.users()

    def value(self, name: str, layout: int) -> int:
        """The number of a value in that layout; one made elsewhere becomes an input."""
        shape = self.shape(name)
        key = self.key(name, layout)
        if key not in self.ids:
            self.ids[key] = self.builder.input(geometry(shape, key[1]), key[1], name)
            self.inputs[key] = self.port(name, shape)
        return self.ids[key]

    def values(self, names: tuple[str, ...], layout: int) -> list[int]:
        """The numbers of values in that layout; those made elsewhere become inputs."""
        for name in names:
            made = self.layouts.get(name, layout)
            if made is not None and made != layout:
                self.turn(name, layout)
            if self.rows and name not in self.layouts:
                if len(self.options.shapes[name]) < 2:
                    raise CannotError("it has too few axes")
                first = next((port.value for port in self.inputs.values()), name)
                if not self._same_rows(name, first):
                    raise CannotError("it has other rows than what runs before")
            self.shape(name)
        return [self.value(name, layout) for name in names]

    def turn(self, name: str, layout: int) -> None:
        """Lay a value of the program out in the other layout, too."""
        if (name, layout) not in self.ids:
            shape = self.shape(name)
            same = as_it_is(name, name, name, shape)
            part = described(same, shape, 1 - layout, layout)
            assert part is not None
            self.ids[name, layout] = self.copy(self.ids[name, 1 - layout], same, layout, part)

    def copy(self, x: int, view: View, to: int, part: Sequence[int]) -> int:
        """A view of the value x as a copy in that layout: ``part``, as :func:`described` has it, is all of it."""
        return self.builder.tensor("view", [x], [*geometry(view.sizes, to), 1, *part], name=view.output)

    def key(self, name: str, layout: int) -> tuple[str, int]:
        """What a value is known by: vectors have one layout."""
        vector = len(self.shape(name)) == 1 or self.layouts.get(name, 0) is None
        return name, CHANNELS_FIRST if vector else layout

    def port(self, value: str, shape: tuple[int, ...]) -> SegmentPort:
        """The port of a value whose sample has that shape."""
        fold = 1 if self.rows or self.sequences else self.plan.values[value].fold
        return SegmentPort(value, shape if fold == 1 else shape[1:], fold=fold)

    def shape(self, value: str, most: int | None = None) -> tuple[int, ...]:
        """The shape of a value behind the axes that count as batch; of at most so many axes."""
        if self.rows and value not in self.shapes:
            return self.options.shapes[value][-1:]
        if self.sequences and value not in self.shapes:
            return self.options.shapes[value][1:]
        shape = self.shapes.get(value, self.plan.values[value].sample)
        if not shape or (most is not None and len(shape) > most):
            raise CannotError("its shape is only known when it runs" if not shape else "it has too many axes")
        return shape

    def _same_rows(self, a: str, b: str) -> bool:
        """Whether two values have the same axes but the last, at every batch size."""
        known = self.plan.values[a].rows == self.plan.values[b].rows
        return known and self.options.shapes[a][:-1] == self.options.shapes[b][:-1]

    def elementwise_layout(self, step: Step) -> int:
        """That of an operand which is there; otherwise the one that the next step needs."""
        there = [layout for name in step.inputs if (layout := self.layouts.get(name)) is not None]
        if there:
            return there[0]
        return self.wanted(step.output) or CHANNELS_FIRST

    def wanted(self, value: str) -> int | None:
        """The layout that the first reader of a value which has one needs it in."""
        for user in self.users.get(value, ()):
            if isinstance(user, (Linear, Recurrence)) or (isinstance(user, Norm) and user.axis == -1):
                return CHANNELS_LAST
            if isinstance(user, (Conv, Pool, GlobalAverage, Upsample, Concat, Norm)):
                return CHANNELS_FIRST
        return None
