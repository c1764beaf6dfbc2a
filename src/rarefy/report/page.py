"""The page: what is said about a run, in the template's order, and the file written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from rarefy._files import write_atomically
from rarefy.report import plots
from rarefy.report.figure import Plot
from rarefy.report.reading import load
from rarefy.report.run import Layer, Run
from rarefy.report.wording import (
    NONE,
    baseline_name,
    duration,
    headline,
    milliseconds,
    number,
    percent,
    points,
    short,
    verdict,
    whole,
)

#: What a FLOP is under each convention of `rarefy.cost`.
CONVENTIONS = {
    "macs": "One multiply-accumulate is one FLOP; biases, normalisations and activation functions do not count.",
    "rigl": "A multiplication and an addition count one FLOP each, and an activation function one for each output.",
}


@dataclass(frozen=True)
class Tile:
    """One figure of the summary: what, how much, and a word on it."""

    label: str
    value: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """One row of the comparison with the baseline."""

    label: str
    run: str
    baseline: str
    difference: str


def write(run: Path, *, baseline: Path | None = None, output: Path | None = None) -> Path:
    """Write the report on a run's folder and return its path, ``RUN/report.html`` unless `output` names another.

    `baseline` is the folder of a run to compare with, usually the dense one. The file is replaced in one step: whoever
    reads it sees the older report or the new one. Raises :class:`RunError` where a folder cannot be read.
    """
    target = Path(run) / "report.html" if output is None else Path(output)
    page = render(load(run), None if baseline is None else load(baseline))
    write_atomically(target, lambda beside: beside.write_text(page, encoding="utf-8", newline="\n"))
    return target


def render(run: Run, baseline: Run | None = None) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rarefy.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, whole=whole, short=short, number=number, markup=Markup, dotted=_dotted)
    layers = [layer for layer in run.layers if layer.parameters is not None]
    histograms = plots.histograms(run)
    return environment.get_template("report.html").render(
        run=run,
        summary=run.summary,
        headline=headline(run, baseline),
        details=_details(run),
        tiles=_tiles(run, baseline),
        training=_present(
            plots.accuracy(run, baseline),
            plots.perplexity(run, baseline),
            plots.sparsity(run),
            plots.loss(run, baseline),
            plots.alpha(run),
            plots.thresholds(run),
            plots.work(run),
        ),
        by_layer=_present(plots.densities(run), plots.flops(run)),
        attentions=plots.attentions(run),
        histograms=histograms,
        histograms_left_out=len(run.histograms) - len(histograms),
        layers=layers,
        rest=_rest(run, layers),
        total=_total(run, layers),
        has_thresholds=any(layer.threshold is not None for layer in layers),
        baseline=baseline,
        baseline_name=baseline_name(baseline) if baseline else "",
        comparison=list(_comparison(run, baseline)) if baseline else [],
        differences=_differences(run.recipe, baseline.recipe) if baseline else [],
        convention=_convention(run),
        environment=[(key, _plain(value)) for key, value in run.environment.items() if key != "command"],
        command=_plain(run.environment.get("command", "")),
    )


def _present(*drawn: Plot | None) -> list[Plot]:
    return [plot for plot in drawn if plot is not None]


def _dotted(name: str) -> Markup:
    """A layer's name that may be broken after its dots."""
    return Markup(".<wbr>").join(escape(part) for part in name.split("."))


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _details(run: Run) -> list[str]:
    """The line under the headline: what was trained, on what, for how long."""
    seed = run.summary.seed if run.summary else run.recipe.get("seed")
    return [
        run.method or "no method",
        *([run.model] if run.model else []),
        *([run.data] if run.data else []),
        *([f"{run.epochs:g} epochs"] if run.epochs else []),
        *([f"seed {seed}"] if seed is not None else []),
    ]


def _convention(run: Run) -> str:
    named = run.summary.convention if run.summary else None
    if named is None:
        return ""
    return f"Convention “{named}”. {CONVENTIONS.get(named, '')}".rstrip()


def _tiles(run: Run, baseline: Run | None) -> list[Tile]:
    tiles = []
    summary = run.summary
    if run.test_accuracy is not None:
        notes = []
        if summary and summary.test_top5 is not None:
            notes.append(f"among the first five {percent(summary.test_top5)}")
        if summary and summary.best_test_accuracy is not None:
            notes.append(f"best epoch, picked on the test set, {percent(summary.best_test_accuracy)}")
        if baseline and baseline.test_accuracy is not None:
            final = "" if summary else " at its end"
            notes.append(f"{baseline_name(baseline)} {percent(baseline.test_accuracy)}{final}")
        tiles.append(Tile("Test accuracy", percent(run.test_accuracy), tuple(notes)))
    if summary is not None and summary.test_bleu is not None:
        other = baseline.summary.test_bleu if baseline and baseline.summary else None
        against = f"{baseline_name(baseline)} {other:.2f}" if baseline and other is not None else ""
        tiles.append(Tile("Test BLEU", f"{summary.test_bleu:.2f}", _noted("greedy, by sacreBLEU", against)))
    if run.valid_perplexity is not None:
        best = summary.best_valid_perplexity if summary else None
        note = f"best epoch {best:.2f}" if best is not None else ""
        tiles.append(Tile("Perplexity", f"{run.valid_perplexity:.2f}", _noted("of the validation set", note)))
    if summary is not None and summary.activation_share is not None:
        measured = ""
        if summary.activation_seconds is not None and summary.batch_seconds is not None:
            alone, batch = (milliseconds(1e3 * t) for t in (summary.activation_seconds, summary.batch_seconds))
            measured = f"{alone} of {batch}, forward and backward"
        how = "tanh and sigmoid timed by themselves"
        tiles.append(Tile("Activations", percent(summary.activation_share), _noted(how, measured)))
    if not run.is_dense:
        tiles.append(Tile("Zero weights", percent(run.sparsity), _noted(verdict(run, "sparsity"))))
    ratio = run.inference_flops_ratio
    if ratio is not None and not run.is_dense:
        counted = f"{short(summary.inference_flops)} of {short(summary.dense_flops)}" if summary else ""
        tiles.append(Tile("Inference FLOPs left", percent(ratio), _noted(counted, verdict(run, "flops"))))
    if summary is None:
        return tiles
    if run.is_dense and summary.dense_flops is not None:
        tiles.append(Tile("Inference FLOPs", short(summary.dense_flops), ("for one input",)))
    if summary.latency_ms is not None:
        planned = f"{milliseconds(summary.latency_ms)} by the table measured before training"
        took = "measured in the engine, one input, one thread" if summary.measured_ms is not None else ""
        shown = milliseconds(summary.measured_ms or summary.latency_ms)
        tiles.append(Tile("Latency", shown, _noted(took, planned, verdict(run, "ms"))))
    if summary.training_flops_ratio is not None and not run.is_dense:
        tiles.append(Tile("Training FLOPs", percent(summary.training_flops_ratio), ("of dense training, counted",)))
    if summary.parameters is not None:
        kept = summary.nonzeros if summary.nonzeros is not None else summary.parameters
        note = f"of {whole(summary.parameters)}" if kept != summary.parameters else "none pruned"
        tiles.append(Tile("Parameters" if run.is_dense else "Parameters left", whole(kept), (note,)))
    if summary.seconds is not None:
        steps = f"measured, {whole(summary.steps)} steps" if summary.steps is not None else "measured"
        saved = summary.seconds_saved
        by_zeros = f"about {duration(saved)} saved by sparse steps" if saved is not None else ""
        tiles.append(Tile("Training time", duration(summary.seconds), _noted(steps, by_zeros)))
    return tiles


def _noted(*notes: str) -> tuple[str, ...]:
    return tuple(note for note in notes if note)


#: The columns of the layers' table that are added up.
_ADDED: tuple[Callable[[Layer], float | None], ...] = (
    lambda layer: layer.parameters,
    lambda layer: layer.nonzeros,
    lambda layer: layer.dense_flops,
    lambda layer: layer.inference_flops,
)


def _total(run: Run, layers: list[Layer]) -> list[float]:
    """Parameters, nonzeros, dense FLOPs and kept FLOPs of the network: the summary's, else the sum over its layers."""
    sums = [sum(column(layer) or 0 for layer in layers) for column in _ADDED]
    summary = run.summary
    if summary is None:
        return sums
    said = (summary.parameters, summary.nonzeros, summary.dense_flops, summary.inference_flops)
    return [total if total is not None else added for total, added in zip(said, sums, strict=True)]


def _rest(run: Run, layers: list[Layer]) -> list[float]:
    """What the network has beside the listed layers, in the same four counts; empty if nothing."""
    rest = [
        total - sum(column(layer) or 0 for layer in layers)
        for total, column in zip(_total(run, layers), _ADDED, strict=True)
    ]
    return rest if any(rest) else []


def _comparison(run: Run, baseline: Run) -> Iterator[Comparison]:
    """The rows of the table against the baseline, once the run has finished; a row needs a value of both."""

    def shares(name: str, ours: float | None, theirs: float | None) -> Iterator[Comparison]:
        if ours is not None and theirs is not None:
            yield Comparison(name, percent(ours), percent(theirs), points(ours - theirs))

    def amounts(
        name: str, ours: float | None, theirs: float | None, say: Callable[[float | None], str] = short
    ) -> Iterator[Comparison]:
        if ours is not None and theirs is not None:
            times = f"\u00d7 {ours / theirs:.3g}" if theirs else NONE
            yield Comparison(name, say(ours), say(theirs), "the same" if ours == theirs else times)

    if (a := run.summary) is None:
        return
    yield from shares("Test accuracy", run.test_accuracy, baseline.test_accuracy)
    if (b := baseline.summary) is None:
        return
    yield from amounts("Test BLEU", a.test_bleu, b.test_bleu, number)
    yield from amounts("Perplexity, validation set", a.valid_perplexity, b.valid_perplexity, number)
    yield from shares("Among the first five", a.test_top5, b.test_top5)
    yield from shares("Best epoch (picked on the test set)", a.best_test_accuracy, b.best_test_accuracy)
    yield from shares("Zero weights", a.sparsity or 0.0, b.sparsity or 0.0)
    yield from amounts("Parameters", a.parameters, b.parameters, whole)
    yield from amounts("Parameters left", a.nonzeros, b.nonzeros, whole)
    if a.convention == b.convention:
        yield from amounts("Inference FLOPs", a.inference_flops, b.inference_flops)
    yield from amounts("Epochs", a.epochs, b.epochs, number)
    yield from amounts("Training time, measured", a.seconds, b.seconds, duration)


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, _plain(value)


def _differences(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """What the two recipes say differently, beside the name and the method: key, ours, theirs."""
    a, b = dict(_flat(ours)), dict(_flat(theirs))
    return [
        (key, a.get(key, NONE), b.get(key, NONE))
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key) and key.split(".")[0] not in ("name", "method")
    ]
