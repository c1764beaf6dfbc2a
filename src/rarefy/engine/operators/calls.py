"""Calls of operators in a graph, and what makes steps of them: the register of all handlers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from rarefy.engine.nodes import dtype_of, sample_of, sample_shape
from rarefy.engine.plan import Step


@dataclass
class Call:
    """One call of an operator in an exported graph.

    Attributes:
        node: of the graph.
        args: by the names of the operator's schema, defaults filled in.
        constants: what is known of the graph's nodes now: parameters, buffers and what was computed from them.
        sources: the names that parameters have in the model, by node.
        batch: how the graph calls the batch size.
        scales: of the output channels of constants that were dequantised from whole numbers, by node.
    """

    node: fx.Node
    args: dict[str, Any]
    constants: dict[str, Tensor]
    sources: dict[str, str]
    batch: str
    scales: dict[str, Tensor] = field(default_factory=dict)
    _labels: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._labels = {"name": self.node.name, "output": self.node.name}

    def value(self, name: str) -> str | None:
        """The float32 value of that argument that the plan computes; None where it is a constant or something else."""
        node = self.args[name]
        return node.name if self.computes(node) else None

    def computes(self, node: Any) -> TypeGuard[fx.Node]:
        """Whether that is a node whose float32 tensor the plan computes."""
        return isinstance(node, fx.Node) and node.name not in self.constants and dtype_of(node) is torch.float32

    def constant(self, name: str) -> Tensor | None:
        """The constant float32 tensor of that argument; None where it is something else."""
        node = self.args[name]
        found = self.constants.get(node.name) if isinstance(node, fx.Node) else None
        return found if found is not None and found.dtype is torch.float32 else None

    def scale(self, name: str) -> Tensor | None:
        """The scales (out,) of that argument's output channels, where it is a constant that has some."""
        node = self.args[name]
        return self.scales.get(node.name) if isinstance(node, fx.Node) else None

    def given(self, name: str) -> bool:
        """Whether that argument is there at all."""
        return self.args.get(name) is not None

    def unknown(self, *names: str) -> bool:
        """Whether one of those arguments is there and no constant float32 tensor."""
        return any(self.given(name) and self.constant(name) is None for name in names)

    def sample(self, name: str) -> tuple[tuple[int, ...] | None, bool]:
        """The shape of one sample of that argument, and whether its first size is part of dimension 0."""
        return sample_of(self.args[name], self.batch)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of one sample of that argument; see :class:`rarefy.engine.plan.Value`."""
        return sample_shape(self.args[name], self.batch)

    @property
    def operator(self) -> str:
        """The operator's name: "add" for ``aten.add.Tensor``."""
        return str(self.node.target).split(".")[1]

    @property
    def labels(self) -> dict[str, Any]:
        """``name`` and ``output`` of the step."""
        return self._labels

    def layer(self, weight: str = "weight") -> dict[str, Any]:
        """The same, with the name of the layer that the weight, one of the arguments, belongs to."""
        for name in (weight, "bias"):
            node = self.args.get(name)
            source = self.sources.get(node.name, "") if isinstance(node, fx.Node) else ""
            if layer := source.removesuffix(name).rstrip("._"):
                return {**self._labels, "name": layer}
        return self._labels


Handler = Callable[[Call], Step | None]
_HANDLERS: dict[str, Handler] = {}


def handler(target: str) -> Handler | None:
    """What makes a step of this operator, if anything does; it gives None where this call of it stays an operator."""
    return _HANDLERS.get(target)


def handles(*targets: str) -> Callable[[Handler], Handler]:
    """Have the function below make the steps of these operators: "aten.add.Tensor"."""

    def register(function: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(targets, function))
        return function

    return register


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """A size an axis, from a size or a list of one or of all."""
    sizes = tuple(value) if isinstance(value, Sequence) else (value,)
    return sizes * axes if len(sizes) == 1 else sizes
