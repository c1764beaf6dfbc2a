"""The comparison as one self-contained HTML page: tables of means, and accuracy against what it costs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from rarefy import report
from rarefy._files import write_atomically
from rarefy.compare.plan import Comparison
from rarefy.compare.table import Mean, means, rows, write_csv
from rarefy.report.figure import (
    GRID,
    INK,
    STYLE,
    Plot,
    curve,
    depth_colours,
    figure,
    inline,
    label,
    legend_above,
    percent_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: So many trajectories and layers' densities are drawn at most, the most accurate methods first.
MOST_LINES = 10

#: A method this far under the best is left out of the figures of accuracy, whose axis it would stretch; in points.
FAR_BELOW = 6.0

_COSTS = {"inference": "inference_flops", "training": "training_flops"}


def write(comparison: Comparison, folder: Path, *, csv: Path | None = None, html: Path | None = None) -> Path:
    """Write the finished runs as ``compare.csv`` and ``compare.html`` in ``folder``, or where told; gives the page.

    Raises ValueError if no run is finished.
    """
    content = rows(comparison, folder)
    write_csv(csv or folder / "compare.csv", content)
    target = html or folder / "compare.html"
    page = render(comparison, content, folder)
    write_atomically(target, lambda path: path.write_text(page, encoding="utf-8"))
    return target


def render(comparison: Comparison, content: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """The page as HTML."""
    found = means(content)
    dense = [mean for mean in found if mean.inference_flops == 1]
    targets = list(dict.fromkeys(mean.target for mean in found if mean.target is not None))
    plots = []
    for target in targets:
        same = [mean for mean in found if mean.target == target]
        at = _named(target, comparison.budget)
        # At equal FLOPs the points of one target are one above the other: they make curves instead, below.
        kinds = [kind for kind in _COSTS if kind != "inference" or comparison.budget != "flops"]
        plots += [_against(kind, at, same, dense) for kind in kinds]
        plots.append(_layers(at, target if comparison.budget == "sparsity" else None, same, content))
    if comparison.budget == "flops" and targets:
        plots.append(_curves([mean for mean in found if mean.target is not None], dense))
    runs = _first_runs(comparison, found, folder)
    if runs:
        plots.append(_trajectories(runs))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rarefy.compare"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markup"] = Markup
    return environment.get_template("compare.html").render(
        name=comparison.name,
        done=len(content),
        planned=len(comparison.jobs),
        about={key: content[0][key] for key in ("model", "epochs", "device", "cpu", "torch", "rarefy")},
        tables=[
            (_named(target, comparison.budget), [_cells(mean) for mean in found if mean.target == target])
            for target in [None, *targets]
        ],
        conventions=sorted({(row["method"], row["training_flops_convention"]) for row in content}),
        options=sorted({(row["label"], row["method"], row["options"]) for row in content}),
        plots=plots,
    )


def _named(target: float | None, budget: str) -> str | None:
    """A target in words."""
    if target is None:
        return None
    return (
        f"{target:g} ms" if budget == "ms" else f"{100 * target:g} %" + (" of the FLOPs" if budget == "flops" else "")
    )


def _cells(mean: Mean) -> list[str]:
    spread = "" if math.isnan(mean.interval) else f" ± {mean.interval:.2f}"
    return [
        mean.label,
        f"{mean.accuracy:.2f}{spread}",
        str(mean.runs),
        f"{100 * mean.sparsity:.2f} %",
        f"{100 * mean.inference_flops:.1f} %",
        f"{100 * mean.training_flops:.1f} %",
        f"{mean.seconds:.0f} s",
    ]


def _points(axes: Axes, kind: str, drawn: Sequence[Mean], dense: Sequence[Mean]) -> None:
    for rank, (colour, mean) in enumerate(zip(depth_colours(len(drawn)), drawn, strict=True), start=1):
        error = None if math.isnan(mean.interval) else mean.interval
        x = getattr(mean, _COSTS[kind])
        name = f"{rank}  {label(mean.label, 26)}"
        axes.errorbar([x], [mean.accuracy], yerr=error, fmt="o", color=colour, markersize=4, linewidth=0.7, label=name)
        axes.annotate(str(rank), (x, mean.accuracy), (3, 2), textcoords="offset points", fontsize=8)
    for mean in dense:
        axes.axhline(
            mean.accuracy, color=INK, linestyle="--", linewidth=0.9, label=f"{mean.label}, {mean.accuracy:.2f}"
        )
    accuracies = [mean.accuracy for mean in (*drawn, *dense)]
    room = 0.15 * (max(accuracies) - min(accuracies)) + 0.2
    axes.set_ylim(min(accuracies) - room, max(accuracies) + room)


@STYLE
def _against(kind: str, at: str | None, same: Sequence[Mean], dense: Sequence[Mean]) -> Plot:
    """Mean accuracy with its confidence interval against FLOPs."""
    drawn = figure(height=430, width=640)
    axes = drawn.subplots()
    shown = [mean for mean in same if mean.accuracy >= same[0].accuracy - FAR_BELOW]
    _points(axes, kind, shown, dense)
    axes.set(xlabel=f"{kind} FLOPs, share of dense", ylabel="test accuracy, %")
    percent_axis(axes.xaxis)
    drawn.legend(loc="outside right upper", fontsize=8, labelspacing=0.25, handlelength=1.0)
    hidden = len(same) - len(shown)
    caption = (
        "Mean over the seeds, by rank, and its 95 % confidence interval (cut at the axis) where there are several."
    )
    caption += f" {hidden} more than {FAR_BELOW:g} points under the best: see the table." if hidden else ""
    title = f"Accuracy against {kind} FLOPs at {at}"
    best = ", ".join(f"{mean.label} {mean.accuracy:.2f}" for mean in shown[:5])
    return inline(title, caption, f"{title}; the most accurate are {best}.", drawn)


@STYLE
def _curves(found: Sequence[Mean], dense: Sequence[Mean]) -> Plot:
    """Mean accuracy of each method over the inference FLOPs of all targets."""
    drawn = figure(height=430, width=640)
    axes = drawn.subplots()
    by_label: dict[str, list[Mean]] = {}
    for mean in sorted(found, key=lambda mean: (-mean.inference_flops, -mean.accuracy)):
        by_label.setdefault(mean.label, []).append(mean)
    best = {mean.target: max(m.accuracy for m in found if m.target == mean.target) for mean in found}
    for colour, (name, same) in zip(depth_colours(len(by_label)), by_label.items(), strict=True):
        shown = [mean for mean in same if mean.accuracy >= best[mean.target] - FAR_BELOW]
        x, y = [mean.inference_flops for mean in shown], [mean.accuracy for mean in shown]
        axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.0, label=label(name, 26))
    for mean in dense:
        axes.axhline(
            mean.accuracy, color=INK, linestyle="--", linewidth=0.9, label=f"{mean.label}, {mean.accuracy:.2f}"
        )
    axes.set(xlabel="inference FLOPs, share of dense", ylabel="test accuracy, %")
    percent_axis(axes.xaxis)
    drawn.legend(loc="outside right upper", fontsize=8, labelspacing=0.25, handlelength=1.0)
    title = "Accuracy against inference FLOPs"
    caption = f"Mean over the seeds; points more than {FAR_BELOW:g} under the best at their target are left out."
    return inline(title, caption, f"{title} of {', '.join(by_label)}.", drawn)


@STYLE
def _layers(at: str | None, target: float | None, same: Sequence[Mean], content: Sequence[Mapping[str, Any]]) -> Plot:
    """Sparsity of each layer by method, and that of the network if that is the target."""
    drawn = figure(height=400, width=560)
    axes = drawn.subplots()
    shown = same[:MOST_LINES]
    for colour, mean in zip(depth_colours(len(shown)), shown, strict=True):
        mine = [row for row in content if row["label"] == mean.label and row["target"] == mean.target]
        by_layer: dict[str, list[float]] = {}
        for row in mine:
            for name, density in json.loads(row["layer_densities"]).items():
                by_layer.setdefault(name, []).append(density)
        sparsities = [1.0 - statistics.mean(densities) for densities in by_layer.values()]
        axes.plot(range(len(sparsities)), sparsities, "o-", color=colour, markersize=3, label=label(mean.label, 24))
        axes.set_xticks(range(len(by_layer)), [label(name, 12) for name in by_layer], rotation=60, fontsize=7)
    if target is not None:
        axes.axhline(target, color=GRID, linestyle="--", linewidth=0.9)
    axes.set(ylabel="sparsity", ylim=(0, 1.02))
    percent_axis(axes.yaxis)
    legend_above(axes, columns=2)
    title = f"Sparsity by layer at {at}"
    caption = f"Mean over the seeds; the {len(shown)} most accurate methods, from the first layer to the last."
    return inline(title, caption, f"{title} for {', '.join(mean.label for mean in shown)}.", drawn)


def _first_runs(comparison: Comparison, found: Sequence[Mean], folder: Path) -> dict[str, report.Run]:
    """One run each of the most accurate methods at the first target, or without one where none has any."""
    sparse = [mean for mean in found if mean.training_flops < 1]
    first = next((mean.target for mean in sparse if mean.target is not None), None)
    best = [mean.label for mean in sparse if mean.target == first][:MOST_LINES]
    jobs = [job for job in comparison.jobs if job.label in best and job.target == first and job.seed == 0]
    finished = [job for job in jobs if (folder / job.folder / "summary.json").is_file()]
    return {job.label: report.load(folder / job.folder) for job in finished}


@STYLE
def _trajectories(runs: Mapping[str, report.Run]) -> Plot:
    """Sparsity over the training."""
    drawn = figure(height=400, width=560)
    axes = drawn.subplots()
    for colour, (name, run) in zip(depth_colours(len(runs)), runs.items(), strict=True):
        progress = [record.epoch / (run.epochs or run.epoch or 1.0) for record in run.train]
        x, y = curve(progress, [record.sparsity for record in run.train])
        axes.plot(x, y, color=colour, linewidth=1.2, label=label(name, 24))
    axes.set(ylabel="sparsity", xlabel="training progress", xlim=(0, 1), ylim=(0, 1.02))
    percent_axis(axes.xaxis)
    percent_axis(axes.yaxis)
    legend_above(axes, columns=2)
    return inline("How sparsity grew", "The first seed of each method.", f"Sparsity of {', '.join(runs)}.", drawn)
