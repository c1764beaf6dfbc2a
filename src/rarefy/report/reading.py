"""Reading the folder that a training run leaves behind.

``recipe.yaml`` and ``metrics.jsonl`` make a folder a run; ``summary.json`` is there once it has finished, and
``environment.json``, ``histograms.json`` and ``attention.json`` where there was something to write. Shares (sparsity,
density, accuracy, FLOPs ratios) are in [0, 1].
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from rarefy._yaml import read_yaml
from rarefy.report.run import Attention, EvalRecord, Histogram, Layer, LayerRecord, Run, Sample, Summary, TrainRecord


class RunError(ValueError):
    """The folder is not a run, or a file in it cannot be read; the message says which and what to do."""


_T = TypeVar("_T")


class _Fields:
    """A JSON object and where it stands, so that a value of the wrong type is named in the error."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise RunError(f"{where}: expected a JSON object, got {value!r:.80}")
        self.value = value
        self.where = where

    def number(self, key: str) -> float | None:
        value = self.value.get(key)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return None if value is None else float(value)
        raise RunError(f"{self.where}: {key} must be a number, got {value!r:.80}")

    def integer(self, key: str) -> int | None:
        value = self.number(key)
        if value is None or value.is_integer():
            return None if value is None else int(value)
        raise RunError(f"{self.where}: {key} must be a whole number, got {value!r}")

    def text(self, key: str) -> str | None:
        value = self.value.get(key)
        if value is None or isinstance(value, str):
            return value
        raise RunError(f"{self.where}: {key} must be text, got {value!r:.80}")

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.value.get(key)
        if isinstance(value, list) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value):
            return tuple(float(x) for x in value)
        raise RunError(f"{self.where}: {key} must be a list of numbers, got {value!r:.80}")

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.value.get(key)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise RunError(f"{self.where}: {key} must be a list of texts, got {value!r:.80}")

    def rows(self, key: str, count: int, width: int) -> tuple[tuple[float, ...], ...]:
        value = self.value.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise RunError(f"{self.where}: {key} must be a list of {count} rows, got {value!r:.80}")
        rows = tuple(_Fields({key: row}, self.where).numbers(key) for row in value)
        if any(len(row) != width for row in rows):
            raise RunError(f"{self.where}: {key} must have {width} numbers in each row, got {value!r:.80}")
        return rows

    def objects(self, key: str) -> list[_Fields]:
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise RunError(f"{self.where}: {key} must be a list, got {value!r:.80}")
        return [_Fields(item, f"{self.where}: {key}[{i}]") for i, item in enumerate(value)]

    def read(self, kind: type[_T], /, **given: object) -> _T:
        """A dataclass of this object's values: those not given are read by the type of their field."""
        readers = {"float": self.number, "int": self.integer, "str": self.text}
        values = dict(given)
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # every kind here is a dataclass
            if field.name not in given:
                wanted, optional, _ = str(field.type).partition(" | None")
                values[field.name] = readers[wanted](field.name)
                if values[field.name] is None and not optional:
                    raise RunError(f"{self.where}: {field.name} is missing")
        return kind(**values)


def _train_record(fields: _Fields) -> TrainRecord:
    return fields.read(TrainRecord, layers=tuple(layer.read(LayerRecord) for layer in fields.objects("layers")))


def _layer(fields: _Fields) -> Layer:
    shape = tuple(int(size) for size in fields.numbers("shape")) if "shape" in fields.value else ()
    return fields.read(Layer, kind=fields.text("kind") or "", shape=shape)


def _summary(fields: _Fields) -> Summary:
    layers = tuple(_layer(layer) for layer in fields.objects("layers"))
    samples = tuple(sample.read(Sample) for sample in fields.objects("samples"))
    return fields.read(Summary, layers=layers, samples=samples)


def _histogram(fields: _Fields) -> Histogram:
    edges, counts = fields.numbers("edges"), fields.numbers("counts")
    if not counts or len(edges) != len(counts) + 1 or any(a >= b for a, b in itertools.pairwise(edges)):
        raise RunError(
            f"{fields.where}: n counts need n + 1 rising edges, got {len(counts)} counts and {len(edges)} edges"
        )
    return fields.read(Histogram, edges=edges, counts=counts)


def _attention(fields: _Fields) -> Attention:
    source, target = fields.texts("source"), fields.texts("target")
    if not source or not target:
        raise RunError(f"{fields.where}: source and target must have a piece at least")
    return Attention(source, target, fields.rows("weights", len(target), len(source)))


def _json(path: Path) -> _Fields | None:
    """The JSON object in this file; None where there is no such file."""
    try:
        return _Fields(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path}: not JSON ({error}); mend the file, or delete it to report without it") from error


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
            fields = _Fields(json.loads(line), where)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no line end: being written just now, or cut when the run was stopped
                break
            raise RunError(f"{where}: not JSON ({error}); delete that line and report again") from error
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
    run = Path(run)
    if not run.is_dir():
        raise RunError(f"{run} is not a folder; expected the folder that `rarefy train` wrote")
    if not (run / "recipe.yaml").is_file():
        raise RunError(f"{run} is not a run's folder: it has no recipe.yaml; expected what `rarefy train` wrote")
    if not (run / "metrics.jsonl").is_file():
        raise RunError(f"{run} has no metrics.jsonl: the run has logged nothing yet, or the file was lost")

    try:
        recipe = read_yaml(run / "recipe.yaml")
    except ValueError as error:
        raise RunError(str(error)) from error
    recipe_text = (run / "recipe.yaml").read_text(encoding="utf-8")
    if not isinstance(recipe, dict):
        raise RunError(f"{run / 'recipe.yaml'}: expected a mapping of name, data, model, ...; got {recipe!r:.80}")

    train, evals = _metrics(run / "metrics.jsonl")
    summary = _json(run / "summary.json")
    if summary is None and not train and not evals:
        raise RunError(f"{run} has no records yet: report again once the run has logged its first step")
    histograms = _json(run / "histograms.json")
    attentions = _json(run / "attention.json")
    environment = _json(run / "environment.json")

    method = recipe.get("method")
    planned = _Fields(method if isinstance(method, dict) else {}, f"{run / 'recipe.yaml'}: method")
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
