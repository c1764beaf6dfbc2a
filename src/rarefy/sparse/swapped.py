"""Layers that compute with a function of their weight while they train, under the names and keys of the plain ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.sparse.selection import Prunable


class Swapped(nn.Module):
    """What a layer gains while it trains: ``reparam``, and a forward that uses ``reparam(weight)``.

    ``weight`` and ``bias`` stay the layer's own parameters; what ``reparam`` holds comes beside them, as
    "reparam.NAME".
    """

    weight: Tensor
    reparam: nn.Module

    def sparse_weight(self) -> Tensor:
        """W^, what the layer computes with."""
        return self.reparam(self.weight)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own forward, with W^ in place of W."""
        return self._conv_forward(x, self.sparse_weight(), self.bias)  # type: ignore[operator, no-any-return]


class SwappedLinear(Swapped, nn.Linear):
    """:class:`torch.nn.Linear` with W^ for W."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own forward, with W^ in place of W."""
        return F.linear(x, self.sparse_weight(), self.bias)


class SwappedConv1d(Swapped, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with W^ for W."""


class SwappedConv2d(Swapped, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with W^ for W."""


class SwappedConv3d(Swapped, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with W^ for W."""


_CLASSES: dict[type[nn.Module], type[Swapped]] = {
    nn.Linear: SwappedLinear,
    nn.Conv1d: SwappedConv1d,
    nn.Conv2d: SwappedConv2d,
    nn.Conv3d: SwappedConv3d,
}
_PLAIN = {swapped: plain for plain, swapped in _CLASSES.items()}


def swap(layer: Prunable, reparam: nn.Module) -> Swapped:
    """Change the layer's class in place and give it ``reparam``."""
    layer.__class__ = _CLASSES[type(layer)]  # type: ignore[assignment]
    swapped = cast(Swapped, layer)
    swapped.reparam = reparam
    return swapped


def swap_back(layer: Swapped) -> None:
    """The plain layer again: undoes :func:`swap`, weight and bias as they are."""
    unguard(layer)
    del layer.reparam
    layer.__class__ = _PLAIN[type(layer)]  # type: ignore[assignment]


def check_swapped(layers: Mapping[str, nn.Module]) -> dict[str, Swapped]:
    """The layers as swapped ones. Raises ValueError if one is plain."""
    for name, layer in layers.items():
        if not isinstance(layer, Swapped):
            raise ValueError(f"layer {name!r} is a plain {type(layer).__name__}: already finalized?")
    return cast(dict[str, Swapped], dict(layers))


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """Does nothing; but with a hook on, TransformerEncoderLayer's fast path, which reads ``weight`` itself, is off."""


def guard_fast_paths(model: nn.Module) -> None:
    """Keep PyTorch's fused transformer layers from reading W past the forward of their swapped parts."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in module.children():
                if isinstance(child, Swapped):
                    child.register_forward_pre_hook(_no_fast_path)


def unguard(layer: nn.Module) -> None:
    """Undo :func:`guard_fast_paths` for this layer."""
    for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _no_fast_path]:
        del layer._forward_pre_hooks[key]
