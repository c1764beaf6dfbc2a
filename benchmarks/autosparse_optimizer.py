"""What the optimizer should do to the weights that AutoSparse masks: results/autosparse-optimizer.csv.

    python benchmarks/autosparse_optimizer.py [--jobs 2]

recipes/fashion-mnist.yaml at 95 %, three seeds. A masked weight's gradient is alpha times what it would be; the
optimizer treats it as any other: it decays, and goes on by its momentum. Tried instead: no decay, no momentum, neither.
Finished runs are kept, in ``runs/autosparse-optimizer``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import results
import training
from rarefy import sparse
from rarefy.cli import main as rarefy
from rarefy.sparse import AutoSparse
from rarefy.sparse.thresholded import Thresholded

RUNS = Path("runs/autosparse-optimizer")


class _Masked(AutoSparse):
    """AutoSparse with something done to masked weights around every step of an SGD."""

    needs_optimizer = True
    decays = forgets = False

    def _before_optimizer(self) -> None:
        assert self._optimizer is not None
        decay = {id(p): group["weight_decay"] for group in self._optimizer.param_groups for p in group["params"]}
        for layer in self._layers.values():
            assert isinstance(layer, Thresholded)
            weight = layer.weight
            assert weight.grad is not None
            masked = layer.magnitude() <= layer.threshold()
            if not self.decays:  # what SGD is about to add
                weight.grad -= decay[id(weight)] * weight.detach() * masked
            if self.forgets and "momentum_buffer" in (state := self._optimizer.state[weight]):
                state["momentum_buffer"] *= ~masked


class NoDecay(_Masked):
    """Masked weights do not decay."""


class NoMomentum(_Masked):
    """Masked weights have no momentum."""

    decays = forgets = True


class Neither(_Masked):
    """Masked weights neither decay nor have momentum."""

    forgets = True


METHODS = {
    "decay and momentum as for all (the default)": ("autosparse", AutoSparse),
    "no decay of masked weights": ("autosparse-no-decay", NoDecay),
    "no momentum of masked weights": ("autosparse-no-momentum", NoMomentum),
    "neither": ("autosparse-neither", Neither),
}


def train(arguments: list[str]) -> int:
    """``rarefy train`` with the methods of this file registered."""
    for name, method in list(METHODS.values())[1:]:
        sparse.register(name, method)
    return rarefy(["train", *arguments])


def run(job: tuple[str, int]) -> dict[str, Any]:
    """One run's row; trains it if it is not there."""
    label, seed = job
    folder = RUNS / f"{METHODS[label][0]}-{seed}"
    method = {"name": METHODS[label][0], "target": 0.95}
    summary = training.run(folder, [f"method={json.dumps(method)}", f"seed={seed}"], program=(__file__, "--train"))
    row = {
        "masked_weights": label,
        "seed": seed,
        "test_accuracy": round(100 * summary["test_accuracy"], 2),
        "sparsity": round(summary["sparsity"], 4),
        "inference_flops_ratio": round(summary["inference_flops_ratio"], 4),
        "training_flops_ratio": round(summary["training_flops_ratio"], 4),
    }
    print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    return {**row, **training.provenance(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    with ThreadPoolExecutor(parser.parse_args().jobs) as pool:
        rows = list(pool.map(run, [(label, seed) for seed in range(3) for label in METHODS]))
    for label in METHODS:
        found = [row["test_accuracy"] for row in rows if row["masked_weights"] == label]
        print(f"{label}: {statistics.mean(found):.2f} +- {statistics.stdev(found):.2f}")
    print(results.write("autosparse-optimizer", rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        sys.exit(train(sys.argv[2:]))
    main()
