"""Training steps that take less time where a layer is sparse: native kernels in place of PyTorch's dense products.

A layer has three products in a step: the output, y = W x, the gradient of the input, W^T dy, and that of the weight,
dy x^T. Each of them is computed by whichever is faster here, PyTorch's function or a kernel that passes over the zeros
(:mod:`rarefy.kernels.sparse_layers`); both are timed on the layer's own tensors when the layer has become sparse enough
for the question to be open. The weight's gradient is sparse while the method reads no gradient of a masked weight.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakIdKeyDictionary

from rarefy import kernels
from rarefy.kernels import sparse_layers
from rarefy.kernels.sparse_layers import Index, Shape
from rarefy.sparse.base import Sparsifier
from rarefy.sparse.families.masked import Masked
from rarefy.sparse.layers import Layer

#: Denser layers are not timed: what some products gain there is little (benchmarks/sparse_steps.py).
DENSEST = 0.6
#: A product that was slower is timed again once the density is this part of that at which it was.
AGAIN = 0.8
#: One that was faster is timed again once the density is this part of that at which it was: it saves more by then.
STALE = 0.5
#: Places of weights that have become 0 are dropped once they are more than this share.
SLACK = 0.1
#: Over so many calls of a layer what its indices cost is averaged.
MEMORY = 10
#: How often each function is timed at least and at most, and after how many seconds no more than at least.
ROUNDS, ENOUGH = (3, 12), 0.05

PRODUCTS = ("output", "input gradient", "weight gradient")


@dataclass
class Choice:
    """How one product of a layer is computed for inputs of one shape, and by what measurement.

    Attributes:
        layer: its name.
        product: one of :data:`PRODUCTS`.
        shape: of the input.
        sparse_from: the largest density at which the sparse kernel was the faster, -1 if at none.
        dense_from: the smallest density above it at which PyTorch's function was, 1 if at none.
        density: at which they were timed last, and what both took in seconds.
        calls: how many sparse products were computed.
        seconds_saved: by them, going by what was timed at the time.
    """

    layer: str
    product: str
    shape: tuple[int, ...]
    sparse_from: float = -1.0
    dense_from: float = 1.0
    density: float = 1.0
    seconds_dense: float = 0.0
    seconds_sparse: float = 0.0
    calls: int = 0
    seconds_saved: float = 0.0
    _gain: float = field(default=0.0, repr=False)

    def open(self, density: float) -> bool:
        """Whether the two are to be timed at this density: nothing tells which is faster, or no more by how much."""
        unknown = self.sparse_from < density <= min(DENSEST, AGAIN * self.dense_from)
        return unknown or density < min(self.sparse_from, STALE * self.density)

    def possible(self, density: float) -> bool:
        """Whether the sparse kernel may be used at this density."""
        return density <= self.sparse_from or self.open(density)

    def measure(self, density: float, dense: Callable[[], object], sparse: Callable[[], object]) -> None:
        """Time both at this density."""
        self.density = density
        self.seconds_dense, self.seconds_sparse = _fastest(dense, sparse)
        if self.seconds_sparse < self.seconds_dense:
            self.sparse_from = max(self.sparse_from, density)
            self.dense_from = max(self.dense_from, self.sparse_from)
            self._gain = self.seconds_dense - self.seconds_sparse
        else:
            self.dense_from = density
            self.sparse_from = min(self.sparse_from, AGAIN * density) if density else -1.0

    def gain(self, density: float) -> float:
        """Seconds that the sparse kernel saves at this density, as far as is known."""
        return self._gain if density <= self.sparse_from else 0.0

    def sparse(self, density: float) -> bool:
        """Whether the sparse kernel computes the product at this density; counts what it saves."""
        if density > self.sparse_from:
            return False
        self.calls += 1
        self.seconds_saved += self._gain
        return True


def _fastest(*functions: Callable[[], object]) -> tuple[float, ...]:
    """The least seconds of each of some functions that are called in turn.

    With one thread they are its own, which do not grow with what else the machine does: the choice stands for long.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(functions)
    least, most = ROUNDS
    begin = clock()
    for turn in range(most):
        if turn >= least and clock() - begin > ENOUGH:
            break
        for i, function in enumerate(functions):
            start = clock()
            function()
            best[i] = min(best[i], clock() - start)
    return tuple(best)


class Acceleration:
    """What :func:`accelerate` did, and the way back."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier = sparsifier
        self._layers = [_Layer(layer, self) for layer in sparsifier._layers]
        self._masks: tuple[int, object, dict[int, Tensor]] = (-1, None, {})

    @property
    def active(self) -> bool:
        """Whether it is in force."""
        return bool(self._layers)

    def choices(self) -> list[Choice]:
        """Return what was timed so far, in the order of the layers."""
        return [choice for choice in self._all() if choice.seconds_dense > 0.0]

    @property
    def seconds_saved(self) -> float:
        """What PyTorch's functions would have taken longer for all sparse products, less what the indices took."""
        return sum(choice.seconds_saved for choice in self._all()) - sum(layer.spent for layer in self._layers)

    def _all(self) -> Iterator[Choice]:
        for layer in self._layers:
            for choices in layer.choices.values():
                yield from choices.values()

    def restore(self) -> None:
        """Let PyTorch compute everything again."""
        for layer in self._layers:
            _LAYERS.pop(layer.layer.parameter, None)
        self._layers = []
        if self._sparsifier._acceleration is self:
            self._sparsifier._acceleration = None
        _uninstall()

    def mask_of(self, layer: Layer) -> Tensor | None:
        """The mask of hard masks, of which a live weight may be 0; None where a weight lives that is not 0."""
        sparsifier = self._sparsifier
        if not isinstance(sparsifier, Masked) or sparsifier.finalized or not sparsifier._buckets:
            return None
        step, buckets, masks = self._masks
        if step != sparsifier.steps or buckets is not sparsifier._buckets:
            rows = zip(sparsifier._layers, sparsifier.kept("mask"), strict=True)
            masks = {id(layer): mask for layer, mask in rows}
            self._masks = (sparsifier.steps, sparsifier._buckets, masks)
        return masks.get(id(layer))

    def dense_gradients(self) -> bool:
        """Whether the step reads gradients of masked weights."""
        return self._sparsifier.finalized or self._sparsifier.reads_masked_gradients()


def accelerate(sparsifier: Sparsifier) -> Acceleration:
    """Compute the products of a sparsifier's linear layers and convolutions on sparse kernels where these are faster.

    ::

        sparsifier.attach(optimizer)
        acceleration = sparse.accelerate(sparsifier)
        ...                                      # the training loop, as it is
        print(acceleration.seconds_saved)
        acceleration.restore()

    For float32 on the CPU, in ``nn.Linear`` and ``nn.Conv2d`` and what derives from them (groups=1, zeros as padding).
    Everything else is PyTorch's, and so is every call under autocast, ``torch.compile``, a mode of PyTorch,
    forward-mode differentiation or a transform of ``torch.func``, and what second derivatives need. The model stays as
    it is: copies, pickles and checkpoints of it know of nothing. While one is in force, ``nn.Linear.forward`` and
    ``nn.Conv2d._conv_forward`` look their weight up.

    Results are PyTorch's up to the rounding of sums in float32. Which function is faster is measured, so two runs may
    round differently. While a method reads no gradient of a masked weight, ``grad`` holds 0 there: a norm of gradients
    that is taken before the step, as clipping does, is over the live weights alone.

    Raises:
        TypeError: for what is no sparsifier.
        RuntimeError: without the native library.
    """
    if not isinstance(sparsifier, Sparsifier):
        raise TypeError(f"accelerate() takes a sparsifier, got {type(sparsifier).__name__}: accelerate(sparsifier)")
    if not sparse_layers.lanes():
        raise RuntimeError("accelerate() needs rarefy's native library, which is not here: `rarefy info` says why")
    if sparsifier._acceleration is not None:
        sparsifier._acceleration.restore()
    acceleration = sparsifier._acceleration = Acceleration(sparsifier)
    for layer in acceleration._layers:
        _LAYERS[layer.layer.parameter] = weakref.ref(layer)
    _install()
    return acceleration


# Which layers live where


class _Layer:
    """A layer that is accelerated: where its weights live, the indices made of that, and the choices."""

    def __init__(self, layer: Layer, owner: Acceleration) -> None:
        self.layer, self.owner = layer, weakref.ref(owner)
        self.places: Tensor | None = None
        self.values = torch.empty(0)  # of the weights there, in the call that goes on
        self.seen: object = None
        self.indices: dict[tuple[Shape, int], Index | None] = {}
        self.choices: dict[object, dict[str, Choice]] = {}
        self.spent = 0.0  # seconds, on indices
        self.upkeep = 0.0  # of that, a call now

    def refresh(self, weight: Tensor, channels_last: bool, choices: Mapping[str, Choice], graded: list[bool]) -> bool:
        """Know where the weights live; False where no product is to be sparse.

        ``graded`` says whether gradients of the input and of the weight are wanted.
        """
        owner = self.owner()
        if owner is None or not owner.active:
            return False
        known = _NOWHERE if self.places is None else self.places
        self.values, nonzero, inside = sparse_layers.take(weight, known)
        needed = [True, graded[0], graded[1] and not owner.dense_gradients()]
        wanted = [product for product, need in zip(PRODUCTS, needed, strict=True) if need]
        density = nonzero / weight.numel()
        if not any(choices[product].possible(density) for product in wanted):
            self._forget()
            return False
        self.upkeep *= 1.0 - 1.0 / MEMORY
        mask = owner.mask_of(self.layer)
        seen = (channels_last, None if mask is None else (mask.data_ptr(), mask._version))
        stale = self.places is None or inside < nonzero or seen != self.seen
        if mask is None and not stale:
            stale = nonzero < (1.0 - SLACK) * len(known)
        if stale:
            # Where masks change in every step the indices may cost more than the zeros save.
            timed = not any(choices[product].open(density) for product in wanted)
            if timed and self.upkeep > sum(choices[product].gain(density) for product in wanted):
                self._forget()
                return False
            began = time.perf_counter()
            self._forget()
            self.places, self.seen = sparse_layers.live_places(weight, mask), seen
            self.values, _, _ = sparse_layers.take(weight, self.places)
            self._spend(time.perf_counter() - began)
        return True

    def _spend(self, seconds: float) -> None:
        self.spent += seconds
        self.upkeep += seconds / MEMORY

    def _forget(self) -> None:
        self.places = None
        self.indices.clear()

    def index(self, shape: Shape, channels_last: bool) -> Index | None:
        """The index for a shape, None where there is none."""
        key = (shape, sparse_layers.lanes())
        if key not in self.indices:
            assert self.places is not None
            began = time.perf_counter()
            try:
                grid = sparse_layers.grid(shape)
                fits = grid.largest < 2**31
                self.indices[key] = Index(grid, self.places, channels_last) if fits else None
            except ValueError:  # more padding than the kernel reaches over
                self.indices[key] = None
            self._spend(time.perf_counter() - began)
        return self.indices[key]

    def choices_for(self, shape: tuple[int, ...], memory: torch.memory_format) -> dict[str, Choice]:
        """The choices for inputs of a shape, by the product."""
        key = (shape, memory, torch.get_num_threads(), kernels.isa())
        if key not in self.choices:
            self.choices[key] = {product: Choice(self.layer.name, product, shape) for product in PRODUCTS}
        return self.choices[key]


_NOWHERE = torch.empty(0, dtype=torch.int32)

#: The layers that are accelerated, by their weights. The sparsifier holds them.
_LAYERS: MutableMapping[nn.Parameter, weakref.ref[_Layer]] = WeakIdKeyDictionary()


def _find(weight: Any) -> _Layer | None:
    reference = _LAYERS.get(weight) if type(weight) is nn.Parameter else None
    return None if reference is None else reference()


# One call of a layer


@dataclass
class _Call:
    """A layer with inputs of one shape: its products, dense and sparse. x and y are as the module has them."""

    layer: _Layer
    index: Index
    #: The live weights, as they were in the forward pass.
    values: Tensor
    memory: torch.memory_format
    #: stride, padding and dilation of a convolution; None of a linear layer.
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None
    choices: dict[str, Choice]

    @property
    def density(self) -> float:
        return len(self.index) / self.layer.layer.parameter.numel()

    def chosen(self, product: str, dense: Callable[[], Any], sparse: Callable[[], Any]) -> Any:
        """The product by the faster of two functions, which are timed where that is not known."""
        choice, density = self.choices[product], self.density
        if choice.open(density):
            choice.measure(density, dense, sparse)
        return sparse() if choice.sparse(density) else dense()

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
        return torch.empty(shape, memory_format=self.memory)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute y = W x + b."""
        output: Tensor = self.chosen(
            "output", lambda: self.dense_forward(x, weight, bias), lambda: self.sparse_forward(x, bias)
        )
        return output

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
                choice = self.choices[product]
                if choice.open(self.density):
                    choice.measure(
                        self.density,
                        functools.partial(self.dense_backward, g, x, weight, alone),
                        functools.partial(self.sparse_backward, g, x, weight, alone),
                    )
                by_kernel[i] = choice.sparse(self.density)
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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight)
        return call.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        # A second derivative is wanted, g is of another kind, or the kernels are others than those of the index.
        if torch.is_grad_enabled() or not _is_plain(g) or sparse_layers.lanes() != call.index.grid.lanes:
            to_x, to_weight = call.dense_backward(g, x, weight, (of_x, of_weight))
        else:
            owner = call.layer.owner()
            dense = owner is None or not owner.active or owner.dense_gradients()
            to_x, to_weight = call.backward(g, x, weight, (of_x, of_weight), dense)
        to_bias = None
        if of_bias:
            to_bias = g.reshape(-1, g.shape[-1]).sum(0) if call.geometry is None else g.sum((0, 2, 3))
        return to_x, to_weight, to_bias, None


def _is_plain(tensor: Tensor) -> bool:
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


def _compute(
    layer: _Layer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None,
) -> Tensor | None:
    """The output of a layer, or None where PyTorch's function is to compute it."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if not all(_is_plain(tensor) for tensor in tensors) or not _undisturbed():
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
    call = _Call(layer, index, layer.values, memory, geometry, choices)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        output: Tensor = _Products.apply(x, weight, bias, call)  # type: ignore[no-untyped-call]
        return output
    return call.forward(x, weight, bias)


# The way in

_linear_forward, _conv_forward = nn.Linear.forward, nn.Conv2d._conv_forward


@functools.wraps(_linear_forward)
def _linear(self: nn.Linear, input: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and (layer := _find(self.weight)) is not None:
        output = _compute(layer, input, self.weight, self.bias, None)
        if output is not None:
            return output
    plain: Tensor = _linear_forward(self, input)
    return plain


@functools.wraps(_conv_forward)
def _conv(self: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if (
        not torch.compiler.is_compiling()
        and (layer := _find(weight)) is not None
        and self.groups == 1
        and self.padding_mode == "zeros"
        and not isinstance(self.padding, str)
    ):
        geometry: Any = (self.stride, self.padding, self.dilation)
        output = _compute(layer, input, weight, bias, geometry)
        if output is not None:
            return output
    plain: Tensor = _conv_forward(self, input, weight, bias)
    return plain


def _install() -> None:
    nn.Linear.forward = _linear  # type: ignore[method-assign]
    nn.Conv2d._conv_forward = _conv  # type: ignore[method-assign]


def _uninstall() -> None:
    """Take it back when nothing is accelerated any more, unless somebody has put his own over it."""
    if any(reference() is not None for reference in _LAYERS.values()):
        return
    if nn.Linear.forward is _linear:
        nn.Linear.forward = _linear_forward  # type: ignore[method-assign]
    if nn.Conv2d._conv_forward is _conv:
        nn.Conv2d._conv_forward = _conv_forward  # type: ignore[method-assign]
