"""The tables of docs/results/methods.md and of the ablation in docs/results/autosparse.md, from results/compare-*.csv.

    python benchmarks/comparison.py

prints them. The results come from ``rarefy compare recipes/compare-NAME.yaml``.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rarefy.compare.table import half_interval, means

Rows = Sequence[Mapping[str, Any]]

#: The length of recipes/compare-glyphs.yaml; what ran for fewer or more is compared by its training FLOPs.
GLYPH_EPOCHS = 40

#: What is published, and the pairs of runs that say whether it holds here: the claim, (the better, the worse).
ORDERINGS: Mapping[str, Sequence[tuple[str, str]]] = {
    "ERK above uniform at equal sparsity": [
        ("GMP, ERK", "GMP, uniform"),
        ("RigL", "RigL, uniform"),
        ("static", "static, uniform"),
        ("Top-K with GA, ERK", "Top-K with GA"),
    ],
    "RigL above SET above static": [("RigL", "SET"), ("SET", "static"), ("RigL", "static")],
    "AutoSparse above STR": [("AutoSparse, accuracy", "STR"), ("AutoSparse, cost", "STR")],
}


def read(name: str, epochs: int | None = None) -> Rows:
    """The rows of results/compare-NAME.csv; those of runs of so many epochs, or all."""
    with (Path(__file__).parent.parent / "results" / f"compare-{name}.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if epochs is None or row["epochs"] == str(epochs)]


def table(rows: Rows, targets: Sequence[float | None]) -> str:
    """A row a method: accuracy in percent with half its 95 % confidence interval, and both FLOPs, target by target."""
    found = {(mean.label, mean.target): mean for mean in means(rows)}
    lines = [["method"], ["---"]]
    for target in targets:
        lines[0] += ["accuracy" if target is None else f"accuracy, {100 * target:g} %", "inference", "training"]
        lines[1] += ["---"] * 3
    labels = list(dict.fromkeys(label for label, target in found if target in targets))
    best = {
        label: [-found[label, t].accuracy if (label, t) in found else math.inf for t in targets] for label in labels
    }
    for label in sorted(labels, key=best.__getitem__):
        line = [label]
        for target in targets:
            mean = found.get((label, target))
            if mean is None:
                line += [""] * 3
                continue
            spread = "" if math.isnan(mean.interval) else f" ± {mean.interval:.2f}"
            line += [f"{mean.accuracy:.2f}{spread}", f"{mean.inference_flops:.3f}", f"{mean.training_flops:.3f}"]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paired(rows: Rows, label: str, other: str, targets: Sequence[str]) -> list[float]:
    """By how many points ``label`` is above ``other``, for each seed that both have at each target on one device."""
    found = {(row["label"], row["target"], row["seed"], row["device"]): float(row["test_accuracy"]) for row in rows}
    mine = [place for (name, *place) in found if name == label and place[0] in targets]
    return [found[label, t, s, d] - found[other, t, s, d] for t, s, d in mine if (other, t, s, d) in found]


def against(rows: Rows, reference: str) -> str:
    """A row a method: by how many points it is above the reference, target by target and over all of them."""
    targets = sorted({row["target"] for row in rows} - {""}, key=float, reverse=True)
    columns = [[target] for target in targets] + ([targets] if len(targets) > 1 else [])
    titles = [*(f"{100 * float(target):g} %" for target in targets), "all"][: len(columns)]
    lines = [["method", *titles], ["---"] * (len(columns) + 1)]
    for label in dict.fromkeys(row["label"] for row in rows if row["target"]):
        if label == reference:
            continue
        line = [label]
        for column in columns:
            found = paired(rows, label, reference, column)
            spread = f" ± {half_interval(found):.2f}" if len(found) > 1 else ""
            line.append(f"{statistics.mean(found):+.2f}{spread}" if found else "")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_training(rows: Rows) -> str:
    """A row for each method and number of epochs, by the training FLOPs in epochs of the dense network."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        epochs = int(row["epochs"])
        costs = found.setdefault((row["label"], epochs), [])
        costs.append((epochs * float(row["training_flops"]), float(row["test_accuracy"])))
    lines = ["| training FLOPs, dense epochs | method | epochs | seeds | accuracy |", "| --- | --- | --- | --- | --- |"]
    for (label, epochs), runs in sorted(found.items(), key=lambda item: statistics.mean(cost for cost, _ in item[1])):
        cost, accuracies = statistics.mean(cost for cost, _ in runs), [accuracy for _, accuracy in runs]
        spread = f" ± {half_interval(accuracies):.2f}" if len(runs) > 1 else ""
        lines.append(f"| {cost:.2f} | {label} | {epochs} | {len(runs)} | {statistics.mean(accuracies):.2f}{spread} |")
    return "\n".join(lines)


def differences(rows: Rows) -> str:
    """A row for each pair of ``ORDERINGS`` and target: the difference in accuracy, paired by the seeds."""
    lines = ["| published | here | target | points | holds? |", "| --- | --- | --- | --- | --- |"]
    for claim, pairs in ORDERINGS.items():
        for better, worse in pairs:
            for target in sorted({row["target"] for row in rows} - {""}):
                found = paired(rows, better, worse, [target])
                if len(found) < 2:
                    continue
                mean, half = statistics.mean(found), half_interval(found)
                holds = "yes" if mean > half else "no, the reverse" if -mean > half else "not to be told"
                here = f"{better} over {worse}"
                lines.append(f"| {claim} | {here} | {float(target):g} | {mean:+.2f} ± {half:.2f} | {holds} |")
    return "\n".join(lines)


def main() -> None:
    rows = read("fashion-mnist")
    for targets in ([None], [0.9, 0.95], [0.8, 0.98]):
        print(table(rows, targets), end="\n\n")
    print(differences(rows), end="\n\n")
    for name, reference in (
        ("equal-flops", "AutoSparse, accuracy"),
        ("autosparse", "accuracy (the default)"),
        ("resnet20", "AutoSparse, accuracy"),
        ("blocks", "AutoSparse"),
        ("glyphs", "AutoSparse, accuracy"),
    ):
        rows = read(name, GLYPH_EPOCHS if name == "glyphs" else None)
        if name in ("blocks", "glyphs"):
            print(table(rows, [None]), end="\n\n")
        for target in sorted({float(row["target"]) for row in rows if row["target"]}, reverse=True):
            print(table(rows, [target]), end="\n\n")
        print(against(rows, reference), end="\n\n")
    print(by_training(read("glyphs")), end="\n\n")
    print(by_training([*read("training-flops"), *(row for row in read("equal-flops") if row["target"] == "0.07")]))


if __name__ == "__main__":
    main()
