"""The thresholds of all layers on a GPU: one launch each, and one that adds the sums of its programs in a fixed order.

A program computes one chunk of a row. A table on the device says which; it depends on the layers' sizes alone. Where
the tensors lie is in tables of addresses, made anew when a tensor has moved. Needs the package ``triton``, and a GPU or
``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

if TYPE_CHECKING:
    from rarefy.kernels.thresholds import ThresholdedLayers

CHUNK = 4096  # values a program computes
LANES = 1024  # chunks a step of the sum adds
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
# A multiply and an add that are joined have other bits.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _span(chunks, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """The layer and the row of this program's chunk, which values it has, and where its row ends."""
    entry = chunks + tl.program_id(0).to(tl.int64) * 4
    at = tl.load(entry + 2) + tl.arange(0, size)
    return tl.load(entry), tl.load(entry + 1), at, tl.load(entry + 3)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _before_kernel(  # type: ignore[no-untyped-def]
    weights, grads, latents, chunks, thresholds, alpha, lower, partial,
    bounded: tl.constexpr, dtype: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    layer, row, at, end = _span(chunks, size)
    inside = at < end
    weight = tl.load(weights + layer).to(tl.pointer_type(dtype)) + at
    latent = tl.load(latents + layer).to(tl.pointer_type(dtype)) + at
    place = tl.load(grads + layer)
    given = at < tl.where(place != 0, end, 0)
    grad = place.to(tl.pointer_type(dtype)) + at
    held = tl.load(latent, inside, 0.0)
    tl.store(weight, held, inside)
    x, g = held.to(tl.float32), tl.load(grad, given, 0.0).to(tl.float32)
    # dL/dW = dL/dW^ * (1 if |W| > T, alpha if not; 0 below the bound of the sparse backward)
    masked = g * tl.load(alpha + layer)
    if bounded:
        masked = tl.where(tl.abs(x) < tl.load(lower + row), 0.0, masked)
    kept = tl.where(tl.abs(x) <= tl.load(thresholds + row), masked, g).to(dtype)
    tl.store(grad, kept, given)
    # dL/dT = -sum dL/dW * sign(W), with sign(0) = 0
    kept = kept.to(tl.float32)
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(x > 0, -kept, tl.where(x < 0, kept, 0.0)), 0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _after_kernel(  # type: ignore[no-untyped-def]
    weights, latents, chunks, thresholds, shrink, dtype: tl.constexpr, size: tl.constexpr
):  # fmt: skip
    layer, row, at, end = _span(chunks, size)
    inside = at < end
    weight = tl.load(weights + layer).to(tl.pointer_type(dtype)) + at
    latent = tl.load(latents + layer).to(tl.pointer_type(dtype)) + at
    held = tl.load(weight, inside, 0.0)
    tl.store(latent, held, inside)
    x, t = held.to(tl.float32), tl.load(thresholds + row)
    # W^ = 0 if |W| <= T, else W - sign(W) s T; written so that NaN passes through
    by = tl.load(shrink + layer) * t
    used = tl.where(tl.abs(x) <= t, 0.0, tl.where(x < 0, x + by, x - by))
    tl.store(weight, used.to(dtype), inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _count_kernel(latents, chunks, thresholds, partial, dtype: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    layer, row, at, end = _span(chunks, size)
    inside = at < end
    x = tl.load(tl.load(latents + layer).to(tl.pointer_type(dtype)) + at, inside, 0.0).to(tl.float32)
    live = inside & (tl.abs(x) > tl.load(thresholds + row))
    tl.store(partial + tl.program_id(0), tl.sum(live.to(tl.int32), 0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mask_kernel(tensors, masks, chunks, integer: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    layer, _, at, end = _span(chunks, size)
    inside = at < end
    keep = tl.load(tl.load(masks + layer).to(tl.pointer_type(tl.int8)) + at, inside, 1)
    tl.store(tl.load(tensors + layer).to(tl.pointer_type(integer)) + at, 0, inside & (keep == 0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sum_kernel(partial, first, sums, wide: tl.constexpr, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the values from one first to the next, always in the same order."""
    begin, end = tl.load(first + tl.program_id(0)), tl.load(first + tl.program_id(0) + 1)
    total = tl.zeros((size,), wide)
    for some in range(begin, end, size):
        at = some + tl.arange(0, size)
        total += tl.load(partial + at, at < end, 0).to(wide)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0).to(sums.dtype.element_ty))


def before(
    layers: ThresholdedLayers, grads: Sequence[Tensor | None], thresholds: Tensor, alpha: Tensor, lower: Tensor | None
) -> Tensor:
    """See :meth:`rarefy.kernels.thresholds.ThresholdedLayers.before`."""
    device = thresholds.device
    chunks, first_of_row, _ = _table(layers.sizes, device)
    partial, grad_thresholds = thresholds.new_empty(len(chunks)), torch.empty_like(thresholds)
    with _device_of(thresholds):
        if len(chunks):
            places = (_places(layers.addresses(part), device) for part in (layers.weights, grads, layers.latents))
            _before_kernel[(len(chunks),)](
                *places, chunks, thresholds, alpha, thresholds if lower is None else lower, partial,
                lower is not None, TYPES[layers.weights[0].dtype], CHUNK, **OPTIONS,
            )  # fmt: skip
        if len(thresholds):
            _sum_kernel[(len(thresholds),)](partial, first_of_row, grad_thresholds, tl.float64, LANES)
    return grad_thresholds


def after(layers: ThresholdedLayers, thresholds: Tensor, shrink: Tensor) -> None:
    """See :meth:`rarefy.kernels.thresholds.ThresholdedLayers.after`."""
    chunks, _, _ = _table(layers.sizes, thresholds.device)
    with _device_of(thresholds):
        if len(chunks):
            places = (_places(layers.addresses(part), thresholds.device) for part in (layers.weights, layers.latents))
            dtype = TYPES[layers.weights[0].dtype]
            _after_kernel[(len(chunks),)](*places, chunks, thresholds, shrink, dtype, CHUNK, **OPTIONS)


def count(layers: ThresholdedLayers, thresholds: Tensor) -> Tensor:
    """See :meth:`rarefy.kernels.thresholds.ThresholdedLayers.count`."""
    device = thresholds.device
    chunks, _, first_of_layer = _table(layers.sizes, device)
    partial = torch.empty(len(chunks), dtype=torch.int32, device=device)
    live = torch.empty(len(layers.sizes), dtype=torch.int64, device=device)
    with _device_of(thresholds):
        if len(chunks):
            dtype = TYPES[layers.weights[0].dtype]
            places = _places(layers.addresses(layers.latents), device)
            _count_kernel[(len(chunks),)](places, chunks, thresholds, partial, dtype, CHUNK, **OPTIONS)
        _sum_kernel[(len(live),)](partial, first_of_layer, live, tl.int64, LANES)
    return live


def mask(tensors: Sequence[Tensor], places: tuple[int, ...], masks: tuple[int, ...]) -> None:
    """See :func:`rarefy.kernels.thresholds.mask_`; ``places`` and ``masks`` are where they lie."""
    device = tensors[0].device
    chunks, _, _ = _table(tuple((1, tensor.numel()) for tensor in tensors), device)
    with _device_of(tensors[0]):
        if len(chunks):
            tables = (_places(some, device) for some in (places, masks))
            _mask_kernel[(len(chunks),)](*tables, chunks, INTEGERS[tensors[0].element_size()], CHUNK, **OPTIONS)


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device: make it that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def probe(device: torch.device) -> None:
    """Compile and launch the smallest kernel; raises what Triton raises where it cannot."""
    empty = torch.zeros(2, dtype=torch.int64, device=device)
    with _device_of(empty):
        _sum_kernel[(1,)](empty, empty, torch.empty_like(empty), tl.int64, LANES)


@functools.lru_cache(maxsize=64)
def _table(sizes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of layers of these rows and columns, int64 on the device, all there when this returns.

    The layer, the row, the first value and the end of every chunk, (chunks, 4); and of every row, and of every layer,
    its first chunk and at last how many there are.
    """
    rows, cols = torch.tensor(sizes, dtype=torch.int64, device="cpu").reshape(-1, 2).unbind(1)
    layer = torch.arange(len(rows), device="cpu").repeat_interleave(rows)  # of every row
    row = torch.arange(len(layer), device="cpu")
    start = (row - _firsts(rows)[layer]) * cols[layer]
    many = (cols[layer] + CHUNK - 1) // CHUNK
    first_of_row = _firsts(many)
    of = row.repeat_interleave(many)  # the row of every chunk
    begin = start[of] + (torch.arange(len(of), device="cpu") - first_of_row[of]) * CHUNK
    chunks = torch.stack([layer[of], of, begin, start[of] + cols[layer[of]]], 1)
    first_of_layer = first_of_row[_firsts(rows)]
    return chunks.to(device), first_of_row.to(device), first_of_layer.to(device)


def _firsts(counts: Tensor) -> Tensor:
    """The sums of the counts before each, and of all."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _places(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses as int64 on the device."""
    if device.type != "cuda":
        return _uploaded.__wrapped__(places, device, 0)
    # In a graph that is captured, the table is the graph's own: it holds nothing before a replay, and then again.
    if torch.cuda.is_current_stream_capturing():
        return _uploaded.__wrapped__(places, device, 0)
    # On another stream the table may not be written yet, or its memory be given away while it is read.
    return _uploaded(places, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=64)
def _uploaded(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Numbers as an int64 tensor on the device. They travel as a kernel's arguments: nothing waits or is pinned."""
    table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
    torch._foreach_add_(table.unbind(), numbers)
    return table
