"""What a network costs: weights, inference FLOPs and training FLOPs, under a convention that is named.

Two conventions are in use, and their figures differ by a factor of two:

- ``"macs"`` (STR, OptG, ST-3): one multiply-accumulate is one FLOP; convolutions, linear layers and adaptive average
  pools count; biases, normalisations and activation functions do not. ResNet-50 at 224x224: 4,089,284,608.
- ``"rigl"`` (RigL, MicroNet challenge): multiplications and additions count one each, plus one for the activation
  function of every output; pools do not count. A layer with v weights behind each of its N outputs costs 2 v N + N.

In both a zero weight costs nothing, and nothing else counts: no attention product, no recurrent cell, no element-wise
operation. All FLOPs are per sample.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Convention", "Cost", "LayerCost", "TrainingSteps", "count", "training_flops", "training_ratio"]

Convention = Literal["macs", "rigl"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


@dataclass(frozen=True)
class LayerCost:
    """One layer: its weights and its FLOPs per sample, all its calls together.

    `nonzeros` is a whole number when counted, and may have a fraction when it comes from a density. `dense` is the
    FLOPs with no weight skipped, `fixed` the part of them that stays when weights become zero.
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
    parameters that are not weights of these layers (biases, normalisations, embeddings). A weight that two layers share
    counts in each of them.
    """

    convention: Convention
    layers: tuple[LayerCost, ...]
    pooling: int
    other_parameters: int

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
        """The same network with these shares of nonzero weights, by layer name; layers not named keep theirs.

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
        """The layers and their totals as an aligned text table."""
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
        return "\n".join("  ".join(row).rstrip() for row in aligned)


def _positions(module: nn.Module, source: Tensor, output: Tensor) -> int:
    """How often a call of this module used each of its weights; for a pool, how many elements it read."""
    # Padding counts as if it were data, as everybody counts it.
    if isinstance(module, _TRANSPOSED):
        return source.numel() // module.in_channels
    if isinstance(module, _CONVOLUTIONS):
        return output.numel() // module.out_channels
    if isinstance(module, nn.Linear):
        return output.numel() // module.out_features
    return source.numel()


@dataclass
class _Tally:
    """A forward hook that adds up a module's calls over the whole example batch."""

    positions: int = 0
    outputs: int = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        self.positions += _positions(module, args[0] if args else kwargs["input"], output)
        self.outputs += output.numel()

    def per_sample(self, name: str, batch: int) -> tuple[int, int]:
        if self.positions % batch or self.outputs % batch:
            raise ValueError(
                f"{name!r} ran at {self.positions} positions for {batch} samples, so its work is not per sample; "
                "give an example_input of one sample"
            )
        return self.positions // batch, self.outputs // batch


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the model is in eval mode and without gradients; modes and random generators are restored."""
    modes = [(module, module.training) for module in model.modules()]
    accelerators = [] if device.type == "cpu" else [device]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def arguments(example_input: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: positional and keyword arguments, of a tensor, a tuple of arguments, or a dict.

    Raises TypeError for anything else, ValueError where no argument is a tensor with a sample in its first dimension.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_input, Tensor):
        args = (example_input,)
    elif isinstance(example_input, (tuple, list)):
        args = tuple(example_input)
    elif isinstance(example_input, Mapping) and all(isinstance(name, str) for name in example_input):
        kwargs = dict(example_input)
    else:
        raise TypeError(
            "example_input must be a tensor, a tuple of the model's arguments or a dict of its keyword arguments, "
            f"got {type(example_input).__name__}"
        )
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        raise ValueError(
            f"example_input must hold a tensor of at least one sample, got {example_input!r:.80}: torch.zeros(shape)"
        )
    if tensors[0].dim() == 0 or len(tensors[0]) == 0:
        raise ValueError("example_input must hold at least one sample in its first dimension")
    return args, kwargs


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, _Tally]:
    """What one forward adds up for every layer and pool, by name."""
    tallies, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (*_LAYERS, *_POOLS)):
            tallies[name] = _Tally()
            handles.append(module.register_forward_hook(tallies[name], with_kwargs=True))
    try:
        # The forward runs on copies of the buffers: some modules write to theirs even in eval mode.
        functional_call(model, {name: buffer.clone() for name, buffer in model.named_buffers()}, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return tallies


def count(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...] | Mapping[str, Any],
    convention: Convention = "macs",
) -> Cost:
    """The cost of `model` per sample, measured by one forward of `example_input` in eval mode.

    The layers counted are Conv1d/2d/3d, ConvTranspose1d/2d/3d and Linear with their subclasses, once for each call of
    the module; one that never runs costs nothing, but its weights count. `example_input` is the argument, the tuple
    of arguments, or the dict of keyword arguments of the model; the first dimension of the first tensor is the batch.
    Tensors are moved to the model's device. The
    model is left as it was: modes, buffers, gradients, random generators.

    Raises ValueError for an unknown convention, a model none of whose layers is counted or runs, and work that is not a
    multiple of the batch.
    """
    if convention not in get_args(Convention):
        raise ValueError(f"convention must be one of {', '.join(get_args(Convention))}, got {convention!r}")
    args, kwargs = arguments(example_input)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, _LAYERS)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer to count; counted are convolutions and linear layers")

    device = next(model.parameters()).device
    with _undisturbed(model, device):
        moved = [value.to(device) if isinstance(value, Tensor) else value for value in (*args, *kwargs.values())]
        tallies = _run(model, tuple(moved[: len(args)]), dict(zip(kwargs, moved[len(args) :], strict=True)))
        # In here because a re-parametrised weight is computed on access, and may be another one in training mode.
        weights = [(name, module, module.weight) for name, module in layers]
        # A layer that is still being sparsified computes with another weight than it stores.
        used = [getattr(module, "sparse_weight", lambda weight=weight: weight)() for _, module, weight in weights]
        nonzeros = [int(torch.count_nonzero(weight)) for weight in used]
    if not any(tallies[name].positions for name, _ in layers):
        raise ValueError(
            f"no convolution or linear layer of {type(model).__name__} ran on example_input; "
            "give the model itself, not one already compiled"
        )

    batch = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
    costs = []
    for (name, module, weight), alive in zip(weights, nonzeros, strict=True):
        kind = next(kind.__name__ for kind in _LAYERS if isinstance(module, kind))
        positions, outputs = tallies.pop(name).per_sample(name, batch)
        # macs: positions v;  rigl: positions v multiplications, as many additions with the bias's, and the activations.
        fixed = outputs if convention == "rigl" else 0
        dense = positions * weight.numel() * (2 if convention == "rigl" else 1) + fixed
        costs.append(LayerCost(name, kind, tuple(weight.shape), weight.numel(), alive, dense, fixed))
    # What is left in the tallies are the pools.
    pooling = sum(tally.per_sample(name, batch)[0] for name, tally in tallies.items()) if convention == "macs" else 0
    counted = {id(weight) for _, _, weight in weights}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in counted)
    return Cost(convention, tuple(costs), pooling, others)


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
