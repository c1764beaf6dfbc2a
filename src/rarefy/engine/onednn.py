"""Dense convolutions by oneDNN inside PyTorch, with weights laid out for it once: the fastest that PyTorch has.

``torch.conv2d`` lays the weights out again at each call; the operators here are those that Inductor uses instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.engine.functions import activate, symmetric_padding
from rarefy.engine.plan import Conv


@dataclass(frozen=True, eq=False)
class PackedConv:
    """A two-dimensional :class:`Conv` with its weights packed for inputs of ``shape``; others work, too."""

    step: Conv
    shape: tuple[int, ...]
    weight: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        padded = [s + sum(p) for s, p in zip(self.shape[2:], self.step.padding, strict=True)]
        _, padding = symmetric_padding(self.step)
        size = [*self.shape[:2], *(s - 2 * p for s, p in zip(padded, padding, strict=True))]
        weight = self.step.weight.contiguous(memory_format=torch.channels_last)
        options = (list(padding), self.step.stride, self.step.dilation, self.step.groups)
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *options, size)
        object.__setattr__(self, "weight", packed)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy packs its weights again: the packed ones lie in oneDNN's own memory."""
        return PackedConv, (self.step, self.shape)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The values that it reads."""
        return self.step.inputs

    @property
    def output(self) -> str:
        """The value that it makes."""
        return self.step.output

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What the step makes of what it reads."""
        step = self.step
        added, padding = symmetric_padding(step)
        x = (F.pad(x, added) if added else x).contiguous(memory_format=torch.channels_last)
        fused = step.activation == "relu" and residual is None
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x,
            self.weight,
            step.bias,
            padding,
            step.stride,
            step.dilation,
            step.groups,
            "relu" if fused else "none",
            [],
            "",
        )
        if residual is not None:
            y += residual
        return y if fused else activate(y, step.activation)


def packed(step: Conv, shape: tuple[int, ...]) -> PackedConv | None:
    """The step, computed by oneDNN on inputs of this shape; None along one axis, and where PyTorch has no oneDNN."""
    there = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    return PackedConv(step, shape) if there and len(step.stride) == 2 else None
