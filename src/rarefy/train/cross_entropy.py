"""The cross-entropy of many words over a large vocabulary, which on a CPU stays in the caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: Logits that a CPU looks at together.
CACHED = 1 << 18


def cross_entropy(logits: Tensor, targets: Tensor, ignored: int, smoothing: float = 0.0) -> Tensor:
    """Return the sum over words, in float32, of ``torch.nn.functional.cross_entropy``; -> ().

    ``logits`` [words, classes] are of any format, ``targets`` [words] int64, ``ignored`` the target that does not
    count, ``smoothing`` that of the labels. On a CPU the gradient is computed anew from the logits, so that nothing of
    their size is kept besides them.
    """
    if logits.device.type == "cpu":
        total: Tensor = _Sum.apply(logits, targets, ignored, smoothing)  # type: ignore[no-untyped-call]
        return total
    return F.cross_entropy(logits.float(), targets, ignore_index=ignored, label_smoothing=smoothing, reduction="sum")


class _Sum(torch.autograd.Function):
    # With z = log sum exp x and smoothing e, of C classes, for target t:
    #   loss = z - (1 - e) x_t - e mean(x),   dloss/dx = exp(x - z) - (1 - e) [t] - e / C

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: int, smoothing: float) -> Tensor:
        counted = targets != ignored
        chosen = targets.where(counted, 0).unsqueeze(1)
        normalizers = torch.empty(len(logits), dtype=torch.float32)
        losses = torch.empty(len(logits), dtype=torch.float32)
        for part in _parts(logits):
            x = logits[part].float()
            normalizers[part] = z = x.logsumexp(1)
            losses[part] = z - (1 - smoothing) * x.gather(1, chosen[part]).squeeze(1)
            if smoothing:  # 0 times a logit of -inf is none
                losses[part] -= smoothing * x.mean(1)
        ctx.save_for_backward(logits, counted, chosen, normalizers)
        ctx.smoothing = smoothing
        return losses.where(counted, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, counted, chosen, normalizers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        given = (upstream * counted).unsqueeze(1)
        for part in _parts(logits):
            d = (logits[part] - normalizers[part].unsqueeze(1)).exp_()
            d -= ctx.smoothing / logits.shape[1]
            d.scatter_add_(1, chosen[part], d.new_full((), ctx.smoothing - 1.0).expand_as(chosen[part]))
            d *= given[part]
            gradient[part] = d
        return gradient, None, None, None


def _parts(logits: Tensor) -> list[slice]:
    rows = max(1, CACHED // max(1, logits.shape[1]))
    return [slice(begin, begin + rows) for begin in range(0, len(logits), rows)]
