"""The products of one call of a layer: the output and both gradients, dense by PyTorch and sparse by a kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy.kernels import sparse_layers
from rarefy.kernels.sparse_layers import Index
from rarefy.sparse.acceleration.choices import PRODUCTS, Choice
from rarefy.sparse.acceleration.places import AcceleratedLayer

#: Stride, padding and dilation of a convolution.
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


@dataclass
class Call:
    """A layer with inputs of one shape: its products, dense and sparse. x and y are as the module has them."""

    layer: AcceleratedLayer
    index: Index
    #: The live weights, as they are in the forward pass.
    values: Tensor
    memory: torch.memory_format
    #: of a convolution; None of a linear layer.
    geometry: Geometry | None
    choices: dict[str, Choice]

    @property
    def density(self) -> float:
        """Of the weight."""
        return len(self.index) / self.layer.layer.parameter.numel()

    def _sparse(self, product: str, dense: Callable[[], object], sparse: Callable[[], object]) -> bool:
        """Whether the kernel computes the product; both functions are timed where it is not known which is faster."""
        choice, density = self.choices[product], self.density
        if choice.open(density):
            choice.measure(density, dense, sparse)
        return choice.sparse(density)

    def _flat(self, tensor: Tensor) -> Tensor:
        """(N, channels, height, width) in the form that the index is of, on the same memory."""
        if self.geometry is None:
            return tensor.view(-1, tensor.shape[-1]).t()[None, :, None, :]
        if not self.index.grid.chunk:
            return tensor
        if self.memory is torch.channels_last:
            return tensor.permute(0, 2, 3, 1).view(-1, tensor.shape[1]).t()[None, :, None, :]
        return tensor.view(len(tensor), tensor.shape[1], 1, -1)

    def _plain(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=self.memory)

    def _empty(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, memory_format=self.memory)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute y = W x + b."""
        dense = functools.partial(self.dense_forward, x, weight, bias)
        sparse = functools.partial(self.sparse_forward, x, bias)
        return sparse() if self._sparse("output", dense, sparse) else dense()

    def dense_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same by PyTorch."""
        if self.geometry is None:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, *self.geometry)

    def sparse_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same by the kernel."""
        grid = self.index.grid
        if self.geometry is None:
            y = self._empty((*x.shape[:-1], grid.shape.outputs))
        else:
            out = x.shape[2:] if grid.chunk else grid.shape.out
            y = self._empty((len(x), grid.shape.outputs, *out))
        self.index.forward(
            self._flat(self._plain(x)), self.values, None if bias is None else bias.contiguous(), self._flat(y)
        )
        return y

    def dense_backward(self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> list[Tensor | None]:
        """Gradients of x and of the weight by PyTorch; differentiable."""
        if self.geometry is None:
            rows, across = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            return [g @ weight if wanted[0] else None, across.t() @ rows if wanted[1] else None]
        stride, padding, dilation = self.geometry
        found = torch.ops.aten.convolution_backward(
            g, x, weight, None, stride, padding, dilation, False, (0, 0), 1, (*wanted, False)
        )
        return [found[0] if wanted[0] else None, found[1] if wanted[1] else None]

    def sparse_backward(self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> list[Tensor | None]:
        """The same by the kernel; the gradient of masked weights is 0."""
        grid = self.index.grid
        x, g = self._plain(x), self._plain(g)
        # What no tap reads gets no sum.
        make = torch.empty_like if grid.all_phases else torch.zeros_like
        to_x = make(x) if wanted[0] else None
        to_weight = torch.empty_like(weight) if wanted[1] else None
        to = None if to_x is None else self._flat(to_x)
        self.index.backward(self._flat(x), self.values, self._flat(g), to, to_weight)
        return [to_x, to_weight]

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool], dense: bool
    ) -> list[Tensor | None]:
        """Gradients of x and of the weight, where they are wanted; that of the whole weight if ``dense``."""
        by_kernel = [False, False]
        for i, product in enumerate(PRODUCTS[1:]):
            if wanted[i] and not (i == 1 and dense):
                alone = (i == 0, i == 1)
                by_kernel[i] = self._sparse(
                    product,
                    functools.partial(self.dense_backward, g, x, weight, alone),
                    functools.partial(self.sparse_backward, g, x, weight, alone),
                )
        found: list[Tensor | None] = [None, None]
        for sparse, backward in ((True, self.sparse_backward), (False, self.dense_backward)):
            ours = (wanted[0] and by_kernel[0] is sparse, wanted[1] and by_kernel[1] is sparse)
            if any(ours):
                found = [
                    old if new is None else new for old, new in zip(found, backward(g, x, weight, ours), strict=True)
                ]
        return found


class _Products(torch.autograd.Function):
    """The output, and its gradients, of a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight)
        return call.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        # A second derivative is wanted, g is of another kind, or the kernels are others than those of the index.
        if torch.is_grad_enabled() or not is_plain(g) or sparse_layers.lanes() != call.index.grid.lanes:
            to_x, to_weight = call.dense_backward(g, x, weight, (of_x, of_weight))
        else:
            owner = call.layer.owner()
            dense = owner is None or not owner.active or owner.dense_gradients()
            to_x, to_weight = call.backward(g, x, weight, (of_x, of_weight), dense)
        to_bias = None
        if of_bias:
            to_bias = g.reshape(-1, g.shape[-1]).sum(0) if call.geometry is None else g.sum((0, 2, 3))
        return to_x, to_weight, to_bias, None


def compute(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output of a call, which has gradients where they are wanted."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)):
        output: Tensor = _Products.apply(x, weight, bias, call)  # type: ignore[no-untyped-call]
        return output
    return call.forward(x, weight, bias)


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read and write it."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and tensor.numel() > 0
    )
