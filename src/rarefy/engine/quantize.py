"""Post-training quantisation: a plan in float32 becomes one in int8, from examples of what the network will see.

Ranges come from histograms of the float32 network's values; weights are symmetric with a scale for each output channel;
the mean error of each channel is taken from its bias (Nagel et al., arXiv 1906.04721, section 4.2, on examples). What
is no layer computes in int8 where int8 layers stand on both sides of it. Where the outputs lose more than a budget,
layers go back to float32, those first without which the error falls most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rarefy.engine import int8, reference
from rarefy.engine.calibrate import METHODS, Histogram, Method, checked, weight_scales
from rarefy.engine.passes import fuse_activations
from rarefy.engine.plan import (
    Affine,
    Binary,
    Concat,
    Conv,
    Dequantize,
    Flatten,
    GlobalAverage,
    Layer,
    Linear,
    Plan,
    Pool,
    Quantize,
    Quantized,
    Step,
    Table,
    Upsample,
    Value,
)
from rarefy.engine.quantization import Quantization, QuantizedLayer

#: The error of the outputs, ||y_int8 - y|| / ||y||, that is let pass: 20 dB. What networks are trained to tell apart
#: differs by more, and 8 bits with a range for each tensor come to 1 to 5 % in networks that quantise well.
BUDGET = 0.1
#: The examples that errors are measured on, and those that layers are tried one by one on.
_EXAMINED, _TRIED = 64, 16
#: What computes in int8 beside layers.
_OTHERS = (Affine, Binary, Pool, GlobalAverage, Concat, Upsample, Flatten)
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


def _key(step: Step) -> str:
    """What a step is known by however it is taken apart: the value it made at first."""
    return step.output.partition(".")[0]


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
        return torch.as_tensor(self.error) / max(self.count, 1)

    def sqnr(self) -> float | None:
        """In dB; None without noise or signal."""
        noise = float((torch.as_tensor(self.squares) - self.count * self.shift().square()).clamp(min=0).sum())
        return 10 * math.log10(self.signal / noise) if noise > 0 and self.signal > 0 else None


@dataclass(frozen=True)
class _Layout:
    """What of a plan runs in int8: the plan, taken apart as needed, what those steps make, and the bytes they read."""

    plan: Plan
    inside: frozenset[str]
    quantized: Mapping[str, Quantized]
    users: Mapping[str, Sequence[Step]]

    def wanted(self, value: str) -> bool:
        """Whether a step in int8 reads the value."""
        return any(user.output in self.inside for user in self.users[value])


@dataclass
class _Network:
    """A network on its way to int8."""

    base: Plan
    method: Method
    batches: Sequence[_Inputs]
    seen: dict[str, Histogram] = field(init=False)
    kept: dict[str, str] = field(default_factory=dict)  # why layers stay float32
    scales: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, _Loss] = field(default_factory=dict)
    exact: dict[int, list[list[Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seen = _observed(self.base, self.batches)
        for step in self.base.steps:
            if isinstance(step, Layer):
                self._begin(step)

    def _begin(self, step: Layer) -> None:
        """The scales of a layer's weights, or why it cannot be quantised."""
        if not step.weight.isfinite().all() or (step.bias is not None and not step.bias.isfinite().all()):
            self.kept[_key(step)] = "a weight is not finite"
            return
        if isinstance(step, Conv) and not 1 <= len(step.stride) <= 2:
            self.kept[_key(step)] = f"it has {len(step.stride)} axes"  # and native layers of three are float32
            return
        self.scales[_key(step)] = scale = weight_scales(step.weight)
        if (_levels(step.weight, scale).abs().flatten(1).double().sum(1).max() * 255) >= 1 << 31:
            self.kept[_key(step)] = "its sums may not fit 32 bits"

    def layout(self, kept: Iterable[str] | None = None) -> _Layout:
        """What runs in int8 when these layers do not."""
        left, plan = {*(self.kept if kept is None else kept)}, self.base
        while True:
            inside, float32 = _inside(plan, left)
            users = plan.users()
            read = {name for step in plan.steps if step.output in inside for name in step.inputs}
            # A sum with what is float32 for its own reasons, or that nothing in int8 reads, is better float32.
            apart = {
                step.output
                for step in plan.steps
                if isinstance(step, Layer) and step.residual is not None and step.output in inside
                if step.residual in float32 or step.output not in read
            }
            if not apart:
                groups = _groups(plan, inside, users)
                return _Layout(plan, frozenset(inside), self._quantized(read, groups), users)
            plan = _without_residuals(plan, apart)

    def _quantized(self, read: set[str], groups: Mapping[str, str]) -> dict[str, Quantized]:
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
        layout = self.layout()
        plan = layout.plan
        for batch in batches:
            values: dict[str, Any] = {**plan.constants, **dict(zip(plan.inputs, batch, strict=True))}
            for step, freed in zip(plan.steps, plan.last_uses(), strict=True):
                values[step.output] = reference.run_step(step, values)
                if isinstance(step, Layer) and step.output in layout.inside:
                    self._examine(step, layout, values)
                for name in freed:
                    del values[name]

    def _examine(self, step: Layer, layout: _Layout, values: Mapping[str, Any]) -> None:
        x, of, to = values[step.input], layout.quantized[step.input], layout.quantized.get(step.output)
        alone = replace(step, residual=None, activation="none")
        exact = reference.run_step(alone, {step.input: x})
        near = int8.dequantize(int8.quantize(x, of), of)
        scale = self.scales[_key(step)]
        rounded = replace(alone, weight=int8.weights(_levels(step.weight, scale), scale))
        channels = -1 if isinstance(step, Linear) else 1
        error = (reference.run_step(rounded, {step.input: near}) - exact).double().movedim(channels, 0).flatten(1)
        loss = self.losses.setdefault(_key(step), _Loss())
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
        layout = self.layout(kept)
        made = _Emitted(layout, self)
        return fuse_activations(made.plan())

    def layers(self) -> tuple[QuantizedLayer, ...]:
        """The report of each layer."""
        found = []
        for step in self.base.steps:
            if isinstance(step, Layer):
                loss, weight = self.losses.get(_key(step), _Loss()), step.weight
                bounds = tuple(float(each) for each in weight.nan_to_num().aminmax()) if weight.numel() else (0.0, 0.0)
                saturated = loss.saturated / max(loss.numbers, 1)
                kept = self.kept.get(_key(step))
                found.append(QuantizedLayer(step.name, step.kind, loss.sqnr(), saturated, bounds, kept))  # type: ignore[arg-type]
        return tuple(found)


def _levels(weight: Tensor, scale: Tensor) -> Tensor:
    """The whole numbers nearest to weights."""
    wide = scale.reshape(-1, *(1,) * (weight.dim() - 1))
    return (weight / wide).round().clamp(-int8.LARGEST, int8.LARGEST)


def _observed(plan: Plan, batches: Sequence[_Inputs]) -> dict[str, Histogram]:
    """Histograms of the float32 values that steps which may be int8 read or make."""
    steps = [step for step in plan.steps if isinstance(step, (Conv, Linear, *_OTHERS))]
    seen = {name: Histogram() for step in steps for name in (*step.inputs, step.output)}
    names = {step.output: step.name for step in plan.steps}
    for batch in batches:
        values: dict[str, Any] = {**plan.constants, **dict(zip(plan.inputs, batch, strict=True))}

        def count(name: str, values: Mapping[str, Any] = values) -> None:
            if name in seen:
                try:
                    seen[name].add(values[name])
                except ValueError as error:
                    raise ValueError(
                        f"the model cannot be quantised: of what {names.get(name, name)!r} makes of the calibration "
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
        if name in seen and seen[name].exponent is None:
            raise ValueError(
                f"calibration input {name!r}: every number in its batches is 0, so there is no range to choose bytes "
                "for; give some hundred examples of what the model will see"
            )
    return seen


def _inside(plan: Plan, kept: set[str]) -> tuple[set[str], set[str]]:
    """The values that steps in int8 make, and those that are float32 for reasons of their own.

    What is no layer is int8 where it reads something that is, and nothing of what PyTorch's operators make; and where
    something in int8 reads it.
    """
    inside, float32 = set[str](), {name for name in plan.inputs if plan.values[name].dtype is not torch.float32}
    float32.update(plan.constants)
    for step in plan.steps:
        if isinstance(step, Layer):
            if _key(step) not in kept:
                inside.add(step.output)
        elif not isinstance(step, _OTHERS) or not _has_int8(plan, step) or float32.intersection(step.inputs):
            float32.add(step.output)
        elif inside.intersection(step.inputs):
            inside.add(step.output)
    read = set[str]()
    for step in reversed(plan.steps):
        if step.output in inside and (isinstance(step, Layer) or step.output in read):
            read.update(step.inputs)
        else:
            inside.discard(step.output)
    return inside, float32


def _has_int8(plan: Plan, step: Step) -> bool:
    """A factor for each channel is a depthwise convolution, which needs places."""
    shape = plan.values[step.output].shape
    per_channel = shape is not None and 2 <= len(shape) <= 4 and getattr(step, "axis", 1) == 1
    return not isinstance(step, Affine) or step.kind == "activation" or per_channel


def _without_residuals(plan: Plan, apart: set[str]) -> Plan:
    """The plan with the additions of these layers in steps of their own."""
    steps, values = list[Step](), dict(plan.values)
    for step in plan.steps:
        if step.output not in apart:
            steps.append(step)
            continue
        assert isinstance(step, Layer)
        assert step.residual is not None
        own = f"{step.output}.own"
        values[own] = values[step.output]
        steps += [
            replace(step, output=own, residual=None, activation="none"),
            Binary(name=step.name, op="add", x=own, y=step.residual, output=step.output, activation=step.activation),
        ]
    return replace(plan, steps=tuple(steps), values=values)


def _groups(plan: Plan, inside: set[str], users: Mapping[str, Sequence[Step]]) -> dict[str, str]:
    """Values that must have the same bytes, by the name of one of them: what copies bytes, copies their meaning.

    An operand of a concatenation that others read, too, keeps its own.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while name in parent:
            name = parent[name]
        return name

    for step in plan.steps:
        if step.output in inside and int8.copies(step):
            for name in dict.fromkeys(step.inputs):
                alone = not isinstance(step, Concat) or len(users[name]) == 1
                if alone and root(name) != root(step.output):
                    parent[root(name)] = root(step.output)
    return {name: root(name) for name in parent}


@dataclass
class _Emitted:
    """The steps of a plan in int8, as they come."""

    layout: _Layout
    network: _Network
    steps: list[Step] = field(default_factory=list)
    values: dict[str, Value] = field(init=False)
    made: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.values = dict(self.layout.plan.values)
        self.made = {*self.layout.plan.inputs, *self.layout.plan.constants}

    def plan(self) -> Plan:
        """The whole plan."""
        base = self.layout.plan
        for step in base.steps:
            if step.output in self.layout.inside:
                self._add(self._int8(step))
            else:
                for name in dict.fromkeys(step.inputs):
                    self._float32(name)
                self._add(step)
        for name in base.outputs:
            self._float32(name)
        known = {*base.inputs, *base.outputs, *(name for step in self.steps for name in (*step.inputs, step.output))}
        values = {name: value for name, value in self.values.items() if name in known}
        return replace(base, steps=tuple(self.steps), values=values)

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        self.made.add(step.output)

    def _float32(self, name: str) -> None:
        """Make sure that a value is there in float32."""
        if name not in self.made:
            self._add(Dequantize(name=name, input=f"{name}.uint8", output=name))

    def _uint8(self, name: str, to: Quantized | None = None) -> str:
        """The bytes of a value, of another quantisation where one is given."""
        own, of = f"{name}.uint8", self.layout.quantized[name]
        if own not in self.made:
            self._bytes(own, name, of)
            self._add(Quantize(name=name, input=name, output=own))
        if to is None or to == of:
            return own
        other = f"{own}.{to.scale}.{to.zero_point}"
        if other not in self.made:
            self._bytes(other, name, to)
            self._add(Table(name=name, input=own, output=other, table=int8.table("none", of, to)))
        return other

    def _bytes(self, name: str, like: str, quantized: Quantized) -> None:
        self.values[name] = replace(self.values[like], dtype=torch.uint8, quantized=quantized)

    def _int8(self, step: Step) -> Step:
        """The step on bytes."""
        output, to = step.output, self.layout.quantized.get(step.output)
        if to is not None:
            output = f"{step.output}.uint8"
            self._bytes(output, step.output, to)
        match step:
            case Conv() | Linear():
                return self._layer(step, output)
            case Affine(activation=activation) if step.kind == "activation":
                assert to is not None
                bytes_of = int8.table(activation, self.layout.quantized[step.input], to)
                return Table(name=step.name, input=self._uint8(step.input), output=output, table=bytes_of)
            case Affine():
                shape = self.values[step.input].shape
                assert shape is not None
                return replace(_depthwise(step, shape), input=self._uint8(step.input), output=output)
            case Binary():
                return replace(step, x=self._uint8(step.x), y=self._uint8(step.y), output=output)
            case Concat():
                operands = tuple(self._uint8(name, to) for name in step.operands)
                return replace(step, operands=operands, output=output)
            case Pool() | GlobalAverage() | Upsample() | Flatten():
                return replace(step, input=self._uint8(step.input), output=output)
        raise AssertionError(f"a {step.kind} is not computed in int8")

    def _layer(self, step: Layer, output: str) -> Layer:
        scale, loss = self.network.scales[_key(step)], self.network.losses.get(_key(step))
        bias = step.bias
        if loss is not None:
            bias = ((0.0 if bias is None else bias.double()) - loss.shift()).float()
        return replace(
            step,
            input=self._uint8(step.input),
            residual=None if step.residual is None else self._uint8(step.residual),
            output=output,
            weight=int8.weights(_levels(step.weight, scale), scale),
            weight_scale=scale,
            bias=bias,
        )


def _depthwise(step: Affine, shape: tuple[int, ...]) -> Conv:
    """Factors for channels as a convolution, whose weights are then exact: 127 or -127 times a scale, or 0."""
    factors = torch.ones(shape[0]) if step.scale is None else step.scale
    scale = weight_scales(factors[:, None])
    axes = len(shape) - 1
    weight = int8.weights(_levels(factors, scale), scale).reshape(-1, *(1,) * (axes + 1))
    return Conv(
        name=step.name,
        input=step.input,
        output=step.output,
        weight=weight,
        bias=step.shift,
        stride=(1,) * axes,
        padding=((0, 0),) * axes,
        dilation=(1,) * axes,
        groups=shape[0],
        activation=step.activation,
        weight_scale=scale,
    )
