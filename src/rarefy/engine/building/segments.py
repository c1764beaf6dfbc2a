"""A native program in the place of steps of a plan, and the values that go into it and come out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.engine.plan import Quantized
from rarefy.engine.programs import Program

#: Whole numbers that programs read, by their bytes.
INTEGERS = {4: torch.int32, 8: torch.int64}
#: Of so many shapes of inputs a segment remembers what it makes of them.
_MOST_KNOWN = 64
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class SegmentPort:
    """A value that goes into or comes out of a program: its shape behind the axes that the program counts as batch.

    Programs read and write float32; ``quantized`` is what the bytes of a value mean that are bytes outside, too. One
    sample of the program are ``fold`` entries of dimension 0. ``integer`` is how many bytes each number of a value of
    whole numbers has, which goes in as it is; 0 where it is float32.
    """

    value: str
    shape: tuple[int, ...]
    quantized: Quantized | None = None
    fold: int = 1
    integer: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the value outside."""
        if self.integer:
            return INTEGERS[self.integer]
        return torch.float32 if self.quantized is None else torch.uint8

    @property
    def numbers(self) -> int:
        """Of one sample, as the program has them."""
        return self.fold * math.prod(self.shape) * max(1, self.integer // 4)

    def batch(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The axes that the program counts as batch, of a tensor of that shape, ``fold`` taken out of the first.

        Raises ValueError for a tensor that is no value of this port.
        """
        axes = len(shape) - len(self.shape)
        batch = tuple(shape[: max(axes, 0)])
        if tuple(shape[len(batch) :]) != self.shape or (self.fold > 1 and (axes != 1 or batch[0] % self.fold)):
            folded = f", after {self.fold} entries a sample" if self.fold > 1 else ""
            raise ValueError(f"{self.value} must end in {self.shape}{folded}, got {tuple(shape)}")
        return (batch[0] // self.fold,) if self.fold > 1 else batch

    def whole(self, batch: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor for such a batch."""
        return (batch[0] * self.fold, *self.shape) if self.fold > 1 else (*batch, *self.shape)


@dataclass(frozen=True, eq=False)
class NativeSegment:
    """A native program in the place of steps that follow each other.

    ``rows`` is how many of its samples there are for one of the network's: more than one where it takes each row of a
    matrix as a sample.
    """

    program: Program
    inputs: tuple[SegmentPort, ...]
    outputs: tuple[SegmentPort, ...]
    steps: tuple[str, ...]  # the values that they make
    rows: float = 1.0

    @property
    def reads(self) -> tuple[str, ...]:
        """The values that it needs."""
        return tuple(port.value for port in self.inputs)

    @property
    def makes(self) -> tuple[str, ...]:
        """The values that are there afterwards."""
        return tuple(port.value for port in self.outputs)

    def run(
        self, threads: int, *values: Tensor, seconds: np.ndarray[Any, np.dtype[np.float64]] | None = None
    ) -> list[Tensor]:
        """The outputs for the inputs; the time of each step is added to ``seconds``."""
        inputs = [self._input(x, port) for x, port in zip(values, self.inputs, strict=True)]
        shapes = tuple([x.shape for x in values])
        if (known := self._known.get(shapes)) is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[shapes] = self._sizes(shapes)
        count, sizes = known
        outputs = [torch.empty(size, dtype=torch.float32, device=_CPU) for size in sizes]
        if count:
            self.program.run(inputs, outputs, count, threads, seconds, known=True)
        if not self._gives_bytes:
            return outputs
        return [_as_bytes(y, port) for y, port in zip(outputs, self.outputs, strict=True)]

    @cached_property
    def _known(self) -> dict[tuple[torch.Size, ...], tuple[int, list[tuple[int, ...]]]]:
        """What :meth:`_sizes` said of inputs."""
        return {}

    @cached_property
    def _gives_bytes(self) -> bool:
        return any(port.quantized is not None for port in self.outputs)

    def _sizes(self, shapes: Sequence[Sequence[int]]) -> tuple[int, list[tuple[int, ...]]]:
        """How many samples inputs of these shapes are, and the shapes of the outputs."""
        batch = self.inputs[0].batch(shapes[0])
        for shape, port in zip(shapes, self.inputs, strict=True):
            if port.batch(shape) != batch:  # the program would read past the end of the shorter
                raise ValueError(
                    f"{port.value} of the shape {tuple(shape)} and {self.inputs[0].value} of the shape "
                    f"{tuple(shapes[0])} must have the same axes before the last {len(port.shape)}"
                )
        return math.prod(batch), [port.whole(batch) for port in self.outputs]

    def _input(self, x: Tensor, port: SegmentPort) -> Tensor:
        if x.dtype is not port.dtype:
            raise ValueError(f"{port.value} must be {port.dtype}, got {x.dtype}")
        if port.integer:
            return x.contiguous().view(torch.float32)
        plain = x.dtype is torch.float32 and x.is_contiguous() and not x.is_neg()
        return x if plain else x.float().resolve_neg().contiguous()


def _as_bytes(y: Tensor, port: SegmentPort) -> Tensor:
    """What a program gives of a value, as bytes where it has such outside: it gives them less their zero point."""
    return y if port.quantized is None else y.add_(port.quantized.zero_point).to(torch.uint8)


def samples(shape: Sequence[int]) -> int:
    """How many samples an input of the network holds."""
    return shape[0] if shape else 1
