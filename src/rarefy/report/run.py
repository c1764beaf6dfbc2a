"""What a training run leaves behind, as typed records; shares (sparsity, density, accuracy, FLOPs) are in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LayerRecord:
    """One layer at one step: the share of weights kept and the threshold that decides it."""

    name: str
    density: float | None
    threshold: float | None
    weight_grad_density: float | None


@dataclass(frozen=True)
class TrainRecord:
    """One logged training step; what a dense run does not have is None or empty."""

    step: int
    epoch: float
    loss: float | None
    learning_rate: float | None
    alpha: float | None
    sparsity: float | None
    target_sparsity: float | None
    inference_flops_ratio: float | None
    seconds: float | None
    layers: tuple[LayerRecord, ...]


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation: of a classifier on the test set, of a translator on the validation set."""

    step: int
    epoch: float
    test_accuracy: float | None
    test_loss: float | None
    valid_perplexity: float | None
    sparsity: float | None
    inference_flops_ratio: float | None


@dataclass(frozen=True)
class Layer:
    """One layer as it ended: counts of its weight tensor, and FLOPs for one input under the summary's convention."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int | None
    nonzeros: int | None
    density: float | None
    dense_flops: float | None
    inference_flops: float | None
    initial_density: float | None
    threshold: float | None


@dataclass(frozen=True)
class Sample:
    """A sentence of the test set, its translation, and what it should be."""

    source: str
    reference: str
    translation: str


@dataclass(frozen=True)
class Attention:
    """What the decoder looked at as it said a translation: of each of T pieces, how much at each of S of the source."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Summary:
    """What a finished run reports: of a classifier its accuracy, of a translator its perplexity and BLEU."""

    test_accuracy: float | None
    best_test_accuracy: float | None
    test_top5: float | None
    valid_perplexity: float | None
    best_valid_perplexity: float | None
    test_bleu: float | None
    bleu_signature: str | None
    activation_share: float | None
    activation_seconds: float | None
    batch_seconds: float | None
    samples: tuple[Sample, ...]
    sparsity: float | None
    inference_flops_ratio: float | None
    training_flops_ratio: float | None
    dense_flops: float | None
    inference_flops: float | None
    parameters: int | None
    nonzeros: int | None
    latency_ms: float | None
    measured_ms: float | None
    convention: str | None
    seconds: float | None
    seconds_saved: float | None
    epochs: float | None
    steps: int | None
    seed: int | None
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Histogram:
    """Magnitudes of a layer's raw weights before the last threshold was applied: n counts between n + 1 edges."""

    name: str
    edges: tuple[float, ...]
    counts: tuple[float, ...]
    threshold: float | None


@dataclass(frozen=True)
class Run:
    """A run's folder, read. `summary` is None while it is unfinished."""

    path: Path
    name: str
    method: str
    model: str
    data: str
    target: float | None
    target_kind: str | None
    recipe: Mapping[str, object]
    recipe_text: str
    environment: Mapping[str, object]
    train: tuple[TrainRecord, ...]
    evals: tuple[EvalRecord, ...]
    summary: Summary | None
    histograms: tuple[Histogram, ...]
    attentions: tuple[Attention, ...]

    @property
    def test_accuracy(self) -> float | None:
        """The final accuracy, or that of the last evaluation so far."""
        if self.summary is not None and self.summary.test_accuracy is not None:
            return self.summary.test_accuracy
        return next((record.test_accuracy for record in reversed(self.evals) if record.test_accuracy is not None), None)

    @property
    def valid_perplexity(self) -> float | None:
        """The final perplexity on the validation set, or that of the last evaluation so far."""
        if self.summary is not None and self.summary.valid_perplexity is not None:
            return self.summary.valid_perplexity
        values = (record.valid_perplexity for record in reversed(self.evals))
        return next((value for value in values if value is not None), None)

    @property
    def sparsity(self) -> float | None:
        """The final share of zero weights, or the last one logged so far."""
        if self.summary is not None and self.summary.sparsity is not None:
            return self.summary.sparsity
        return next((record.sparsity for record in reversed(self.train) if record.sparsity is not None), None)

    @property
    def inference_flops_ratio(self) -> float | None:
        """The final share of the dense inference FLOPs that is left, or the last one logged so far."""
        if self.summary is not None and self.summary.inference_flops_ratio is not None:
            return self.summary.inference_flops_ratio
        ratios = (record.inference_flops_ratio for record in reversed(self.train))
        return next((ratio for ratio in ratios if ratio is not None), None)

    @property
    def is_dense(self) -> bool:
        """Whether no weight was ever made zero."""
        return not self.sparsity and not any(record.sparsity for record in self.train)

    @property
    def epochs(self) -> float | None:
        """The epochs that the run took or is to take."""
        if self.summary is not None and self.summary.epochs is not None:
            return self.summary.epochs
        schedule = self.recipe.get("schedule")
        planned = schedule.get("epochs") if isinstance(schedule, Mapping) else None
        return float(planned) if isinstance(planned, (int, float)) else None

    @property
    def epoch(self) -> float:
        """The epoch of the last record."""
        last = [record.epoch for record in self.train[-1:]] + [record.epoch for record in self.evals[-1:]]
        return max(last, default=0.0)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The summary's layers; of an unfinished run, those of the log with their first and their latest density."""
        if self.summary is not None:
            return self.summary.layers
        logged = [record.layers for record in self.train if record.layers]
        if not logged:
            return ()
        first = {layer.name: layer.density for layer in logged[0]}
        return tuple(
            Layer(
                name=layer.name,
                kind="",
                shape=(),
                parameters=None,
                nonzeros=None,
                density=layer.density,
                dense_flops=None,
                inference_flops=None,
                initial_density=first.get(layer.name),
                threshold=layer.threshold,
            )
            for layer in logged[-1]
        )
