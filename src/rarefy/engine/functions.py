"""What the steps of a plan are computed by in PyTorch, in float32 and in int8 alike."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.engine.plan import Activation, Conv

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu,
}
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def activate(x: Tensor, function: Activation) -> Tensor:
    """The activation function of every element."""
    return ACTIVATIONS[function](x)


def symmetric_padding(step: Conv) -> tuple[list[int], tuple[int, ...]]:
    """What to pad the input with before the convolution, as ``F.pad`` takes it, and then the convolution's padding."""
    if any(before != after for before, after in step.padding):
        return [size for pair in reversed(step.padding) for size in pair], (0,) * len(step.padding)
    return [], tuple(before for before, _ in step.padding)
