"""Gated units for ``rarefy bench act``, beside PyTorch's two steps and memcpy of what they read and write."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy import act

aten = torch.ops.aten
unit: Any = torch.ops.rarefy


def calls(gate: Tensor, compiled: bool) -> dict[str, Callable[[], object]]:
    """Return the calls by entry; memcpy copies as many bytes as a unit reads and writes, half of them each.

    Gradients are written to new tensors, ours as PyTorch's.
    """
    up, upstream, out = torch.randn_like(gate), torch.randn_like(gate), torch.empty_like(gate)
    source = torch.zeros(gate.numel() * 5 // 2, dtype=gate.dtype)
    copy = torch.zeros_like(source)

    def memcpy(arrays: int) -> Callable[[], object]:
        size = arrays * gate.numel() * gate.element_size() // 2
        return lambda: ctypes.memmove(copy.data_ptr(), source.data_ptr(), size)

    found: dict[str, Callable[[], object]] = {
        "memcpy of 3 arrays": memcpy(3),
        "call silu_and_mul": lambda: act.silu_and_mul(gate, up, out=out),
        "call gelu_and_mul": lambda: act.gelu_and_mul(gate, up, out=out),
        "call gelu_tanh_and_mul": lambda: act.gelu_tanh_and_mul(gate, up, out=out),
        "torch.silu * up": lambda: torch.mul(F.silu(gate), up, out=out),
        "torch.gelu * up": lambda: torch.mul(F.gelu(gate), up, out=out),
        "torch.gelu_tanh * up": lambda: torch.mul(F.gelu(gate, approximate="tanh"), up, out=out),
        "memcpy of 5 arrays": memcpy(5),
        "silu_and_mul backward": lambda: unit.gated_backward(upstream, gate, up, "silu", "exact", ""),
        "gelu_and_mul backward": lambda: unit.gated_backward(upstream, gate, up, "gelu", "exact", ""),
        "gelu_tanh_and_mul backward": lambda: unit.gated_backward(upstream, gate, up, "gelu_tanh", "exact", ""),
        "torch.silu * up backward": lambda: (aten.silu_backward(upstream * up, gate), upstream * F.silu(gate)),
        "torch.gelu * up backward": lambda: (aten.gelu_backward(upstream * up, gate), upstream * F.gelu(gate)),
        "torch.gelu_tanh * up backward": lambda: (
            aten.gelu_backward(upstream * up, gate, approximate="tanh"),
            upstream * F.gelu(gate, approximate="tanh"),
        ),
    }
    if compiled:
        fast = torch.compile(lambda v, u, o: o.copy_(F.silu(v) * u), fullgraph=True)
        fast(gate, up, out)
        found["inductor torch.silu * up"] = lambda: fast(gate, up, out)
    return found
