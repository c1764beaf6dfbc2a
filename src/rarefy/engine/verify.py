"""Whether an engine computes what its model does, tried before it is given away.

Float32 sums are taken in another order here, so that "the same" has a tolerance: a share of the largest number of an
output. Where that is passed, float64 judges, since a network may magnify rounding: the engine may be off by some times
what the model itself is. Where that cannot be told either, each item alone must compute what PyTorch does of the same
numbers. What is computed on bytes must be equal to the bit.

Networks with jumps (K-TanH's tables, rounding, comparisons) magnify rounding without end where a number lies beside
one. There the plan itself judges: how far its outputs go when every number moves a little.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.engine import named, reference
from rarefy.engine.building import NativeSegment
from rarefy.engine.engine import Engine
from rarefy.engine.execute import Runner
from rarefy.engine.int8 import Int8
from rarefy.engine.lowering import Item, uses
from rarefy.engine.plan import Operator, Plan, Step, parts

#: How many times as far from float64 as the model an engine may be.
_TIMES = 16
#: By what share numbers are moved: a thousand roundings, so that what rounding takes over a jump goes over it in about
#: half of the tries. And how many times as far as the plan goes then an engine may be off.
_MOVED, _TRIES, _AS_FAR = 2.0**-13, 8, 2
#: Operators with jumps.
_JUMPS = frozenset(
    f"aten.{name}"
    for name in (
        *("round", "floor", "ceil", "trunc", "frac", "sign", "sgn", "floor_divide", "remainder", "fmod", "heaviside"),
        *("gt", "ge", "lt", "le", "eq", "ne", "argmax", "argmin", "argsort", "sort", "topk", "bucketize"),
    )
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class EngineError(ValueError):
    """An engine that does not compute what its model does; the message names the first step that differs."""


class PlanError(ValueError):
    """A plan for any batch size that does not compute what its model does at this one; the message says so."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Inputs, and what the model makes of them."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@contextmanager
def _seeded() -> Iterator[None]:
    """Within the block PyTorch draws the same random numbers each time, without gradient."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield


def trial(model: nn.Module, inputs: Sequence[Tensor], batch: int | None = None) -> Trial | None:
    """A trial on the example's inputs, or so many samples made of them; None where the model does not take them.

    Further samples are the example's, moved along their last axis: whatever the numbers mean, they are of its kind.
    """
    given = tuple(_samples(x, batch) for x in inputs)
    with _seeded():
        try:
            outputs = model(*(x.clone() for x in given))
        except Exception:  # a model may refuse a batch size with whatever it likes
            if batch is None:
                raise
            return None
    return Trial(given, tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,))


def plan_trial(plan: Plan, inputs: tuple[Tensor, ...]) -> Trial:
    """A trial of a plan in the place of a model."""
    with _seeded():
        return Trial(inputs, tuple(reference.run(plan, inputs)))


def _samples(x: Tensor, batch: int | None) -> Tensor:
    if batch is None or x.shape[0] == batch:
        return x
    several = [x.roll(i, -1) if x.dim() > 1 else x for i in range(-(-batch // x.shape[0]))]
    return torch.cat(several)[:batch]


def plan_differs(plan: Plan, model: nn.Module, tried: Trial) -> str | None:
    """In what the plan, run by PyTorch, differs from the model; None where it does not."""
    try:
        with _seeded():
            outputs = reference.run(plan, tried.inputs)
    except Exception as error:  # operators raise what they like for shapes that they were not traced for
        return f"it raises {type(error).__name__}: {error}"
    return _difference(plan, outputs, tried, lambda: _wide(model, tried))


def check(engine: Engine, plan: Plan, model: nn.Module | None, tried: Trial) -> None:
    """Raise EngineError where the engine differs from what was tried, of the plan and, where given, of the model.

    Raises PlanError where it is the plan, for any batch size, that differs from the model.
    """
    with _seeded():
        outputs = engine.flat(tried.inputs)
    found = _difference(plan, outputs, tried, lambda: None if model is None else _wide(model, tried))
    if found is None:
        return
    if model is not None and plan.batch is None and plan_differs(plan, model, tried):
        raise PlanError(f"it does something else for a batch of {tried.inputs[0].shape[0]} than for others")
    if (step := _first_different(engine, plan, tried)) is None:
        return
    raise EngineError(
        f"the engine does not compute what the model does for inputs of the shapes "
        f"{', '.join(str(tuple(x.shape)) for x in tried.inputs)}: {found}. The first step that differs is {step}; "
        "choose='torch' runs all in PyTorch. Please report it with the model"
    )


def _difference(
    plan: Plan, outputs: Sequence[Tensor], tried: Trial, wide: Callable[[], Sequence[Tensor] | None]
) -> str | None:
    """In what outputs differ from those of the model by more than rounding; None where they do not."""
    chance = _draws(plan)
    # Rounding before a byte may make it another: what differs at all is looked at step by step.
    quantized = any(value.quantized for value in plan.values.values())
    allowed = 0.0 if quantized else _tolerance(plan)
    jumps = not quantized and any(_jumps(plan, step) for step in plan.steps)
    exact: Sequence[Tensor] | None = None
    moved: list[list[Tensor]] = []
    for index, (got, expected) in enumerate(zip(outputs, tried.outputs, strict=True)):
        for what in ("shape", "dtype"):
            if getattr(got, what) != getattr(expected, what):
                return f"output {index} has the {what} {getattr(got, what)}, not {getattr(expected, what)}"
        if chance or _close(got, expected, allowed):
            continue
        if jumps:
            moved = moved or [_moved(plan, tried.inputs, seed) for seed in range(_TRIES)]
            if _within(got, expected, [each[index] for each in moved]):
                continue
        exact = exact or wide()
        if exact is None or not _as_good(got, expected, exact[index]):
            return f"output {index} is off by {_distance(got, expected):.2g} of its largest number"
    return None


def _draws(plan: Plan) -> bool:
    """Whether a step draws random numbers."""
    targets = (step.target for step in plan.steps if isinstance(step, Operator))
    return any(torch.Tag.nondeterministic_seeded in getattr(named.resolve(target), "tags", ()) for target in targets)


def _jumps(plan: Plan, step: Step) -> bool:
    """Whether the least difference in what a step reads may become a large one."""
    modes = [getattr(step, "mode", None), parts(getattr(step, "activation", ""))[1]]
    if isinstance(step, Operator):
        read = [plan.values[name].dtype.is_floating_point for name in step.inputs if name in plan.values]
        modes += step.args
        if step.target.rpartition(".")[0] in _JUMPS and any(read):
            return True
    return "ktanh" in [mode for mode in modes if isinstance(mode, str)]


def _moved(plan: Plan, inputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The outputs of a plan of which every floating-point number is moved at random, by :data:`_MOVED` at most."""
    chance = torch.Generator().manual_seed(seed)

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x + x * ((2 * torch.rand(x.shape, generator=chance, dtype=torch.float32) - 1) * _MOVED).to(x.dtype)

    with _seeded():
        values: dict[str, Any] = {**plan.constants, **dict(zip(plan.inputs, map(moved, inputs), strict=True))}
        for step, freed in zip(reference.items(plan), plan.last_uses(), strict=True):
            values[step.output] = moved(reference.run_step(step, values))
            for name in freed:
                del values[name]
    return [values[name] for name in plan.outputs]


def _within(got: Tensor, expected: Tensor, moved: Sequence[Tensor]) -> bool:
    """Whether an output is not much farther off than those of moved numbers, in its largest error and in the mean."""
    farthest = [max(_distance(each, expected, mean=mean) for each in moved) for mean in (False, True)]
    off = [_distance(got, expected, mean=mean) for mean in (False, True)]
    return all(a <= _AS_FAR * b < math.inf for a, b in zip(off, farthest, strict=True))


def _tolerance(plan: Plan) -> float:
    """The share of the largest number that rounding in the coarsest dtype of the plan may come to."""
    dtypes = {value.dtype for value in plan.values.values()} & {*_FLOATS}
    dtypes |= {value.dtype for value in plan.constants.values()} & {*_FLOATS}
    coarsest: float = max(torch.finfo(dtype).eps for dtype in dtypes or {torch.float64})
    return math.sqrt(coarsest) / 4


def _close(got: Tensor, expected: Tensor, allowed: float) -> bool:
    if got.dtype.is_floating_point or got.is_complex():
        return _distance(got, expected) <= allowed
    return torch.equal(got, expected)


def _distance(got: Tensor, expected: Tensor, *, mean: bool = False) -> float:
    """The largest difference, or the mean one, as a share of the largest number.

    It is infinite where NaN and infinities are elsewhere.
    """
    if got.numel() == 0:
        return 0.0
    kind = torch.complex128 if got.is_complex() else torch.float64
    a, b = got.detach().to(kind), expected.detach().to(kind)
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    if not finite.any():
        return 0.0
    a, b = a[finite], b[finite]
    largest = b.abs().max().item()
    differences = (a - b).abs()
    difference = (differences.mean() if mean else differences.max()).item()
    return float(difference and difference / max(largest, torch.finfo(torch.float32).tiny))


def _as_good(got: Tensor, expected: Tensor, exact: Tensor) -> bool:
    """Whether an output is about as far from the exact one as the model's own is."""
    own = _distance(expected, exact.to(expected.dtype))
    return own > 0 and _distance(got, exact.to(got.dtype)) <= _TIMES * own


def _wide(model: nn.Module, tried: Trial) -> tuple[Tensor, ...] | None:
    """What the model makes of the inputs in float64; None where it cannot run in it."""
    try:
        with _seeded():
            doubled = copy.deepcopy(model).double()
            outputs = doubled(*(x.double() if x.is_floating_point() else x.clone() for x in tried.inputs))
    except Exception:  # models with dtypes of their own, or that cannot be copied
        return None
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def _first_different(engine: Engine, plan: Plan, tried: Trial) -> str | None:
    """The first item that makes something else than PyTorch of the same numbers, in words."""
    values: dict[str, Any] = {**plan.constants, **dict(zip(plan.inputs, tried.inputs, strict=True))}
    with _seeded():
        whole = set[str]()  # what is made of bytes, which has no rounding of its own
        for step in reference.items(plan):
            values[step.output] = reference.run_step(step, values)
            if isinstance(step, Int8):
                whole.add(step.output)
        for item in engine._items:
            made = _made(item, values, engine)
            for name, got in made.items():
                allowed = 0.0 if name in whole else _tolerance(plan)
                if isinstance(got, Tensor) and not (
                    got.shape == values[name].shape and _close(got, values[name], allowed)
                ):
                    if isinstance(item, NativeSegment):
                        inside = ", ".join(dict.fromkeys(engine._names.get(each, each) for each in item.steps))
                        return f"{engine._names.get(name, name)!r} (a native program of {inside})"
                    return f"{engine._names.get(name, name)!r} (run by PyTorch)"
    return None


def _made(item: Item, values: Mapping[str, Any], engine: Engine) -> dict[str, Any]:
    """What an item makes of the values."""
    reads, makes = uses(item)
    made = Runner([item], reads, makes, engine._constants)([values[name] for name in reads], engine.threads or 1)
    return dict(zip(makes, made, strict=True))
