"""From a model to a plan that computes what it does, as it is to be run: captured, tried, rewritten, quantised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from rarefy.engine import pt2e, verify
from rarefy.engine.arguments import Precision, check_calibration
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from rarefy.engine.plan import Conv, Linear, Plan, Recurrence, Step
from rarefy.engine.quantization import Quantization
from rarefy.engine.quantize import quantize
from rarefy.engine.structure import Call, Flat, StructureError, title
from rarefy.engine.tracing import CaptureError, other_dtype


def flattened(calibration: Iterable[Any], takes: Call) -> Iterable[Any]:
    """Batches like an example as tuples of tensors."""
    return calibration if takes.is_plain else (takes.of_example(each) for each in calibration)


class Prepared(NamedTuple):
    """A plan as captured, what it was tried on, what is made of it to be run, and what int8 costs."""

    plan: Plan
    trials: list[verify.Trial]
    better: Plan
    quantization: Quantization | None


def prepare(
    model: Flat,
    inputs: tuple[Tensor, ...],
    precision: Precision,
    calibration: Iterable[Tensor | Sequence[Tensor]] | None,
    error_budget: float,
    *,
    later: bool = False,
    fixed_because: str | None = None,
) -> Prepared:
    """Capture, rewrite and quantise; arguments as those of :func:`compile`.

    With ``later`` a plan of any batch size is compared with the model at small ones alone: the engine will be at the
    example's. Where ``fixed_because`` says why, it is for the batch size of the inputs alone.
    """
    quantized = precision == "int8" and pt2e.is_quantized(model.model)
    check_calibration(precision, calibration, error_budget, quantized)
    plan, trials = _captured(model, inputs, later, fixed_because)
    better, quantization = optimize(plan), None
    if quantized:
        better, quantization = pt2e.read(better)
    elif calibration is not None:
        better, quantization = quantize(better, calibration, budget=error_budget)
    return Prepared(plan, trials, stored(better, precision), quantization)


def _captured(
    model: Flat, inputs: tuple[Tensor, ...], later: bool, fixed_because: str | None
) -> tuple[Plan, list[verify.Trial]]:
    """The plan, which computes what the model does at the batch sizes tried, and what the engine is to be tried on.

    A batch of one and one of several are both tried where the plan takes any: a model may treat them differently, and
    is traced at one of them. Where they differ the engine takes that of the example alone.
    """
    example, raised = None, None
    try:
        example = verify.trial(model, inputs)
        gives = model.seen.gives
    except StructureError as error:
        raise CaptureError(
            f"what {title(model)} gives back cannot be taken apart: {error}. Leave it out (transformers' caches by "
            "use_cache=False), or wrap the model in one that takes the tensors out of it"
        ) from error
    except Exception as error:  # whatever the model raises: tracing may tell where
        raised = error
    plan = capture(model, inputs, fixed_because)
    if example is not None and model.seen.gives != gives:
        raise _traced_differently(model, "its output is of another structure")
    if example is None:
        why = other_dtype(model, inputs) or f"it raises {type(raised).__name__}: {raised}"
        raise CaptureError(f"{title(model)} does not run on example_input: {why}") from raised
    if plan.batch is None:
        batch = inputs[0].shape[0]
        other = verify.trial(model, inputs, 2 if batch == 1 else 1)
        several = verify.trial(model, inputs, 2) if later and batch > 2 else None
        trials = [example] if other is None else [example, other]
        wrong = next(
            (found for each in (several or example, *trials[1:]) if (found := verify.plan_differs(plan, model, each))),
            None,
        )
        refused = other is None and batch == 1
        if wrong is None and not refused:
            return plan, trials
        because = "refuses a batch of 2" if refused else "does something else for a batch of one than for others"
        plan = capture(model, inputs, f"it {because}")
    wrong = verify.plan_differs(plan, model, example)
    if wrong is not None:
        raise _traced_differently(model, wrong)
    return plan, [example]


def _traced_differently(model: Flat, how: str) -> CaptureError:
    return CaptureError(
        f"{title(model)} does something else when it is traced than when it is called ({how}): its forward may not "
        "depend on the Python around it or on memory that it shares with its inputs"
    )


def stored(plan: Plan, precision: str) -> Plan:
    """The plan with its layers' weights as the native kernels store them."""
    return plan if precision != "bfloat16" else replace(plan, steps=tuple(map(_rounded, plan.steps)))


def _rounded(step: Step) -> Step:
    """The step with its weights rounded to bfloat16."""
    if not isinstance(step, (Conv, Linear, Recurrence)):
        return step
    return replace(step, weight=step.weight.bfloat16().float())
