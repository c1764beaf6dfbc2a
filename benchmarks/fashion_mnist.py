"""Dense, AutoSparse (both policies) and STR on Fashion-MNIST at 90 and 95 %, three seeds each.

    python benchmarks/fashion_mnist.py [--seeds 3] [--jobs 2]

Runs recipes/fashion-mnist.yaml once for each row of results/fashion-mnist.csv, in ``runs/fashion-mnist-table``, on one
thread each. Finished runs are kept: started again, it does only what is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import results
import training

RUNS = Path("runs/fashion-mnist-table")

#: label -> the method's part of the recipe
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"name": "dense"},
    "AutoSparse, accuracy": {"name": "autosparse", "policy": "accuracy"},
    "AutoSparse, cost": {"name": "autosparse", "policy": "cost"},
    "STR": {"name": "str"},
    "AutoSparse, 14 % of the FLOPs": {"name": "autosparse", "target_flops": 0.14},
    "dense, AdamW": {"name": "dense"},
    "AutoSparse, AdamW": {"name": "autosparse"},
}
TARGETS = {
    "AutoSparse, AdamW": (0.9,),
    **dict.fromkeys(("AutoSparse, accuracy", "AutoSparse, cost", "STR"), (0.9, 0.95)),
}
ADAMW = {"name": "adamw", "lr": 0.003, "weight_decay": 0.01}


def run(label: str, target: float | None, seed: int) -> dict[str, Any]:
    """One finished run's row; trains it if it is not there."""
    method = {**METHODS[label], **({} if target is None else {"target": target})}
    name = label.replace(", ", "-").replace(" ", "-").replace("%", "percent")
    folder = RUNS / "-".join([name, *([] if target is None else [f"{target:g}"]), f"seed{seed}"])
    optimizer = [f"optimizer={json.dumps(ADAMW)}"] if label.endswith("AdamW") else []
    summary = training.run(folder, [f"method={json.dumps(method)}", f"seed={seed}", *optimizer])
    row = {
        "method": label,
        "target": "" if target is None else target,
        "seed": seed,
        "test_accuracy": round(100 * summary["test_accuracy"], 2),
        "sparsity": round(summary["sparsity"], 6),
        "landed_by_itself": "" if target is None else round(landed(folder), 5),
        "inference_flops_ratio": round(summary["inference_flops_ratio"], 4),
        "training_flops_ratio": round(summary["training_flops_ratio"], 4),
        "seconds": round(summary["seconds"], 1),
    }
    print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    return {**row, **training.provenance(folder)}


def landed(folder: Path) -> float:
    """The sparsity last recorded before the exact finish."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = max(record["step"] for record in records)
    return float([r["sparsity"] for r in records if r["event"] == "train" and r["step"] < last][-1])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean and sample standard deviation over the seeds, as Markdown."""
    lines = [
        "| method | target | test accuracy | sparsity | inference FLOPs | training FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["method"], row["target"]) for row in rows):
        same = [row for row in rows if (row["method"], row["target"]) == key]
        accuracies = [row["test_accuracy"] for row in same]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        means = {
            column: statistics.mean(row[column] for row in same)
            for column in ("sparsity", "inference_flops_ratio", "training_flops_ratio")
        }
        lines.append(
            f"| {key[0]} | {key[1]} | {statistics.mean(accuracies):.2f}{spread} | {100 * means['sparsity']:.2f} % "
            f"| {means['inference_flops_ratio']:.3f} | {means['training_flops_ratio']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    arguments = parser.parse_args()
    work = [
        (label, target, seed)
        for label in METHODS
        for target in TARGETS.get(label, (None,))
        for seed in range(arguments.seeds)
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda job: run(*job), work))
    print(results.write("fashion-mnist", rows))
    print(table(rows))


if __name__ == "__main__":
    main()
