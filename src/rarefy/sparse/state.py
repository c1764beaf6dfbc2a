"""What buckets keep, as a checkpoint holds it: by the names of the layers, whatever the buckets, formats and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rarefy.sparse.buckets import Bucket
from rarefy.sparse.layers import Layer
from rarefy.sparse.shards import like

#: Whether the optimizer of the method's own parameters had stepped.
STARTED = "optimizer.started"


def _tensors(bucket: Bucket) -> dict[str, tuple[bool, Sequence[Tensor]]]:
    """All that must survive, by name: whether it is split as the weights are, and one tensor a layer, in place."""
    found = {name: _by_layer(bucket, name, value) for name, value in bucket.kept.items()}
    found.update({f"own.{name}": _by_layer(bucket, name, value.detach()) for name, value in bucket.own.items()})
    if bucket.companion is not None:
        for (name, key), value in bucket.companion.tensors().items():
            found[f"optimizer.{name}.{key}"] = _by_layer(bucket, name, value)
        found[STARTED] = _by_layer(bucket, STARTED, torch.tensor(bucket.companion.started))
    return found


def _by_layer(bucket: Bucket, name: str, value: Tensor) -> tuple[bool, Sequence[Tensor]]:
    if value.dim() == 0:  # a step, the same for all layers
        return False, [value] * len(bucket.layers)
    per = bucket.per.get(name)
    if per == "layer":
        return False, value.split_with_sizes([1] * len(value))
    return True, bucket.views(value) if per is None else value.split_with_sizes([shape[0] for shape in bucket.shapes])


def options(sparsifier: Any, layers: Sequence[Layer]) -> dict[str, Any]:
    """What a checkpoint's sparsifier must have in common with the one that goes on: all options, and the layers."""
    elsewhere = {"model", "include", "exclude", "example_input"}
    given = {
        option.name: dict(value) if isinstance(value, Mapping) else [*value] if isinstance(value, tuple) else value
        for option in fields(sparsifier)
        if option.init and option.name not in elsewhere
        for value in [getattr(sparsifier, option.name)]
        if value is None or isinstance(value, (bool, int, float, str, tuple, Mapping))
    }
    return {
        "method": type(sparsifier).__name__,
        **given,
        "layers": {layer.name: list(layer.shape) for layer in layers},
    }


def check(saved: Any, ours: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no state of a sparsifier with these options and layers."""
    mapping: Any = Mapping
    parts = {"config": mapping, "steps": int, "aside": (list, tuple), "method": mapping, "layers": mapping}
    given: Mapping[str, Any] = saved if isinstance(saved, Mapping) else {}
    if not all(isinstance(given.get(key), kind) for key, kind in parts.items()):
        raise ValueError(
            f"load_state_dict() takes what a sparsifier's state_dict() gave, with its {', '.join(parts)}; got "
            f"{list(saved)[:5] if isinstance(saved, Mapping) else type(saved).__name__}"
        )
    theirs = saved["config"]
    for key, mine in ours.items():
        if key != "layers" and theirs.get(key) != mine:
            raise ValueError(
                f"the checkpoint's sparsifier has {key}={theirs.get(key)!r}, this one {mine!r}; make it with the "
                "options of the run that is resumed"
            )
    there, here = theirs.get("layers"), ours["layers"]
    if there != here:
        known = there if isinstance(there, Mapping) else {}
        odd = [name for name in {**known, **here} if known.get(name) != here.get(name)]
        raise ValueError(
            f"the checkpoint's sparsifier has other layers: {odd[0]!r} is {known.get(odd[0], 'not there')} there, "
            f"{here.get(odd[0], 'not there')} here ({len(odd)} differ); make it with the model, include and exclude of "
            "the run that is resumed (layers frozen since are left out unless include names them)"
        )
    if saved["steps"] < 0 or not set(saved["aside"]) < set(here):
        raise ValueError(
            f"the checkpoint is broken: it says {saved['steps']} steps, and that of {len(here)} layers "
            f"{list(saved['aside'])[:3]} take no part"
        )


def export(buckets: Sequence[Bucket]) -> dict[str, dict[str, Tensor]]:
    """Copies of what the buckets keep: ``{layer: {name: tensor}}``; a part of a layer comes as a DTensor."""
    saved: dict[str, dict[str, Tensor]] = {}
    for bucket in buckets:
        for name, (split, values) in _tensors(bucket).items():
            for layer, value in zip(bucket.layers, values, strict=True):
                copy = value.detach().clone(memory_format=torch.contiguous_format)
                saved.setdefault(layer.name, {})[name] = like(copy, layer.parameter) if split else copy
    return saved


def restore(buckets: Sequence[Bucket], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write back what :func:`export` gave, on these processes' parts of the layers."""
    for bucket in buckets:
        if bucket.companion is not None:
            bucket.companion.renew(started=True)
            alike = {f"optimizer.{name}.{key}" for name, key in bucket.companion.tensors()}
            there = [saved.get(layer.name, {}) for layer in bucket.layers]
            if not all(alike <= set(tensors) and tensors.get(STARTED) for tensors in there):
                bucket.companion.renew()  # it had not stepped yet, or was of another kind
        for name, (split, values) in _tensors(bucket).items():
            if name.startswith("optimizer.") and not (bucket.companion and bucket.companion.started):
                continue
            for layer, value in zip(bucket.layers, values, strict=True):
                given = saved.get(layer.name, {}).get(name)
                if given is not None:
                    value.copy_(_part(layer, given, value, split))
                else:
                    raise ValueError(
                        f"the checkpoint has no {name!r} of layer {layer.name!r}; it is not of this method"
                    )


def of_companions(saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Of what the buckets keep, what the steps of the method's own parameters remember."""
    return {
        name: {key: value for key, value in tensors.items() if key.startswith("optimizer.")}
        for name, tensors in saved.items()
    }


def _part(layer: Layer, given: Any, mine: Tensor, split: bool) -> Any:
    """The part that is held here of a saved tensor, which may be whole, or a part of another division."""
    if hasattr(given, "full_tensor"):
        # By what all processes see alike: gathering takes all of them.
        mesh, placements = getattr(layer.parameter, "device_mesh", None), getattr(layer.parameter, "placements", None)
        if split and given.device_mesh == mesh and given.placements == placements:
            given = given.to_local()
        else:
            given = given.full_tensor()
    if split and layer.shard is not None and len(given) == layer.shape[0] != len(mine):
        given = given[layer.shard.first_row : layer.shard.first_row + len(mine)]
    if given.shape != mine.shape:
        raise ValueError(
            f"the checkpoint has a tensor of shape {tuple(given.shape)} for layer {layer.name!r}, here it is "
            f"{tuple(mine.shape)}"
        )
    return given
