"""The report's figures, one function each: a run in, a :class:`Plot` out, or None where the run has nothing to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from rarefy.report.figure import (
    AIM,
    FAINT,
    GRID,
    INK,
    OTHER,
    RUN,
    SECOND,
    STYLE,
    Plot,
    count_axis,
    curve,
    depth_colours,
    epochs_axis,
    figure,
    inline,
    label,
    legend_above,
    percent_axis,
)
from rarefy.report.run import Attention, Histogram, Run
from rarefy.report.wording import baseline_name, number, percent, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: So many layers have a line of their own in a legend, and so many a histogram.
NAMED_LINES = 8
HISTOGRAMS = 12

#: A weight of the attention below which its cell stays empty.
FAINTEST = 0.01

#: From so many evaluations on the first ones may lie under the axis of the accuracy.
CLIPPED_EPOCHS = 12


@STYLE
def accuracy(run: Run, baseline: Run | None) -> Plot | None:
    """Test accuracy over the epochs."""
    drawn = figure()
    axes = drawn.subplots()
    said: list[str] = []
    values: list[float] = []
    lines = [] if baseline is None else [(baseline, label(baseline_name(baseline)), OTHER, "--")]
    for source, name, colour, style in [*lines, (run, "this run", RUN, "-")]:
        x, y = curve([record.epoch for record in source.evals], [record.test_accuracy for record in source.evals])
        if len(x):
            marker = "o" if len(x) <= 30 else ""
            axes.plot(x, y, style, color=colour, marker=marker, markersize=3.5, label=f"{name}: {percent(y[-1])}")
            said.append(f"{name} from {percent(y[0])} to {percent(y[-1])}")
            values.extend(y[np.isfinite(y)].tolist())
    if not values:
        return None
    # The first epochs are far below what matters, the last few tenths of a point: let them begin under the axis.
    low, high = float(np.quantile(values, 0.2)), max(values)
    room = 0.15 * (high - low) + 0.001
    caption = "On the test set."
    if len(run.evals) >= CLIPPED_EPOCHS and min(values) < low - room:
        axes.set_ylim(low - room, high + room)
        caption += f" The axis begins at {percent(low - room)}; earlier epochs lie below it."
    percent_axis(axes.yaxis)
    epochs_axis(axes)
    legend_above(axes)
    return inline("Test accuracy", caption, f"Test accuracy over the epochs: {'; '.join(said)}.", drawn)


@STYLE
def perplexity(run: Run, baseline: Run | None) -> Plot | None:
    """Perplexity on the validation set over the epochs."""
    drawn = figure()
    axes = drawn.subplots()
    said: list[str] = []
    lines = [] if baseline is None else [(baseline, label(baseline_name(baseline)), OTHER, "--")]
    for source, name, colour, style in [*lines, (run, "this run", RUN, "-")]:
        x, y = curve([record.epoch for record in source.evals], [record.valid_perplexity for record in source.evals])
        if len(x):
            marker = "o" if len(x) <= 30 else ""
            axes.plot(x, y, style, color=colour, marker=marker, markersize=3.5, label=f"{name}: {y[-1]:.2f}")
            said.append(f"{name} from {y[0]:.2f} to {y[-1]:.2f}")
    if not said:
        return None
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    axes.yaxis.set_minor_formatter("{x:g}")
    epochs_axis(axes)
    legend_above(axes)
    caption = "Of a token, on the validation set; the axis is logarithmic."
    return inline("Perplexity", caption, f"Perplexity over the epochs: {'; '.join(said)}.", drawn)


@STYLE
def sparsity(run: Run) -> Plot | None:
    """Sparsity and the inference FLOPs that remain, with the target and the controller's aim."""
    if run.is_dense:
        return None
    drawn = figure()
    axes = drawn.subplots()
    epochs = [record.epoch for record in run.train]
    x, y = curve(epochs, [record.sparsity for record in run.train])
    if not len(x):
        return None
    alt = f"Sparsity over the epochs, from {percent(y[0])} to {percent(y[-1])}"
    axes.plot(x, y, color=RUN, label="sparsity")
    x, y = curve(epochs, [record.inference_flops_ratio for record in run.train])
    if len(x):
        axes.plot(x, y, color=SECOND, label="inference FLOPs left")
        alt += f"; inference FLOPs left, from {percent(y[0])} to {percent(y[-1])}"
    x, y = curve(epochs, [record.target_sparsity for record in run.train])
    if len(x):
        axes.plot(x, y, ":", color=AIM, label="aim", linewidth=1.5)
    if run.target is not None and run.target_kind in ("sparsity", "flops"):
        axes.axhline(run.target, color=AIM, linestyle="--", linewidth=1.1, label=f"target {percent(run.target)}")
        alt += f"; the target is {percent(run.target)} {'sparsity' if run.target_kind == 'sparsity' else 'FLOPs'}"
    axes.set_ylim(0, 1)
    percent_axis(axes.yaxis)
    epochs_axis(axes)
    legend_above(axes, columns=2)
    caption = "The share of weights that are zero, and the share of the dense inference FLOPs that remains."
    if len(x):
        caption += " The dotted line is what the controller aimed at."
    return inline("Sparsity", caption, f"{alt}.", drawn)


@STYLE
def loss(run: Run, baseline: Run | None) -> Plot | None:
    """Training loss, smoothed, and test loss."""
    drawn = figure()
    axes = drawn.subplots()
    said = []
    lines = [] if baseline is None else [(baseline, f"{label(baseline_name(baseline))}, training", OTHER, "--")]
    for source, name, colour, style in [*lines, (run, "training", RUN, "-")]:
        x, y = curve([record.epoch for record in source.train], [record.loss for record in source.train], most=1000)
        if not len(x):
            continue
        if source is run:
            axes.plot(*curve(x.tolist(), y.tolist()), color=FAINT, linewidth=0.7)
        window = max(1, len(y) // 40)
        mean = np.ones(window) / window
        axes.plot(
            *curve(np.convolve(x, mean, "valid").tolist(), np.convolve(y, mean, "valid").tolist()),
            linestyle=style,
            color=colour,
            label=name,
        )
        said.append(f"{name} from {number(y[0])} to {number(y[-1])}")
    x, y = curve([record.epoch for record in run.evals], [record.test_loss for record in run.evals])
    if len(x):
        axes.plot(x, y, color=AIM, marker="o" if len(x) <= 30 else "", markersize=3.5, linewidth=1.2, label="test")
        said.append(f"test from {number(y[0])} to {number(y[-1])}")
    if not said:
        return None
    epochs_axis(axes)
    legend_above(axes)
    tested = ", and on the test set" if len(x) else ""
    caption = f"In training, with its moving mean in bold{tested}."
    return inline("Loss", caption, f"Loss over the epochs: {'; '.join(said)}.", drawn)


@STYLE
def alpha(run: Run) -> Plot | None:
    """The gradient scale of the masked weights."""
    x, y = curve([record.epoch for record in run.train], [record.alpha for record in run.train])
    if not len(x):
        return None
    drawn = figure()
    axes = drawn.subplots()
    axes.plot(x, y, color=RUN, drawstyle="steps-post")
    axes.set_ylim(-0.03, max(1.03, 1.05 * np.nanmax(y, initial=0.0)))
    epochs_axis(axes)
    caption = "The factor on the gradient of masked weights: at 1 they learn as if they were kept, at 0 not at all."
    alt = f"Alpha over the epochs, from {number(y[0])} to {number(y[-1])}."
    return inline("Alpha", caption, alt, drawn)


@STYLE
def thresholds(run: Run) -> Plot | None:
    """The threshold of every layer."""
    values: dict[str, list[tuple[float, float | None]]] = {}
    for record in run.train:
        for layer in record.layers:
            values.setdefault(layer.name, []).append((record.epoch, layer.threshold))
    lines = {name: curve([x for x, _ in points], [y for _, y in points], most=120) for name, points in values.items()}
    lines = {name: line for name, line in lines.items() if len(line[0])}
    if not lines:
        return None
    ends = {name: float(y[-1]) for name, (_, y) in lines.items()}
    highest, lowest = max(ends, key=ends.__getitem__), min(ends, key=ends.__getitem__)

    drawn = figure(height=285)
    axes = drawn.subplots()
    named = {round(i) for i in np.linspace(0, len(lines) - 1, min(len(lines), NAMED_LINES))}
    for i, (colour, (name, (x, y))) in enumerate(zip(depth_colours(len(lines)), lines.items(), strict=True)):
        width = 1.7 if len(lines) <= NAMED_LINES else 1.2
        axes.plot(x, y, color=colour, linewidth=width, label=label(name, 24) if i in named else "")
    every = np.concatenate([y for _, y in lines.values()])
    every = every[np.isfinite(every)]
    if len(every) and every.min() > 0 and every.max() > 20 * every.min():
        axes.set_yscale("log")
        count_axis(axes.yaxis)
    epochs_axis(axes)
    legend_above(axes, columns=2)
    when = "At the end" if run.summary else "So far"
    caption = f"{when}: highest in {highest} ({number(ends[highest])}), lowest in {lowest} ({number(ends[lowest])})."
    if len(lines) > NAMED_LINES:
        caption = f"All {len(lines)} layers; the colour runs from the first to the last, some are named. {caption}"
    return inline("Thresholds", caption, f"Threshold of {len(lines)} layers over the epochs. {caption}", drawn)


@STYLE
def work(run: Run) -> Plot | None:
    """The three products of a training step, each as a share of its dense FLOPs."""
    flops = {layer.name: layer.dense_flops or 0.0 for layer in run.layers}
    shares: list[float | None] = []
    for record in run.train:
        known = [
            (flops.get(layer.name, 0.0), layer.weight_grad_density)
            for layer in record.layers
            if layer.weight_grad_density is not None
        ]
        total = sum(size for size, _ in known)
        shares.append(sum(size * density for size, density in known) / total if total else None)
    epochs = [record.epoch for record in run.train]
    x, y = curve(epochs, [record.inference_flops_ratio for record in run.train])
    backward_x, backward_y = curve(epochs, shares)
    if not len(x) or not len(backward_x):
        return None
    drawn = figure()
    axes = drawn.subplots()
    axes.plot(x, y, color=SECOND, label="forward and input gradients")
    axes.plot(backward_x, backward_y, color=AIM, label="weight gradients")
    axes.set_ylim(0, 1.03)
    percent_axis(axes.yaxis)
    epochs_axis(axes)
    legend_above(axes, columns=2)
    caption = "The share of the dense FLOPs that each part of a training step needs. Counted, not timed."
    if run.summary is not None and run.summary.training_flops_ratio is not None:
        caption += f" Over the whole run: {percent(run.summary.training_flops_ratio)}."
    alt = (
        f"Share of the dense FLOPs of a training step: forward and input gradients from {percent(y[0])} to "
        f"{percent(y[-1])}, weight gradients from {percent(backward_y[0])} to {percent(backward_y[-1])}."
    )
    return inline("Work of a training step", caption, alt, drawn)


def _bars(rows: Sequence[tuple[str, float, float, str]], behind: str, before: str) -> tuple[Figure, Axes]:
    """Horizontal bars, one row a layer: a wide faint one, a narrow one before it, and a word at the end."""
    drawn = figure(height=84 + (18 if len(rows) <= 30 else 15) * len(rows))
    axes = drawn.subplots()
    at = np.arange(len(rows))
    axes.barh(at, [row[1] for row in rows], height=0.78, color=FAINT, alpha=0.55, label=behind)
    axes.barh(at, [row[2] for row in rows], height=0.42, color=RUN, label=before)
    for i, (_, wide, narrow, word) in enumerate(rows):
        axes.annotate(word, (max(wide, narrow), i), (3, 0), textcoords="offset points", va="center", fontsize=9.5)
    axes.set_yticks(at, [label(row[0], 24) for row in rows])
    axes.tick_params("y", length=0, labelsize=10)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.14 * max([*(row[1] for row in rows), *(row[2] for row in rows), 1e-9]))
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    return drawn, axes


@STYLE
def densities(run: Run) -> Plot | None:
    """The density of each layer at the start and at the end."""
    rows = [
        (layer.name, layer.initial_density or 0.0, layer.density, percent(layer.density))
        for layer in run.layers
        if layer.density is not None
    ]
    if run.is_dense or not rows:
        return None
    drawn, axes = _bars(rows, "at the start", "at the end" if run.summary else "so far")
    legend_above(axes)
    axes.set_xticks(np.linspace(0, 1, 6))
    percent_axis(axes.xaxis)
    least, most = min(rows, key=lambda row: row[2]), max(rows, key=lambda row: row[2])
    alt = f"Density of {len(rows)} layers: least in {least[0]} ({least[3]}), most in {most[0]} ({most[3]})."
    return inline("Density by layer", "The share of each layer's weights that is not zero.", alt, drawn)


@STYLE
def flops(run: Run) -> Plot | None:
    """The inference FLOPs of each layer, dense and kept."""
    rows = []
    for layer in run.layers:
        if layer.dense_flops is not None and layer.inference_flops is not None:
            kept = layer.inference_flops / layer.dense_flops if layer.dense_flops else None
            word = short(layer.dense_flops) if run.is_dense else percent(kept)
            rows.append((layer.name, layer.dense_flops, layer.inference_flops, word))
    if not rows:
        return None
    drawn, axes = _bars(rows, "dense", "kept")
    if not run.is_dense:
        legend_above(axes)
    count_axis(axes.xaxis)
    most = max(rows, key=lambda row: row[2])
    caption = (
        f"For one input{'' if run.is_dense else ', with the kept share at the end of each bar'}. Counted, not timed."
    )
    alt = f"Inference FLOPs of {len(rows)} layers, dense and kept; most are kept in {most[0]}: {short(most[2])}."
    return inline("Inference FLOPs by layer", caption, alt, drawn)


def histograms(run: Run) -> list[Plot]:
    """The magnitudes of the raw weights about the threshold, for the largest layers in the network's order."""
    largest = sorted(run.histograms, key=lambda histogram: -sum(histogram.counts))[:HISTOGRAMS]
    return [_histogram(histogram) for histogram in run.histograms if histogram in largest]


@STYLE
def _histogram(histogram: Histogram) -> Plot:
    edges, counts, threshold = np.array(histogram.edges), np.array(histogram.counts), histogram.threshold
    drawn = figure(height=150, width=230)
    axes = drawn.subplots()
    axes.set_yscale("log")
    if threshold is not None and edges[0] < threshold < edges[-1]:
        split = int(np.searchsorted(edges, threshold))  # the bin with the threshold becomes two of its height
        if edges[split] != threshold:
            edges = np.insert(edges, split, threshold)
            counts = np.insert(counts, split, counts[split - 1])
    below = edges[1:] <= threshold if threshold is not None else np.zeros(len(counts), dtype=bool)
    floor = 0.7  # an empty bin, on a logarithmic axis
    for chosen, colour in ((below, OTHER), (~below, RUN)):
        if chosen.any():
            first, last = np.flatnonzero(chosen)[[0, -1]]
            heights = np.maximum(counts[first : last + 1], floor)
            axes.stairs(heights, edges[first : last + 2], baseline=floor, fill=True, color=colour, linewidth=0)
    alt = f"Histogram of the weights' magnitudes in {histogram.name}"
    if threshold is not None:
        axes.axvline(threshold, color=AIM, linewidth=1.4)
        alt += f", threshold {number(threshold)}"
    axes.set_ylim(bottom=floor)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=4)
    count_axis(axes.yaxis)
    axes.tick_params(labelsize=10)
    axes.set_title(label(histogram.name, 28), fontsize=11, color=INK, loc="left")
    return inline(histogram.name, "", f"{alt}.", drawn)


def attentions(run: Run) -> list[Plot]:
    """What the decoder looked at as it said translations."""
    return [_attention(attention, number) for number, attention in enumerate(run.attentions, start=1)]


@STYLE
def _attention(attention: Attention, number: int) -> Plot:
    weights = np.clip(np.array(attention.weights), 0.0, 1.0)
    rows, columns = weights.shape
    drawn = figure(height=95 + 15 * rows)
    axes = drawn.subplots()
    # Each cell is a rectangle: in the page's colour, and sharp at any size. The faintest are left out.
    for row, column in np.argwhere(weights >= FAINTEST):
        cell = (column - 0.5, row - 0.5), 1.0, 1.0
        axes.add_patch(Rectangle(*cell, facecolor=RUN, alpha=float(weights[row, column]), linewidth=0))
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks(range(columns), [label(piece, 14) for piece in attention.source], rotation=60, ha="left")
    axes.set_yticks(range(rows), [label(piece, 14) for piece in attention.target])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9.5)
    axes.grid(visible=False)
    axes.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, color=GRID, linewidth=0.3)
    axes.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, color=GRID, linewidth=0.3)
    for spine in axes.spines.values():
        spine.set_visible(False)
    pairs = [(attention.target[row], attention.source[int(weights[row].argmax())]) for row in range(rows)]
    alt = "; ".join(f"{said} looks most at {seen}" for said, seen in pairs)
    return inline(f"Sentence {number}", _text(attention.source), f"Attention of a translation: {alt}.", drawn)


def _text(pieces: Sequence[str]) -> str:
    """The sentence that byte-pair pieces make, without the end."""
    return "".join(pieces[:-1]).replace("\u2581", " ").strip()
