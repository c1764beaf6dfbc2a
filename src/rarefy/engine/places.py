"""Arithmetic of places (:class:`rarefy.engine.plan.Places`): what views make of them, and where channels are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from rarefy.engine.binding import CHANNELS_LAST
from rarefy.engine.plan import Places, View


class Digits(NamedTuple):
    """Places by the axes of a shape: the index along each to begin with, and how much further each index is."""

    offset: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]  # of the places' axes


def contiguous(value: str, shape: Sequence[int], axes: Sequence[int | None], count: int) -> Places:
    """Places of a whole value over ``count`` axes: axis i of its shape is axes[i] of these, or stands still (None)."""
    strides, numbers = [0] * count, 1
    for size, axis in reversed([*zip(shape, axes, strict=True)]):
        if axis is not None and size > 1:
            strides[axis] = numbers
        numbers *= size
    return Places(value, numbers, tuple(strides))


def digits(number: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The index along each axis of a shape of what is this number in the order of its axes."""
    found = []
    for size in reversed(sizes):
        number, digit = divmod(number, size)
        found.append(digit)
    return tuple(reversed(found))


def by_axes(places: Places, sizes: Sequence[int], shape: Sequence[int]) -> Digits | None:
    """Places over axes of ``sizes`` by the axes of a shape; None where a step goes over the end of one."""
    offset = digits(places.offset, shape)
    strides = [stride if size > 1 else 0 for size, stride in zip(sizes, places.strides, strict=True)]
    steps = tuple(digits(stride, shape) for stride in strides)
    for axis, size in enumerate(shape):
        last = offset[axis] + sum((count - 1) * step[axis] for count, step in zip(sizes, steps, strict=True))
        if last >= size:
            return None
    return Digits(offset, steps)


def _merged(view: View) -> tuple[list[int], list[int]]:
    """Sizes and strides of a view, neighbours joined that are as one axis."""
    sizes, strides = list[int](), list[int]()
    for size, stride in zip(view.sizes, view.strides, strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes, strides = [*sizes, size], [*strides, stride]
    return sizes, strides


def through(places: Places, sizes: Sequence[int], view: View) -> Places | None:
    """The places in a view's input of numbers that lie at places of its result; None where these are no places."""
    shape, between = _merged(view)
    if min(between, default=0) < 0:
        return None
    found = by_axes(places, sizes, shape)
    if found is None:
        return None

    def moved(index: Sequence[int]) -> int:
        return sum(at * stride for at, stride in zip(index, between, strict=True))

    strides = tuple(moved(step) for step in found.steps)
    return Places(view.input, view.numbers, strides, view.offset + moved(found.offset))


def inverse(view: View) -> View | None:
    """The view that takes a view's result back, where that has every number once; None where it has not."""
    sizes, strides = _merged(view)
    order = sorted(range(len(sizes)), key=lambda axis: -strides[axis])
    expected = view.numbers
    for axis in order:
        if strides[axis] * sizes[axis] != expected:
            return None
        expected = strides[axis]
    if expected != 1 or view.offset or math.prod(sizes) != view.numbers:
        return None
    after = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    return replace(
        view,
        input=view.output,
        output=view.input,
        sizes=tuple(sizes[axis] for axis in order),
        strides=tuple(after[axis] for axis in order),
        folded=False,
    )


def geometry(shape: Sequence[int], layout: int) -> tuple[int, int, int]:
    """Channels, height and width of a sample of that shape in a native program."""
    channels, *sizes = (shape[-1], *shape[:-1]) if layout == CHANNELS_LAST else shape
    width = sizes[-1] if sizes else 1
    return channels, math.prod(sizes[:-1]), width
