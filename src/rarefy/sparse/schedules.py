"""Schedules as pure functions of progress in [0, 1]: nothing here keeps state, so nothing can compound.

The value at a progress is the factor on the initial alpha: ``alpha = alpha_0 * anneal(progress)``.
Source: AutoSparse (arXiv 2304.06941), section on Gradient Annealing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rarefy import _checks

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


def cosine_decay(initial: float, progress: float, end: float) -> float:
    """``f(t) = initial / 2 * (1 + cos(pi t / end))``, and 0 from the end on (RigL, section 3)."""
    return initial / 2.0 * (1.0 + math.cos(math.pi * min(progress / end, 1.0))) if end > 0.0 else 0.0


@dataclass(frozen=True)
class Annealed:
    """``alpha(progress) = alpha_0 * schedule(progress)``, and 0 from the cut-off on.

    Args:
        initial: alpha_0, in [0, 1].
        schedule: a name in :data:`SCHEDULES`.
        cutoff: share of the run after which alpha is 0, in [0, 1]; None never cuts it off.

    Raises:
        ValueError: a number outside [0, 1], an unknown schedule.
    """

    initial: float
    schedule: str = "sigmoid-cosine"
    cutoff: float | None = None

    def __post_init__(self) -> None:
        _checks.fraction("alpha", self.initial)
        _checks.one_of("anneal", self.schedule, SCHEDULES)
        if self.cutoff is not None:
            _checks.fraction("cutoff", self.cutoff)

    def __call__(self, progress: float) -> float:
        """Alpha at this share of the run."""
        if self.cutoff is not None and progress >= self.cutoff:
            return 0.0
        return self.initial * SCHEDULES[self.schedule](progress)
