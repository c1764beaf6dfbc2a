"""What quantising a network cost: the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_COLUMNS = ("layer", "kind", "SQNR dB", "saturated", "weights", "in")


@dataclass(frozen=True)
class QuantizedLayer:
    """What int8 makes of one layer.

    Attributes:
        name: the layer's in the model.
        kind: "conv", "depthwise" or "linear".
        sqnr_db: signal to quantisation noise in dB, 10 log10(E[y^2] / E[e^2]): y its sums with bias in float32, e what
            they differ by when its weights and what it reads are quantised, the mean error of each channel taken off.
            None where there is no noise, or where the layer cannot be quantised.
        saturated: share of what it makes that lies beyond the first or the last byte, in [0, 1]; 0 where it gives
            float32.
        weight_range: its smallest and its largest weight.
        kept: why it stays float32; None where it is int8.
    """

    name: str
    kind: str
    sqnr_db: float | None
    saturated: float
    weight_range: tuple[float, float]
    kept: str | None = None


@dataclass(frozen=True)
class Quantization:
    """How a network was quantised; ``str()`` of it is a table, :meth:`to_dict` is for JSON.

    Attributes:
        method: how ranges were chosen: "mse", "percentile" or "minmax"; "given" by the model, where it came quantised.
        samples: how many examples it was calibrated with; 0 where the model came quantised.
        error: of the network's outputs on examples, ||y_int8 - y|| / ||y|| over all their numbers; None where the
            float32 network is not known.
        budget: what ``error`` may be at most; None where there was none.
        layers: in the order in which they run.
    """

    method: str
    samples: int
    error: float | None
    budget: float | None
    layers: tuple[QuantizedLayer, ...]

    @property
    def sqnr_db(self) -> float | None:
        """The network's signal to quantisation noise in dB; None where there is no noise or it is not known."""
        return -20 * math.log10(self.error) if self.error else None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, strings, lists and dicts."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers], "sqnr_db": self.sqnr_db}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Quantization:
        """Make it of what :meth:`to_dict` returns, from a file that may be forged; raises ValueError where it is."""
        layers = tuple(
            QuantizedLayer(**{**layer, "weight_range": tuple(layer["weight_range"])}) for layer in given["layers"]
        )
        found = cls(**{**{name: given[name] for name in ("method", "samples", "error", "budget")}, "layers": layers})
        texts = [found.method, *(text for layer in layers for text in (layer.name, layer.kind, layer.kept or ""))]
        numbers = [found.samples, found.error, found.budget]
        numbers += [each for layer in layers for each in (layer.sqnr_db, layer.saturated, *layer.weight_range)]
        told = [each for each in numbers if each is not None]
        if not all(isinstance(text, str) for text in texts) or not all(
            type(each) in (int, float) and math.isfinite(each) for each in told
        ):
            raise ValueError("a text or a number of the quantisation is none")
        return found

    def __str__(self) -> str:
        table = [_COLUMNS, *(_cells(layer) for layer in self.layers)]
        widths = [max(len(line[i]) for line in table) for i in range(len(_COLUMNS))]
        left = (0, 1, 5)  # columns of text
        lines = [
            "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        kept = sum(layer.kept is not None for layer in self.layers)
        source = f"{self.method} of {self.samples} examples" if self.samples else "ranges given by the model"
        parts = [source, f"{kept} of {len(self.layers)} layers stay float32"]
        if self.error is not None:
            decibel = "" if self.sqnr_db is None else f" ({self.sqnr_db:.1f} dB)"
            budget = "" if self.budget is None else f", at most {self.budget:g} asked for"
            parts.append(f"error of the outputs {self.error:.2g}{decibel}{budget}")
        return "\n".join([*lines, "; ".join(parts)])


def _cells(layer: QuantizedLayer) -> tuple[str, ...]:
    low, high = layer.weight_range
    return (
        layer.name,
        layer.kind,
        "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
        f"{100 * layer.saturated:.2f} %",
        f"{low:.3g} to {high:.3g}",
        "int8" if layer.kept is None else f"float32: {layer.kept}",
    )
