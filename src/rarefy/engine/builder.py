"""What makes native programs: it takes their steps one after the other, as the native engine has them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from rarefy import kernels
from rarefy.engine import binding
from rarefy.engine.binding import NativeError, native_mode
from rarefy.engine.plan import ACTIVATIONS, OF_ONE, OF_TWO, Activation, parts
from rarefy.engine.programs import Int8Program, Program

#: Functions of whole values, in the order of ``rarefy_function``.
Function = Literal[
    "layer norm",
    "rms norm",
    "group norm",
    "matmul",
    "softmax",
    "attention",
    "pointwise",
    "view",
    "resize",
    "reduce",
    "embedding",
]
FUNCTIONS: tuple[Function, ...] = get_args(Function)
#: Operations of expressions, in the order of ``rarefy_operation``.
OPERATIONS: tuple[str, ...] = (*OF_TWO, *OF_ONE, *ACTIVATIONS)
#: What a convolution may be computed by.
CHOICES = {"measure": 0, "sparse": 1, "dense": 2}
#: How weights are stored.
STORAGES = {"float32": 0, "bfloat16": 1}
#: How an int8 layer takes its weights: any four that are not zero, those of four channels together, all of them, or, in
#: layers of vectors, those that are not zero of some rows in windows of columns or behind a bitmask.
Layout = Literal["quads", "blocks", "dense", "windows", "bitmask"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class Depth(NamedTuple):
    """A third axis of windows, before rows and columns: the rows of x are those of so many ``planes``."""

    planes: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    padding: tuple[int, int] = (0, 0)


class Windows:
    """Windows along one, two or three axes of these sizes, as :class:`Builder` takes them."""

    def __init__(
        self,
        sizes: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[tuple[int, int]],
    ) -> None:
        self.kernel, self.stride, self.dilation = (_two(each, 1) for each in (kernel, stride, dilation))
        top_bottom, left_right = _two(padding, (0, 0))
        self.padding = (*top_bottom, *left_right)
        deep = len(sizes) == 3
        self.depth = Depth(sizes[0], kernel[0], stride[0], dilation[0], padding[0]) if deep else None


def _two(sizes: Sequence[Any], first: Any) -> tuple[Any, Any]:
    """A pair, of rows and columns, from sizes along one axis or more."""
    return (first, sizes[0]) if len(sizes) == 1 else (sizes[-2], sizes[-1])


@dataclass(frozen=True, kw_only=True)
class Result:
    """How the results of a step of an int8 program become bytes; see ``rarefy_int8_result``.

    ``layout`` None chooses by rule.
    """

    zero_point: int = 0
    floats: bool = False
    multiplier: float = 0.0
    other: float = 0.0
    bias: float = 0.0
    ratio: float = 0.0
    low: float = 0.0
    high: float = 255.0
    multipliers: Tensor | None = None
    biases: Tensor | None = None
    table: Tensor | None = None
    layout: Layout | None = None


def bits(number: float) -> int:
    """A double as the numbers of a function have it."""
    return int(np.float64(number).view(np.int64))


def _function(activation: Activation) -> int:
    """The number of an activation's function in ``rarefy_activation``."""
    return ACTIVATIONS.index(parts(activation)[0])


def _depth(depth: Depth | None) -> binding.Depth:
    return binding.Depth() if depth is None else binding.Depth(*depth[:-1], binding.Int32x2(*depth.padding))


def _float32(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().to(torch.float32).contiguous()


def _address(values: Tensor | None) -> int | None:
    return None if values is None else kernels.address(values)


class Builder:
    """Takes the steps of a program one after the other; values are numbers. Every method raises NativeError."""

    def __init__(self) -> None:
        self._address: int = binding.call("builder_new")
        self._finalizer = weakref.finalize(self, binding.call, "builder_free", self._address)

    def __reduce__(self) -> tuple[Any, ...]:
        """Raise TypeError: a copy would hold the same address."""
        raise TypeError("a Builder cannot be copied or pickled: copy the Program that finish() makes")

    def input(self, shape: tuple[int, int, int], layout: int, name: str) -> int:
        """An input of so many channels, rows and columns."""
        return self._add("input", *shape, layout, name=name)

    def conv(
        self,
        x: int,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        depth: Depth | None = None,
        groups: int = 1,
        residual: int = -1,
        activation: Activation = "none",
        storage: str,
        choice: str,
        name: str,
    ) -> int:
        """A convolution: weight (out, in / groups, [depth,] height, width); padding is top, bottom, left, right."""
        weights, biases = _float32(weight), _float32(bias)
        assert weights is not None
        about = binding.Conv(
            x=x,
            residual=residual,
            out_channels=weights.shape[0],
            kernel=binding.Int32x2(*weights.shape[-2:]),
            stride=binding.Int32x2(*stride),
            dilation=binding.Int32x2(*dilation),
            padding=binding.Int32x4(*padding),
            groups=groups,
            activation=_function(activation),
            storage=STORAGES[storage],
            choice=CHOICES[choice],
            weight=_address(weights),
            weights=weights.numel(),
            bias=_address(biases),
            biases=0 if biases is None else biases.numel(),
            depth=_depth(depth),
        )
        return self._moded(self._add("conv", ctypes.byref(about), name=name), activation)

    def pool(
        self,
        x: int,
        *,
        average: bool,
        count_padding: bool,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        dilation: tuple[int, int],
        padding: tuple[int, int, int, int],
        depth: Depth | None = None,
        name: str,
    ) -> int:
        """The maximum or average over windows; padding is top, bottom, left, right."""
        about = binding.Pool(
            x=x,
            average=average,
            count_padding=count_padding,
            kernel=binding.Int32x2(*kernel),
            stride=binding.Int32x2(*stride),
            dilation=binding.Int32x2(*dilation),
            padding=binding.Int32x4(*padding),
            depth=_depth(depth),
        )
        return self._add("pool", ctypes.byref(about), name=name)

    def global_average(self, x: int, *, name: str) -> int:
        """The mean over rows and columns."""
        return self._add("global_average", x, name=name)

    def binary(self, x: int, y: int, *, multiply: bool, activation: Activation, name: str) -> int:
        """The sum or the product of two values."""
        return self._moded(self._add("binary", x, y, multiply, _function(activation), name=name), activation)

    def affine(self, x: int, scale: Tensor | None, shift: Tensor | None, activation: Activation, *, name: str) -> int:
        """A factor and a summand for every channel."""
        scales, shifts = _float32(scale), _float32(shift)
        counts = {each.numel() for each in (scales, shifts) if each is not None}
        if len(counts) > 1:
            raise NativeError(f"scale and shift must have one number a channel, got {sorted(counts)}")
        given = (_address(scales), _address(shifts), max(counts, default=0))
        return self._moded(self._add("affine", x, *given, _function(activation), name=name), activation)

    def concat(self, xs: Sequence[int], *, name: str) -> int:
        """The channels of all."""
        return self._add("concat", (binding.INT32 * len(xs))(*xs), len(xs), name=name)

    def upsample(self, x: int, factor: tuple[int, int], *, name: str) -> int:
        """Every pixel so many times down and across."""
        return self._add("upsample", x, *factor, name=name)

    def flatten(self, x: int, *, name: str) -> int:
        """All numbers as a vector."""
        return self._add("flatten", x, name=name)

    def lstm_cell(self, gates: int, c: int, *, mode: str = "exact", table: str = "", name: str) -> int:
        """An LSTM's new cell, of the gates before their activations and the cell before."""
        return self._moded(self._add("lstm_cell", gates, c, name=name), f"tanh {mode} {table}")

    def lstm_hidden(self, gates: int, c: int, *, mode: str = "exact", table: str = "", name: str) -> int:
        """An LSTM's result, of the same gates and the new cell."""
        return self._moded(self._add("lstm_hidden", gates, c, name=name), f"tanh {mode} {table}")

    def gru(self, x: int, h: int, state: int, *, mode: str = "exact", table: str = "", name: str) -> int:
        """A GRU's result, of the products of input and state with their weights, and the state before."""
        return self._moded(self._add("gru", x, h, state, name=name), f"tanh {mode} {table}")

    def recurrence(
        self,
        x: int,
        states: Sequence[int],
        weight: Tensor,
        bias: Tensor | None,
        *,
        reverse: bool,
        cells: bool,
        mode: str = "exact",
        table: str = "",
        storage: str,
        choice: str,
        name: str,
    ) -> int:
        """A layer over a sequence, of an LSTM (weight: 4 n x n) or a GRU (3 n x n); without states it begins at 0."""
        weights, biases = _float32(weight), _float32(bias)
        assert weights is not None
        about = binding.Recurrence(
            x=x,
            h=states[0] if states else -1,
            c=states[1] if len(states) > 1 else -1,
            hidden=weights.shape[1],
            reverse=reverse,
            cells=cells,
            storage=STORAGES[storage],
            choice=CHOICES[choice],
            weight=_address(weights),
            weights=weights.numel(),
            bias=_address(biases),
            biases=0 if biases is None else biases.numel(),
        )
        return self._moded(self._add("recurrence", ctypes.byref(about), name=name), f"tanh {mode} {table}")

    def tensor(
        self,
        function: Function,
        xs: Sequence[int],
        numbers: Sequence[int] = (),
        constants: Sequence[Tensor] = (),
        *,
        name: str,
    ) -> int:
        """A function of whole values; ``rarefy_function`` says what its numbers and constants are."""
        given = [_float32(each.reshape(-1)) for each in constants]
        flat = torch.cat([each for each in given if each is not None]) if given else None
        about = binding.Tensor(
            function=FUNCTIONS.index(function),
            xs=(binding.INT32 * len(xs))(*xs),
            x_count=len(xs),
            numbers=(binding.INT64 * len(numbers))(*numbers),
            number_count=len(numbers),
            constants=_address(flat),
            constant_count=0 if flat is None else flat.numel(),
        )
        return self._add("tensor", ctypes.byref(about), name=name)

    def output(self, x: int, layout: int) -> None:
        """Make a value a result."""
        binding.call("builder_output", self._address, x, layout)

    def shape(self, x: int) -> tuple[int, int, int]:
        """Channels, rows and columns of a value."""
        shape = binding.Int32x3()
        binding.call("builder_shape", self._address, x, ctypes.byref(shape))
        return (shape[0], shape[1], shape[2])

    def finish(self, *, batch: int, threads: int, tune_seconds: float, measured: Program | None = None) -> Program:
        """The program, its kernels chosen for this batch size and number of threads.

        Layers like those of ``measured``, which was made for the same, take its kernels.
        """
        like = None if measured is None else measured.address
        options = binding.Options(binding.isa(), batch, threads, tune_seconds, like)
        return Program(binding.call("builder_finish", self._address, ctypes.byref(options)))

    def finish_int8(self, results: Sequence[Result], *, batch: int, threads: int) -> Int8Program:
        """The program on bytes of these steps, whose weights are whole numbers; a result for every step, in order."""
        own = [[_float32(each) for each in (r.multipliers, r.biases)] for r in results]
        given = (binding.Result * len(results))(
            *(
                binding.Result(
                    *(r.zero_point, r.floats, r.multiplier, r.other, r.bias, r.ratio, r.low, r.high),
                    *(_address(multipliers), _address(biases), 0 if multipliers is None else multipliers.numel()),
                    _address(r.table),
                    0 if r.layout is None else 1 + LAYOUTS.index(r.layout),
                )
                for r, (multipliers, biases) in zip(results, own, strict=True)
            )
        )
        options = binding.Options(binding.isa(whole=True), batch, threads, 0.0, None)
        return Int8Program(binding.call("int8_finish", self._address, given, len(results), ctypes.byref(options)))

    def _moded(self, value: int, activation: Activation) -> int:
        """The value, whose step has now the mode of the activation."""
        function, mode, table = parts(activation)
        if mode:
            binding.call("builder_mode", self._address, value, *native_mode(function, mode, table))
        return value

    def _add(self, function: str, *arguments: Any, name: str) -> int:
        result: int = binding.call(f"builder_{function}", self._address, *arguments, name.encode())
        return result
