"""Reading the folder that a training run leaves behind.

``recipe.yaml`` and ``metrics.jsonl`` make a folder a run; ``summary.json`` is there once it has finished, and
``environment.json``, ``histograms.json`` and ``attention.json`` where there was something to write. Shares (sparsity,
density, accuracy, FLOPs ratios) are in [0, 1].
"""

from __future__ import annotations

import itertools
from pathlib import Path

from rarefy._json import Fields, parse_json, read_fields
from rarefy._yaml import read_yaml
from rarefy.report.run import Attention, EvalRecord, Histogram, Layer, LayerRecord, Run, Sample, Summary, TrainRecord


class RunError(ValueError):
    """The folder is not a run, or a file in it cannot be read; the message says which and what to do."""


#: What to do about a file that is damaged, and about a line of the metrics.
_MEND, _DELETE = "mend the file, or delete it to report without it", "delete that line and report again"


def _train_record(fields: Fields) -> TrainRecord:
    return fields.read(TrainRecord, layers=tuple(layer.read(LayerRecord) for layer in fields.objects("layers")))


def _layer(fields: Fields) -> Layer:
    shape = tuple(int(size) for size in fields.numbers("shape")) if "shape" in fields.value else ()
    return fields.read(Layer, kind=fields.text("kind") or "", shape=shape)


def _summary(fields: Fields) -> Summary:
    layers = tuple(_layer(layer) for layer in fields.objects("layers"))
    samples = tuple(sample.read(Sample) for sample in fields.objects("samples"))
    return fields.read(Summary, layers=layers, samples=samples)


def _histogram(fields: Fields) -> Histogram:
    edges, counts = fields.numbers("edges"), fields.numbers("counts")
    if not counts or len(edges) != len(counts) + 1 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise fields.wrong(f"n counts need n + 1 rising edges, got {len(counts)} counts and {len(edges)} edges")
    return fields.read(Histogram, edges=edges, counts=counts)


def _attention(fields: Fields) -> Attention:
    source, target = fields.texts("source"), fields.texts("target")
    if not source or not target:
        raise fields.wrong("source and target must have a piece at least")
    return Attention(source, target, fields.rows("weights", len(target), len(source)))


def _json(path: Path) -> Fields | None:
    """The JSON object in this file; None where there is no such file."""
    try:
        return read_fields(path, _MEND)
    except FileNotFoundError:
        return None


def _metrics(path: Path) -> tuple[tuple[TrainRecord, ...], tuple[EvalRecord, ...]]:
    """Both kinds of records in order of step; other events are left to whoever wrote them."""
    train: list[TrainRecord] = []
    evals: list[EvalRecord] = []
    last = -1
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = parse_json(line, where, _DELETE)
        except ValueError:
            if number == len(lines):  # no line end: being written just now, or cut when the run was stopped
                break
            raise
        fields = Fields(value, where, _DELETE, finite=False)  # a loss need not be
        event = fields.value.get("event")
        if event not in ("train", "eval"):
            continue
        record = _train_record(fields) if event == "train" else fields.read(EvalRecord)
        if record.step < last:  # resumed from a checkpoint: what came after it was run again
            train = [old for old in train if old.step < record.step]
            evals = [old for old in evals if old.step < record.step]
        last = record.step
        if isinstance(record, TrainRecord):
            train.append(record)
        else:
            evals.append(record)
    return tuple(train), tuple(evals)


def load(run: Path) -> Run:
    """Read a run's folder, finished or not.

    A last line of ``metrics.jsonl`` without its line end is left out if it is not whole; where a resumed run logged a
    step again, the later record counts. Raises RunError where the folder is not a run, has no record yet or holds a
    file that cannot be read.
    """
    try:
        return _read(Path(run))
    except ValueError as error:
        raise RunError(str(error)) from error


def _read(run: Path) -> Run:
    if not run.is_dir():
        raise ValueError(f"{run} is not a folder; expected the folder that `rarefy train` wrote")
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} is not a run's folder: it has no recipe.yaml; expected what `rarefy train` wrote")
    if not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run} has no metrics.jsonl: the run has logged nothing yet, or the file was lost")

    recipe = read_yaml(run / "recipe.yaml")
    recipe_text = (run / "recipe.yaml").read_text(encoding="utf-8")
    if not isinstance(recipe, dict):
        raise ValueError(f"{run / 'recipe.yaml'}: expected a mapping of name, data, model, ...; got {recipe!r:.80}")

    train, evals = _metrics(run / "metrics.jsonl")
    summary = _json(run / "summary.json")
    if summary is None and not train and not evals:
        raise ValueError(f"{run} has no records yet: report again once the run has logged its first step")
    histograms = _json(run / "histograms.json")
    attentions = _json(run / "attention.json")
    environment = _json(run / "environment.json")

    method = recipe.get("method")
    planned = Fields(method if isinstance(method, dict) else {}, f"{run / 'recipe.yaml'}: method")
    if summary:
        target, kind = summary.number("target"), summary.text("target_kind")
    else:
        options = {"sparsity": "target", "flops": "target_flops", "ms": "target_ms"}
        targets = {kind: planned.number(option) for kind, option in options.items()}
        kind, target = next((pair for pair in targets.items() if pair[1] is not None), (None, None))

    def called(key: str) -> str:
        """The name of the model, the data or the method: the summary's word, else the recipe's."""
        part = recipe.get(key)
        named = part.get("name") if isinstance(part, dict) else part
        return (summary.text(key) if summary else None) or str(named or "")

    return Run(
        path=run,
        name=called("name") or run.resolve().name,
        method=called("method"),
        model=called("model"),
        data=called("data"),
        target=target,
        target_kind=kind,
        recipe=recipe,
        recipe_text=recipe_text,
        environment=dict(environment.value) if environment else {},
        train=train,
        evals=evals,
        summary=_summary(summary) if summary else None,
        histograms=tuple(_histogram(item) for item in histograms.objects("layers")) if histograms else (),
        attentions=tuple(_attention(item) for item in attentions.objects("sentences")) if attentions else (),
    )
