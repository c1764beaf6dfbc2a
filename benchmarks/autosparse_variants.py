"""What else AutoSparse could do, by changes of its code: results/autosparse-variants.csv.

    python benchmarks/autosparse_variants.py [--jobs 2] [--seeds 3]

recipes/fashion-mnist.yaml at 7 % of the inference FLOPs, so that accuracies compare. Every line changes one thing: what
the optimizer does to masked weights (their gradient is alpha times what it would be; otherwise they decay, and go on by
their momentum, as any other), how the pressure is spread over the layers, and what the trim moves. Batch norms are
estimated anew at the end of every run, as a column. What options change is in recipes/compare-autosparse.yaml.
Finished runs are kept, in ``runs/autosparse-variants``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import results
import training
from rarefy import models, sparse
from rarefy.cli import main as rarefy
from rarefy.data import fashion_mnist
from rarefy.sparse import AutoSparse
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.soft_threshold import MAX_DECAY
from rarefy.sparse.layers import Layer
from rarefy.train.batches import normalise

RUNS = Path("runs/autosparse-variants")
FLOPS = 0.07

#: Training images that batch norms are estimated anew from.
ESTIMATED_FROM = 5000


@dataclass(eq=False, repr=False)
class _Masked(AutoSparse):
    """AutoSparse with something done to masked weights around every step of an SGD."""

    decays = forgets = False

    def _before(self, bucket: Bucket) -> None:
        super()._before(bucket)
        assert bucket.optimizer is not None
        assert bucket.group is not None
        decay = bucket.optimizer.param_groups[bucket.group]["weight_decay"]
        for layer, mask in zip(bucket.layers, bucket.views(self.live(bucket)), strict=True):
            assert layer.grad is not None
            if not self.decays:  # what SGD is about to add
                layer.grad.sub_(decay * layer.local * ~mask)
            if self.forgets and "momentum_buffer" in (state := bucket.optimizer.state[layer.parameter]):
                state["momentum_buffer"] *= mask


class NoDecay(_Masked):
    """Masked weights do not decay."""


class NoMomentum(_Masked):
    """Masked weights have no momentum."""

    decays = forgets = True


class Neither(_Masked):
    """Masked weights neither decay nor have momentum."""

    forgets = True


@dataclass(eq=False, repr=False)
class ByCost(AutoSparse):
    """Pressure in proportion to a power of what one weight of the layer costs, its mean over all weights unchanged."""

    power = 1.0

    def _sizes(self) -> list[int]:
        return [layer.size for layer in self._layers]

    def _measures(self) -> Sequence[float]:
        assert self.budget is not None
        return [prices.each[0] for prices in self.budget.prices]

    def _press(self, parameters: list[Tensor], decay: float) -> None:
        scaled = [measure**self.power for measure in self._measures()]
        sizes = self._sizes()
        mean = sum(measure * size for measure, size in zip(scaled, sizes, strict=True)) / sum(sizes)
        for layer, measure in zip(self._layers, scaled, strict=True):
            s = self._s(layer)
            torch.maximum(s, s * math.exp(-min(decay * measure / mean, MAX_DECAY)), out=s)

    def _s(self, layer: Layer) -> Tensor:
        """The threshold parameter of a layer, (1,)."""
        bucket, place = self.where(layer)
        return bucket.own["s"].detach()[place : place + 1]


class ByRootOfCost(ByCost):
    """Pressure in proportion to the root of what one weight of the layer costs."""

    power = 0.5


class ByRootOfSize(ByCost):
    """Pressure in proportion to the root of how many weights the layer has, so less on the first layers."""

    power = 0.5

    def _measures(self) -> Sequence[float]:
        return self._sizes()


class ByFourthRootOfSize(ByRootOfSize):
    """Pressure in proportion to the fourth root of how many weights the layer has."""

    power = 0.25


class ToScale(ByCost):
    """Pressure towards twice the deviation of the layer's first weights, in place of 1/2."""

    deviations = 2.0

    def _begin(self) -> None:
        super()._begin()
        weights = [layer.local for layer in self._layers]
        self._ends = [self._g.inverse((self.deviations * weight.std()).clamp(max=0.9)) for weight in weights]

    def _press(self, parameters: list[Tensor], decay: float) -> None:
        for layer, end in zip(self._layers, self._ends, strict=True):
            s = self._s(layer)
            torch.maximum(s, end + (s - end) * math.exp(-decay), out=s)


class Untrimmed(ByCost):
    """The classifier's threshold is not trimmed."""

    power = 0.0

    def _shift(self, by: float) -> None:
        for layer in self._layers[:-1]:
            self._s(layer).add_(by)


METHODS: dict[str, tuple[str, type[AutoSparse]]] = {
    "the default": ("autosparse", AutoSparse),
    "no decay of masked weights": ("autosparse-no-decay", NoDecay),
    "no momentum of masked weights": ("autosparse-no-momentum", NoMomentum),
    "neither": ("autosparse-neither", Neither),
    "pressure by a weight's cost": ("autosparse-by-cost", ByCost),
    "pressure by the root of a weight's cost": ("autosparse-by-root", ByRootOfCost),
    "pressure by the root of the layer's size": ("autosparse-by-size", ByRootOfSize),
    "pressure by the fourth root of it": ("autosparse-by-size-4", ByFourthRootOfSize),
    "pressure towards the layer's scale": ("autosparse-to-scale", ToScale),
    "classifier not trimmed": ("autosparse-fc-untrimmed", Untrimmed),
}


def train(arguments: list[str]) -> int:
    """``rarefy train`` with the methods of this file registered."""
    for name, method in list(METHODS.values())[1:]:
        sparse.register(name, method)
    return rarefy(["train", *arguments])


@torch.no_grad()
def with_new_norms(folder: Path, data: fashion_mnist.FashionMNIST) -> float:
    """Test accuracy of a finished run's model, its batch norms estimated anew on training images."""
    model = models.fashion_cnn()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches
    for images in torch.split(normalise(data.train_images[:ESTIMATED_FROM]), 250):
        model.train()(images)
    return float((model.eval()(normalise(data.test_images)).argmax(1) == data.test_labels).float().mean())


def run(job: tuple[str, int]) -> Path:
    """The folder of a run; trains it if it is not there."""
    label, seed = job
    folder = RUNS / f"{METHODS[label][0]}-{seed}"
    method = {"name": METHODS[label][0], "target_flops": FLOPS}
    training.run(folder, [f"method={json.dumps(method)}", f"seed={seed}"], program=(__file__, "--train"))
    print(folder, "done", flush=True)
    return folder


def row(job: tuple[str, int], folder: Path, data: fashion_mnist.FashionMNIST) -> dict[str, Any]:
    """The row of a finished run."""
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "variant": job[0],
        "seed": job[1],
        "test_accuracy": round(100 * summary["test_accuracy"], 2),
        "test_accuracy_new_norms": round(100 * with_new_norms(folder, data), 2),
        "sparsity": round(summary["sparsity"], 4),
        "inference_flops_ratio": round(summary["inference_flops_ratio"], 4),
        "training_flops_ratio": round(summary["training_flops_ratio"], 4),
        **training.provenance(folder),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, default=1, help="runs of every variant")
    arguments = parser.parse_args()
    jobs = [(label, seed) for seed in range(arguments.seeds) for label in METHODS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = list(pool.map(run, jobs))
    data = fashion_mnist.load()
    rows = [row(job, folder, data) for job, folder in zip(jobs, folders, strict=True)]
    for label in METHODS:
        found = [row["test_accuracy"] for row in rows if row["variant"] == label]
        new = [row["test_accuracy_new_norms"] for row in rows if row["variant"] == label]
        spread = f" +- {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        print(f"{label}: {statistics.mean(found):.2f}{spread}, with new norms {statistics.mean(new):.2f}")
    print(results.write("autosparse-variants", rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        sys.exit(train(sys.argv[2:]))
    main()
