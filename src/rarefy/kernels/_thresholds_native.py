"""The thresholds of all layers on the CPU in float32: one native call each, declared in rarefy.h."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rarefy.kernels._library import find
from rarefy.kernels._memory import address

if TYPE_CHECKING:
    from rarefy.kernels.thresholds import ThresholdedLayers

CHUNK = 1 << 15  # RAREFY_CHUNK in rarefy.h
_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


def available() -> bool:
    """Whether there is a native library with a kernel that may run."""
    return _kernel("thresholds_before_f32", 8) is not None


def before(
    layers: ThresholdedLayers, grads: Sequence[Tensor | None], thresholds: Tensor, alpha: Tensor, lower: Tensor | None
) -> Tensor:
    """See :meth:`rarefy.kernels.thresholds.ThresholdedLayers.before`."""
    table, chunks = _table(layers.sizes)
    grad_thresholds = torch.empty_like(thresholds)
    partial = torch.empty(chunks, dtype=torch.float64, device="cpu")
    _kernel("thresholds_before_f32", 8)(
        *(
            table,
            len(layers.sizes),
            *(_array(layers.addresses(part)) for part in (layers.weights, grads, layers.latents)),
        ),
        *(address(thresholds), address(alpha), None if lower is None else address(lower)),
        *(address(grad_thresholds), address(partial), torch.get_num_threads()),
    )
    return grad_thresholds


def after(layers: ThresholdedLayers, thresholds: Tensor, shrink: Tensor) -> None:
    """See :meth:`rarefy.kernels.thresholds.ThresholdedLayers.after`."""
    table, _ = _table(layers.sizes)
    _kernel("thresholds_after_f32", 4)(
        *(table, len(layers.sizes), *(_array(layers.addresses(part)) for part in (layers.weights, layers.latents))),
        *(address(thresholds), address(shrink), torch.get_num_threads()),
    )


def count(layers: ThresholdedLayers, thresholds: Tensor) -> Tensor:
    """See :meth:`rarefy.kernels.thresholds.ThresholdedLayers.count`."""
    table, chunks = _table(layers.sizes)
    live = torch.empty(len(layers.sizes), dtype=torch.int64, device="cpu")
    partial = torch.empty(chunks, dtype=torch.int64, device="cpu")
    _kernel("thresholds_count_f32", 4)(
        *(
            table,
            len(layers.sizes),
            _array(layers.addresses(layers.latents)),
            address(thresholds),
            address(live),
            address(partial),
        ),
        torch.get_num_threads(),
    )
    return live


def mask(tensors: Sequence[Tensor], places: tuple[int, ...], masks: tuple[int, ...]) -> None:
    """See :func:`rarefy.kernels.thresholds.mask_`; ``places`` and ``masks`` are where they lie."""
    table, _ = _table(tuple((1, tensor.numel()) for tensor in tensors))
    _kernel("mask_f32", 2)(table, len(tensors), _array(places), _array(masks), torch.get_num_threads())


def _kernel(name: str, pointers: int) -> Any:
    """A kernel that takes the table, the number of layers, these pointers and the number of threads."""
    return find(name, None, _POINTER, _INT64, *(_POINTER,) * pointers, _INT32)


def _array(places: tuple[int, ...]) -> Any:
    """An array of pointers, null for 0."""
    return (_POINTER * len(places))(*places)


@functools.lru_cache(maxsize=64)
def _table(sizes: tuple[tuple[int, int], ...]) -> tuple[Any, int]:
    """The array of rarefy_layer for these rows and columns, and how many chunks they have."""
    first_row = itertools.accumulate((rows for rows, _ in sizes), initial=0)
    *first_chunk, chunks = itertools.accumulate((rows * -(-cols // CHUNK) for rows, cols in sizes), initial=0)
    layers = [
        value for chunk, row, size in zip(first_chunk, first_row, sizes, strict=False) for value in (chunk, row, *size)
    ]
    return (_INT64 * len(layers))(*layers), chunks
