"""What a network costs: weights, inference FLOPs and training FLOPs, under a convention that is named.

Two conventions are in use, and their figures differ by a factor of two:

- ``"macs"`` (STR, OptG, ST-3): one multiply-accumulate is one FLOP; layers and adaptive average pools count; biases,
  normalisations and activation functions do not. ResNet-50 at 224x224: 4,089,284,608.
- ``"rigl"`` (RigL, MicroNet challenge): multiplications and additions count one each, plus one for the activation
  function of every output; pools do not count. A layer with v weights behind each of its N outputs costs 2 v N + N.

A layer is a parameter that takes part in a product, wherever it stands: convolutions and linear layers, attention's
projections, recurrent networks at each of their steps, an embedding that is the classifier as well, a parameter that is
multiplied by a plain function. In both conventions a zero weight costs nothing, and nothing else counts: no product of
two activations (attention's scores and averages), no element-wise operation. `Cost.uncounted` says how many
multiplications that leaves out. All FLOPs are per sample.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rarefy._forward import arguments, run, undisturbed
from rarefy._names import layer_name
from rarefy._products import Tally

__all__ = ["Convention", "Cost", "LayerCost", "TrainingSteps", "count", "training_flops", "training_ratio"]

#: How FLOPs are counted: "macs", a multiplication and its addition as one; "rigl", as two, as RigL's authors do.
Convention = Literal["macs", "rigl"]

_LINEAR = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.Bilinear),
)
#: Modules whose weights are layers even where they do not run.
_LAYERS = (*_LINEAR, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)

#: The share of uncounted multiplications that is told.
_NOTABLE = 0.05


@dataclass(frozen=True)
class LayerCost:
    """One layer: its weights and its FLOPs per sample, all its uses together.

    `name` is its parameter's, without ``.weight`` at the end; `kind` is the type of the module that holds it.
    `nonzeros` is a whole number when counted, and may have a fraction when it comes from a density. `dense` is the
    FLOPs with no weight skipped, `fixed` the part of them that stays when weights become zero. Where the weights of one
    parameter are used unequally often, as packed projections are by queries and keys of other lengths, its FLOPs are
    taken to spread evenly.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    nonzeros: float
    dense: int
    fixed: int

    @property
    def density(self) -> float:
        """Share of nonzero weights, in [0, 1]; 1 for a layer without weights."""
        return self.nonzeros / self.parameters if self.parameters else 1.0

    @property
    def inference(self) -> float:
        """FLOPs per sample with the zero weights skipped."""
        return (self.dense - self.fixed) * self.density + self.fixed


@dataclass(frozen=True)
class Cost:
    """The cost of a network under one convention: per layer in `layers`, summed in the properties.

    `pooling` is the FLOPs per sample of the pools, part of `dense` and of `inference`; `other_parameters` counts the
    parameters that are not weights of these layers (biases, normalisations, embeddings). A weight that is used twice
    costs twice, and is one layer. `uncounted` is what the forward multiplied besides, of which nothing is in the other
    figures: multiplications per sample by the name of PyTorch's operator (the products of attention, say), None for an
    operator that takes weights and does not tell what it multiplies.
    """

    convention: Convention
    layers: tuple[LayerCost, ...]
    pooling: int
    other_parameters: int
    uncounted: Mapping[str, int | None] = field(default_factory=dict, hash=False)

    @property
    def parameters(self) -> int:
        """Weights of all layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def nonzeros(self) -> float:
        """Weights of all layers that are not zero."""
        return sum(layer.nonzeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights of all layers, in [0, 1]."""
        return 1 - self.nonzeros / self.parameters

    @property
    def dense(self) -> int:
        """FLOPs per sample of the dense network."""
        return sum(layer.dense for layer in self.layers) + self.pooling

    @property
    def inference(self) -> float:
        """FLOPs per sample with the zero weights skipped."""
        return sum(layer.inference for layer in self.layers) + self.pooling

    @property
    def ratio(self) -> float:
        """`inference` as a share of `dense`, in [0, 1]."""
        return self.inference / self.dense

    def with_densities(self, densities: Mapping[str, float]) -> Cost:
        """Return the same network with these shares of nonzero weights, by layer name; layers not named keep theirs.

        Raises ValueError for a name that is no layer of this network and for a density outside [0, 1].
        """
        known = [layer.name for layer in self.layers]
        for name, density in densities.items():
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; there is {', '.join(known)}"
                raise ValueError(f"unknown layer: {name!r}{hint}")
            if not 0 <= density <= 1:
                raise ValueError(
                    f"the density of {name!r} must be in [0, 1], got {density}; it is the share of nonzero weights, "
                    "0.1 for a sparsity of 90 %"
                )
        layers = tuple(
            replace(layer, nonzeros=layer.parameters * densities[layer.name]) if layer.name in densities else layer
            for layer in self.layers
        )
        return replace(self, layers=layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts, ready for JSON."""
        return {
            "convention": self.convention,
            "parameters": self.parameters,
            "nonzeros": self.nonzeros,
            "sparsity": self.sparsity,
            "other_parameters": self.other_parameters,
            "dense": self.dense,
            "inference": self.inference,
            "ratio": self.ratio,
            "pooling": self.pooling,
            "uncounted": dict(self.uncounted),
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "parameters": layer.parameters,
                    "nonzeros": layer.nonzeros,
                    "dense": layer.dense,
                    "inference": layer.inference,
                }
                for layer in self.layers
            ],
        }

    def table(self) -> str:
        """Write the layers and their totals as an aligned text table, and what is not counted below it."""
        header = ("layer", "kind", "shape", "weights", "density", "dense FLOPs", "FLOPs", "of dense")
        rows = [
            (
                layer.name,
                layer.kind,
                "x".join(map(str, layer.shape)),
                f"{layer.parameters:,}",
                f"{layer.density:.2%}",
                f"{layer.dense:,}",
                f"{layer.inference:,.0f}",
                f"{layer.inference / layer.dense if layer.dense else 1:.2%}",
            )
            for layer in self.layers
        ]
        if self.pooling:
            rows.append(("", "pooling", "", "", "", f"{self.pooling:,}", f"{self.pooling:,}", "100.00%"))
        total = (
            "total",
            f"({self.convention})",
            "",
            f"{self.parameters:,}",
            f"{1 - self.sparsity:.2%}",
            f"{self.dense:,}",
            f"{self.inference:,.0f}",
            f"{self.ratio:.2%}",
        )
        widths = [max(map(len, column)) for column in zip(header, *rows, total, strict=True)]
        rule = tuple("-" * width for width in widths)
        # Words to the left, numbers to the right.
        aligned = [
            [
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            for row in (header, rule, *rows, rule, total)
        ]
        lines = ["  ".join(row).rstrip() for row in aligned]
        for operator, products in self.uncounted.items():
            known = "unknown" if products is None else f"{products:,}"
            lines.append(f"not counted: {operator}, multiplications: {known}")
        return "\n".join(lines)


def _nonzeros(parameter: Tensor) -> int:
    found = torch.count_nonzero(parameter)
    # Of a distributed tensor every process has a part.
    return int(found.full_tensor() if hasattr(found, "full_tensor") else found)


def _warn_of_uncounted(model: nn.Module, counted: int, uncounted: Mapping[str, int | None]) -> None:
    others = sum(products or 0 for products in uncounted.values())
    share = others / (counted + others)
    unknown = [operator for operator, products in uncounted.items() if products is None]
    told = [f"{share:.0%} of its multiplications ({', '.join(uncounted)})"] if share > _NOTABLE else []
    told += [f"what {operator} multiplies" for operator in unknown]
    if told:
        warnings.warn(
            f"the cost of {type(model).__name__} leaves out {' and '.join(told)}: only products with a parameter "
            "count, none of two activations; Cost.uncounted has them",
            stacklevel=3,
        )


def count(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...] | Mapping[str, Any],
    convention: Convention = "macs",
) -> Cost:
    """Count the cost of `model` per sample, by one forward of `example_input` in eval mode.

    Every parameter that takes part in a product is a layer, and costs what it multiplies in all its uses, at every step
    of a recurrent network. Weights computed from parameters (weight normalisation, a mask) have the name of the largest
    of them and the zeros that they have when used. A layer module that never runs costs nothing, but its weights count.

    `example_input` is the argument, the tuple of arguments, or the dict of keyword arguments of the model; the first
    dimension of the first tensor is the batch, or the second, where a recurrent network or attention that is not
    ``batch_first`` takes it so; packed sequences cost the mean of their samples. Tensors are moved to the model's
    device. The model is left as it was: modes, buffers, gradients, random generators.

    Warns where more than 5 % of the multiplications are not counted, or some whose number nobody knows.

    Raises ValueError for an unknown convention, a model with lazy layers or without any that runs, and work that is not
    a multiple of the batch.
    """
    if convention not in get_args(Convention):
        raise ValueError(f"convention must be one of {', '.join(get_args(Convention))}, got {convention!r}")
    args, kwargs = arguments(example_input)
    kind = type(model).__name__
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise ValueError(f"{lazy[0]!r} is of a lazy layer that has no shape yet; call the model once before")
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is None:
        raise ValueError(f"{kind} has no layer to count: it has no parameters")

    with undisturbed(model, device):
        forward = run(model, args, kwargs, device)
        tallies = forward.products.tallies
        used = []
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            idle = isinstance(owner, _LAYERS) and "weight" in name.rpartition(".")[2] and parameter.dim() > 1
            if name in tallies or (idle and name not in forward.products.absorbed):
                tally = tallies.get(name, Tally())
                alive = _nonzeros(parameter) if tally.nonzeros is None else tally.nonzeros
                used.append((name, owner, parameter, tally, alive))
    if not tallies:
        raise ValueError(f"no parameter of {kind} took part in a product on example_input")

    costs = []
    for name, owner, parameter, tally, alive in used:
        layer = layer_name(name)
        products, outputs = forward.per_sample(layer, tally.rows, tally.products, tally.outputs)
        # macs: the products;  rigl: as many additions with the bias's, and the activations.
        fixed = outputs if convention == "rigl" else 0
        dense = products * (2 if convention == "rigl" else 1) + fixed
        kind = next((base.__name__ for base in _LINEAR if isinstance(owner, base)), type(owner).__name__)
        costs.append(LayerCost(layer, kind, tuple(parameter.shape), parameter.numel(), alive, dense, fixed))
    pooled = [forward.per_sample(name, read, read)[0] for name, read in forward.pooled.items()]
    uncounted = {
        operator: None if products is None else round(products / forward.batch)
        for operator, products in forward.products.uncounted.items()
    }
    _warn_of_uncounted(model, sum(tally.products for tally in tallies.values()) // forward.batch, uncounted)
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(layer.parameters for layer in costs)
    return Cost(convention, tuple(costs), sum(pooled) if convention == "macs" else 0, others, uncounted)


@dataclass(frozen=True)
class TrainingSteps:
    """A stretch of a training run: `steps` optimizer steps with the same densities, each by layer name, in [0, 1].

    `forward` is the density of the weights in the forward pass and in the gradient of the input, `weight_gradient` the
    share of the weights whose gradient is computed. Layers not named are dense.
    """

    steps: float
    forward: Mapping[str, float] = field(default_factory=dict)
    weight_gradient: Mapping[str, float] = field(default_factory=dict)


def training_flops(cost: Cost, log: Iterable[TrainingSteps]) -> float:
    """FLOPs per sample of the average training step of a run, 3 `cost.dense` when it is dense throughout.

    Forward, input gradient and weight gradient cost the same at the same density, as RigL counts (arXiv 1911.11134);
    the first layer's input gradient counts too. Multiply by steps and batch size for the total of a run. Only the dense
    figures of `cost` are read. Raises ValueError for a negative number of steps, for a log without any step, and for
    what :meth:`Cost.with_densities` refuses.
    """
    dense = cost.with_densities(dict.fromkeys((layer.name for layer in cost.layers), 1.0))
    total, steps = 0.0, 0.0
    for record in log:
        if record.steps < 0:
            raise ValueError(f"steps must not be negative, got {record.steps}")
        forward = dense.with_densities(record.forward).inference
        weight_gradient = dense.with_densities(record.weight_gradient).inference
        total += record.steps * (2 * forward + weight_gradient)
        steps += record.steps
    if steps == 0:
        raise ValueError("the log has no training step; record at least one TrainingSteps with steps > 0")
    return total / steps


def training_ratio(cost: Cost, log: Iterable[TrainingSteps]) -> float:
    """:func:`training_flops` as a share of the dense network's over the same steps, in [0, 1]."""
    return training_flops(cost, log) / (3 * cost.dense)
