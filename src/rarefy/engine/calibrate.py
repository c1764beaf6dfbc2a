"""What values a network takes on examples, and the bytes that stand for them best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from rarefy.engine.int8 import LARGEST
from rarefy.engine.plan import Layer, Plan, Quantized

#: "mse": the range that loses least, in the mean square; "percentile": all but the outermost 0.01 % of numbers on each
#: side; "minmax": everything that was seen.
Method = Literal["mse", "percentile", "minmax"]
METHODS: tuple[Method, ...] = get_args(Method)
_BINS = 2048  # on each side of 0
_OUTERMOST = 1e-4
#: Examples whose largest magnitude is smaller, or larger than its inverse, leave float32 no room for products and sums.
_SMALLEST = 1e-30
_SHARES = torch.linspace(
    0.3, 1, 36, dtype=torch.float64, device="cpu"
)  # of the range seen, which are tried for the least error


class Histogram:
    """Counts of numbers in bins as wide as a power of two, 2048 on each side of 0; they widen for larger numbers.

    So it does not depend on the order in which numbers come.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * _BINS, dtype=torch.int64)
        self.exponent: int | None = None  # of the width: None before a number other than 0 came
        self.least = self.largest = 0.0  # 0 is always there: padding, zeros behind a ReLU

    def add(self, x: Tensor) -> None:
        """Count more numbers. Raises ValueError where one is not finite."""
        if x.numel() == 0:
            return
        least, largest = (float(each) for each in x.aminmax())
        if not (math.isfinite(least) and math.isfinite(largest)):
            raise ValueError("a number is NaN or infinite")
        self.least, self.largest = min(self.least, least), max(self.largest, largest)
        farthest = max(-least, largest)
        if farthest > 0:
            self._widen(math.frexp(farthest)[1] - _BINS.bit_length() + 1)
        if self.exponent is None:
            self.counts[_BINS] += x.numel()
            return
        index = (x.double() if self.exponent < -120 else x).reshape(-1).mul(2.0**-self.exponent).floor_()
        self.counts += torch.bincount(index.int().add_(_BINS), minlength=2 * _BINS)

    def merge(self, other: Histogram) -> None:
        """Count what the other one has counted."""
        both = Histogram()
        both.counts, both.exponent = other.counts, other.exponent
        if other.exponent is not None:
            self._widen(other.exponent)
            if self.exponent is not None:
                both._widen(self.exponent)
        self.counts = self.counts + both.counts
        self.least, self.largest = min(self.least, other.least), max(self.largest, other.largest)

    def _widen(self, exponent: int) -> None:
        """Make bins at least ``2**exponent`` wide."""
        self.exponent = exponent if self.exponent is None else self.exponent
        while self.exponent < exponent:
            pairs = self.counts.reshape(_BINS, 2).sum(1)
            self.counts = torch.cat([pairs.new_zeros(_BINS // 2), pairs, pairs.new_zeros(_BINS // 2)])
            self.exponent += 1

    def quantized(self, method: Method) -> Quantized:
        """The scale and zero point for these numbers; the zero point is 0 where none is negative."""
        if self.exponent is None:
            return Quantized(1.0, 0)
        low, high = self.least, self.largest
        if method == "percentile":
            low, high = self._percentile(low, high)
        elif method == "mse":
            low, high = self._closest(low, high)
        return _of_range(low, high)

    def _middles(self) -> tuple[Tensor, Tensor]:
        """The middles of bins that are not empty, and their counts, in float64."""
        assert self.exponent is not None
        there = self.counts.nonzero().reshape(-1)
        return ((there - _BINS).double() + 0.5) * 2.0**self.exponent, self.counts[there].double()

    def _percentile(self, low: float, high: float) -> tuple[float, float]:
        middles, counts = self._middles()
        shares = counts.cumsum(0) / counts.sum()
        below = float(middles[torch.searchsorted(shares, _OUTERMOST)])
        above = float(middles[torch.searchsorted(shares, 1 - _OUTERMOST)])
        return max(low, min(below, 0.0)), min(high, max(above, 0.0))

    def _closest(self, low: float, high: float) -> tuple[float, float]:
        """The range of least square error: first both ends as the same share of what was seen, then each alone."""
        middles, counts = self._middles()

        def best(ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
            return min(ranges, key=lambda each: _error(middles, counts, _of_range(*each)))

        shares = _SHARES.flip(0).tolist()  # of ranges as good as each other, the widest
        found = best([(low * share, high * share) for share in shares])
        if low < 0 < high:
            found = best([(low * share, found[1]) for share in shares])
            found = best([(found[0], high * share) for share in shares])
        return found


def _of_range(low: float, high: float) -> Quantized:
    """The 256 numbers from low (at most 0) to high (at least 0), moved so that 0 is one of them."""
    scale = max((high - low) / 255, float(np.finfo(np.float32).tiny))
    return Quantized(float(np.float32(scale)), min(255, max(0, round(-low / scale))))


def _error(middles: Tensor, counts: Tensor, of: Quantized) -> float:
    q = (middles / of.scale + of.zero_point).round().clamp(0, 255)
    return float((((q - of.zero_point) * of.scale - middles).square() * counts).sum())


def weight_scales(weight: Tensor) -> Tensor:
    """The scale (out,) of each output channel of weights (out, ...): its largest magnitude is 127."""
    largest = weight.flatten(1).abs().amax(1)
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(largest > 0, (largest.double() / LARGEST).float().clamp(min=tiny), 1.0)


def checked(plan: Plan, batches: Iterable[Tensor | Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """The batches to calibrate a plan with; raises TypeError or ValueError for those that are none."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        hint = ": [x] is one batch" if isinstance(batches, Tensor) else ""
        raise TypeError(f"calibration must be an iterable of batches, got {type(batches).__name__}{hint}")
    found = []
    for number, batch in enumerate(batches):
        given = (batch,) if isinstance(batch, Tensor) else batch
        if not isinstance(given, (tuple, list)) or not all(isinstance(x, Tensor) for x in given):
            raise TypeError(
                f"calibration batch {number} must be a tensor or a tuple of tensors, got {type(batch).__name__}"
            )
        if len(given) != len(plan.inputs):
            raise ValueError(
                f"calibration batch {number} has {len(given)} tensors, and the model takes {len(plan.inputs)} inputs: "
                "leave labels and the like out"
            )
        for name, x in zip(plan.inputs, given, strict=True):
            _check(plan, name, x, f"calibration batch {number}, input {name!r}:")
        if plan.batch is None and len(sizes := {len(x) for x in given}) > 1:
            raise ValueError(f"calibration batch {number} has inputs of {', '.join(map(str, sorted(sizes)))} examples")
        found.append(tuple(x.detach() for x in given))
    if not found:
        raise ValueError("calibration has no batches: give some hundred examples of what the model will see")
    return found


def read_by_layers(plan: Plan, name: str) -> bool:
    """Whether a layer multiplies its weights with that value."""
    return any(isinstance(step, Layer) and step.input == name for step in plan.steps)


def is_wild(x: Tensor) -> bool:
    """Whether no 256 numbers can stand for these: one is NaN, infinite, or so large that float32 has no room."""
    return x.is_floating_point() and not bool((x.abs() <= 1.0 / _SMALLEST).all())


def _check(plan: Plan, name: str, x: Tensor, where: str) -> None:
    value = plan.values[name]
    if x.dtype != value.dtype:
        raise ValueError(f"{where} must be {value.dtype}, got {x.dtype}: convert it first")
    if x.device.type != "cpu":
        raise ValueError(f"{where} must be on the CPU, got {x.device}: call it with x.cpu()")
    if value.shape is not None and (x.dim() == 0 or tuple(x.shape[1:]) != value.shape):
        expected = ", ".join(["batch", *map(str, value.shape)])
        raise ValueError(f"{where} must have the shape ({expected}), got {tuple(x.shape)}")
    if plan.batch is not None and x.dim() and value.shape is not None and len(x) != plan.batch:
        raise ValueError(f"{where} must be a batch of {plan.batch} ({plan.fixed_because}), got {len(x)}")
    if x.numel() == 0:
        raise ValueError(f"{where} must not be empty, got the shape {tuple(x.shape)}")
    if not read_by_layers(plan, name):  # a mask of -inf, say: what reads it stays float32
        return
    if x.is_floating_point() and not x.isfinite().all():
        raise ValueError(f"{where} has a number that is NaN or infinite")
    largest = float(x.abs().max()) if x.is_floating_point() else 0.0
    if largest > 0.0 and not _SMALLEST <= largest <= 1.0 / _SMALLEST:
        raise ValueError(
            f"{where} has {largest:.3g} as its largest magnitude, and float32 tells no 256 numbers of a range so "
            f"{'small' if largest < 1.0 else 'large'} apart in what is computed of it: give what the model will see, "
            f"between {_SMALLEST:g} and {1.0 / _SMALLEST:g}"
        )
