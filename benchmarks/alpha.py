"""Sparsity against time for constant and annealed alpha: docs/figures/alpha.svg and results/alpha.csv.

    python benchmarks/alpha.py [--jobs 2]

recipes/fashion-mnist.yaml without a target, all but one under the same pressure, in ``runs/alpha``, a thread each.
alpha = 0 (STR's gradient) runs away, a large constant alpha holds on to its weights, an annealed one goes between.
Finished runs are kept: started again, it does only what is missing.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import results
import training
from rarefy import report
from rarefy._files import write_atomically
from rarefy.report.trajectories import trajectories

PRESSURE = 12.5
NO_PRESSURE = "no pressure, alpha 0.75, annealed"
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "alpha.svg"
CONSTANT: dict[str, dict[str, Any]] = {
    f"alpha {alpha:g}": {"alpha": alpha, "anneal": "constant"} for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)
}
METHODS = {
    **CONSTANT,
    NO_PRESSURE: {"alpha": 0.75, "anneal": "sigmoid-cosine", "pressure": 0.0},
    "alpha 0.75, annealed": {"alpha": 0.75, "anneal": "sigmoid-cosine"},
    "alpha 0.75, annealed, 0 from 45 %": {"alpha": 0.75, "anneal": "sigmoid-cosine", "cutoff": 0.45},
}


def run(label: str) -> dict[str, Any]:
    """One run's row; trains it if it is not there."""
    method = {"name": "autosparse", "pressure": PRESSURE, **METHODS[label]}
    summary = training.run(folder(label), [f"method={json.dumps(method)}"])
    row = {
        "alpha": label.removeprefix("no pressure, ").removeprefix("alpha "),
        "pressure": method["pressure"],
        "seed": summary["seed"],
        "test_accuracy": round(100 * summary["test_accuracy"], 2),
        "sparsity": round(summary["sparsity"], 4),
        "inference_flops_ratio": round(summary["inference_flops_ratio"], 4),
        "training_flops_ratio": round(summary["training_flops_ratio"], 4),
    }
    print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    return {**row, **training.provenance(folder(label))}


def folder(label: str) -> Path:
    """Where the run of this label lies."""
    return Path("runs/alpha") / label.replace(", ", "-").replace(" ", "-").replace("%", "percent")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    with ThreadPoolExecutor(parser.parse_args().jobs) as pool:
        rows = list(pool.map(run, METHODS))
    print(results.write("alpha", rows))
    figure = trajectories({label: report.load(folder(label)) for label in METHODS})
    write_atomically(FIGURE, lambda path: path.write_text(figure))
    print(FIGURE)


if __name__ == "__main__":
    main()
