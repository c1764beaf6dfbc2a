"""How the sparsity of several runs grew, in one figure: what a constant, an annealed and no alpha do to it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Literal, overload

from rarefy.report.figure import STYLE, curve, depth_colours, figure, label, legend_above, percent_axis, svg
from rarefy.report.run import Run


@overload
def trajectories(runs: Mapping[str, Run], format: Literal["svg"] = "svg") -> str: ...


@overload
def trajectories(runs: Mapping[str, Run], format: Literal["png"]) -> bytes: ...


@STYLE
def trajectories(runs: Mapping[str, Run], format: Literal["svg", "png"] = "svg") -> str | bytes:
    """Draw sparsity against training progress for runs by their labels, and alpha below where a run has one.

    The figure is transparent and in mid-tones, for light and dark pages. Progress is the share of the run's epochs
    that is done. Raises ValueError without a run that has logged its sparsity.
    """
    drawn = figure(height=360, width=640)
    has_alpha = any(record.alpha is not None for run in runs.values() for record in run.train)
    if has_alpha:
        upper, lower = drawn.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    else:
        upper = lower = drawn.subplots()
    for colour, (name, run) in zip(depth_colours(len(runs)), runs.items(), strict=True):
        progress = [record.epoch / (run.epochs or run.epoch or 1.0) for record in run.train]
        x, y = curve(progress, [record.sparsity for record in run.train])
        if len(x):
            upper.plot(x, y, color=colour, label=f"{label(name, 40)} ({100 * y[-1]:.0f}\u00a0%)")
        x, y = curve(progress, [record.alpha for record in run.train])
        if len(x):
            lower.plot(x, y, color=colour, drawstyle="steps-post")
    if not upper.lines:
        raise ValueError(f"expected at least one run that logged its sparsity, got {', '.join(runs) or 'no runs'}")

    if has_alpha:
        lower.set(ylabel="alpha", ylim=(-0.06, 1.06))
    upper.set(ylabel="sparsity", xlim=(0, 1), ylim=(0, 1))
    percent_axis(upper.yaxis)
    percent_axis(lower.xaxis)
    lower.set_xlabel("training progress")
    legend_above(upper, columns=2)

    if format == "svg":
        return svg(drawn, salt="trajectories")
    image = io.BytesIO()
    drawn.savefig(image, format="png", dpi=144, metadata={"Software": None})
    return image.getvalue()
