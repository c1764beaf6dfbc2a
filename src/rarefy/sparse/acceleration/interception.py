"""The way in: ``nn.Linear`` and ``nn.Conv2d`` look their weight up, and calls of an accelerated layer come here.

What a kernel is not for goes on to PyTorch's function.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import _get_current_dispatch_mode

from rarefy.kernels import sparse_layers
from rarefy.kernels.sparse_layers import Shape
from rarefy.sparse.acceleration.places import AcceleratedLayer
from rarefy.sparse.acceleration.products import Call, Geometry, compute, is_plain

#: The layers that are accelerated, by the ids of their weights, which they hold and the sparsifier them. No weak
#: references to weights: PyTorch swaps no tensor that has one (torch.__future__.set_swap_module_params_on_conversion).
LAYERS: dict[int, weakref.ref[AcceleratedLayer]] = {}

#: PyTorch's own.
linear_forward, conv_forward = nn.Linear.forward, nn.Conv2d._conv_forward

# TorchScript compiles what functools.wraps says is wrapped, and looks its names up here.
for _given in (linear_forward, conv_forward):
    for _name in _given.__code__.co_names:
        if _name in _given.__globals__:
            globals().setdefault(_name, _given.__globals__[_name])


def find(weight: Any) -> AcceleratedLayer | None:
    """The accelerated layer of this weight, if there is one."""
    reference = LAYERS.get(id(weight)) if type(weight) is nn.Parameter else None
    layer = None if reference is None else reference()
    return layer if layer is not None and layer.layer.parameter is weight else None


def _undisturbed() -> bool:
    """Whether nobody else takes part in calls of PyTorch now: no transform, mode, trace or cast."""
    return (
        sparse_layers.lanes() > 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_function_stack() == 0
        and _get_current_dispatch_mode() is None
        and not torch._C._is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and torch.autograd.forward_ad._current_level < 0
    )


def _output(
    layer: AcceleratedLayer, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry | None
) -> Tensor | None:
    """The output of a layer, or None where PyTorch's function is to compute it."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if not all(is_plain(tensor) for tensor in tensors) or not _undisturbed():
        return None
    channels_last = weight.dim() == 4 and not weight.is_contiguous()
    if not (weight.permute(0, 2, 3, 1) if channels_last else weight).is_contiguous():
        return None
    outputs, inputs = weight.shape[:2]
    memory = torch.contiguous_format
    if geometry is None:
        if x.dim() < 1 or x.shape[-1] != inputs:
            return None
        shape = Shape(outputs, inputs, flat=True)
    else:
        if x.dim() != 4 or x.shape[1] != inputs:
            return None
        if torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight)):  # as PyTorch's does
            memory = torch.channels_last
        kernel = (weight.shape[2], weight.shape[3])
        flat = (kernel, *geometry[:2]) == ((1, 1), (1, 1), (0, 0))
        size = (1, 1) if flat else (x.shape[2], x.shape[3])
        stride, padding, dilation = geometry
        shape = Shape(outputs, inputs, *size, kernel, stride, padding, (1, 1) if flat else dilation, flat)
    choices = layer.choices_for(tuple(x.shape), memory)
    graded = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight)]
    if not layer.refresh(weight.detach(), channels_last, choices, graded):
        return None
    index = layer.index(shape, channels_last)
    if index is None:
        return None
    return compute(Call(layer, index, layer.values, memory, geometry, choices), x, weight, bias)


@functools.wraps(linear_forward)
def _linear(self: nn.Linear, input: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and (layer := find(self.weight)) is not None:
        output = _output(layer, input, self.weight, self.bias, None)
        if output is not None:
            return output
    plain: Tensor = linear_forward(self, input)
    return plain


@functools.wraps(conv_forward)
def _conv(self: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if (
        not torch.compiler.is_compiling()
        and (layer := find(weight)) is not None
        and self.groups == 1
        and self.padding_mode == "zeros"
        and not isinstance(self.padding, str)
    ):
        geometry: Any = (self.stride, self.padding, self.dilation)
        output = _output(layer, input, weight, bias, geometry)
        if output is not None:
            return output
    plain: Tensor = conv_forward(self, input, weight, bias)
    return plain


def intercept(layers: Sequence[AcceleratedLayer]) -> None:
    """Let calls of these layers come here from now on."""
    for layer in layers:
        LAYERS[id(layer.layer.parameter)] = weakref.ref(layer)
    nn.Linear.forward = _linear  # type: ignore[method-assign]
    nn.Conv2d._conv_forward = _conv  # type: ignore[method-assign]


def let_go(layers: Sequence[AcceleratedLayer]) -> None:
    """Let PyTorch compute these layers again.

    The way in is taken back when nothing is accelerated any more, unless somebody has put his own over it.
    """
    for key, reference in list(LAYERS.items()):
        if (layer := reference()) is None or any(layer is each for each in layers):
            del LAYERS[key]
    if LAYERS:
        return
    if nn.Linear.forward is _linear:
        nn.Linear.forward = linear_forward  # type: ignore[method-assign]
    if nn.Conv2d._conv_forward is _conv:
        nn.Conv2d._conv_forward = conv_forward  # type: ignore[method-assign]
