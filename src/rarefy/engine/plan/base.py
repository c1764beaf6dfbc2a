"""What all steps share, and what is known of the values that they read and make."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

#: The name of a function; or, as ``rarefy::activation`` has them, function, mode and, where there is one, the JSON of a
#: table, with spaces between: "silu ktanh".
Activation: TypeAlias = str
#: The functions, as PyTorch has them.
ACTIVATIONS: tuple[Activation, ...] = (
    *("none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "hardswish", "hardsigmoid"),
    "leaky_relu",
)
#: Those that have modes.
MODED: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid")


@dataclass(frozen=True)
class Quantized:
    """What the bytes q of a quantised value mean: ``scale * (q - zero_point)``.

    ``scale`` is a float32 number above 0, ``zero_point`` in 0..255; :mod:`rarefy.engine.int8` has the arithmetic.
    """

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not (0 < self.scale < math.inf and self.scale == float(np.float32(self.scale))):
            raise ValueError(f"the scale of a quantised value must be a float32 number above 0, got {self.scale!r}")
        if type(self.zero_point) is not int or not 0 <= self.zero_point <= 255:
            raise ValueError(f"the zero point of a quantised value must be in 0..255, got {self.zero_point!r}")


@dataclass(frozen=True)
class Value:
    """What is known of a value before it is there.

    Attributes:
        shape: of one sample, without the batch in dimension 0; None where dimension 0 is not the batch, or where
            another dimension is only known when the plan runs.
        dtype: of its elements.
        rows: its axes but the last, as the graph writes their sizes for any batch: values where they are the same have
            as many rows.
        quantized: what its bytes mean; None where it is not quantised.
        fold: how many entries of dimension 0 belong to one sample, one sample's after the other: 1 where that is the
            batch.
        inner: the shape behind dimension 0 where ``fold`` is more than 1.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype
    rows: str = ""
    quantized: Quantized | None = None
    fold: int = 1
    inner: tuple[int, ...] | None = None

    @property
    def sample(self) -> tuple[int, ...] | None:
        """The shape of one sample, ``fold`` first where there is more than one; None where it is not known."""
        return self.shape if self.shape is not None or self.inner is None else (self.fold, *self.inner)


@dataclass(frozen=True, eq=False, kw_only=True)
class Step(ABC):
    """One step: ``name`` is the layer's in the model where it has one, ``output`` the value that it makes."""

    name: str
    output: str

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """The values that it reads."""

    @property
    def kind(self) -> str:
        """What it is, in one word."""
        return type(self).__name__.lower()


@dataclass(frozen=True, eq=False, kw_only=True)
class Unary(Step):
    """A step that reads one value."""

    input: str

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)


def parts(activation: Activation) -> tuple[str, str, str]:
    """Function, mode and table of an activation; both are empty for a function of PyTorch's."""
    function, mode, table = (*activation.split(" ", 2), "", "")[:3]
    return function, mode, table


def tensors(step: Step) -> dict[str, Tensor]:
    """The weights of a step, by the names of its fields."""
    found = {each.name: getattr(step, each.name) for each in fields(step)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
