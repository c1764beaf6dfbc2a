"""The plan as a whole, and the steps of it that PyTorch runs."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from rarefy.engine.plan.arithmetic import (
    Affine,
    Binary,
    Dequantize,
    GlobalAverage,
    Pointwise,
    Pool,
    Quantize,
    Reduce,
    Table,
)
from rarefy.engine.plan.base import Step, Value
from rarefy.engine.plan.layers import (
    Conv,
    ConvTranspose,
    Embedding,
    GroupNorm,
    GRUGates,
    Linear,
    LSTMCell,
    LSTMHidden,
    Norm,
    Recurrence,
)
from rarefy.engine.plan.moving import Concat, Flatten, Join, Resize, Upsample, View
from rarefy.engine.plan.places import Attention, MatMul, Softmax

_Name = TypeVar("_Name", bound=Hashable)


@dataclass(frozen=True)
class Ref:
    """A value, or a constant of the plan, among the arguments of an :class:`Operator`."""

    name: str


def refs(argument: Any) -> Iterator[str]:
    """The names of the values among an argument of an :class:`Operator`."""
    if isinstance(argument, Ref):
        yield argument.name
    elif isinstance(argument, (list, tuple)):
        for each in argument:
            yield from refs(each)


@dataclass(frozen=True, eq=False, kw_only=True)
class Operator(Step):
    """An operator that PyTorch runs, as ``torch.ops`` names it: ``aten.softmax.int``.

    The arguments are numbers, strings, dtypes and the like, lists and tuples of such, and :class:`Ref`.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(dict.fromkeys(refs((self.args, tuple(self.kwargs.values())))))

    @property
    def kind(self) -> str:  # noqa: D102
        return self.target.split(".")[1]


#: The steps that a native kernel may compute.
NATIVE = (
    *(Conv, ConvTranspose, Linear, Affine, Binary, Pool, GlobalAverage, Concat, Upsample, Resize, Flatten),
    *(Embedding, Reduce, View, Join, Norm, GroupNorm, Pointwise, MatMul, Softmax, Attention),
    *(LSTMCell, LSTMHidden, GRUGates, Recurrence),
)
#: The steps on quantised values alone, and those into and out of them.
INT8 = (Quantize, Dequantize, Table)


@dataclass(frozen=True, eq=False)
class Plan:
    """A network.

    Attributes:
        inputs: the values it is called with, in order.
        outputs: the values it gives back, in order.
        single: whether it gives a tensor back (then there is one output), or a tuple of them.
        steps: in an order in which they can run.
        values: what is known of each value that is a tensor.
        constants: tensors that :class:`Operator` steps read.
        batch: the only batch size that it takes; None takes any.
        fixed_because: why it takes one alone.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    single: bool
    steps: tuple[Step, ...]
    values: Mapping[str, Value]
    constants: Mapping[str, Tensor]
    batch: int | None
    fixed_because: str | None = None

    def last_uses(self) -> list[tuple[str, ...]]:
        """For each step the values that nothing needs after it."""
        return last_uses([(step.inputs, (step.output,)) for step in self.steps], {*self.outputs, *self.constants})

    def users(self) -> dict[str, list[Step]]:
        """The steps that read each value; a step that reads it twice is there once."""
        found: dict[str, list[Step]] = {name: [] for name in self.inputs}
        for step in self.steps:
            found[step.output] = []
            for name in dict.fromkeys(step.inputs):
                found.setdefault(name, []).append(step)
        return found


def last_uses(
    steps: Sequence[tuple[Sequence[_Name], Sequence[_Name]]], kept: Collection[_Name]
) -> list[tuple[_Name, ...]]:
    """For steps given as (values read, values made): the values that no later one reads, but those to be kept."""
    seen = set(kept)
    freed: list[tuple[_Name, ...]] = []
    for reads, makes in reversed(steps):
        now = tuple(name for name in dict.fromkeys((*reads, *makes)) if name not in seen)
        seen.update(now)
        freed.append(now)
    return freed[::-1]
