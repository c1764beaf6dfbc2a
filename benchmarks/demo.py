"""How long `make demo` takes from a fresh clone, set-up included, and what it ends with: results/demo.csv.

python benchmarks/demo.py
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

import results


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "rarefy"
        subprocess.run(["git", "clone", "-q", str(results.FOLDER.parent), str(clone)], check=True)
        began = time.monotonic()
        subprocess.run(["make", "demo"], cwd=clone, check=True)
        seconds = time.monotonic() - began
        (run,) = clone.glob("runs/demo-[0-9]*")
        sparse, dense = (json.loads((where / "summary.json").read_text()) for where in (run, clone / "runs/demo-dense"))
    row = {
        "test_accuracy": round(100 * sparse["test_accuracy"], 2),
        "dense_test_accuracy": round(100 * dense["test_accuracy"], 2),
        "sparsity": round(sparse["sparsity"], 5),
        "inference_flops_ratio": round(sparse["inference_flops_ratio"], 4),
        "training_flops_ratio": round(sparse["training_flops_ratio"], 4),
        "minutes_with_setup": round(seconds / 60, 1),
        "training_minutes": round(sparse["seconds"] / 60, 1),
    }
    print(*(f"{key}={value}" for key, value in row.items()))
    print(results.write("demo", [{**row, **results.provenance()}]))


if __name__ == "__main__":
    main()
