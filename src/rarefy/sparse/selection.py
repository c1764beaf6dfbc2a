"""Which layers of a model a method works on, and how far down each may go."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from rarefy._names import unknown

#: The layers that can be sparsified. Exactly these types: what a subclass does in its forward is not known.
PRUNABLE: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

Prunable = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

#: The least density of a layer, where nothing else is asked for.
DEFAULT_FLOOR = 0.005


def select_layers(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, Prunable]:
    """The layers to sparsify by name, in the model's order. Raises ValueError as
    :class:`rarefy.sparse.base.Sparsifier` says.
    """
    for option, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise ValueError(f"{option} must be a list of patterns, got the string {patterns!r}; write [{patterns!r}]")
    for name, module in model.named_modules():
        if isinstance(module, _WRAPPERS) or type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"the model is wrapped in {type(module).__name__}, which would not see what a sparsifier adds: make "
                "the sparsifier on the plain model, then wrap it"
            )
        if hasattr(module, "sparse_weight"):
            raise ValueError(f"layer {name!r} is being sparsified already; finalize() that sparsifier first")
    prunable = {
        name: m
        for name, m in model.named_modules()
        if type(m) in PRUNABLE and (is_lazy(m.weight) or m.weight.numel() > 0)
    }
    check_patterns(include or (), prunable, "include")
    check_patterns(exclude or (), prunable, "exclude")
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
        if module.weight.is_meta:
            raise ValueError(f"the weight of layer {name!r} is on the meta device; give it memory first (to_empty)")
        if is_lazy(module.weight):
            raise ValueError(f"layer {name!r} is lazy and has no weight yet; call the model once on an example first")
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise ValueError(
                f"the weight of layer {name!r} is not a parameter (a parametrization or torch.nn.utils.prune is on "
                "it); remove that first or exclude the layer"
            )
    _check_shared(model, chosen)
    return chosen


def warn_of_dense(model: nn.Module, chosen: Mapping[str, nn.Module], share: float = 0.05) -> None:
    """Warn if more than ``share`` of the model's matrix weights lie outside the chosen layers, naming where."""
    mine = {id(module.weight) for module in chosen.values()}
    matrices = {name: p for name, p in model.named_parameters() if p.dim() >= 2}
    outside = {name: p.numel() for name, p in matrices.items() if id(p) not in mine}
    left = sum(outside.values()) / sum(p.numel() for p in matrices.values())
    if left > share:
        largest = sorted(outside, key=outside.__getitem__, reverse=True)[:3]
        warnings.warn(
            f"{100 * left:.0f} % of the matrix weights stay dense, {', '.join(largest)} among them: only layers that "
            "are exactly Conv1d/2d/3d or Linear are sparsified, and targets are about those; include=[...] names the "
            "layers and silences this",
            stacklevel=4,
        )


def is_lazy(weight: object) -> bool:
    """Whether a lazy module has not made this parameter yet."""
    return isinstance(weight, nn.parameter.UninitializedParameter)


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


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(patterns: Iterable[str], names: Iterable[str], option: str) -> None:
    """Raise ValueError for a pattern that matches no name."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(unknown(f"Conv1d/2d/3d or Linear layer in {option}:", pattern, names))


def floor_of(name: str, floor: float | Mapping[str, float]) -> float:
    """The floor of the layer of this name. Raises ValueError for one outside [0, 1]."""
    if isinstance(floor, Mapping):
        matching = [value for pattern, value in floor.items() if fnmatch.fnmatchcase(name, pattern)]
        value = matching[0] if matching else DEFAULT_FLOOR
    else:
        value = floor
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"floor must be a density in [0, 1], got {value}")
    return value
