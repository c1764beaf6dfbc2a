"""Single steps as plans, and what they must come to."""

from dataclasses import fields, replace

import torch
from torch import Tensor

from rarefy import kernels
from rarefy.engine import binding, measure, reference
from rarefy.engine.assembling import build
from rarefy.engine.building import Options
from rarefy.engine.lowering import Lowered, lower
from rarefy.engine.plan import Conv, Linear, Plan, Step, Value


def paths():
    """Every way to compute a step here: PyTorch, and the native kernels of each instruction set."""
    isas = {kernel.isa for kernel in kernels.table() if kernel.name == "engine" and kernel.supported}
    return ["pytorch", *(sorted(isas) if binding.available() else [])]


def sparse(weight: Tensor, density: float) -> Tensor:
    """The same weights with this share of them left, at random."""
    return torch.where(torch.rand(weight.shape) < density, weight, 0.0)


PATTERNS = {
    "dense": lambda w: w,
    "random": lambda w: sparse(w, 0.1),
    "half": lambda w: sparse(w, 0.5),
    "empty rows": lambda w: w * (torch.arange(len(w)) % 3 == 1).reshape(-1, *(1,) * (w.dim() - 1)),
    "first row alone": lambda w: torch.cat([w[:1], torch.zeros_like(w[1:])]),
    "one nonzero": lambda w: (
        torch.zeros_like(w).index_put((torch.tensor(w.numel() - 1),), w.flatten()[-1])
        if w.dim() == 1
        else torch.zeros(w.numel()).index_fill(0, torch.tensor([w.numel() - 1]), 1.5).reshape(w.shape)
    ),
    "one channel": lambda w: w * (torch.arange(w.shape[1]) == w.shape[1] - 1).reshape(1, -1, *(1,) * (w.dim() - 2)),
    "nothing": torch.zeros_like,
    "minus zero": lambda w: torch.where(torch.rand(w.shape) < 0.2, w, -0.0),
}


def plan_of(step: Step, inputs: dict[str, Tensor]) -> Plan:
    """A plan of one step, of any batch size."""
    result = reference.run_step(step, inputs)
    known = {**inputs, step.output: result}
    values = {name: Value(tuple(x.shape[1:]), x.dtype) for name, x in known.items()}
    return Plan(tuple(inputs), (step.output,), True, (step,), values, {}, None)


def run(step: Step, inputs: dict[str, Tensor], isa: str, choose: str = "native", precision: str = "float32") -> Tensor:
    """The step's result, computed that way."""
    with kernels.forced(isa):
        engine = build(plan_of(step, inputs), tuple(inputs.values()), 1, precision, choose, 0.0)
        assert engine.report.chosen == ("PyTorch" if isa == "pytorch" else "native")
        if isa != "pytorch":
            assert not any(each.note for each in engine.steps()), engine.steps()
        return engine(*inputs.values())


def lowered(plan: Plan, *inputs: Tensor, choose: str = "measure", precision: str = "float32") -> Lowered:
    """The plan as native programs, their kernels chosen by rule, and what is left to PyTorch."""
    shapes, _ = measure.walk(plan, inputs, timed=False)
    return lower(plan, Options(choose, precision, 1, 0.0, shapes, 1))


def wide(step: Step, inputs: dict[str, Tensor]) -> Tensor:
    """The step's result in float64."""
    doubled = {f.name: v.double() for f in fields(step) if isinstance(v := getattr(step, f.name), Tensor)}
    return reference.run_step(replace(step, **doubled), {name: x.double() for name, x in inputs.items()})


def tolerance(step: Step, inputs: dict[str, Tensor]) -> Tensor:
    """How far a float32 result may be from that in float64: every sum rounds, in any order, and activations do."""
    terms = 1
    size = wide(step, inputs).abs()
    if isinstance(step, (Conv, Linear)):
        terms += step.weight[0].numel()
        magnitudes = {name: x.abs() for name, x in inputs.items()}
        bias = None if step.bias is None else step.bias.abs()
        size = size + wide(replace(step, weight=step.weight.abs(), bias=bias, activation="none"), magnitudes)
    return 2.0**-24 * 1.5 * (terms + 4) * size + 2e-6 * (1 + size)


def check(step: Step, inputs: dict[str, Tensor], isa: str, choose: str = "native") -> None:
    """Assert that the step comes to what it does in float64."""
    compare(step, inputs, run(step, inputs, isa, choose))


def compare(step: Step, inputs: dict[str, Tensor], result: Tensor) -> None:
    """Assert that this is what the step comes to in float64."""
    expected = wide(step, inputs)
    assert result.shape == expected.shape
    assert result.dtype is torch.float32
    excess = ((result.double() - expected).abs() - tolerance(step, inputs)).max().item()
    assert excess <= 0, f"{step} is off by {excess} more than it may"
