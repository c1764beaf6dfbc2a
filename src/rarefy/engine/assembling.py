"""From a plan to an engine: what runs it is chosen, and what it needs is copied."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rarefy.engine import binding, measure
from rarefy.engine.arguments import Choose, Precision
from rarefy.engine.building import NativeSegment, Options, samples
from rarefy.engine.eager import Eager
from rarefy.engine.engine import Engine, Port, Report
from rarefy.engine.execute import torch_threads
from rarefy.engine.int8 import Int8
from rarefy.engine.lowering import Item, lower, uses
from rarefy.engine.onednn import PackedConv
from rarefy.engine.plan import Plan, Step, tensors
from rarefy.engine.preparing import stored
from rarefy.engine.structure import TENSOR, Call, Flat, Node

_Step = TypeVar("_Step", bound=Step)


def build(
    plan: Plan,
    inputs: Sequence[Tensor],
    threads: int | None,
    precision: Precision,
    choose: Choose,
    tune_seconds: float,
    model: nn.Module | None = None,
    native_alone: bool = False,
    torch_compile: bool = False,
) -> Engine:
    """The engine of a plan, and of the model where that may run itself; arguments as those of :func:`compile`.

    With ``native_alone`` what is measured are the native kernels, and not PyTorch beside them.
    """
    begun = time.perf_counter()
    plan = stored(plan, precision)
    threads_now = threads or torch.get_num_threads()
    with torch_threads(threads_now), torch.no_grad():
        found, shapes = _choose(
            plan, inputs, choose, precision, threads_now, tune_seconds, model, native_alone, torch_compile
        )
    own = _Copies()
    items = tuple(own.item(item) for item in found.lowered.items)
    read = {name for item in items for name in uses(item)[0]} | {*plan.outputs}
    native = [item.program.facts for item in items if isinstance(item, NativeSegment)]
    left = [tensor for item in items for tensor in _weights(item)]
    return Engine(
        items=items,
        inputs=[Port(name, tuple(x.shape), x.dtype) for name, x in zip(plan.inputs, inputs, strict=True)],
        outputs=[Port(name, shapes[name], plan.values[name].dtype) for name in plan.outputs],
        takes=model.takes if isinstance(model, Flat) else Call.plain(len(plan.inputs)),
        gives=model.seen.gives if isinstance(model, Flat) else _given(plan),
        batch=plan.batch,
        fixed_because=plan.fixed_because,
        constants={name: own.tensor(value) for name, value in plan.constants.items() if name in read},
        names={step.output: step.name for step in plan.steps},
        layers=found.layers,
        reasons=found.lowered.reasons,
        threads=threads,
        report=Report(
            seconds=time.perf_counter() - begun,
            measuring_seconds=found.seconds,
            chosen=found.chosen,
            candidates=found.candidates,
            precision=precision,
            weight_bytes=sum(tensor.nbytes for tensor in left) + sum(facts.weight_bytes for facts in native),
            scratch_bytes=max((facts.scratch_bytes for facts in native), default=0),
        ),
    )


def _given(plan: Plan) -> Node:
    """What a plan gives that has no model around it: a tensor, or a tuple."""
    return TENSOR if plan.single else Node("tuple", children=(TENSOR,) * len(plan.outputs))


def _weights(item: Item) -> list[Tensor]:
    """The weights that PyTorch has for an item."""
    match item:
        case NativeSegment():
            return []
        case Eager():
            return [*item.model.state_dict().values()]
        case PackedConv() | Int8():
            return [*tensors(item.step).values()]
    return [*tensors(item).values()]


class _Copies:
    """Copies of the tensors that an engine keeps, one of each: the model's may change later."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[Tensor, Tensor]] = {}

    def tensor(self, tensor: Tensor) -> Tensor:
        """The copy, that which is there where it is the same tensor or another view of the same numbers."""
        if tensor.layout is not torch.strided:
            return tensor.clone()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        if key not in self._known:
            self._known[key] = tensor, tensor.detach().clone()  # the first is kept, so that none takes its address
        return self._known[key][1]

    def item(self, item: Item) -> Item:
        """The item with copies in the place of its tensors."""
        if isinstance(item, (NativeSegment, Eager)):  # which have their own
            return item
        if isinstance(item, PackedConv):
            return replace(item, step=self.step(item.step))
        if isinstance(item, Int8):
            return replace(item, step=self.step(item.step))
        return self.step(item)

    def step(self, step: _Step) -> _Step:
        """The same of a step."""
        copies: dict[str, Any] = {name: self.tensor(value) for name, value in tensors(step).items()}
        return replace(step, **copies)


def _choose(
    plan: Plan,
    inputs: Sequence[Tensor],
    choose: str,
    precision: str,
    threads: int,
    tune_seconds: float,
    model: nn.Module | None,
    native_alone: bool,
    torch_compile: bool,
) -> tuple[measure.Decision, dict[str, tuple[int, ...]]]:
    """What runs the plan, and the shapes of its values on the inputs."""
    begun = time.perf_counter()
    usable = binding.available()
    quantized = any(value.quantized is not None for value in plan.values.values())
    timed = choose == "measure" and usable
    native_alone = native_alone or quantized  # PyTorch has no int8 that is any match
    with torch_threads(1):
        shapes, layers = measure.walk(plan, inputs, timed=timed and not native_alone)
    options = Options(
        choice=choose if choose in ("sparse", "dense") else "measure",
        storage="bfloat16" if precision == "bfloat16" else "float32",
        threads=threads,
        tune_seconds=tune_seconds if timed else 0.0,
        shapes=shapes,
        samples=samples(inputs[0].shape),
    )
    if timed:
        eager = model if precision == "float32" else None
        found = measure.choose(plan, inputs, options, layers, eager, native_alone, torch_compile)
        return replace(found, seconds=time.perf_counter() - begun), shapes
    if choose == "torch" or not usable:
        why = "choose='torch'" if choose == "torch" else "there is no native engine"
        return measure.Decision(measure.in_torch(plan, why), {}, "PyTorch", layers, 0.0), shapes
    return measure.Decision(lower(plan, options), {}, "native", layers, 0.0), shapes
