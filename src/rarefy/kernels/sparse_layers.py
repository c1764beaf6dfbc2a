"""Linear layers and convolutions with sparse weights, forward and backward, on native kernels (rarefy_training.h).

A :class:`Grid` says how a layer's tensors lie in planes, an :class:`Index` which weights live; :func:`take` gives their
values, in one pass over the dense weight that counts what else is not 0. float32 on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.kernels._library import find
from rarefy.kernels._memory import address

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64

#: RAREFY_TILE in rarefy_training.h.
MOST_VECTORS = 12
#: Vectors of a tile: more load fewer weights and indices, fewer leave more of a tile in the first cache.
TILE = 8
#: Bytes of the planes that a block of a tile reads: they stay in the first cache, beside what else goes through it.
CACHE = 32 << 10


@dataclass(frozen=True)
class Shape:
    """A layer and what comes in, but for the size of the batch.

    Attributes:
        outputs, inputs: channels.
        height, width: of the input.
        kernel, stride, padding, dilation: (down, across).
        flat: positions are rows of one long line of any length, which is cut anywhere: a linear layer, or a convolution
            of 1x1. Then height and width are 1, whatever comes in.
    """

    outputs: int
    inputs: int
    height: int = 1
    width: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    flat: bool = False

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the output."""
        down, across = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return down, across


class _Axis:
    """Taps along one axis: tap k reads place ``stride * (i + shift[k]) + phase[k]`` for position i."""

    def __init__(self, size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
        steps = [k * dilation - padding for k in range(kernel)]
        self.phase, self.shift = [t % stride for t in steps], [t // stride for t in steps]
        self.low, self.high = min(self.shift), max(self.shift)
        self.span = self.high - self.low
        #: positions of the input's gradient in a phase
        self.inner = -(-size // stride)
        # Neighbouring rows share the column of zeros between them, where there is one on both sides.
        shared = self.low < 0 and stride * (out + self.span - 1 + self.low) >= size
        shared_inner = self.high > 0 and self.inner - 1 - self.low >= out
        self.columns = max(out + self.span - shared, self.inner + self.span - shared_inner)


class Grid:
    """How the tensors of a layer lie in planes; see rarefy_training.h for the words.

    Raises ValueError for a layer with more padding than its kernel reaches over, or without output.
    """

    def __init__(self, shape: Shape, lanes: int) -> None:
        self.shape, self.lanes = shape, lanes
        out_height, out_width = shape.out
        down, across = (
            _Axis(*args)
            for args in zip(
                (shape.height, shape.width), shape.out, shape.kernel, shape.stride, shape.padding, shape.dilation,
                strict=True,
            )
        )  # fmt: skip
        if min(out_height, out_width) < 1 or min(down.high, across.high) < 0:
            raise ValueError(f"no grid for {shape}: no output, or more padding than the kernel reaches over")
        self.down, self.across = down, across
        self.chunk = TILE * lanes if shape.flat else 0
        columns = self.columns = self.chunk or across.columns
        taps = [(y, x) for y in range(shape.kernel[0]) for x in range(shape.kernel[1])]
        phases = sorted({(down.phase[y], across.phase[x]) for y, x in taps})
        self.phases = torch.tensor(phases, dtype=torch.int64, device="cpu").reshape(-1, 2)
        self.all_phases = len(phases) == shape.stride[0] * shape.stride[1]
        reach = down.span * columns + across.span
        self.y_begin = down.high * columns + across.high
        self.rows = out_height + down.span
        self.inner_rows = down.inner + down.span
        wide = self.chunk or out_width
        self.tiles, self.tile_width = _tiles((out_height - 1) * columns + wide, lanes)
        inner_size = (down.inner - 1) * columns + (self.chunk or across.inner)
        inner_tiles, self.inner_tile_width = _tiles(inner_size, lanes)
        self.phase_size = _round_up(max(self.rows * columns + lanes, self.tiles * self.tile_width + reach), 16)
        self.plane = _odd_lines(len(phases) * self.phase_size)
        self.y_plane = _odd_lines(
            max(
                self.inner_rows * columns + lanes,
                inner_tiles * self.inner_tile_width + reach,
                self.y_begin + self.tiles * self.tile_width,
            )
        )
        # Columns of the matrix, in the order (tap, channel): where its plane begins, and how far along the tap reads.
        place = {phase: i for i, phase in enumerate(phases)}
        self.tap_phase = [place[down.phase[y], across.phase[x]] for y, x in taps]
        self.tap_offset = [
            phase * self.phase_size + (down.shift[y] - down.low) * columns + (across.shift[x] - across.low)
            for phase, (y, x) in zip(self.tap_phase, taps, strict=True)
        ]
        self.tap_inner = [(down.high - down.shift[y]) * columns + (across.high - across.shift[x]) for y, x in taps]
        a_plane = 4 * len(phases) * (self.tile_width + reach)
        self.block = _even(shape.inputs, max(8, CACHE // a_plane))
        self.inner_block = _even(shape.outputs, max(8, CACHE // (4 * (self.inner_tile_width + reach))))
        self.largest = max(shape.inputs * self.plane, shape.outputs * self.y_plane)
        self._columns: dict[bool, tuple[Tensor, ...]] = {}

    def columns_of(self, channels_last: bool) -> tuple[Tensor, ...]:
        """Return (forward block, forward offset, backward row, backward offset) of every column of the weight."""
        if channels_last not in self._columns:
            channel = torch.arange(self.shape.inputs, device="cpu").unsqueeze(1)
            parts = (
                (channel // self.block).expand(-1, len(self.tap_offset)),
                channel * self.plane + torch.tensor(self.tap_offset, device="cpu"),
                torch.tensor(self.tap_phase, device="cpu") * self.shape.inputs + channel,
                torch.tensor(self.tap_inner, device="cpu").expand(self.shape.inputs, -1),
            )
            self._columns[channels_last] = tuple(
                (part.t() if channels_last else part).to(torch.int32).contiguous().flatten() for part in parts
            )
        return self._columns[channels_last]


def _tiles(size: int, lanes: int) -> tuple[int, int]:
    vectors = -(-size // lanes)
    count = -(-vectors // TILE)
    return count, -(-vectors // count) * lanes


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def _odd_lines(n: int) -> int:
    """An odd number of cache lines, so that the planes' beginnings spread over the whole cache."""
    lines = -(-n // 16)
    return 16 * (lines + 1 - lines % 2)


def _even(n: int, most: int) -> int:
    """The size of parts that are about as large, none larger than ``most``."""
    parts = -(-n // most)
    return -(-n // parts)


class _Planes(ctypes.Structure):
    _fields_ = [
        *((name, _INT64) for name in ("channels", "height", "width", "step_n", "step_y", "step_x", "step_c")),
        *((name, _INT64) for name in ("stride_y", "stride_x", "low_y", "low_x", "rows", "columns", "plane")),
        *((name, _INT64) for name in ("phase_size", "phases")),
        ("phase", _POINTER),
    ]


class _Entries(ctypes.Structure):
    _fields_ = [
        ("count", _INT64),
        ("blocks", _INT64),
        *((name, _POINTER) for name in ("rows", "begin", "offset", "which")),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _INT64) for name in ("batch", "chunk", "tile", "slices")),
        *((name, _Planes) for name in ("x", "y", "out", "inner")),
        ("y_begin", _INT64),
        ("forward", _Entries),
        ("backward", _Entries),
        *((name, _POINTER) for name in ("values", "place")),
        ("weights", _INT64),
        *((name, _POINTER) for name in ("bias", "input", "output_gradient", "output", "input_gradient")),
        *((name, _POINTER) for name in ("weight_gradient", "forward_weights", "backward_weights", "gradients")),
        *((name, _POINTER) for name in ("products", "scratch")),
        ("scratch_size", _INT64),
    ]


class _IndexCall(ctypes.Structure):
    _fields_ = [
        *((name, _INT64) for name in ("rows", "columns", "entries", "forward_blocks", "backward_rows")),
        *((name, _INT64) for name in ("backward_blocks", "rows_a_block", "plane", "most")),
        *((name, _POINTER) for name in ("place", "column_block", "column_offset", "column_row", "column_tap")),
        *((name, _POINTER) for name in ("forward_rows", "backward_entry_rows", "forward_begin", "backward_begin")),
        *((name, _POINTER) for name in ("forward_offset", "forward_which", "backward_offset", "backward_which")),
        ("scratch", _POINTER),
    ]


def lanes() -> int:
    """Return how many floats a vector of the kernels has that run now; 0 without kernels."""
    kernel = find("sparse_lanes", _INT64)
    return 0 if kernel is None else kernel()


def grid(shape: Shape) -> Grid:
    """Return the grid of a shape for the vectors of the kernels that run; raises ValueError as :class:`Grid`."""
    return _grid(shape, lanes())


@functools.lru_cache(maxsize=1024)
def _grid(shape: Shape, lanes: int) -> Grid:
    return Grid(shape, lanes)


def live_places(weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """Where a weight is not 0, or a boolean mask is set; in the order of the weight's memory, as int32, (live,)."""
    if mask is not None and mask.stride() != weight.stride():
        mask = torch.empty_like(weight, dtype=torch.bool).copy_(mask)
    kernel = find("sparse_live_f32", _INT64, _POINTER, _POINTER, _INT64, _POINTER)
    given = address(weight), None if mask is None else address(mask), weight.numel()
    count = kernel(*given, None)
    places = torch.empty(count + 1, dtype=torch.int32, device="cpu")
    kernel(*given, address(places))
    return places[:count]


def take(weight: Tensor, places: Tensor) -> tuple[Tensor, int, int]:
    """Return the elements of a weight at the places, how many of all are not 0, and how many of these."""
    values, counts = torch.empty(len(places), dtype=torch.float32, device="cpu"), (_INT64 * 2)()
    kernel = find("sparse_take_f32", None, _POINTER, _INT64, _POINTER, _INT64, _POINTER, _POINTER)
    kernel(address(weight), weight.numel(), address(places), len(places), address(values), counts)
    return values, counts[0], counts[1]


class Index:
    """Which weights of a layer live, in the order in which the kernels come by them; for those of the grid's vectors.

    Args:
        grid: of the layer.
        places: of the live weights in the memory of the weight, ascending, int32.
        channels_last: whether the weight is (out, height, width, in) in memory.
    """

    def __init__(self, grid: Grid, places: Tensor, channels_last: bool) -> None:
        self.grid, self.places = grid, places
        shape = grid.shape
        taps = shape.kernel[0] * shape.kernel[1]
        rows, columns, entries = shape.outputs, shape.inputs * taps, len(places)
        blocks, inner_blocks = -(-shape.inputs // grid.block), -(-rows // grid.inner_block)
        inner_rows = len(grid.phases) * shape.inputs
        whole = functools.partial(torch.empty, dtype=torch.int32, device="cpu")
        self._rows, self._inner_rows = whole(blocks, rows, 2), whole(inner_blocks, inner_rows, 2)
        self._begin = torch.zeros(blocks + 1, dtype=torch.int64, device="cpu")
        self._inner_begin = torch.zeros(inner_blocks + 1, dtype=torch.int64, device="cpu")
        self._offset, self._which = whole(entries), whole(entries)
        self._inner_offset, self._inner_which = whole(entries), whole(entries)
        most = grid.inner_block * taps
        scratch = whole(2 * max(blocks * rows, inner_blocks * inner_rows) + max(columns, most) + rows + 3)
        made = grid.columns_of(channels_last)
        find("sparse_index", None, _POINTER)(
            ctypes.byref(
                _IndexCall(
                    *(rows, columns, entries, blocks, inner_rows, inner_blocks, grid.inner_block, grid.y_plane, most),
                    *(tensor.data_ptr() for tensor in (places, *made)),
                    *(tensor.data_ptr() for tensor in (self._rows, self._inner_rows, self._begin, self._inner_begin)),
                    *(tensor.data_ptr() for tensor in (self._offset, self._which)),
                    *(tensor.data_ptr() for tensor in (self._inner_offset, self._inner_which, scratch)),
                )
            )
        )
        self._forward = _Entries(
            rows, blocks, *(t.data_ptr() for t in (self._rows, self._begin, self._offset, self._which))
        )
        self._backward = _Entries(
            inner_rows,
            inner_blocks,
            *(t.data_ptr() for t in (self._inner_rows, self._inner_begin, self._inner_offset, self._inner_which)),
        )

    def __len__(self) -> int:
        return len(self.places)

    def _step(self, x: Tensor, y: Tensor, values: Tensor) -> _Step:
        """What both directions need."""
        if len(values) != len(self):
            raise ValueError(f"{len(self)} weights live, got values of {len(values)}")
        grid, shape = self.grid, self.grid.shape
        columns = grid.columns
        phases = grid.phases.data_ptr()
        one = _ONE_PHASE.data_ptr()
        steps_x, steps_y = ((t.stride(0), t.stride(2), t.stride(3), t.stride(1)) for t in (x, y))
        sizes_x, sizes_y, height = x.shape[1:], y.shape[1:], y.shape[2]
        stride, low = shape.stride, (grid.down.low, grid.across.low)
        units = len(x) * (-(-x.shape[3] // grid.chunk) if grid.chunk else 1)
        slices = max(1, min(torch.get_num_threads(), units))
        step = _Step(len(x), grid.chunk, TILE, slices)
        step.x = _Planes(
            *sizes_x, *steps_x, *stride, *low, grid.rows, columns, grid.plane, grid.phase_size, len(grid.phases), phases
        )
        step.out = _Planes(*sizes_y, *steps_y, 1, 1, 0, 0, height, columns, 0, 0, 1, one)
        step.y = _Planes(
            *(*sizes_y, *steps_y, 1, 1, -grid.down.high, -grid.across.high),
            *(grid.inner_rows, columns, grid.y_plane, 0, 1, one),
        )
        step.inner = _Planes(*sizes_x, *steps_x, *stride, 0, 0, x.shape[2], columns, 0, 0, len(grid.phases), phases)
        step.y_begin = grid.y_begin
        step.forward, step.backward = self._forward, self._backward
        step.values, step.place = address(values), self.places.data_ptr()
        return step

    def _scratch(self, step: _Step, planes: int, rows: int) -> Tensor:
        step.scratch_size = planes + rows * (MOST_VECTORS * self.grid.lanes + 16) + 16
        scratch = torch.empty(step.slices * step.scratch_size + 16, dtype=torch.float32, device="cpu")
        step.scratch = -(-scratch.data_ptr() // 64) * 64
        return scratch

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """Compute y = W x + bias; x (N, in, height, width) and y (N, out, height, width) of any strides.

        ``values`` are those of the live weights, as :func:`take` gives them.
        """
        step = self._step(x, y, values)
        shape = self.grid.shape
        ordered = torch.empty(len(self), dtype=torch.float32, device="cpu")
        step.input, step.output = address(x), address(y)
        step.bias = None if bias is None else address(bias)
        step.forward_weights = ordered.data_ptr()
        scratch = self._scratch(step, shape.inputs * self.grid.plane, shape.outputs)
        find("sparse_forward_f32", None, _POINTER)(ctypes.byref(step))
        del scratch

    def backward(
        self, x: Tensor, values: Tensor, y_gradient: Tensor, x_gradient: Tensor | None, weight_gradient: Tensor | None
    ) -> None:
        """Compute dx = W^T dy and dW = dy x^T, 0 where no weight lives; either may be None."""
        step = self._step(x, y_gradient, values)
        shape = self.grid.shape
        ordered, gradients = torch.empty(2, len(self), dtype=torch.float32, device="cpu").unbind()
        step.input, step.output_gradient = address(x), address(y_gradient)
        step.backward_weights, step.gradients = ordered.data_ptr(), gradients.data_ptr()
        step.input_gradient = None if x_gradient is None else address(x_gradient)
        if weight_gradient is not None:
            products = torch.empty(step.slices * len(self) + 4, dtype=torch.float32, device="cpu")
            step.weight_gradient, step.weights = address(weight_gradient), weight_gradient.numel()
            step.products = products.data_ptr()
        planes = shape.inputs * self.grid.plane + shape.outputs * self.grid.y_plane
        scratch = self._scratch(step, planes, len(self.grid.phases) * shape.inputs)
        find("sparse_backward_f32", None, _POINTER)(ctypes.byref(step))
        del scratch


_ONE_PHASE = torch.zeros(2, dtype=torch.int64, device="cpu")
