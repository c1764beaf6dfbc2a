"""The contract of every method, written once."""

from __future__ import annotations

import math
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy.sparse.budget import ACTIONS, check_feasible, make_budget
from rarefy.sparse.selection import DEFAULT_FLOOR, Prunable, check_patterns, floor_of, select_layers, warn_of_dense

#: finalize() warns where it changes the density by more than this share of it.
CUT = 0.05


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


@dataclass(frozen=True)
class Info:
    """What :func:`rarefy.sparse.list` tells about a method.

    Attributes:
        title: the method's own name.
        paper: where it is from.
        start: "dense" (dense to sparse) or "sparse" (sparse to sparse, from the first step).
        targeted: "always" (a target must be given), "optional", or "never".
        training_flops: what a training step costs, as ``LayerState`` reports it: forward and input gradient at the
            density of the weights used, and the weight gradient as said here.
    """

    title: str
    paper: str
    start: str
    targeted: str
    training_flops: str


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
        sparsifier.attach(optimizer)
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
        include: shell patterns of the names of the layers to sparsify; default all that are exactly a Conv1d/2d/3d or
            Linear. Where that leaves a good part of the matrix weights dense, as attention layers and subclasses, a
            warning names them.
        exclude: shell patterns of the names of layers to leave dense.
        floor: the least density of a layer, in [0, 1], or a mapping of shell patterns to floors (others: the default).
            No layer ends below it, nor below one weight; while training this is seen to 125 times in the run.

    Raises:
        ValueError: an option out of its range, a pattern that matches nothing, nothing to sparsify, a target that the
            floors or the dense layers make impossible.
    """

    #: What the registry tells about the method.
    info: ClassVar[Info]

    #: Whether the method must see the optimizer's steps (:meth:`attach`).
    needs_optimizer: ClassVar[bool] = False

    #: The fewest steps that the method's schedule fits into.
    least_steps: ClassVar[int] = 1

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
        floor: float | Mapping[str, float] = DEFAULT_FLOOR,
    ) -> None:
        if isinstance(total_steps, bool) or not hasattr(total_steps, "__index__") or total_steps < 1:
            raise ValueError(f"total_steps must be a positive whole number of optimizer steps, got {total_steps!r}")
        total_steps = operator.index(total_steps)
        if total_steps < self.least_steps:
            raise ValueError(
                f"total_steps={total_steps} is too few for the schedule of {type(self).__name__}, which needs at least "
                f"{self.least_steps}"
            )
        layers = select_layers(model, include, exclude)
        floors = {name: floor_of(name, floor) for name in layers}
        if isinstance(floor, Mapping):
            check_patterns(floor, layers, "floor")
        self.model = model
        self.total_steps = total_steps
        self.steps = 0
        self._finalized = False
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[RemovableHandle] = []
        self.interval = max(1, total_steps // ACTIONS)
        self._layers = layers
        self._least = {name: max(1, math.ceil(floors[name] * m.weight.numel())) for name, m in layers.items()}
        if include is None and exclude is None:
            warn_of_dense(model, layers)
        self.budget = make_budget(model, layers, target, target_flops, example_input)
        if self.budget is not None:
            check_feasible(self.budget, list(self._least.values()))

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

    def _before_optimizer(self) -> None:  # noqa: B027
        """What the method does when the gradients are whole and the optimizer is about to step."""

    def _after_optimizer(self) -> None:  # noqa: B027
        """What the method does when the optimizer has stepped."""

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

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the method see this optimizer's steps, until :meth:`finalize`; replaces one attached before.

        Methods with hard masks hold their zeros, and clear the optimizer's state of weights that come back, this way;
        others add the gradient of their penalty. Where nothing needs it this does nothing, so call it always, before
        the optimizer is wrapped.

        Raises:
            ValueError: the optimizer does not hold the weights of the sparsified layers.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, layer in self._layers.items():
            if id(layer.weight) not in held:
                raise ValueError(
                    f"the optimizer does not hold the weight of layer {name!r}; make it from param_groups()"
                )
        self._detach()
        if self.needs_optimizer:
            self._optimizer = optimizer
            self._hooks = [
                optimizer.register_step_pre_hook(lambda *_: self._before_optimizer()),
                optimizer.register_step_post_hook(lambda *_: self._after_optimizer()),
            ]

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizer = [], None

    @torch.no_grad()
    def step(self) -> None:
        """Call once after every optimizer step.

        Raises RuntimeError after :meth:`finalize`, and without :meth:`attach` where the method needs it.
        """
        if self._finalized:
            raise RuntimeError("step() after finalize(): the model is a plain one now; make a new sparsifier to go on")
        if self.needs_optimizer and self._optimizer is None:
            raise RuntimeError(
                f"{type(self).__name__} works on the optimizer's steps: call sparsifier.attach(optimizer) once, before "
                "training"
            )
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
        if model is self.model and self._finalized:
            raise ValueError("the model is a plain one: already finalized; to go on, make a new sparsifier")
        modules = dict(model.named_modules())
        if model is self.model and self.budget is not None:
            density = self.budget.density([layer.live for layer in self.layers()])
            if abs(density / self.budget.goal - 1.0) > CUT:
                warnings.warn(
                    f"finalize() after {self.steps} of {self.total_steps} steps cuts from a density of {density:.4f} "
                    f"to {self.budget.goal:.4f} at once, which costs accuracy; train to the last step first (an "
                    "optimizer step after finalize() fills zeros again)",
                    stacklevel=2,
                )
        missing = [name for name in self._layers if name not in modules]
        if missing:
            raise ValueError(
                f"the model given to finalize() has no layer {missing[0]!r}; give a copy of the trained one"
            )
        with torch.no_grad():
            self._finalize({name: modules[name] for name in self._layers})
        if model is self.model:
            self._finalized = True
            self._detach()
        return model

    def aim(self) -> float | None:
        """The density that the method steers towards now, in (0, 1]; None where it follows no curve."""
        return None

    def _config(self) -> dict[str, Any]:
        """What a checkpoint's sparsifier must have in common with the one that goes on."""
        return {
            "method": type(self).__name__,
            "total_steps": self.total_steps,
            "target": None if self.budget is None else [self.budget.kind, self.budget.goal],
            "layers": {name: list(layer.weight.shape) for name, layer in self._layers.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model's and the optimizer's state."""
        return {"config": self._config(), "steps": self.steps, **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken. Raises ValueError if it is of a sparsifier with other options."""
        for key, mine in self._config().items():
            if state["config"].get(key) != mine:
                raise ValueError(
                    f"the checkpoint's sparsifier has {key}={state['config'].get(key)!r}, this one {mine!r}; "
                    "make it with the options of the run that is resumed"
                )
        self.steps = int(state["steps"])
        self._load_state(state)
