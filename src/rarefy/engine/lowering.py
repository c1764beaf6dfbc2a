"""Steps that follow each other as one native program, and what is left to PyTorch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from rarefy.engine.binding import NativeError
from rarefy.engine.building import Building, CannotError, NativeSegment, Options
from rarefy.engine.building_int8 import Int8Building
from rarefy.engine.eager import Eager
from rarefy.engine.int8 import Int8, item
from rarefy.engine.onednn import PackedConv
from rarefy.engine.plan import Embedding, Norm, Operator, Plan, Pointwise, Quantize, Step
from rarefy.engine.programs import Program

#: What an engine runs one after the other.
Item: TypeAlias = NativeSegment | PackedConv | Eager | Step | Int8

#: Numbers times instructions from which on an expression is worth a program of its own: one takes some 10 us to call.
_HEAVY = 1 << 17


def uses(item: Item) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The values that an item reads, and those that it makes."""
    return (item.reads, item.makes) if isinstance(item, (NativeSegment, Eager)) else (item.inputs, (item.output,))


@dataclass(frozen=True)
class Lowered:
    """A plan as native programs and the steps between them that PyTorch runs, and why it runs those, by their value."""

    items: tuple[Item, ...]
    reasons: Mapping[str, str]


def lower(
    plan: Plan, options: Options, leave: Collection[str] = (), measured: Mapping[str, Program] | None = None
) -> Lowered:
    """Make programs of all that the native engine can run, but of the steps that make the values in ``leave``.

    Layers take the kernels that were chosen for them in ``measured``: programs, by what their steps make.
    A program reads bytes from the float32 numbers that they are made of: a Quantize step runs in PyTorch only where a
    step reads its bytes that runs there, too.
    """
    return _Lowering(plan, options, leave, measured or {}).run()


class _Lowering:
    def __init__(self, plan: Plan, options: Options, leave: Collection[str], measured: Mapping[str, Program]) -> None:
        self.plan, self.options, self.leave, self.measured = plan, options, leave, measured
        self.items: list[Item] = []
        self.reasons: dict[str, str] = {}
        self.quantizers: dict[str, Quantize] = {}
        self.building: Building | None = None

    def run(self) -> Lowered:
        for step in self.plan.steps:
            if isinstance(step, Quantize):
                self.quantizers[step.output] = step
                continue
            runnable = item(self.plan, step)
            reason = self._add(runnable)
            if reason is not None:
                if self._reads_own(runnable):
                    self._flush()
                self._in_torch(runnable, reason)
        self._flush()
        for name in self.plan.outputs:
            self._quantize(name)
        return Lowered(tuple(self.items), self.reasons)

    def _add(self, runnable: Step | Int8) -> str | None:
        """Add a step to the program that is being built, or to another; gives the reason if it cannot be."""
        step = runnable.step if isinstance(runnable, Int8) else runnable
        if isinstance(step, Operator):
            return "PyTorch alone has it"
        if step.output in self.leave:
            return "PyTorch is faster"
        kind = Int8Building if isinstance(runnable, Int8) else Building
        if type(self.building) is kind and self.building.add(step) is None:
            return None
        fresh = (
            Int8Building(self.plan, self.options, quantizers=self.quantizers)
            if kind is Int8Building
            else Building(self.plan, self.options, measured=self.measured)
        )
        reason = fresh.add(step)
        if reason is None:
            self._flush()
            self.building = fresh
        return reason

    def _reads_own(self, runnable: Step | Int8) -> bool:
        """Whether a step reads what the program that is being built makes; otherwise it may run before that."""
        if self.building is None:
            return False
        own, quantizers = self.building.layouts, self.quantizers
        return any((quantizers[name].input if name in quantizers else name) in own for name in runnable.inputs)

    def _flush(self) -> None:
        """Finish the program that is being built, where there is one."""
        building, self.building = self.building, None
        if building is None or not building.steps:
            return
        try:
            if all(self._light(step) for step in building.steps):
                raise CannotError("it would take longer to bring its input into a program and its result out")
            self.items.append(building.finish())
        except (CannotError, NativeError) as error:
            own = {step.output for step in building.steps}  # which may be kept in another form there
            for step in self.plan.steps:
                if step.output in own:
                    self._in_torch(item(self.plan, step), str(error))

    def _light(self, step: Step) -> bool:
        """Whether it takes less time than the way into a program and out of it."""
        if isinstance(step, Pointwise):
            return len(step.code) * math.prod(self.options.shapes[step.output]) < _HEAVY
        return isinstance(step, (Norm, Embedding))

    def _in_torch(self, runnable: Step | Int8, reason: str) -> None:
        for name in runnable.inputs:
            self._quantize(name)
        self.items.append(runnable)
        self.reasons[runnable.output] = reason

    def _quantize(self, name: str) -> None:
        """Run a Quantize step in PyTorch, where a value is what one makes and none has made it yet."""
        step = self.quantizers.get(name)
        if step is not None and all(name not in uses(each)[1] for each in self.items):
            self.items.append(item(self.plan, step))
            self.reasons[name] = "a step that PyTorch runs reads it"
