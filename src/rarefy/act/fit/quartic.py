"""The coefficients of :mod:`rarefy.act.spec.quartic`: tanh interpolated at Chebyshev nodes, segment by segment."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rarefy.act.spec import oracle
from rarefy.act.spec.quartic import SEGMENTS, Quartic, row_of, span


def _through(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> list[float]:
    """Find the polynomial through points, lowest power first: in rationals, so that every machine finds the same."""
    nodes, table = ([Fraction(float(v)) for v in values] for values in (x, y))
    for order in range(1, len(nodes)):  # divided differences
        for i in range(len(nodes) - 1, order - 1, -1):
            table[i] = (table[i] - table[i - 1]) / (nodes[i] - nodes[i - order])
    powers = [Fraction(0)] * len(nodes)
    for node, value in zip(reversed(nodes), reversed(table), strict=True):  # powers <- powers * (x - node) + value
        powers = [value - node * powers[0], *(a - node * b for a, b in pairwise(powers))]
    return [float(c) for c in powers]


def fit_quartic() -> Quartic:
    """Fit the coefficients of tanh: interpolation at Chebyshev nodes, segment by segment."""
    nodes = np.cos(np.pi * (np.arange(5) + 0.5) / 5)
    coefficients = np.zeros((5, SEGMENTS))
    for segment in range(SEGMENTS):
        begin, width = span(segment)
        if segment == 0:
            # tanh f = f + f^2 (c2 + c3 f + c4 f^2), the bracket interpolated at three nodes. The relative error is then
            # about f (f - n1) (f - n2) (f - n3), least where these are the zeros of T4 with the first one moved to 0.
            t4 = -np.cos(np.pi * (np.arange(4) + 0.5) / 4)
            f = width * (t4[1:] - t4[0]) / (1.0 - t4[0])
            c = np.array([0.0, 1.0, *_through(f, (np.tanh(f) - f) / f**2)])
        elif begin >= 9.0:  # tanh rounds to 1
            c = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
        else:
            f = width / 2 * (1 + nodes)
            c = np.array(_through(f, oracle.tanh(begin + f)))
        coefficients[:, row_of(segment)] = c
    bits = coefficients.astype(np.float32).view(np.uint32)
    return Quartic(tuple(tuple(int(v) for v in row) for row in bits))
