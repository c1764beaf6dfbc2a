"""The contract of every method, written once."""

from __future__ import annotations

import fnmatch
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from rarefy import cost
from rarefy._names import unknown
from rarefy.sparse.budget import ACTIONS, Budget

#: The layers that can be sparsified. Exactly these types: what a subclass does in its forward is not known.
PRUNABLE: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

Prunable = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


@dataclass(frozen=True)
class LayerState:
    """One sparsified layer, now.

    Attributes:
        name: as in ``model.named_modules()``.
        shape: of the weight, (out, in, ...).
        live: how many weights are used in the forward pass.
        weight_grad_density: share of the weights whose gradient is computed, in [0, 1].
        threshold: on the magnitude (the mean over the channels where there are several); None if the method has none.
        alpha: factor on the gradient of masked weights; None if the method has none.
    """

    name: str
    shape: tuple[int, ...]
    live: int
    weight_grad_density: float
    threshold: float | None = None
    alpha: float | None = None

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Share of live weights, in [0, 1]."""
        return self.live / self.weights


class Selection(TypedDict, total=False):
    """The keyword arguments of :class:`Sparsifier` besides ``total_steps``, for the methods built on it."""

    target: float | None
    target_flops: float | None
    example_input: Any
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    floor: float | Mapping[str, float]


class Sparsifier(ABC):
    """Makes a model sparse while it trains.

    ::

        sparsifier = AutoSparse(model, target=0.9, total_steps=epochs * len(loader))
        optimizer = torch.optim.SGD(sparsifier.param_groups(weight_decay=5e-4), lr=0.1, momentum=0.9)
        for x, y in batches:
            ...
            optimizer.step()
            sparsifier.step()
        model = sparsifier.finalize()

    Args:
        model: changed in place; it keeps its modules' names and its parameters.
        total_steps: how many optimizer steps the training takes.
        target: sparsity to land on, in (0, 1): the share of zeros among the weights of the sparsified layers.
        target_flops: instead of it, the inference FLOPs to land on as a share of the whole dense network's, in (0, 1).
        example_input: what ``model`` is called with, to count FLOPs; needed with ``target_flops``.
        include: shell patterns of the names of the layers to sparsify; default all Conv1d/2d/3d and Linear.
        exclude: shell patterns of the names of layers to leave dense.
        floor: the least density of a layer, in (0, 1], or a mapping of shell patterns to floors (others: the default).
            No layer goes below it, nor below one weight.

    Raises:
        ValueError: an option out of its range, a pattern that matches nothing, nothing to sparsify, a target that the
            floors or the dense layers make impossible.
    """

    default_floor = 0.005

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        target: float | None = None,
        target_flops: float | None = None,
        example_input: Any = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        floor: float | Mapping[str, float] = default_floor,
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be a positive whole number of optimizer steps, got {total_steps!r}")
        layers = select_layers(model, include, exclude)
        floors = {name: _floor_of(name, floor) for name in layers}
        if isinstance(floor, Mapping):
            _check_patterns(floor, layers, "floor")
        self.model = model
        self.total_steps = total_steps
        self.steps = 0
        self.interval = max(1, total_steps // ACTIONS)
        self._layers = layers
        self._least = {name: max(1, math.ceil(floors[name] * m.weight.numel())) for name, m in layers.items()}
        self.budget = make_budget(model, layers, target, target_flops, example_input)
        if self.budget is not None:
            _check_feasible(self.budget, list(self._least.values()))

    # What a method provides

    @abstractmethod
    def layers(self) -> list[LayerState]:
        """The state of every sparsified layer, in the model's order."""

    @abstractmethod
    def _update(self) -> None:
        """What the method does after an optimizer step."""

    @abstractmethod
    def _finalize(self, layers: Mapping[str, Prunable]) -> None:
        """Put exact zeros into the weights of these layers, and take out everything that the method put in."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What else must survive a checkpoint besides the model's own state and the step."""

    @abstractmethod
    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`_state` gave."""

    def _own_parameters(self) -> list[Tensor]:
        """The parameters that the method added to the model."""
        return []

    def _own_options(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The optimizer options of the method's own parameters, given those of all others."""
        return {"weight_decay": 0.0}

    # What every method has

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(self.steps / self.total_steps, 1.0)

    def param_groups(self, **defaults: Any) -> list[dict[str, Any]]:
        """Parameter groups for any optimizer: the model's parameters with ``defaults``, then the method's own.

        The method's own group carries the weight decay and learning rate that the method needs; never add decay to it.
        """
        own = {id(parameter) for parameter in self._own_parameters()}
        groups = [{"params": [p for p in self.model.parameters() if id(p) not in own], **defaults}]
        if own:
            groups.append({"params": self._own_parameters(), **defaults, **self._own_options(defaults)})
        return groups

    def step(self) -> None:
        """Call once after every optimizer step."""
        self.steps += 1
        self._update()

    def sparsity(self) -> float:
        """Share of zeros among the weights of the sparsified layers, in [0, 1]."""
        layers = self.layers()
        return 1.0 - sum(layer.live for layer in layers) / sum(layer.weights for layer in layers)

    def finalize(self, model: nn.Module | None = None) -> nn.Module:
        """The plain model: exact zeros in ``weight``, the dense model's keys, nothing of rarefy left; done in place.

        With a target the number of zeros is exact: the best weights whose cost fits the budget stay. Give ``model`` to
        finalize a copy of the trained model instead (an exponential moving average, a deepcopy).
        """
        model = self.model if model is None else model
        modules = dict(model.named_modules())
        if self.budget is not None and self.steps < self.total_steps:
            warnings.warn(
                f"finalize() after {self.steps} of {self.total_steps} steps: the target is reached by cutting at once, "
                "which costs accuracy; train on or fine-tune",
                stacklevel=2,
            )
        missing = [name for name in self._layers if name not in modules]
        if missing:
            raise ValueError(
                f"the model given to finalize() has no layer {missing[0]!r}; give a copy of the trained one"
            )
        with torch.no_grad():
            self._finalize({name: modules[name] for name in self._layers})
        return model

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model's and the optimizer's state."""
        return {"method": type(self).__name__, "steps": self.steps, "total_steps": self.total_steps, **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Raises ValueError if it is of another method or length of run."""
        for key, mine in (("method", type(self).__name__), ("total_steps", self.total_steps)):
            if state.get(key) != mine:
                raise ValueError(
                    f"the checkpoint's sparsifier has {key}={state.get(key)!r}, this one {mine!r}; "
                    "make it with the options of the run that is resumed"
                )
        self.steps = int(state["steps"])
        self._load_state(state)


def select_layers(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, Prunable]:
    """The layers to sparsify by name, in the model's order. Raises ValueError as :class:`Sparsifier` says."""
    for option, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ValueError(f"{option} must be a list of patterns, got the string {patterns!r}; write [{patterns!r}]")
    prunable = {name: m for name, m in model.named_modules() if type(m) in PRUNABLE}
    _check_patterns(include or (), prunable, "include")
    _check_patterns(exclude or (), prunable, "exclude")
    chosen = {
        name: module
        for name, module in prunable.items()
        if (include is None or _matches(name, include)) and not _matches(name, exclude or ())
    }
    if not chosen:
        raise ValueError(
            f"nothing to sparsify: the model has {len(prunable)} Conv1d/2d/3d or Linear layers"
            + (", and include and exclude leave none" if prunable else "")
        )
    for name, module in chosen.items():
        if isinstance(module.weight, nn.parameter.UninitializedParameter):
            raise ValueError(f"layer {name!r} is lazy and has no weight yet; call the model once on an example first")
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise ValueError(
                f"the weight of layer {name!r} is not a parameter (a parametrization or torch.nn.utils.prune is on "
                "it); remove that first or exclude the layer"
            )
    _check_shared(model, chosen)
    return chosen


def _check_shared(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    for owner, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            other = owners.setdefault(id(parameter), owner)
            if other != owner and (owner in chosen or other in chosen):
                raise ValueError(
                    f"layers {other!r} and {owner!r} share one weight, which cannot be sparse in one of them alone; "
                    f"pass exclude=[{(owner if owner in chosen else other)!r}]"
                )


def make_budget(
    model: nn.Module,
    layers: Mapping[str, Prunable],
    target: float | None,
    target_flops: float | None,
    example_input: Any,
) -> Budget | None:
    """The budget that the options name, or None without a target."""
    if target is not None and target_flops is not None:
        raise ValueError("give target (a sparsity) or target_flops, not both")
    for option, value in (("target", target), ("target_flops", target_flops)):
        if value is not None and not 0.0 < value < 1.0:
            hint = f"; for {value:g} % write {value / 100:g}" if 1.0 < value < 100.0 else ""
            raise ValueError(f"{option} must be in (0, 1), got {value}{hint}")
    sizes = [module.weight.numel() for module in layers.values()]
    if target is not None:
        return Budget("sparsity", 1.0 - target, (1.0,) * len(sizes), 0.0, float(sum(sizes)))
    if target_flops is None:
        return None
    if example_input is None:
        raise ValueError("target_flops needs example_input, what the model is called with, to count FLOPs")
    counted = cost.count(model, example_input)
    dense = {layer.name: float(layer.dense) for layer in counted.layers}
    uncalled = [name for name in layers if not dense.get(name)]
    if uncalled:
        raise ValueError(f"layer {uncalled[0]!r} is not called for example_input; exclude it")
    costs = tuple(dense[name] / size for name, size in zip(layers, sizes, strict=True))
    fixed = counted.dense - sum(dense[name] for name in layers)
    return Budget("flops", target_flops, costs, fixed, float(counted.dense))


def _check_feasible(budget: Budget, least: Sequence[int]) -> None:
    lowest = budget.density(least)
    if lowest > budget.goal:
        asked = f"target={1 - budget.goal:g}" if budget.kind == "sparsity" else f"target_flops={budget.goal:g}"
        raise ValueError(
            f"{asked} cannot be reached: the floors of the layers and what stays dense already keep {lowest:.4g} of "
            f"the network, more than {budget.goal:.4g}; lower floor, or exclude fewer layers"
        )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(patterns: Iterable[str], names: Iterable[str], option: str) -> None:
    names = list(names)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(unknown(f"Conv1d/2d/3d or Linear layer in {option}:", pattern, names))


def _floor_of(name: str, floor: float | Mapping[str, float]) -> float:
    if isinstance(floor, Mapping):
        matching = [value for pattern, value in floor.items() if fnmatch.fnmatchcase(name, pattern)]
        value = matching[0] if matching else Sparsifier.default_floor
    else:
        value = floor
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"floor must be a density in [0, 1], got {value}")
    return value
