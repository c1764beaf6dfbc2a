"""What a run is expected to cost in FLOPs, before any of its steps: the method's own curve in place of the metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from rarefy import cost
from rarefy.sparse import ACDC, Sparsifier
from rarefy.sparse.families.budgeted import Budgeted


def expected(dense: cost.Cost, sparsifier: Sparsifier | None) -> tuple[cost.Cost, float] | None:
    """Return what the finished network is expected to cost, and the run's training FLOPs as a share of the dense run's.

    The share is made as :meth:`rarefy.train.recorder.Recorder.training_ratio` makes it, from as many records, with the
    densities that the method aims at for those that a run finds:

    - the method's curve to its target (``aim``), the target's density from the first step where it starts sparse, the
      cubic curve of every budget where it names none;
    - over the layers as the method's distribution says; where weights of all layers compete, or thresholds are learned,
      as if all layers were alike.

    What is learned may come down sooner than the curve, and alpha of AutoSparse's policy "accuracy" reach 0 before the
    end, which nobody knows before: then a run takes less, about half at the most in results/compare-fashion-mnist.csv.
    There competing layers took up to 14 % more, and so did RigL (12 to 24 %), MEST with ``soft``, whose masks are wider
    until its last stage (a quarter to a third), and GraNet (half).

    None where nothing says how sparse the run will get: a learned method without a target.
    """
    if sparsifier is None:
        return dense, 1.0
    names = [layer.name for layer in sparsifier.layers()]
    log = []
    with _at_any_step(sparsifier):
        for step in range(0, sparsifier.total_steps, sparsifier.interval):
            sparsifier.steps = step
            densities = _densities(sparsifier)
            if densities is None:
                return None
            gradients = [sparsifier.weight_grad_density(density) for density in densities]
            forward, gradient = (dict(zip(names, each, strict=True)) for each in (densities, gradients))
            steps = min(sparsifier.interval, sparsifier.total_steps - step)
            log.append(cost.TrainingSteps(steps, forward, gradient))
        sparsifier.steps = sparsifier.total_steps
        last = _densities(sparsifier)
    assert last is not None
    return dense.with_densities(dict(zip(names, last, strict=True))), cost.training_ratio(dense, log)


@contextmanager
def _at_any_step(sparsifier: Sparsifier) -> Iterator[None]:
    """Let ``steps`` be any: what a method aims at is a pure function of them."""
    now = sparsifier.steps
    try:
        yield
    finally:
        sparsifier.steps = now


def _densities(sparsifier: Sparsifier) -> list[float] | None:
    """The share of each layer's weights that is expected to live after the sparsifier's step."""
    layers, budget = sparsifier.layers(), sparsifier.budget
    if budget is None:
        fixed = sparsifier.info.targeted == "never"
        return [layer.density for layer in layers] if fixed else None
    aim = sparsifier.aim()
    if isinstance(sparsifier, ACDC):
        aim = budget.goal if sparsifier.compressed() else 1.0
    elif aim is None:
        aim = budget.goal if sparsifier.info.start == "sparse" else budget.aim(sparsifier.progress)
    if isinstance(sparsifier, Budgeted) and sparsifier.distribution != "global":
        assert not isinstance(sparsifier.block, int)
        together = math.prod(sparsifier.block)
        counts = sparsifier.live_counts(aim)
        return [count * together / layer.weights for count, layer in zip(counts, layers, strict=True)]
    # Of FLOPs a part belongs to no layer here: what all layers' weights share is the rest.
    alike = aim if budget.kind == "ms" else budget.available_at(aim) / (budget.total - budget.fixed)
    return [min(max(alike, 0.0), 1.0)] * len(layers)
