"""The functions g through which thresholds are learned, ``T = g(s)``, each with its inverse and its derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ThresholdFunction(NamedTuple):
    """g, its inverse, which keeps order over all magnitudes, and its derivative as a function of T = g(s)."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


# A sigmoid up to 1 - 1e-6, and on in a straight line, so that any magnitude can be masked in the end.
_EDGE = 1.0 - 1e-6
_BEND = math.log(_EDGE / (1.0 - _EDGE))


def _sigmoid(s: Tensor) -> Tensor:
    return torch.sigmoid(s.clamp(max=_BEND)) + 1e-6 * (s - _BEND).clamp(min=0.0)


def _sigmoid_inverse(threshold: Tensor) -> Tensor:
    return torch.logit(threshold.clamp(1e-30, _EDGE)) + 1e6 * (threshold - _EDGE).clamp(min=0.0)


def _softplus_inverse(threshold: Tensor) -> Tensor:
    return threshold + torch.log(-torch.expm1(-threshold.clamp(min=1e-30)))


def _log(threshold: Tensor) -> Tensor:
    return torch.log(threshold.clamp(min=1e-30))


THRESHOLD_FUNCTIONS = {
    "sigmoid": ThresholdFunction(_sigmoid, _sigmoid_inverse, lambda t: (1.0 - t).clamp(min=0.0) * t),
    "exp": ThresholdFunction(torch.exp, _log, lambda t: t),
    "softplus": ThresholdFunction(F.softplus, _softplus_inverse, lambda t: -torch.expm1(-t)),
}
