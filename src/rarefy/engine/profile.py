"""Where the time of an engine goes, and what the zeros are worth: the break-even of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rarefy.engine.execute import Timed
from rarefy.engine.peak import peak
from rarefy.engine.steps import StepInfo

_COLUMNS = ("layer", "kernel", "ms", "share", "density", "GFLOP/s", "of peak", "dense ms", "gain")


@dataclass(frozen=True)
class Row:
    """One step, for the whole batch on one thread.

    Attributes:
        name: the layer's in the model; of other steps the operator's in the graph.
        kind: "conv", "depthwise", "linear", "pool", ..., or the operator's name.
        kernel: what computes it: a native kernel, "oneDNN" (in PyTorch, with packed weights) or "PyTorch".
        seconds: median.
        share: of the whole time, in [0, 1].
        density: nonzero weights, as a share of all; None without weights.
        gflops: 1e9 floating-point operations a second, two for each multiply with a nonzero weight; None without
            weights.
        peak_share: ``gflops`` as a share of what the core can do at most; None where one of them is not known.
        dense_seconds: the fastest dense way to compute the layer that was measured while compiling, PyTorch's or a
            native one, scaled to this batch; None where none was measured.
        note: why PyTorch runs it, where it does.
    """

    name: str
    kind: str
    kernel: str
    seconds: float
    share: float
    density: float | None = None
    gflops: float | None = None
    peak_share: float | None = None
    dense_seconds: float | None = None
    note: str = ""

    @property
    def gain(self) -> float | None:
        """How many times faster than the dense way it is; below 1 it loses."""
        return None if self.dense_seconds is None or self.seconds <= 0 else self.dense_seconds / self.seconds


@dataclass(frozen=True)
class Profile:
    """A profile; ``str()`` of it is a table, :meth:`to_dict` is for JSON.

    Attributes:
        rows: the steps, in the order in which they run; last, as "call", what a call takes beside them. They add up.
        batch: how many samples they ran on at once.
        seconds: of a whole call, without what checks its inputs.
        peak_gflops: what one core was measured to do at most, in 1e9 floating-point operations a second; None where
            there is no native library to measure it with.
    """

    rows: tuple[Row, ...]
    batch: int
    seconds: float
    peak_gflops: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, strings, lists and dicts."""
        rows = [{**asdict(row), "gain": row.gain} for row in self.rows]
        return {"batch": self.batch, "seconds": self.seconds, "peak_gflops": self.peak_gflops, "rows": rows}

    def __str__(self) -> str:
        table = [_COLUMNS, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(_COLUMNS))]
        left = 2  # columns of text
        lines = [
            "  ".join(
                cell.ljust(width) if i < left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        peak_text = "" if self.peak_gflops is None else f"; peak of one core {self.peak_gflops:.0f} GFLOP/s"
        lines.append(f"batch of {self.batch}, one thread: {1e3 * self.seconds:.3f} ms{peak_text}")
        return "\n".join(lines)


def profile(steps: Sequence[StepInfo], took: Timed, batch: int) -> Profile:
    """Make the profile of steps from what they were timed at.

    Reading the clock between steps makes them slower: where they add up to more than a whole call they are that much
    less, each by the same factor.
    """
    whole, most = float(np.median(took.calls)), peak()
    seconds = np.concatenate([np.zeros(0), *(np.median(times, 0) for times in took.steps)])
    if seconds.sum() > whole:
        seconds *= whole / seconds.sum()
    rows = [row(step, float(each), whole, batch, most) for step, each in zip(steps, seconds, strict=True)]
    if (between := whole - float(seconds.sum())) > 0:
        call = StepInfo("", "call", "", note="from step to step, into native programs and out again")
        rows.append(row(call, between, whole, batch, most))
    return Profile(tuple(rows), batch, whole, most)


def row(step: StepInfo, seconds: float, whole: float, batch: int, peak_gflops: float | None) -> Row:
    """Make the row of a step that took so many ``seconds`` for the ``batch``, of ``whole`` in all."""
    share = seconds / whole if whole > 0 else 0.0
    result = Row(step.name, step.kind, step.kernel, seconds, share, note=step.note)
    facts = step.facts
    if facts is None:
        return result
    # A multiply and an addition for every nonzero weight at every place.
    gflops = 2e-9 * facts.macs * batch / seconds if seconds > 0 else None
    return replace(
        result,
        density=facts.nonzeros / facts.weights if facts.weights else None,
        gflops=gflops,
        peak_share=None if gflops is None or peak_gflops is None else gflops / peak_gflops,
        dense_seconds=None if step.dense_seconds is None else step.dense_seconds * batch,
    )


def _cells(row: Row) -> tuple[str, ...]:
    def cell(value: float | None, text: str) -> str:
        return "" if value is None else text.format(value)

    return (
        row.name,
        f"{row.kernel} ({row.kind})" if row.kernel in ("PyTorch", "oneDNN") else row.kernel or row.kind,
        f"{1e3 * row.seconds:.3f}",
        f"{100 * row.share:.1f} %",
        cell(None if row.density is None else 100 * row.density, "{:.1f} %"),
        cell(row.gflops, "{:.1f}"),
        cell(None if row.peak_share is None else 100 * row.peak_share, "{:.0f} %"),
        cell(None if row.dense_seconds is None else 1e3 * row.dense_seconds, "{:.3f}"),
        cell(row.gain, "{:.2f}x"),
    )
