"""What buckets keep, as a checkpoint holds it: by the names of the layers, whatever the buckets, formats and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.sparse.buckets import Bucket
from rarefy.sparse.layers import Layer
from rarefy.sparse.shards import like


def _tensors(bucket: Bucket) -> dict[str, Sequence[Tensor]]:
    """Everything that must survive, by name: one tensor a layer, in place."""
    found = {name: _split(bucket, value) for name, value in bucket.kept.items()}
    found.update({f"own.{name}": _split(bucket, value.detach()) for name, value in bucket.own.items()})
    if bucket.companion is not None:
        found.update({f"optimizer.{key}": _split(bucket, value) for key, value in bucket.companion.tensors().items()})
    return found


def _split(bucket: Bucket, value: Any) -> Sequence[Tensor]:
    if isinstance(value, list):
        return value
    if value.dim() == 0:  # a step, the same for all layers
        return [value] * len(bucket.layers)
    if bucket.rows is not None and len(value) == sum(bucket.rows):
        return list(torch.split(value, bucket.rows))
    if len(value) == bucket.size:
        return bucket.views(value)
    return list(torch.split(value, 1))  # one a layer


def export(buckets: Sequence[Bucket]) -> dict[str, dict[str, Tensor]]:
    """Copies of what the buckets keep: ``{layer: {name: tensor}}``; a part of a layer comes as a DTensor."""
    saved: dict[str, dict[str, Tensor]] = {}
    for bucket in buckets:
        for name, values in _tensors(bucket).items():
            for layer, value in zip(bucket.layers, values, strict=True):
                copy = value.detach().clone(memory_format=torch.contiguous_format)
                saved.setdefault(layer.name, {})[name] = like(copy, layer.parameter) if _is_part(layer, copy) else copy
    return saved


def restore(buckets: Sequence[Bucket], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write back what :func:`export` gave, on these processes' parts of the layers."""
    for bucket in buckets:
        for name, values in _tensors(bucket).items():
            for layer, value in zip(bucket.layers, values, strict=True):
                given = saved.get(layer.name, {}).get(name)
                if given is not None:
                    value.copy_(_part(layer, given, value))
                elif not name.startswith("optimizer."):
                    raise ValueError(f"the checkpoint has no {name!r} of layer {layer.name!r}; it is not of this method")


def _is_part(layer: Layer, value: Tensor) -> bool:
    return layer.shard is not None and value.dim() > 0 and value.shape[0] == layer.local.shape[0]


def _part(layer: Layer, given: Tensor, mine: Tensor) -> Tensor:
    """This process's part of a saved tensor, which may be a part of another division, or whole."""
    if hasattr(given, "full_tensor"):
        if given._local_tensor.shape == mine.shape and layer.shard is not None:  # type: ignore[attr-defined]
            return given._local_tensor  # type: ignore[attr-defined, no-any-return]
        given = given.full_tensor()  # type: ignore[operator]
    if layer.shard is not None and given.shape != mine.shape:
        given = given[layer.shard.first_row : layer.shard.first_row + len(mine)]
    if given.shape != mine.shape:
        raise ValueError(
            f"the checkpoint has a tensor of shape {tuple(given.shape)} for layer {layer.name!r}, here it is "
            f"{tuple(mine.shape)}"
        )
    return given
