"""A transposed convolution as an ordinary one: every place of its result reads a fixed few places of its input.

Along one axis, place y of the result is the sum of ``weight[t] x[i]`` over all taps t and places i with
``stride i - padding + dilation t = y``. With ``y = stride q + r`` that is a convolution over i for each of the phases
r, and all phases are one convolution of ``stride`` times as many channels, whose result is shuffled. Of its weights
those are zero that another phase has.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.engine.plan import ConvTranspose


@dataclass(frozen=True, eq=False)
class Phases:
    """The convolution, of stride 1.

    Attributes:
        weight: (out x phases, in / groups, *kernel), the phases of a channel one after the other, the last axis
            fastest.
        bias: one number for each of its channels, or None.
        padding: (before, after) along each axis.
        made: places of its result along each axis, of each phase.
        sizes: those of the transposed convolution's result, at most ``made`` times its strides.
    """

    weight: Tensor
    bias: Tensor | None
    padding: tuple[tuple[int, int], ...]
    made: tuple[int, ...]
    sizes: tuple[int, ...]


def phases(step: ConvTranspose, given: tuple[int, ...]) -> Phases:
    """The convolution for an input of these sizes."""
    axes = [_Axis(step, axis, size) for axis, size in enumerate(given)]
    kernel = [axis.last - axis.first + 1 for axis in axes]
    count = math.prod(step.stride)
    rows, inputs = step.weight.shape[:2]
    weight = torch.zeros(rows, count, inputs, *kernel, dtype=torch.float32)
    for taps in itertools.product(*(range(size) for size in step.weight.shape[2:])):
        shifts = [axis.shift(tap) for axis, tap in zip(axes, taps, strict=True)]
        phase = 0
        for (r, _), stride in zip(shifts, step.stride, strict=True):
            phase = phase * stride + r
        every, at = slice(None), [m - axis.first for (_, m), axis in zip(shifts, axes, strict=True)]
        to: tuple[Any, ...] = (every, phase, every, *at)
        of: tuple[Any, ...] = (every, every, *taps)
        weight[to] = step.weight[of]
    return Phases(
        weight.flatten(0, 1),
        None if step.bias is None else step.bias.repeat_interleave(count),
        tuple((-axis.first, max(0, axis.after)) for axis in axes),
        tuple(axis.made for axis in axes),
        tuple(axis.size for axis in axes),
    )


class _Axis:
    """One axis: which tap belongs to which phase r, and reads place q + m."""

    def __init__(self, step: ConvTranspose, axis: int, given: int) -> None:
        self.stride, self.padding, self.dilation = (each[axis] for each in (step.stride, step.padding, step.dilation))
        kernel = step.weight.shape[2 + axis]
        self.size = (given - 1) * self.stride - 2 * self.padding + self.dilation * (kernel - 1) + 1
        self.size += step.output_padding[axis]
        shifts = [self.shift(tap)[1] for tap in range(kernel)]
        self.first, self.last = min(0, *shifts), max(0, *shifts)  # from the place itself on, at least
        quotients = -(-self.size // self.stride)
        self.after = quotients + (self.last - self.first) - given + self.first
        self.made = given - self.first + max(0, self.after) - (self.last - self.first)

    def shift(self, tap: int) -> tuple[int, int]:
        """Its r and m: ``stride (q + m) - padding + dilation tap = stride q + r``, r in 0 .. stride - 1."""
        moved = self.dilation * tap - self.padding
        return moved % self.stride, -(moved // self.stride)
