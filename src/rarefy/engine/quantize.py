"""Post-training quantisation: a plan in float32 becomes one in int8, from examples of what the network will see.

Ranges come from histograms of the float32 network's values; weights are symmetric with a scale for each output channel;
the mean error of each channel is taken from its bias (Nagel et al., arXiv 1906.04721, section 4.2, on examples). What
is no layer computes in int8 where int8 layers stand on both sides of it. Where the outputs lose more than a budget,
layers go back to float32, those first without which the error falls most.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rarefy.engine import int8, reference
from rarefy.engine.calibrate import METHODS, Histogram, Method, checked, is_wild, read_by_layers, weight_scales
from rarefy.engine.int8_layout import OTHERS, Layout, key, lay_out
from rarefy.engine.int8_plan import Int8Plan, levels
from rarefy.engine.passes import fuse_activations
from rarefy.engine.plan import (
    Affine,
    Binary,
    Conv,
    Layer,
    Linear,
    Plan,
    Quantized,
    Step,
)
from rarefy.engine.quantization import Quantization, QuantizedLayer

#: The error of the outputs, ||y_int8 - y|| / ||y||, that is let pass: 20 dB. What networks are trained to tell apart
#: differs by more, and 8 bits with a range for each tensor come to 1 to 5 % in networks that quantise well.
BUDGET = 0.1
#: The examples that errors are measured on, and those that layers are tried one by one on.
_EXAMINED, _TRIED = 64, 16
_Inputs = tuple[Tensor, ...]


@torch.no_grad()
def quantize(
    plan: Plan,
    batches: Iterable[Tensor | Sequence[Tensor]],
    *,
    method: Method = "mse",
    budget: float = BUDGET,
) -> tuple[Plan, Quantization]:
    """Quantise a plan after training.

    Args:
        plan: in float32, optimized.
        batches: what the network will see, some hundred examples: tensors, or tuples of one for each input.
        method: how ranges are chosen; see :data:`rarefy.engine.calibrate.Method`.
        budget: how far the outputs may be from those in float32 on examples, ||y_int8 - y|| / ||y||; 0 gives float32.

    Raises ValueError for batches that the network does not take, or on which it makes NaN or infinities; TypeError for
    what are no batches.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not budget >= 0:
        raise ValueError(f"budget must be at least 0, got {budget}; 0.1 lets the outputs be a tenth off")
    given = checked(plan, batches)
    network = _Network(_with_tables(plan), method, given)
    examined = list(_first(given, _EXAMINED, plan.batch))
    network.examine(examined)
    error = network.error(examined)
    if error > budget:
        error = network.give_back(error, budget, examined, list(_first(given, _TRIED, plan.batch)))
    samples = sum(len(batch[0]) if batch[0].dim() else 1 for batch in given)
    return network.plan(), Quantization(method, samples, error, budget, network.layers())


def _first(batches: Sequence[_Inputs], count: int, fixed: int | None) -> Iterator[_Inputs]:
    """Batches of about so many examples in all, the first ones."""
    for batch in batches:
        if count <= 0:
            return
        size = len(batch[0]) if batch[0].dim() else 1
        yield batch if fixed is not None else tuple(x[:count] for x in batch)
        count -= size


def _with_tables(plan: Plan) -> Plan:
    """The plan with activations that are no bounds in steps of their own."""
    steps, values = list[Step](), dict(plan.values)
    for step in plan.steps:
        apart = isinstance(step, (Conv, Linear, Binary, Affine)) and step.activation not in int8.CLAMPS
        if not apart or step.kind == "activation":
            steps.append(step)
            continue
        assert isinstance(step, (Conv, Linear, Binary, Affine))
        before = f"{step.output}.before"
        values[before] = values[step.output]
        steps += [
            replace(step, output=before, activation="none"),
            Affine(name=step.name, input=before, output=step.output, activation=step.activation),
        ]
    return replace(plan, steps=tuple(steps), values=values)


@dataclass
class _Loss:
    """What a layer loses, summed over examples: of each channel the error, its square and the signal's."""

    count: int = 0
    error: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    signal: float = 0.0
    numbers: int = 0
    saturated: int = 0

    def shift(self) -> Tensor:
        """The mean error of each channel."""
        return torch.as_tensor(self.error, dtype=torch.float64) / max(self.count, 1)

    def sqnr(self) -> float | None:
        """In dB; None without noise or signal."""
        noise = float(
            (torch.as_tensor(self.squares, dtype=torch.float64) - self.count * self.shift().square()).clamp(min=0).sum()
        )
        return 10 * math.log10(self.signal / noise) if noise > 0 and self.signal > 0 else None


@dataclass
class _Network:
    """A network on its way to int8."""

    base: Plan
    method: Method
    batches: Sequence[_Inputs]
    seen: dict[str, Histogram] = field(init=False)
    wild: frozenset[str] = field(init=False)  # the values that have no range
    kept: dict[str, str] = field(default_factory=dict)  # why layers stay float32
    scales: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, _Loss] = field(default_factory=dict)
    exact: dict[int, list[list[Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seen, self.wild = _observed(self.base, self.batches)
        for step in self.base.steps:
            if isinstance(step, Layer):
                self._begin(step)

    def _begin(self, step: Layer) -> None:
        """The scales of a layer's weights, or why it cannot be quantised."""
        if not step.weight.isfinite().all() or (step.bias is not None and not step.bias.isfinite().all()):
            self.kept[key(step)] = "a weight is not finite"
            return
        if step.input in self.wild:
            self.kept[key(step)] = "what it reads has no range"
            return
        if isinstance(step, Conv) and not 1 <= len(step.stride) <= 2:
            self.kept[key(step)] = f"it has {len(step.stride)} axes"  # and native layers of three are float32
            return
        self.scales[key(step)] = scale = weight_scales(step.weight)
        if (levels(step.weight, scale).abs().flatten(1).double().sum(1).max() * 255) >= 1 << 31:
            self.kept[key(step)] = "its sums may not fit 32 bits"

    def _layout(self, kept: Iterable[str] | None = None) -> Layout:
        """What runs in int8 when these layers do not; by custom those that were given back."""
        return lay_out(self.base, self.kept if kept is None else kept, self._quantized, self.wild)

    def _quantized(self, read: Collection[str], groups: Mapping[str, str]) -> dict[str, Quantized]:
        """The quantisation of values that steps in int8 read: one for each group."""
        whole: dict[str, Histogram] = {}
        for name, seen in self.seen.items():
            whole.setdefault(groups.get(name, name), Histogram()).merge(seen)
        chosen: dict[str, Quantized] = {}
        for name in read:
            group = groups.get(name, name)
            chosen.setdefault(group, whole[group].quantized(self.method))
        return {name: chosen[groups.get(name, name)] for name in read}

    def examine(self, batches: Sequence[_Inputs]) -> None:
        """Measure what each layer loses on these batches."""
        layout = self._layout()
        plan = layout.plan
        for batch in batches:
            values: dict[str, Any] = {**plan.constants, **dict(zip(plan.inputs, batch, strict=True))}
            for step, freed in zip(plan.steps, plan.last_uses(), strict=True):
                values[step.output] = reference.run_step(step, values)
                if isinstance(step, Layer) and step.output in layout.inside:
                    self._examine(step, layout, values)
                for name in freed:
                    del values[name]

    def _examine(self, step: Layer, layout: Layout, values: Mapping[str, Any]) -> None:
        x, of, to = values[step.input], layout.quantized[step.input], layout.quantized.get(step.output)
        alone = replace(step, residual=None, activation="none")
        exact = reference.run_step(alone, {step.input: x})
        near = int8.dequantize(int8.quantize(x, of), of)
        scale = self.scales[key(step)]
        rounded = replace(alone, weight=int8.weights(levels(step.weight, scale), scale))
        channels = -1 if isinstance(step, Linear) else 1
        error = (reference.run_step(rounded, {step.input: near}) - exact).double().movedim(channels, 0).flatten(1)
        loss = self.losses.setdefault(key(step), _Loss())
        loss.count += error.shape[1]
        loss.error, loss.squares = loss.error + error.sum(1), loss.squares + error.square().sum(1)
        loss.signal += float(exact.double().square().sum())
        made = values[step.output]
        loss.numbers += made.numel()
        if to is not None:
            q = made / to.scale + to.zero_point
            loss.saturated += int(((q < -0.5) | (q > 255.5)).sum())

    def error(self, batches: Sequence[_Inputs], kept: Iterable[str] | None = None) -> float:
        """How far the outputs are from those in float32 when these layers stay float32."""
        if id(batches) not in self.exact:
            self.exact[id(batches)] = [reference.run(self.base, batch) for batch in batches]
        plan = self.plan(kept)
        signal = noise = 0.0
        for batch, exact in zip(batches, self.exact[id(batches)], strict=True):
            for y, got in zip(exact, reference.run(plan, batch), strict=True):
                if y.is_floating_point():
                    finite = y.isfinite()
                    signal += float(y[finite].double().square().sum())
                    noise += float((got[finite].double() - y[finite].double()).square().sum())
                else:
                    signal, noise = signal + y.numel(), noise + float((got != y).sum())
        return math.sqrt(noise / signal) if signal else math.inf if noise else 0.0

    def give_back(self, error: float, budget: float, examined: Sequence[_Inputs], tried: Sequence[_Inputs]) -> float:
        """Let layers be float32 until the error is within the budget; gives the error."""
        before = self.error(tried)
        without = {name: self.error(tried, {*self.kept, name}) for name in self.losses}
        order = sorted(without, key=lambda name: without[name])
        effect = [max(0.0, before**2 - without[name] ** 2) for name in order]
        # Errors of layers add up, about, in the square: so many have to go before it is worth looking.
        left, first = sum(effect), 0
        while left > 0 and first < len(order) - 1 and error**2 * (left - sum(effect[: first + 1])) / left > budget**2:
            first += 1
        for number, name in enumerate(order):
            self.kept[name] = f"the outputs' error falls from {before:.2g} to {without[name]:.2g} without it"
            if number >= first:
                error = self.error(examined)
                if error <= budget:
                    break
        return error

    def plan(self, kept: Iterable[str] | None = None) -> Plan:
        """The plan in int8 when these layers stay float32; by custom those that were given back."""
        shifts = {name: loss.shift() for name, loss in self.losses.items()}
        return fuse_activations(Int8Plan(self._layout(kept), self.scales, shifts).plan())

    def layers(self) -> tuple[QuantizedLayer, ...]:
        """The report of each layer."""
        found = []
        for step in self.base.steps:
            if isinstance(step, Layer):
                loss, weight = self.losses.get(key(step), _Loss()), step.weight
                bounds = tuple(float(each) for each in weight.nan_to_num().aminmax()) if weight.numel() else (0.0, 0.0)
                saturated = loss.saturated / max(loss.numbers, 1)
                kept = self.kept.get(key(step))
                found.append(QuantizedLayer(step.name, step.kind, loss.sqnr(), saturated, bounds, kept))  # type: ignore[arg-type]
        return tuple(found)


def _observed(plan: Plan, batches: Sequence[_Inputs]) -> tuple[dict[str, Histogram], frozenset[str]]:
    """Histograms of the float32 values that steps which may be int8 read or make, and the values that have no range.

    Inputs are such, and what is no layer's result, where a number is NaN, infinite or very large: masks, logarithms of
    0. Raises ValueError where a layer makes NaN or infinities of what has a range.
    """
    steps = [step for step in plan.steps if isinstance(step, (Conv, Linear, *OTHERS))]
    seen = {name: Histogram() for step in steps for name in (*step.inputs, step.output)}
    made = {step.output: step for step in plan.steps}
    wild = set[str]()
    for batch in batches:
        values: dict[str, Any] = {**plan.constants, **dict(zip(plan.inputs, batch, strict=True))}

        def count(name: str, values: Mapping[str, Any] = values) -> None:
            if name not in seen:
                return
            step = made.get(name)
            tame = isinstance(step, Layer) and not wild.intersection(step.inputs[1:])
            if not tame and is_wild(values[name]):
                wild.add(name)
                return
            try:
                seen[name].add(values[name])
            except ValueError as error:
                raise ValueError(
                    f"the model cannot be quantised: of what {step.name if step else name!r} makes of the calibration "
                    f"batches {error}"
                ) from None

        for name in plan.inputs:
            count(name)
        for step, freed in zip(plan.steps, plan.last_uses(), strict=True):
            values[step.output] = reference.run_step(step, values)
            count(step.output)
            for name in freed:
                del values[name]
    for name in plan.inputs:
        if name not in seen or name in wild or seen[name].exponent is not None:
            continue
        if read_by_layers(plan, name):
            raise ValueError(
                f"calibration input {name!r}: every number in its batches is 0, so there is no range to choose bytes "
                "for; give some hundred examples of what the model will see"
            )
        wild.add(name)
    return seen, frozenset(wild)
