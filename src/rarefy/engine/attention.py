"""The scores of additive attention (Bahdanau et al., arXiv 1409.0473) in one pass over the keys."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from rarefy import kernels
from rarefy.engine.binding import NativeError, native_mode
from rarefy.engine.functions import activate, check_mode

_SIZES = (ctypes.c_int64,) * 3
_MODE = (ctypes.c_int32, ctypes.c_void_p)


def additive_scores(keys: Tensor, queries: Tensor, vector: Tensor, mode: str = "exact", table: str = "") -> Tensor:
    """Return ``vector . tanh(keys + queries)``, (B, S), of keys (B, S, H), queries (B, H) and a vector (H,).

    All are float32 on the CPU. ``mode`` and ``table``, a table's JSON or "", are those of :func:`rarefy.act.tanh`.
    Natively tanh of the modes "exact" and "fast" is right to 2.6 units of the last place.

    Raises ValueError for shapes that do not fit, another dtype or device, or a mode or table that is none.
    """
    batch, tokens, width = keys.shape if keys.dim() == 3 else (-1, -1, -1)
    plain = all(x.dtype is torch.float32 and x.device.type == "cpu" for x in (keys, queries, vector))
    if not plain or tuple(queries.shape) != (batch, width) or tuple(vector.shape) != (width,):
        given = ", ".join(f"{tuple(x.shape)} of {x.dtype} on {x.device}" for x in (keys, queries, vector))
        raise ValueError(
            f"keys, queries and vector must be (B, S, H), (B, H) and (H,) of float32 on the CPU, got {given}"
        )
    check_mode("tanh", mode, table)
    kernel = kernels.find("additive_scores", None, *(ctypes.c_void_p,) * 4, *_SIZES, *_MODE, ctypes.c_int32)
    try:
        how = native_mode("tanh", mode, table)
    except NativeError:
        kernel = None
    if kernel is None:
        mixed = keys + queries.unsqueeze(1)
        return (torch.tanh(mixed) if mode in ("exact", "fast") else activate(mixed, f"tanh {mode} {table}")) @ vector
    scores = torch.empty(batch, tokens, dtype=torch.float32, device="cpu")
    tensors = [x.detach().resolve_neg().contiguous() for x in (keys, queries, vector)]
    places = [kernels.address(x) for x in (*tensors, scores)]
    if scores.numel():
        kernel(*places, batch, tokens, width, *how, torch.get_num_threads())
    return scores
