"""What the steps of a plan are computed by in PyTorch, in float32 and in int8 alike."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.act import operator
from rarefy.act.kernels import aten
from rarefy.engine.plan import MODED, Activation, Conv, parts

_PLAIN: dict[Activation, Callable[[Tensor], Tensor]] = {
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
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation function of every element."""
    return function_of(activation)(x)


@functools.lru_cache(maxsize=256)
def function_of(activation: Activation) -> Callable[[Tensor], Tensor]:
    """What computes an activation. Raises ValueError for one that is none."""
    if activation in _PLAIN:
        return _PLAIN[activation]
    function, mode, table = parts(activation)
    if function not in MODED or not mode:
        raise ValueError(f"there is no activation {activation!r:.80}")
    check_mode(function, mode, table)
    return functools.partial(_of_mode, function, mode, table)


def _of_mode(function: str, mode: str, table: str, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.rarefy.activation(x, function, mode, "x", table)
    return result


def check_mode(function: str, mode: str, table: str) -> None:
    """Raise ValueError unless the function has the mode in float32, and that the table, which is one's JSON."""
    if table and not table.startswith("{"):
        raise ValueError(f"a table is given by its JSON, got {table!r:.80}")
    operator.check_dtype(function, torch.float32, mode, table)


def whole_table(text: str) -> str:
    """A table of ``rarefy::activation``, which may be a name or a file, as its JSON; none stays none."""
    table = aten.given_table(text)
    return "" if table is None else table.text


def symmetric_padding(step: Conv) -> tuple[list[int], tuple[int, ...]]:
    """What to pad the input with before the convolution, as ``F.pad`` takes it, and then the convolution's padding."""
    if any(before != after for before, after in step.padding):
        return [size for pair in reversed(step.padding) for size in pair], (0,) * len(step.padding)
    return [], tuple(before for before, _ in step.padding)
