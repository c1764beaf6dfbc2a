"""What a run writes down: metrics as they come, and at the end what it came to."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from rarefy import cost
from rarefy._names import layer_name
from rarefy.sparse import Sparsifier
from rarefy.sparse.shards import like
from rarefy.train.recipe import Recipe
from rarefy.train.run_folder import RunFolder
from rarefy.train.sharding import whole

_SCALARS = (
    *("loss", "learning_rate", "alpha", "sparsity", "inference_flops_ratio", "latency_ms", "test_accuracy"),
    *("test_top5", "test_loss"),
)


class Recorder:
    """Metrics of a run in its folder and as TensorBoard events; one that is not opened only looks.

    Processes that hold a model together count together: each of them must ask for every record.

    Attributes:
        sparsity: of the sparsified layers when last recorded; None for a dense run.
    """

    def __init__(
        self, folder: RunFolder, dense: cost.Cost, sparsifier: Sparsifier | None, steps_per_epoch: int
    ) -> None:
        self.folder, self.cost, self.sparsifier, self.steps_per_epoch = folder, dense, sparsifier, steps_per_epoch
        self.sparsity: float | None = None
        self._events: SummaryWriter | None = None

    def open(self, step: int) -> None:
        """Begin after this step, forgetting what was recorded later."""
        self.folder.rewind(step)
        self._events = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=step + 1)

    def close(self) -> None:
        """Write out the events."""
        if self._events is not None:
            self._events.close()

    def train(self, step: int, **values: Any) -> None:
        """Record the training up to this step: the values, and every sparsified layer."""
        self._write("train", step, {**values, **self._sparse_state()})

    def evaluation(self, step: int, **values: Any) -> None:
        """Record an evaluation."""
        state = self._sparse_state()
        state.pop("layers", None)
        self._write("eval", step, {**values, **state})

    def _sparse_state(self) -> dict[str, Any]:
        if self.sparsifier is None:
            return {}
        layers = self.sparsifier.layers()
        densities = {layer.name: layer.density for layer in layers}
        self.sparsity = 1.0 - sum(layer.live for layer in layers) / sum(layer.weights for layer in layers)
        return {
            "alpha": layers[0].alpha,
            "target_sparsity": self._aim(),
            "sparsity": self.sparsity,
            "inference_flops_ratio": self.cost.with_densities(densities).ratio,
            "latency_ms": self.latency_ms(),
            "layers": [
                {
                    "name": layer.name,
                    "density": layer.density,
                    "threshold": layer.threshold,
                    "weight_grad_density": layer.weight_grad_density,
                }
                for layer in layers
            ],
        }

    def _write(self, event: str, step: int, values: dict[str, Any]) -> None:
        if self._events is None:
            return
        self.folder.append({"event": event, "step": step, "epoch": step / self.steps_per_epoch, **values})
        for key in _SCALARS:
            if values.get(key) is not None:
                self._events.add_scalar(f"{event}/{key}", values[key], step)

    def training_ratio(self) -> float:
        """Training FLOPs as a share of the dense run's, from the densities in the metrics."""
        if self.sparsifier is None:
            return 1.0
        log = []
        for record, following in itertools.pairwise(self._with_layers()):
            # The steps between two records begin with what the first of them found.
            forward = {layer["name"]: layer["density"] for layer in record["layers"]}
            gradient = {layer["name"]: layer["weight_grad_density"] for layer in record["layers"]}
            log.append(cost.TrainingSteps(following["step"] - record["step"], forward, gradient))
        return cost.training_ratio(self.cost, log)

    def _aim(self) -> float | None:
        """The sparsity that the method steers towards now, if its target is one."""
        if self.sparsifier is None or self.sparsifier.budget is None or self.sparsifier.budget.kind != "sparsity":
            return None
        aim = self.sparsifier.aim()
        return None if aim is None else 1.0 - aim

    def latency_ms(self) -> float | None:
        """What the network takes in the engine now, by the table that a target in milliseconds goes by."""
        budget = None if self.sparsifier is None else self.sparsifier.budget
        if self.sparsifier is None or budget is None or budget.kind != "ms":
            return None
        return 1e3 * budget.cost([layer.live for layer in self.sparsifier.layers()])

    def _with_layers(self) -> list[dict[str, Any]]:
        return [record for record in self.folder.records() if record.get("layers")]

    def summary(
        self, recipe: Recipe, final: cost.Cost, thresholds: dict[str, float | None], latency_ms: float | None
    ) -> dict[str, Any]:
        """What the finished run came to; ``thresholds`` are the sparsified layers' last ones."""
        budget = None if self.sparsifier is None else self.sparsifier.budget
        pruned = [layer for layer in final.layers if layer.name in thresholds] or list(final.layers)
        first: dict[str, Any] = next(iter(self._with_layers()), {"layers": []})
        initial = {layer["name"]: layer["density"] for layer in first["layers"]}
        return {
            "name": recipe.name,
            "method": recipe.method.name,
            "model": recipe.model.name,
            "data": recipe.data.name,
            "target": None if budget is None else budget.asked,
            "target_kind": None if budget is None else budget.kind,
            "sparsity": 1.0 - sum(layer.nonzeros for layer in pruned) / sum(layer.parameters for layer in pruned),
            "inference_flops_ratio": final.ratio,
            "training_flops_ratio": self.training_ratio(),
            "latency_ms": latency_ms,
            "dense_flops": final.dense,
            "inference_flops": final.inference,
            "parameters": final.parameters,
            "nonzeros": final.nonzeros,
            "convention": final.convention,
            "epochs": recipe.schedule.epochs,
            "seed": recipe.seed,
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "parameters": layer.parameters,
                    "nonzeros": layer.nonzeros,
                    "density": layer.density,
                    "dense_flops": layer.dense,
                    "inference_flops": layer.inference,
                    "initial_density": initial.get(layer.name, 1.0),
                    "threshold": thresholds.get(layer.name),
                }
                for layer in final.layers
            ],
        }


def histograms(sparsifier: Sparsifier, bins: int = 60) -> list[dict[str, Any]]:
    """Magnitudes of the dense weights of each sparsified layer, to be seen about their threshold."""
    weights, found = sparsifier.dense_weights(), []
    parameters = {layer_name(key): parameter for key, parameter in sparsifier.model.named_parameters()}
    for layer in sparsifier.layers():
        entire = whole(like(weights[layer.name].contiguous(), parameters[layer.name]))
        counts, edges = torch.histogram(entire.float().abs().flatten().cpu(), bins)
        named = {"name": layer.name, "threshold": layer.threshold}
        found.append({**named, "edges": edges.tolist(), "counts": [int(count) for count in counts]})
    return found
