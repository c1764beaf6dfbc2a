"""Schedules as pure functions of progress in [0, 1]: nothing here keeps state, so nothing can compound.

The value at a progress is the factor on the initial alpha: ``alpha = alpha_0 * anneal(progress)``.
Source: AutoSparse (arXiv 2304.06941), section on Gradient Annealing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]


def constant(progress: float) -> float:
    """1 throughout: the plain scaled straight-through estimator."""
    return 1.0


def linear(progress: float) -> float:
    """From 1 to 0 in a straight line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """``(1 + cos(pi p)) / 2``: from 1 to 0, slow at both ends."""
    return (1.0 + math.cos(math.pi * progress)) / 2.0


def sigmoid(progress: float) -> float:
    """``1 - sigmoid(-6 + 12 p)``: from 0.9975 to 0.0025, steep in the middle."""
    return 1.0 - 1.0 / (1.0 + math.exp(-(-6.0 + 12.0 * progress)))


def sigmoid_cosine(progress: float) -> float:
    """The larger of :func:`sigmoid` and :func:`cosine`: the schedule that the paper recommends."""
    return max(sigmoid(progress), cosine(progress))


def cubic_ramp(progress: float, start: float, end: float) -> float:
    """From 0 at ``start`` to 1 at ``end`` as ``1 - (1 - u)^3`` (Zhu and Gupta 2017, equation 1)."""
    u = min(max((progress - start) / (end - start), 0.0), 1.0)
    return 1.0 - (1.0 - u) ** 3


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "sigmoid-cosine": sigmoid_cosine,
}
