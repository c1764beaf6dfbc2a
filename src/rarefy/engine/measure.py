"""What computes a plan fastest: native programs, PyTorch, or some of both; found by measuring."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from rarefy.engine.building import NativeSegment, Options, samples
from rarefy.engine.eager import Eager
from rarefy.engine.execute import Runner
from rarefy.engine.int8 import Int8
from rarefy.engine.lowering import Item, Lowered, lower
from rarefy.engine.onednn import PackedConv, packed
from rarefy.engine.plan import Conv, ConvTranspose, Layer, Plan, Recurrence
from rarefy.engine.reference import bind, items, run_step
from rarefy.engine.structure import Flat, title

_ROUNDS = 5
_LEAST_ROUNDS = 2
_RACE_SECONDS = 2.0  # after the least rounds, no more are begun when the ways have run for so long
_LONG_SECONDS = 0.2  # of a network: so long a run needs none before it that is not counted
_LEAST_SECONDS = 0.002  # of one measurement of a layer
_ENOUGH_SECONDS = 0.02  # of one measurement: so long a run is not repeated, nor is one before it that is not counted
#: A way that took so many times as long as the fastest so far runs no further rounds; one whose runs are long.
_LOST, _LOST_LONG = 1.5, 1.1
#: A layer is given to PyTorch where that takes at most this share of our time: the way there and back costs, too.
_CLEARLY_FASTER = 0.9
#: What the model itself is called among the ways, and the share of the best other's time that it must stay below: what
#: is made of its graph can be saved.
EAGER, INDUCTOR = "eager", "torch.compile"
_WORTH_KEEPING = 0.97
#: Giving layers to PyTorch is only tried where it may save this share of the whole time.
_WORTH_TRYING = 0.03


@dataclass(frozen=True)
class LayerFacts:
    """What is counted of a layer, for one sample, and the time that PyTorch takes for it with all its weights.

    Attributes:
        weights, nonzeros: how many weights there are, and how many of them are not zero.
        macs, dense_macs: multiply-accumulates with those that are not zero, and with all.
        torch_seconds: of PyTorch, in the faster of its memory formats; None where it was not measured.
    """

    weights: int
    nonzeros: int
    macs: int
    dense_macs: int
    torch_seconds: float | None


@dataclass(frozen=True)
class Decision:
    """What was chosen to run a plan.

    Attributes:
        lowered: the programs and steps to run.
        candidates: seconds that each way to run the whole plan took on the example, by name; empty if not measured.
        chosen: the name of the way that was taken.
        layers: facts of each layer, by the value that it makes.
        seconds: what measuring took.
    """

    lowered: Lowered
    candidates: Mapping[str, float]
    chosen: str
    layers: Mapping[str, LayerFacts]
    seconds: float


def seconds_of(threads: int) -> Callable[[], float]:
    """The clock to measure with: the thread's own where there is one, since others may use the processor, too."""
    return time.thread_time if threads == 1 else time.perf_counter


def walk(
    plan: Plan, inputs: Sequence[Tensor], *, timed: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, LayerFacts]]:
    """Run the plan in PyTorch: the shape of each value, and facts of each layer, its time among them if ``timed``."""
    values: dict[str, Any] = {**plan.constants, **dict(zip(plan.inputs, inputs, strict=True))}
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    layers: dict[str, LayerFacts] = {}
    known: dict[object, float] = {}  # layers that look alike take the same time: all their weights count
    for item, freed in zip(items(plan), plan.last_uses(), strict=True):
        begun = time.thread_time()
        result = values[item.output] = run_step(item, values)
        took = time.thread_time() - begun
        step = item.step if isinstance(item, Int8) else item
        if isinstance(step, Layer):
            look = _look(step, shapes[step.input])
            if timed and look not in known:
                other = packed(step, shapes[step.input]) if isinstance(step, Conv) else None
                known[look] = took if took > _ENOUGH_SECONDS else _time(step, values)
                if other is not None:
                    known[look] = min(known[look], _time(other, values))
            # every weight is used once for each place of the output channel that it belongs to
            places = result.numel() // len(step.weight)
            layers[step.output] = _facts(step.weight, places, samples(inputs[0].shape), known.get(look))
        if isinstance(step, ConvTranspose):  # once for each place of the input channel that it belongs to
            given = shapes[step.input]
            layers[step.output] = _facts(step.weight, math.prod(given) // given[1], samples(inputs[0].shape), took)
        if isinstance(step, Recurrence):  # once for each step of every sequence
            layers[step.output] = _facts(step.weight, math.prod(result.shape[:2]), samples(inputs[0].shape), None)
        if isinstance(result, Tensor):
            shapes[step.output] = tuple(result.shape)
        for name in freed:
            del values[name]
    return shapes, layers


def _look(step: Layer, shape: tuple[int, ...]) -> object:
    """All that the time of a dense layer depends on."""
    options = (step.stride, step.padding, step.dilation, step.groups) if isinstance(step, Conv) else ()
    return type(step), tuple(step.weight.shape), options, step.residual is None, step.activation, shape


def choose(
    plan: Plan,
    inputs: Sequence[Tensor],
    options: Options,
    layers: Mapping[str, LayerFacts],
    model: nn.Module | None,
    native_alone: bool = False,
    torch_compile: bool = False,
) -> Decision:
    """The fastest way to run the plan on inputs like these; the model that it is of, where given, is one of them.

    With ``native_alone`` those of PyTorch are not; with ``torch_compile`` its form of the model is, too.
    """
    begun = time.perf_counter()
    native = lower(plan, options)
    # Measuring on a busy machine may mislead.
    ways = {"native": native, "native by rule": lower(plan, replace(options, tune_seconds=0.0))}
    if not native_alone:
        dense = in_torch(plan, "PyTorch is faster")
        ways |= {"PyTorch": dense, "PyTorch, oneDNN": _by_onednn(dense, options.shapes)}
        if slow := slower_than_torch(native, plan, inputs, layers):
            segments = [item for item in native.items if isinstance(item, NativeSegment)]
            measured = {name: segment.program for segment in segments for name in segment.steps}
            ways["native and PyTorch"] = _by_onednn(lower(plan, options, slow, measured), options.shapes)
    if model is not None:
        ways[EAGER] = in_eager(plan, model)
    if torch_compile and isinstance(model, Flat):
        ways[INDUCTOR] = _by_inductor(plan, model, inputs)
    dense_seconds = sum(facts.torch_seconds or 0.0 for facts in layers.values()) * samples(inputs[0].shape)
    least = {name: dense_seconds / options.threads for name in ways if not name.startswith("native")}
    least[INDUCTOR] = 0.0  # which was asked for: it runs
    times = race(ways, plan, inputs, options.threads, least)
    chosen = min(times, key=lambda name: times[name] / (_WORTH_KEEPING if name in (EAGER, INDUCTOR) else 1))
    if chosen == EAGER and model is not None:
        try:
            ways[EAGER] = in_eager(plan, deepcopy(model))
        except Exception:  # whatever its parts raise: then the engine has no copy that nobody changes
            chosen = min({*times} - {EAGER}, key=lambda name: times[name])
    return Decision(ways[chosen], times, chosen, layers, time.perf_counter() - begun)


def runner(items: Sequence[Item], plan: Plan) -> Runner:
    """What runs these items, into which the plan was made."""
    return Runner(items, plan.inputs, plan.outputs, plan.constants)


def in_eager(plan: Plan, model: nn.Module) -> Lowered:
    """The model itself."""
    return Lowered((Eager(model, plan.inputs, plan.outputs, plan.single),), {})


def _by_inductor(plan: Plan, model: Flat, inputs: Sequence[Tensor]) -> Lowered:
    """A copy of the model as ``torch.compile`` makes it. Raises ValueError where it cannot."""
    try:
        own = deepcopy(model)
        compiled = Flat(cast(nn.Module, torch.compile(own.model)), own.takes)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.compile warns of its own parts
            compiled(*inputs)
    except Exception as error:  # whatever PyTorch's compiler and the one of C++ raise
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch_compile=True, and torch.compile cannot make {title(model)} here ({type(error).__name__}: {said}): "
            "leave it out"
        ) from error
    note = "torch.compile's form of the model, which is faster than what the engine makes of its graph"
    return Lowered((Eager(compiled, plan.inputs, plan.outputs, plan.single, note),), {})


def in_torch(plan: Plan, because: str) -> Lowered:
    """The plan with PyTorch for everything."""
    return Lowered(items(plan), {step.output: because for step in plan.steps})


def _by_onednn(lowered: Lowered, shapes: Mapping[str, tuple[int, ...]]) -> Lowered:
    """The same with packed weights in the convolutions that PyTorch runs."""
    items = [item if isinstance(item, NativeSegment) else _packed(item, shapes) or item for item in lowered.items]
    return replace(lowered, items=tuple(items))


def _packed(item: Item, shapes: Mapping[str, tuple[int, ...]]) -> PackedConv | None:
    return packed(item, shapes[item.input]) if isinstance(item, Conv) else None


def _time(item: Layer | PackedConv, values: dict[str, Any]) -> float:
    """Seconds of a step in PyTorch: the median of some runs, its inputs already in the format that it takes."""
    given = [values[name] for name in item.inputs]
    if isinstance(item, PackedConv):
        given = [x.contiguous(memory_format=torch.channels_last) for x in given]
    run = item.run if isinstance(item, PackedConv) else bind(item)[0]

    def once() -> float:
        begun = time.thread_time()
        run(*given)
        return time.thread_time() - begun

    first = once()
    took: list[float] = []
    if first > _ENOUGH_SECONDS:
        return first
    while sum(took) < _ENOUGH_SECONDS and (len(took) < 3 or (sum(took) < _LEAST_SECONDS and len(took) < 50)):
        took.append(once())
    return median(took)


def _facts(weight: Tensor, places: int, samples: int, seconds: float | None) -> LayerFacts:
    """Facts of weights that are each used so many times, in so many seconds."""
    weights, nonzeros, each = weight.numel(), int(weight.count_nonzero()), places // samples
    took = None if seconds is None else seconds / samples
    return LayerFacts(weights, nonzeros, nonzeros * each, weights * each, took)


def slower_than_torch(
    native: Lowered, plan: Plan, inputs: Sequence[Tensor], layers: Mapping[str, LayerFacts]
) -> set[str]:
    """The layers that PyTorch computes clearly faster than the programs do, where that matters to the whole."""
    timed = runner(native.items, plan).timed
    times = timed(inputs, 1).steps
    if sum(took.sum() for took in times) < _LONG_SECONDS:
        times = timed(inputs, _LEAST_ROUNDS).steps
    saved: dict[str, float] = {}
    for item, took in zip(native.items, times, strict=True):
        if isinstance(item, NativeSegment):
            for step, seconds in zip(item.program.steps(), took.min(0), strict=True):
                known = layers[step.name].torch_seconds if step.kind != "input" and step.name in layers else None
                if known is not None and known * samples(inputs[0].shape) < _CLEARLY_FASTER * seconds:
                    saved[step.name] = seconds - known * samples(inputs[0].shape)
    whole = sum(took.min(0).sum() for took in times)
    return set(saved) if sum(saved.values()) > _WORTH_TRYING * whole else set()


def race(
    ways: Mapping[str, Lowered], plan: Plan, inputs: Sequence[Tensor], threads: int, least: Mapping[str, float]
) -> dict[str, float]:
    """Seconds of each way, the least of some rounds in which each runs once, after one that is not counted.

    Where runs are long the first counts, too. Those that are far behind run no more: twice as far after a round that is
    not counted. Those that would be, for what they are known to take at ``least``, do not run at all; the first one
    always does. Where rounds are long there are fewer.
    """
    clock = seconds_of(threads)
    times: dict[str, list[float]] = {}

    def run(name: str, repeats: int) -> float:
        begun = clock()
        for _ in range(repeats):
            runners[name](inputs, threads)
        return (clock() - begun) / repeats

    runners = {name: runner(way.items, plan) for name, way in ways.items()}
    for name in ways:
        if not times or least.get(name, 0.0) <= 2 * _LOST * min(map(min, times.values())):
            times[name] = [run(name, 1)]
    racing = list(times)
    uncounted = int(min(map(min, times.values())) < _LONG_SECONDS)
    for done in range(1, _ROUNDS + 1):
        best = {name: min(times[name][min(done - 1, uncounted) :]) for name in racing}
        lost = (_LOST_LONG if not uncounted else _LOST if done > 1 else 2 * _LOST) * min(best.values())
        racing = [name for name in racing if best[name] <= lost]
        enough = done - uncounted >= _LEAST_ROUNDS and sum(map(sum, times.values())) > _RACE_SECONDS
        if len(racing) == 1 or enough:
            break
        for name in racing:
            # What takes microseconds runs many times, or its first runs decide.
            times[name].append(run(name, min(50, 1 + int(_LEAST_SECONDS / max(times[name][0], 1e-6)))))
    return {name: min(each[uncounted:] or each) for name, each in times.items()}
