"""Operators that move numbers, as reshapes, permutations, slices and concatenations, which become views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _plain(numbers: Sequence[Any]) -> bool:
    """Whether none of the numbers depends on the batch."""
    return all(isinstance(each, int) for each in numbers)


def pixel_shuffle(x: Tensor, upscale_factor: int) -> Any:
    """``aten::pixel_shuffle``: (B, C r r, H, W) -> (B, C, H r, W r)."""
    if x.dim() != 4:
        return NotImplemented
    (batch, channels, height, width), r = x.shape, upscale_factor
    parts = x.reshape(batch, channels // (r * r), r, r, height, width)
    return parts.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // (r * r), height * r, width * r)


def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Any:
    """``aten::pixel_unshuffle``: (B, C, H r, W r) -> (B, C r r, H, W)."""
    if x.dim() != 4:
        return NotImplemented
    (batch, channels, height, width), r = x.shape, downscale_factor
    parts = x.reshape(batch, channels, height // r, r, width // r, r)
    return parts.permute(0, 1, 3, 5, 2, 4).reshape(batch, channels * r * r, height // r, width // r)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """``aten::channel_shuffle``: the channels of all groups in turn."""
    batch, channels, *rest = x.shape
    return x.reshape(batch, groups, channels // groups, *rest).transpose(1, 2).reshape(x.shape)


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """``aten::glu``: one half times the sigmoid of the other."""
    one, gate = x.chunk(2, dim)
    return one * gate.sigmoid()


def repeat(x: Tensor, repeats: Sequence[int]) -> Any:
    """``aten::repeat`` along any axes but the batch, as many as there are."""
    if not _plain(repeats) or len(repeats) != x.dim() or repeats[0] != 1 or min(repeats) < 1:
        return NotImplemented
    for axis, times in enumerate(repeats):
        x = x if times == 1 else torch.cat([x] * times, axis)
    return x


def repeat_interleave(x: Tensor, repeats: int, dim: int | None = None, *, output_size: int | None = None) -> Any:
    """``aten::repeat_interleave`` of every entry along an axis so many times."""
    if dim is None or not _plain([repeats]) or dim % x.dim() == 0 or repeats < 1:
        return NotImplemented
    axis, shape = dim % x.dim() + 1, list(x.shape)
    several = [*shape[:axis], repeats, *shape[axis:]]
    shape[axis - 1] = shape[axis - 1] * repeats
    return x.unsqueeze(axis).expand(several).reshape(shape)


def pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """``aten::pad`` with what is in the tensor already; a constant stays."""
    if mode == "constant" or not _plain(pad) or min(pad) < 0 or len(pad) // 2 >= x.dim():
        return NotImplemented
    for number in range(len(pad) // 2):
        before, after = pad[2 * number : 2 * number + 2]
        axis = x.dim() - 1 - number
        size = x.shape[axis]

        def of(begin: int, end: int, x: Tensor = x, axis: int = axis) -> Tensor:
            return x.narrow(axis, begin, end - begin)

        match mode:
            case "reflect":
                ends = of(1, before + 1).flip(axis), of(size - 1 - after, size - 1).flip(axis)
            case "replicate":
                wide = [-1] * x.dim()
                ends = of(0, 1), of(size - 1, size)
                ends = (
                    ends[0].expand([*wide[:axis], before, *wide[axis + 1 :]]),
                    ends[1].expand([*wide[:axis], after, *wide[axis + 1 :]]),
                )
            case "circular":
                ends = of(size - before, size), of(0, after)
            case _:
                return NotImplemented
        parts = [ends[0]] * (before > 0) + [x] + [ends[1]] * (after > 0)
        x = torch.cat(parts, axis) if len(parts) > 1 else x
    return x


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What these operators are made of, as ``run_decompositions`` takes it."""
    aten = torch.ops.aten
    return {
        aten.pixel_shuffle.default: pixel_shuffle,
        aten.pixel_unshuffle.default: pixel_unshuffle,
        aten.channel_shuffle.default: channel_shuffle,
        aten.glu.default: glu,
        aten.repeat.default: repeat,
        aten.repeat_interleave.self_int: repeat_interleave,
        aten.pad.default: pad,
    }
