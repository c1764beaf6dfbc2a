"""What each layer takes in the engine by how many of its weights live: measured once, for training to milliseconds.

The network's plan is compiled at a few densities with masks drawn at random, and the engine's profile tells what each
layer takes at each. A profile reads the clock between steps, and what lies between them is not in it: so whole calls
are timed as well, and the layers' seconds are multiplied by one factor, beside a fixed rest, for which their sums are
the calls' (least squares of relative errors).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rarefy import environment
from rarefy.engine.arguments import Precision, checked
from rarefy.engine.assembling import build
from rarefy.engine.compiler import compiling
from rarefy.engine.engine import Engine
from rarefy.engine.plan import Layer, Plan, Step
from rarefy.engine.preparing import flattened, prepare
from rarefy.engine.quantize import BUDGET
from rarefy.latency import Latency, LayerLatency
from rarefy.sparse import _options
from rarefy.sparse.masks import Block, block_expand

#: Where layers are measured; below the first the line through the first two goes on. Sparse kernels are tried up to a
#: density of 0.7, where time may jump: no line should lead over that.
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.69, 0.71, 1.0)

#: Turns, in each of which all densities are measured, and calls in each of them that are profiled, and timed whole.
_ROUNDS, _PROFILED = 15, 3

_Seconds = NDArray[np.float64]


def latency(
    model: nn.Module,
    example_input: Any,
    *,
    precision: Precision = "float32",
    calibration: Iterable[Any] | None = None,
    error_budget: float = BUDGET,
    block: int | Sequence[int] = 1,
    tune_seconds: float = 8.0,
) -> Latency:
    """Measure what a network takes in the engine on one thread, by how many weights of each layer live.

    It is compiled at eight densities, with masks drawn at random: what the weights are does not matter, so that a
    model before training will do. What comes of it holds for this machine, this build and this example, and is what
    ``target_ms`` of the methods of :mod:`rarefy.sparse` lands by.

    Args:
        model: in evaluation mode, on the CPU. It is not changed.
        example_input: what a call is timed on, as in :func:`compile`; its batch size counts.
        precision: as in :func:`compile`.
        calibration: as in :func:`compile`, for "int8" alone.
        error_budget: as in :func:`compile`; layers that int8 leaves in float32 are timed as such.
        block: in blocks of how many inputs, or of how many outputs and inputs, the weights will live, as the methods'
            ``block``.
        tune_seconds: as in :func:`compile`, for each of the densities.

    Raises:
        TypeError: as :func:`compile`.
        ValueError: as :func:`compile`; ``block`` is no positive whole number, and no two; the engine knows no layer
            of the model, as where PyTorch runs all that has weights.
    """
    together = _options.block("block", block)
    flat, inputs = checked(model, example_input, 1, precision, "measure", tune_seconds)
    if calibration is not None:
        calibration = flattened(calibration, flat.takes)
    with compiling():
        plan = prepare(flat, inputs, precision, calibration, error_budget).better
        sizes = weights_of(plan)
        if not sizes:
            raise ValueError(
                f"the engine knows no layer of {type(model).__name__}, by whose weights its time could be told: a "
                "target in FLOPs (target_flops) is what there is for it"
            )
        layers, calls = timed(at_densities(plan, inputs, precision, together, tune_seconds), inputs, list(sizes))
    shape, machine = [list(x.shape) for x in inputs], environment.describe()
    about = {key: machine[key] for key in ("cpu", "native_isa", "torch", "rarefy", "python")}
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return table(sizes, layers, calls, precision, together, {**about, "date": date, "example": shape})


def table(
    sizes: dict[str, int], layers: _Seconds, calls: _Seconds, precision: str, block: Block, about: dict[str, Any]
) -> Latency:
    """Make the table of seconds that were measured: of (layers, densities), and of whole calls, (densities,)."""
    # Never falling: between the highest so far and the lowest yet to come.
    rising = np.maximum.accumulate(layers, 1), np.minimum.accumulate(layers[:, ::-1], 1)[:, ::-1]
    smooth = (rising[0] + rising[1]) / 2
    # call = factor * sum + rest
    sums = smooth.sum(0)
    _, rest = np.linalg.lstsq(np.stack([sums / calls, 1 / calls], 1), np.ones(len(calls)), rcond=None)[0]
    fixed = float(np.clip(rest, 0, max(calls.min() - sums.min(), 0)))
    smooth *= np.median((calls - fixed) / sums)
    first = smooth[:, 0] - (smooth[:, 1] - smooth[:, 0]) * DENSITIES[0] / (DENSITIES[1] - DENSITIES[0])
    smooth = np.concatenate([first.clip(min=0)[:, None], smooth], 1)
    rows = zip(sizes.items(), smooth.tolist(), strict=True)
    found = tuple(LayerLatency(name, size, (0.0, *DENSITIES), tuple(seconds)) for (name, size), seconds in rows)
    return Latency(found, fixed, precision, block, about)


def weights_of(plan: Plan) -> dict[str, int]:
    """How many weights each layer has, by name."""
    return {step.name: step.weight.numel() for step in plan.steps if isinstance(step, Layer)}


def at_densities(
    plan: Plan, inputs: tuple[Tensor, ...], precision: Precision, block: Block, tune_seconds: float
) -> list[Engine]:
    """An engine for each of :data:`DENSITIES`, of native kernels alone.

    PyTorch wins with whole dense networks: what a layer takes in those is not what it takes among sparse ones.
    """
    return [
        build(_masked(plan, density, block), inputs, 1, precision, "measure", tune_seconds, native_alone=True)
        for density in DENSITIES
    ]


def _masked(plan: Plan, density: float, block: Block) -> Plan:
    """The plan with as many weights in every layer, where chance wants them."""
    chance = torch.Generator().manual_seed(0)

    def masked(step: Step) -> Step:
        if not isinstance(step, Layer):
            return step
        weight = step.weight
        (outputs, inputs, *kernel), (rows, columns) = weight.shape, block
        if outputs % rows or inputs % columns:
            rows = columns = 1
        blocks = torch.zeros(outputs // rows, inputs // columns, *kernel, dtype=torch.float32)
        live = torch.randperm(blocks.numel(), generator=chance)[: max(1, round(density * blocks.numel()))]
        blocks.view(-1)[live] = 1.0
        mask = block_expand(blocks, (rows, columns)).to(weight.dtype)
        used = torch.where(weight == 0, torch.ones_like(weight), weight) * mask
        # What goes through the network keeps its size: numbers that fade to denormal ones would take longer.
        return replace(step, weight=used * density**-0.5 if weight.is_floating_point() else used)

    return replace(plan, steps=tuple(map(masked, plan.steps)))


def timed(engines: Sequence[Engine], inputs: Sequence[Tensor], names: Sequence[str]) -> tuple[_Seconds, _Seconds]:
    """Seconds of (layers, engines), and of whole calls, (engines,): medians of rounds in which all take turns."""
    layers = np.zeros((_ROUNDS, len(names), len(engines)))
    calls: list[list[float]] = [[] for _ in engines]
    places = {name: place for place, name in enumerate(names)}
    for done in range(_ROUNDS):
        for index, engine in enumerate(engines):
            for row in engine.profile(*inputs, rounds=_PROFILED).rows:
                if row.density is not None and row.name in places:
                    layers[done, places[row.name], index] += row.seconds
            calls[index].append(engine.seconds(*inputs, rounds=_PROFILED))
    return np.median(layers, 0), np.array([median(each) for each in calls])
