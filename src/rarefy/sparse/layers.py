"""Which parameters of a model a method works on, and how far down each may go.

A *layer* is one parameter that takes part in products, under the name of the parameter without a trailing ".weight":
"conv1", "encoder.self_attn.in_proj_weight", "rnn.weight_hh_l0". A weight that several modules share is one layer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy import _checks
from rarefy._names import layer_name, matches, unknown
from rarefy.sparse.shards import Shard, reshard, shard_of, shared_group, total

#: The least density of a layer, where nothing else is asked for.
DEFAULT_FLOOR = 0.005

#: What wraps a model and leaves its parameters as they are; the sparsifier works on what is inside.
_TRANSPARENT = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass(eq=False)
class Layer:
    """A parameter that is sparsified.

    Attributes:
        name: see the module.
        key: the parameter's own name, as in ``model.named_parameters()``.
        parameter: as it is now; a sharded one is a DTensor.
        shape: of the whole parameter, on all processes together.
        least: how many weights live at least.
        inputs_first: whether the weight's first dimension is the inputs, as of transposed convolutions; else they are
            the second.
        shard: which part of it this process holds, where it is sharded.
    """

    name: str
    key: str
    parameter: nn.Parameter
    least: int = 1
    inputs_first: bool = False
    shape: tuple[int, ...] = field(init=False)
    shard: Shard | None = field(init=False)

    def __post_init__(self) -> None:
        self.take(self.parameter)

    def take(self, parameter: nn.Parameter) -> None:
        """Work on this parameter from now on."""
        self.parameter, self.shape, self.shard = parameter, tuple(parameter.shape), shard_of(self.name, parameter)

    @property
    def size(self) -> int:
        """How many weights it has, on all processes together."""
        return math.prod(self.shape)

    @property
    def local(self) -> Tensor:
        """What this process holds of it, as a tensor that shares its memory."""
        return local(self.parameter).detach()

    @property
    def place(self) -> int:
        """Where that lies."""
        return (self.parameter if self.shard is None else local(self.parameter)).data_ptr()

    @property
    def version(self) -> int:
        """How often it was written to: a part, or the distributed tensor around it, which counts for itself."""
        return self.parameter._version + (0 if self.shard is None else local(self.parameter)._version)

    @property
    def grad(self) -> Tensor | None:
        """The gradient of what this process holds, or None."""
        grad = self.parameter.grad
        if grad is None:
            return None
        if grad.is_sparse:
            raise ValueError(
                f"the gradient of layer {self.name!r} is a sparse tensor; make the embedding with sparse=False, or "
                "exclude it"
            )
        if self.shard is None and not hasattr(grad, "_local_tensor"):
            return grad.detach() if grad.requires_grad else grad
        if getattr(grad, "placements", None) != getattr(self.parameter, "placements", None):
            raise ValueError(
                f"the gradient of layer {self.name!r} is placed as {getattr(grad, 'placements', None)}, the parameter "
                f"as {getattr(self.parameter, 'placements', None)}: bring it there with redistribute(), or exclude it"
            )
        return local(grad).detach()


def local(tensor: Tensor) -> Tensor:
    """Return the part of a distributed tensor that this process holds; any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel and ``torch.compile``. Raises ValueError for wrappers that hide parameters."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while isinstance(model, _TRANSPARENT) or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model.module if isinstance(model, _TRANSPARENT) else model._orig_mod  # type: ignore[assignment]
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "FullyShardedDataParallel" or type(module).__module__.startswith("deepspeed"):
            where = f"module {name!r} of the model" if name else "the model"
            raise ValueError(
                f"{where} is wrapped in {kind}, which hides the parameters in one flat tensor; shard it with "
                "torch.distributed.fsdp.fully_shard (FSDP2) or use DDP"
            )
    return model


def product_weights(module: nn.Module) -> list[str]:
    """The names of a module's own parameters that are sparsified unless asked otherwise."""
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or _is_conv1d(module):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        return ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    if isinstance(module, nn.RNNBase):
        return [name for names in module._all_weights for name in names if name.startswith("weight_")]
    if isinstance(module, nn.modules.rnn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    return []


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is the linear layer of GPT-2 in transformers, and no convolution that somebody calls so."""
    weight = getattr(module, "weight", None)
    other = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    return type(module).__name__ == "Conv1D" and not other and isinstance(weight, Tensor) and weight.dim() == 2


def _computed(module: nn.Module, name: str) -> bool:
    """Whether a weight is made of other parameters, by a parametrization or by what torch.nn.utils once had for it."""
    parametrized = name in getattr(module, "parametrizations", {})
    return parametrized or any(f"{name}_{end}" in module._parameters for end in ("orig", "g", "v"))


@dataclass(eq=False)
class _Candidate:
    """A parameter that could be a layer, under all its names."""

    parameter: nn.Parameter
    keys: list[str] = field(default_factory=list)
    usual: bool = False  # takes part in products, as far as its module tells
    embedding: bool = False
    inputs_first: bool = False

    def matches(self, patterns: Iterable[str]) -> bool:
        return any(_names(key, pattern) for pattern in patterns for key in self.keys)

    @property
    def lazy(self) -> bool:
        return isinstance(self.parameter, nn.parameter.UninitializedParameter)


def _names(key: str, pattern: str) -> bool:
    """Whether a shell pattern is the name of a parameter, of its layer, or of the module that has it."""
    return any(matches(name, pattern) for name in (key, layer_name(key), key.rpartition(".")[0]))


def _candidates(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]
) -> tuple[list[_Candidate], list[str]]:
    """What could be a layer, and the names of weights that are computed from others and are not asked for."""
    computed = []
    found: dict[int, _Candidate] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        usual = product_weights(module)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            candidate = found.setdefault(id(parameter), _Candidate(parameter))
            candidate.keys.append(f"{prefix}.{name}" if prefix else name)
            candidate.usual |= name in usual
            candidate.embedding |= isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            candidate.inputs_first |= isinstance(module, nn.modules.conv._ConvTransposeNd) or _is_conv1d(module)
        for name in usual:
            key = f"{prefix}.{name}" if prefix else name
            if not _computed(module, name):
                continue
            asked = include is None or any(_names(key, pattern) for pattern in include)
            if asked and not any(_names(key, pattern) for pattern in exclude):
                raise ValueError(
                    f"the weight of layer {layer_name(key)!r} is not a parameter (a parametrization or "
                    f"torch.nn.utils.prune is on it); remove that first, or pass exclude=[{layer_name(key)!r}]"
                )
            computed.append(key)
    able = [c for c in found.values() if c.lazy or (c.parameter.dim() >= 2 and c.parameter.numel() > 0)]
    return able, computed


def select_layers(
    model: nn.Module,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    floor: float | Mapping[str, float],
) -> list[Layer]:
    """The layers to sparsify, in the model's order. Raises ValueError as :class:`rarefy.sparse.Sparsifier` says."""
    reshard(model)
    candidates, computed = _candidates(model, include, exclude or ())
    usual = [c for c in candidates if c.usual and not c.embedding and (c.parameter.requires_grad or c.lazy)]
    names = [layer_name(c.keys[0]) for c in candidates]
    if include is None:
        chosen = usual
    else:
        picked = []
        for pattern in include:
            # A pattern is about the layers that are usual; one that finds none of them may name any parameter.
            matching = [c for c in candidates if c.matches([pattern])]
            picked += [c for c in matching if c.usual] or matching
            if not matching:
                raise ValueError(unknown("layer in include:", pattern, names))
        chosen = [c for c in candidates if any(c is other for other in picked)]
    for pattern in exclude or ():
        if not any(c.matches([pattern]) for c in candidates) and not any(_names(key, pattern) for key in computed):
            raise ValueError(unknown("layer in exclude:", pattern, names))
    chosen = [c for c in chosen if not c.matches(exclude or ())]
    if not chosen:
        frozen = sum(c.usual and not c.parameter.requires_grad for c in candidates)
        raise ValueError(
            f"nothing to sparsify: the model has {len(usual)} weights of linear, convolution, attention or recurrent "
            "layers that train"
            + (f" ({frozen} are frozen: name those in include)" if frozen else "")
            + (", and include and exclude leave none" if usual else "")
        )
    layers = []
    for candidate in chosen:
        key = candidate.keys[0]
        name = layer_name(key)
        if candidate.lazy:
            raise ValueError(f"layer {name!r} is lazy and has no weight yet; call the model once on an example first")
        if not candidate.parameter.is_floating_point():
            raise ValueError(f"layer {name!r} is of {candidate.parameter.dtype}, which is not real; exclude it")
        layers.append(Layer(name, key, candidate.parameter, inputs_first=candidate.inputs_first))
    shared_group([layer.shard for layer in layers])
    for layer in layers:
        layer.least = max(1, math.ceil(_floor_of(layer.name, floor) * layer.size))
    if isinstance(floor, Mapping):
        check_patterns(floor, [layer.name for layer in layers], "floor")
    if include is None and exclude is None:
        _warn_of_dense(candidates, chosen)
    return layers


def check_patterns(patterns: Iterable[str], names: Sequence[str], option: str) -> None:
    """Raise ValueError for a pattern that matches no name."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(unknown(f"layer in {option}:", pattern, names))


def resolve(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Look every layer up again in the model; gives those whose parameter has become another object."""
    unwrapped(model)
    reshard(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    moved = []
    for layer in layers:
        parameter = parameters.get(layer.key)
        if parameter is None or tuple(parameter.shape) != layer.shape:
            now = "is not there any more" if parameter is None else f"is of shape {tuple(parameter.shape)} now"
            raise ValueError(
                f"{layer.key!r} of the model {now}, and was of shape {layer.shape} when the sparsifier was made: make "
                "a new one; where a wrapper has flattened the parameters (FullyShardedDataParallel, DeepSpeed) shard "
                "with torch.distributed.fsdp.fully_shard (FSDP2) or use DDP"
            )
        if parameter is not layer.parameter:
            layer.take(parameter)
            moved.append(layer)
    shared_group([layer.shard for layer in layers])
    return moved


def check_same(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise RuntimeError for a layer whose parameter has become another object."""
    replaced = resolve(model, layers)
    if replaced:
        raise RuntimeError(
            f"the model has another parameter as {replaced[0].key!r} than when the sparsifier was attached; "
            "call attach() with the optimizer that trains it"
        )


def copies_of(layers: Sequence[Layer], model: nn.Module) -> list[nn.Parameter]:
    """Look the layers up in a copy of the trained model that finalize() is given. Raises ValueError for any other."""
    parameters = dict(unwrapped(model).named_parameters(remove_duplicate=False))
    missing = [layer.key for layer in layers if layer.key not in parameters]
    if missing:
        inside = "; give what it wraps, its .module" if f"module.{missing[0]}" in parameters else ""
        raise ValueError(
            f"the model given to finalize() has no parameter {missing[0]!r}{inside}; give a copy of the trained one"
        )
    for layer in layers:
        if tuple(parameters[layer.key].shape) != layer.shape:
            raise ValueError(
                f"{layer.key!r} of the model given to finalize() has the shape "
                f"{tuple(parameters[layer.key].shape)}, that of the trained one {layer.shape}; "
                "give a copy of that"
            )
        if getattr(parameters[layer.key], "placements", None) != getattr(layer.parameter, "placements", None):
            raise ValueError(
                f"{layer.key!r} of the model given to finalize() is not sharded as that of the trained one: "
                "give a copy that fully_shard has split alike, or finalize a whole copy with the sparsifier of a "
                "whole model, whose load_state_dict() takes this one's state"
            )
    return [parameters[layer.key] for layer in layers]


def check_memory(layers: Sequence[Layer]) -> None:
    """Raise ValueError for a weight that has none."""
    for layer in layers:
        if layer.parameter.is_meta:
            raise ValueError(f"the weight of layer {layer.name!r} is on the meta device; give it memory first")


def without_gradient(layers: Sequence[Layer]) -> list[Layer]:
    """Those of the layers that train and have no gradient, on any process."""
    training = [layer for layer in layers if layer.parameter.requires_grad]
    graded = torch.tensor([int(layer.grad is not None) for layer in training], device=training[0].local.device)
    used = total(graded, [layer.shard for layer in training]).tolist()
    return [layer for layer, anywhere in zip(training, used, strict=True) if not anywhere]


def not_finite(layers: Sequence[Layer]) -> list[Layer]:
    """Those of the layers that have a weight which is NaN or infinite, on any process."""
    # w - w is 0 for what is finite, and the same is decided wherever a part of the layer lies.
    odd = torch.stack([((w - w).sum() != 0).long() for w in (layer.local for layer in layers)])
    counts = total(odd, [layer.shard for layer in layers]).tolist()
    return [layer for layer, count in zip(layers, counts, strict=True) if count]


def _warn_of_dense(candidates: Sequence[_Candidate], chosen: Sequence[_Candidate], share: float = 0.05) -> None:
    """Warn if more than ``share`` of the weights that train and could be sparse stay dense, naming where."""
    able = [c for c in candidates if c.parameter.requires_grad and not c.lazy and not c.embedding]
    outside = sorted((c for c in able if c not in chosen), key=lambda c: c.parameter.numel(), reverse=True)
    weights = sum(c.parameter.numel() for c in able) or 1
    left = sum(c.parameter.numel() for c in outside) / weights
    if left > share:
        warnings.warn(
            f"{100 * left:.0f} % of the matrix weights stay dense, {', '.join(c.keys[0] for c in outside[:3])} among "
            "them: by default linear, convolution, attention and recurrent layers are sparsified, and targets are "
            "about those; include=[...] names any parameter and silences this",
            stacklevel=6,
        )


def _floor_of(name: str, floor: float | Mapping[str, float]) -> float:
    """The floor of the layer of this name. Raises ValueError for one outside [0, 1]."""
    value: Any = floor
    if isinstance(floor, Mapping):
        value = next((v for pattern, v in floor.items() if matches(name, pattern)), DEFAULT_FLOOR)
    try:
        _checks.fraction("floor", value)
    except ValueError as error:
        raise ValueError(str(error).replace("must be in", "must be a density in", 1)) from None
    return float(value)


def dense_in_memory(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill its memory without gaps, its first dimension outermost."""
    dims = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]
    expected = 1
    for stride, size in sorted(dims):
        if stride != expected:
            return False
        expected *= size
    return tensor.shape[0] <= 1 or tensor.stride(0) == expected // tensor.shape[0]
