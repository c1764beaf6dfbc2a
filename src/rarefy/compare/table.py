"""The finished runs of a comparison as rows, as a CSV file, and as means with confidence intervals."""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy import _files, sparse
from rarefy._json import read_fields
from rarefy.compare.plan import BUDGETS, Comparison, Job

#: Two-sided 95 % quantiles of Student's t distribution by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}


@dataclass(frozen=True)
class _Finished:
    """What the table takes of a run's summary."""

    test_accuracy: float
    sparsity: float
    inference_flops_ratio: float
    training_flops_ratio: float
    seconds: float
    model: str
    epochs: int


@dataclass(frozen=True)
class _Layer:
    name: str
    density: float


@dataclass(frozen=True)
class _About:
    """What the table takes of a run's environment."""

    cpu: str
    native_isa: str
    torch: str
    rarefy: str
    python: str
    date: str
    device: str
    gpu: str | None


def rows(comparison: Comparison, folder: Path) -> list[dict[str, Any]]:
    """Make a row a finished run, in the comparison's order.

    ``test_accuracy`` is in percent; ``sparsity`` and the two FLOPs are shares, of the sparsified weights and of the
    dense network's; ``training_flops_convention`` says what the method's weight gradient is counted at;
    ``layer_densities`` is JSON; ``budget`` says what ``target`` is of, and ``device`` what trained: "cpu", or the
    GPU's name.

    Raises ValueError, naming the file, where one of a finished run is damaged.
    """
    finished = [job for job in comparison.jobs if (folder / job.folder / "summary.json").is_file()]
    return [_row(job, folder / job.folder, comparison) for job in finished]


def _row(job: Job, path: Path, comparison: Comparison) -> dict[str, Any]:
    advice = f"delete {path / 'summary.json'}, and rarefy compare does that run again"
    fields = read_fields(path / "summary.json", advice)
    summary = fields.read(_Finished)
    layers = [layer.read(_Layer) for layer in fields.objects("layers")]
    about = read_fields(path / "environment.json", advice).read(_About)
    name = job.recipe.method.name
    options = {
        key: value
        for key, value in job.recipe.method.options.items()
        if key not in BUDGETS.values() or job.target is None
    }
    changes = [part for change in comparison.changes for part in ("--set", change)]
    convention = "dense" if name == "dense" else sparse.list_methods(name, details=True)[name].training_flops
    return {
        "label": job.label,
        "method": name,
        "options": json.dumps(options),
        "budget": job.budget,
        "target": "" if job.target is None else job.target,
        "seed": job.seed,
        "test_accuracy": round(100 * summary.test_accuracy, 2),
        "sparsity": round(summary.sparsity, 6),
        "inference_flops": round(summary.inference_flops_ratio, 4),
        "training_flops": round(summary.training_flops_ratio, 4),
        "training_flops_convention": convention,
        "seconds": round(summary.seconds, 1),
        "model": summary.model,
        "epochs": summary.epochs,
        "layer_densities": json.dumps({layer.name: round(layer.density, 5) for layer in layers}),
        "cpu": about.cpu,
        "native_isa": about.native_isa,
        "torch": about.torch,
        "rarefy": about.rarefy,
        "python": about.python,
        "date": about.date,
        "device": about.gpu if about.device.startswith("cuda") else about.device,
        "threads": 1,
        "command": shlex.join(["rarefy", "compare", str(comparison.source), *changes]),
    }


def write_csv(path: Path, content: Sequence[dict[str, Any]]) -> Path:
    """Replace the file by these rows. Raises ValueError without any."""
    if not content:
        raise ValueError("no run of the comparison is finished yet")
    return _files.write_csv(path, content)


@dataclass(frozen=True)
class Mean:
    """One method at one target over its seeds; ``interval`` is half the 95 % confidence interval, NaN for one run."""

    label: str
    target: float | None
    runs: int
    accuracy: float
    interval: float
    sparsity: float
    inference_flops: float
    training_flops: float
    seconds: float


def half_interval(sample: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean, by Student's t distribution; NaN for a sample of one."""
    freedom = len(sample) - 1
    if freedom == 0:
        return math.nan
    # beyond the table the quantile is 1.96 + 2.5 / freedom, to 1 % of itself
    return _T95.get(freedom, 1.96 + 2.5 / freedom) * statistics.stdev(sample) / math.sqrt(len(sample))


def means(content: Sequence[Mapping[str, Any]]) -> list[Mean]:
    """One entry a method and target, best accuracy first within a target."""
    groups: dict[tuple[Any, str], list[Mapping[str, Any]]] = {}
    for row in content:
        groups.setdefault((row["target"], row["label"]), []).append(row)
    found = []
    for (target, label), same in groups.items():
        accuracies = [float(row["test_accuracy"]) for row in same]
        columns = ("sparsity", "inference_flops", "training_flops", "seconds")
        averages = [statistics.mean(float(row[column]) for row in same) for column in columns]
        aim = None if target == "" else float(target)
        found.append(Mean(label, aim, len(same), statistics.mean(accuracies), half_interval(accuracies), *averages))
    return sorted(found, key=lambda mean: (mean.target is not None, mean.target or 0.0, -mean.accuracy))
