"""What an engine runs, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rarefy.engine.building import NativeSegment
from rarefy.engine.eager import Eager
from rarefy.engine.int8 import Int8
from rarefy.engine.lowering import Item
from rarefy.engine.measure import LayerFacts
from rarefy.engine.onednn import PackedConv


@dataclass(frozen=True)
class StepInfo:
    """One step of an engine.

    Attributes:
        name: the layer's in the model; of other steps the operator's in the graph.
        kind: "conv", "depthwise", "linear", "pool", ..., or the operator's name.
        kernel: what computes it: a native kernel, "oneDNN" (in PyTorch, with packed weights) or "PyTorch".
        program: the number of the native program that runs it, from 0 on; None where PyTorch does.
        isa: the instruction set of that program; None where PyTorch runs the step.
        facts: what is counted of a layer; None without weights.
        dense_seconds: the fastest dense way to compute the layer that was measured while compiling, PyTorch's or a
            native one, for one sample; None where none was measured.
        note: why PyTorch runs it, where it does.
    """

    name: str
    kind: str
    kernel: str
    program: int | None = None
    isa: str | None = None
    facts: LayerFacts | None = None
    dense_seconds: float | None = None
    note: str = ""


def steps(
    items: Sequence[Item], names: Mapping[str, str], layers: Mapping[str, LayerFacts], reasons: Mapping[str, str]
) -> list[StepInfo]:
    """List the steps of items in the order in which they run.

    Args:
        items: what runs one after the other.
        names: of the steps, by the values that they make.
        layers: facts of the layers, by the values that they make.
        reasons: why PyTorch runs a step, by the value that it makes.
    """
    result: list[StepInfo] = []
    programs = 0
    for item in items:
        if isinstance(item, NativeSegment):
            result += _of_program(item, programs, names, layers)
            programs += 1
        elif isinstance(item, Eager):
            result.append(StepInfo("", "model", "PyTorch", note=item.note))
        else:
            kernel = "oneDNN" if isinstance(item, PackedConv) else "PyTorch"
            step = item.step if isinstance(item, (PackedConv, Int8)) else item
            facts, note = layers.get(item.output), reasons.get(item.output, "")
            dense = None if facts is None else facts.torch_seconds
            result.append(StepInfo(step.name, step.kind, kernel, facts=facts, dense_seconds=dense, note=note))
    return result


def _of_program(
    item: NativeSegment, number: int, names: Mapping[str, str], layers: Mapping[str, LayerFacts]
) -> list[StepInfo]:
    """The steps of a native program."""
    result = []
    for native in item.program.steps():
        port = native.kind in ("input", "output")  # known by the value, not by the step that made it
        name = native.name if port else names.get(native.name, native.name)
        facts = None if port else layers.get(native.name)
        dense = [native.dense_seconds * item.rows, facts.torch_seconds or 0.0] if facts is not None else []
        fastest = min((seconds for seconds in dense if seconds > 0), default=None)
        isa = item.program.facts.isa
        result.append(StepInfo(name, native.kind, native.kernel, number, isa, facts, fastest))
    return result
