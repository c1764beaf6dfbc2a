"""The best tokens of logits: what a search needs of them, in one pass where there is a native kernel."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from rarefy import kernels

_ARGUMENTS = (ctypes.c_void_p, *(ctypes.c_int64,) * 3, *(ctypes.c_void_p,) * 3, ctypes.c_int32)


class Best(NamedTuple):
    """The largest logits of every row.

    Attributes:
        logp: their log-probabilities, (B, count), falling.
        tokens: where they are, (B, count).

    """

    logp: Tensor
    tokens: Tensor


def best(logits: Tensor, count: int) -> Best:
    """Return the ``count`` best of logits (B, vocab_size), of any floating dtype, by softmax in float32.

    Without gradient.

    Raises ValueError for another shape, and for a count that is not in 1..vocab_size.
    """
    if logits.dim() != 2 or not 1 <= count <= logits.shape[1]:
        raise ValueError(f"there are no {count} best of logits of the shape {tuple(logits.shape)}")
    logits = logits.detach().float()
    kernel = kernels.find("best_of_rows", None, *_ARGUMENTS) if logits.device.type == "cpu" else None
    if kernel is None:
        return Best(*logits.log_softmax(1).topk(count, 1))
    rows, width = logits.shape
    logits = logits.resolve_neg().contiguous()
    values, totals = torch.empty(rows, count), torch.empty(rows, 1)
    tokens = torch.empty(rows, count, dtype=torch.long)
    if rows:
        places = [kernels.address(each) for each in (values, tokens, totals)]
        kernel(kernels.address(logits), rows, width, count, *places, torch.get_num_threads())
    return Best((values - values[:, :1]) - totals, tokens)
