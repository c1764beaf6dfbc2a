"""What a run will take, before it runs: figures of its model, FLOPs by its method's curve, and a few measured steps."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.train.expectation import expected
from rarefy.train.recipe import Recipe, parse
from rarefy.train.run import Run
from rarefy.train.starting import prepare
from rarefy.train.token_batches import TokenBatches

#: Steps that are measured, after some that are not.
STEPS, WARM = 20, 3

#: GB/s between devices where nothing else is said: a network of 100 Gbit/s.
BANDWIDTH = 12.5

#: How a step of several devices is reckoned; of how many exchanges, by whether a run shards.
FORMULA = "load + step + {times} (N - 1) / N x gradient bytes / bandwidth"
TIMES = {False: 2, True: 3}


@dataclass(frozen=True)
class Step:
    """An optimizer step as measured: medians.

    Attributes:
        load: seconds until the step's data is there.
        compute: seconds of the step itself, the method's work in it.
    """

    load: float
    compute: float


@dataclass(frozen=True)
class Memory:
    """Bytes of a device.

    Attributes:
        weights: parameters and buffers, with an average of them and the copy that is evaluated where there are such.
        gradients: one for every parameter that trains.
        optimizer: what it remembers, after a step.
        method: what the sparse method remembers.
        activations: what one micro-batch's forward pass keeps for its backward pass, without the weights.
    """

    weights: int
    gradients: int
    optimizer: int
    method: int
    activations: int

    @property
    def total(self) -> int:
        """All of it; what PyTorch's allocator and its libraries hold besides is not in it."""
        return self.weights + self.gradients + self.optimizer + self.method + self.activations


@dataclass(frozen=True)
class Scaled:
    """The run on some devices, each of which takes its share of every batch.

    Attributes:
        devices: how many.
        step: measured on one, with the share of one.
        exchange: seconds in which the gradients are summed, as reckoned.
        hours: of all optimizer steps; evaluations, checkpoints and the start come on top.
        memory: of each device.
        price: of all of them for so long; None where no price of an hour was given.
    """

    devices: int
    step: Step
    exchange: float
    hours: float
    memory: Memory
    price: float | None


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to. FLOPs are those of :mod:`rarefy.cost`, a multiplication and its addition as one.

    Attributes:
        parameters, sparse: of the model, and the weights that the method makes sparse.
        dense, inference: FLOPs of an example: dense, and as expected of the finished model; None if nobody can know.
        training: FLOPs of the whole run if it were dense.
        training_ratio: the expected share of them (:func:`rarefy.train.expectation.expected`); None as ``inference``.
        epochs, examples, steps: passes, examples of all of them, optimizer steps.
        device, threads, bandwidth: what was measured on; GB/s between devices.
        shard: whether devices hold parts of the weights.
        scaled: for each number of devices.
    """

    name: str
    model: str
    method: str
    parameters: int
    sparse: int
    dense: int
    inference: float | None
    training: float
    training_ratio: float | None
    epochs: int
    examples: int
    steps: int
    device: str
    threads: int
    bandwidth: float
    shard: bool
    scaled: tuple[Scaled, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and strings, ready for JSON."""
        return {**asdict(self), "formula": self.formula}

    @property
    def formula(self) -> str:
        """How the steps of several devices were reckoned."""
        return FORMULA.format(times=TIMES[self.shard])

    def text(self) -> str:
        """Write it for a reader."""
        known = self.training_ratio is not None and self.inference is not None
        lines = [
            f"{self.name}: {self.model} by {self.method}",
            f"  parameters       {self.parameters:,}, of which the method makes {self.sparse:,} sparse",
            f"  inference        {self.dense:.4g} FLOPs an example when dense"
            + (
                f", {self.inference:.4g} expected at the end"
                if known
                else ", fewer at the end: no target says how many"
            ),
            f"  training         {self.training:.4g} FLOPs when dense"
            + (f", {self.training_ratio:.1%} of them expected by the method's curve" if known else ""),
            f"  length           {self.epochs} epochs, {self.examples:,} examples, {self.steps:,} optimizer steps",
            f"measured on {self.device}, {self.threads} threads: medians of at most {STEPS} steps, by one share",
        ]
        for each in self.scaled:
            memory = each.memory
            lines += [
                f"  {each.devices} device{'s' * (each.devices > 1)}",
                f"    step           {_ms(each.step.load)} load + {_ms(each.step.compute)} step"
                f" + {_ms(each.exchange)} exchange",
                f"    memory         {_mib(memory.total)} a device: weights {_mib(memory.weights)}, gradients"
                f" {_mib(memory.gradients)}, optimizer {_mib(memory.optimizer)}, method {_mib(memory.method)},"
                f" activations {_mib(memory.activations)}",
                f"    hours          {each.hours:.3g}" + ("" if each.price is None else f", price {each.price:,.2f}"),
            ]
        lines += [
            f"a step on N devices is {self.formula}, here at {self.bandwidth:g} GB/s, nothing overlapped",
            "memory: weights, gradients, optimizer and method are counted; activations are those that a measured step"
            " kept for its backward pass",
            "hours are of optimizer steps alone: evaluations and checkpoints come on top",
        ]
        return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def exchange(devices: int, gradient_bytes: int, bandwidth: float, shard: bool = False) -> float:
    """Return the seconds in which a ring of devices sums gradients, at ``bandwidth`` GB/s each way.

    ``2 (N - 1) / N x bytes / bandwidth``: every device sends all but its own part once to be summed, and once summed
    (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms"); with ``shard`` it sends its part of the
    weights twice, for the forward and for the backward pass, and gradients once, to be summed. Latencies are left out.
    """
    return TIMES[shard] * (devices - 1) / devices * gradient_bytes / (1e9 * bandwidth)


def held(memory: Memory, recipe: Recipe, devices: int) -> Memory:
    """Return what one of several devices holds of what one alone would: an average and a copy that is evaluated, too.

    With ``shard`` it is parts of all but that copy, and of activations.
    """
    parts = devices if recipe.shard else 1
    averaged = recipe.optimizer.ema is not None
    weights = memory.weights * (1 + averaged) // parts + memory.weights * (averaged or parts > 1)
    return Memory(
        weights, memory.gradients // parts, memory.optimizer // parts, memory.method // parts, memory.activations
    )


def make(
    recipe: Recipe,
    devices: Sequence[int] = (1,),
    *,
    price: float | None = None,
    bandwidth: float = BANDWIDTH,
) -> Plan:
    """Plan a run of a recipe on these numbers of devices, by some steps on this machine's; nothing is written.

    ``price`` is of a device for an hour. A number of devices is measured with a batch of one device's share, so what
    smaller batches lose is in it.

    Raises:
        ValueError: what the recipe's run refuses; numbers of devices that do not divide its batch, a price or
            bandwidth that is not above 0; several processes; a run of one step.
        FileNotFoundError: no data.
    """
    for number in devices:
        if number < 1:
            raise ValueError(f"devices must be at least 1, got {number}")
        if recipe.schedule.batch_size % (number * recipe.schedule.accumulate):
            raise ValueError(
                f"schedule.batch_size={recipe.schedule.batch_size} must be divisible by schedule.accumulate="
                f"{recipe.schedule.accumulate} times {number} devices"
            )
    for name, value in (("price", price), ("bandwidth", bandwidth)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    with tempfile.TemporaryDirectory() as empty:
        whole = prepare(recipe, Path(empty) / "run")
        return describe(whole, ((number, _share(whole, number)) for number in devices), price, bandwidth)


def _share(whole: Run, devices: int) -> Run:
    """The run of one of several devices: the same, by its share of every batch."""
    if devices == 1:
        return whole
    plain = whole.recipe.to_dict()
    plain["schedule"]["batch_size"] //= devices
    return prepare(parse(plain), whole.folder.path)


def describe(whole: Run, shares: Iterable[tuple[int, Run]], price: float | None, bandwidth: float) -> Plan:
    """Make the plan of a run that has not begun, from runs with the share of one of so many devices; these step."""
    if whole.accelerator.num_processes > 1:
        raise ValueError("a plan is measured in one process, with what one device does: start it without torchrun")
    recipe, steps = whole.recipe, whole.total_steps
    parameters = sum(p.numel() for p in whole.plain_model.parameters())
    sparse = 0 if whole.sparsifier is None else sum(layer.weights for layer in whole.sparsifier.layers())
    found = expected(whole.cost, whole.sparsifier)
    examples = _examples(whole)
    gradients = sum(_size(p) for p in whole.plain_model.parameters() if p.requires_grad)
    scaled = []
    for devices, run in shares:
        step, memory = measure(run)
        exchanged = exchange(devices, gradients, bandwidth, recipe.shard)
        hours = steps * (step.load + step.compute + exchanged) / 3600
        cost = None if price is None else price * devices * hours
        scaled.append(Scaled(devices, step, exchanged, hours, held(memory, recipe, devices), cost))
    return Plan(
        name=recipe.name,
        model=recipe.model.name,
        method=recipe.method.name,
        parameters=parameters,
        sparse=sparse,
        dense=whole.cost.dense,
        inference=None if found is None else found[0].inference,
        training=3.0 * whole.cost.dense * examples,
        training_ratio=None if found is None else found[1],
        epochs=recipe.schedule.epochs,
        examples=examples,
        steps=steps,
        device=str(whole.accelerator.device),
        threads=torch.get_num_threads(),
        bandwidth=bandwidth,
        shard=recipe.shard,
        scaled=tuple(scaled),
    )


def _examples(run: Run) -> int:
    """Images, or pairs of sentences, that all steps learn from."""
    if isinstance(run.batches, TokenBatches):
        return len(run.batches.kept) * run.recipe.schedule.epochs
    return run.total_steps * run.recipe.schedule.batch_size


def measure(run: Run, steps: int = STEPS) -> tuple[Step, Memory]:
    """Take some optimizer steps of a run that has not begun, and tell what one takes; the run is of no use after."""
    if run.total_steps < 2:
        raise ValueError(f"a plan measures optimizer steps after a first one, and the run has {run.total_steps} in all")
    contents, warm = _contents(run), min(WARM, run.total_steps - 1)
    activations = _Kept(run.plain_model)
    with torch.autograd.graph.saved_tensors_hooks(activations.keep, activations.give):
        run._optimizer_step(next(contents))
    for content in itertools.islice(contents, warm - 1):
        run._optimizer_step(content)
    loads, computes = [], []
    for _ in range(min(steps, run.total_steps - warm)):
        began = _now(run)
        content = next(contents)
        loaded = _now(run)
        run._optimizer_step(content)
        loads.append(loaded - began)
        computes.append(_now(run) - loaded)
    model = run.plain_model
    memory = Memory(
        weights=sum(_size(t) for t in itertools.chain(model.parameters(), model.buffers())),
        gradients=sum(_size(p) for p in model.parameters() if p.requires_grad),
        optimizer=_tensors(run.optimizer.state_dict()["state"]),
        method=0 if run.sparsifier is None else _tensors(run.sparsifier.state_dict()["layers"]),
        activations=activations.most,
    )
    return Step(statistics.median(loads), statistics.median(computes)), memory


def _contents(run: Run) -> Iterator[Any]:
    """What the run's steps learn from, of as many epochs as it takes."""
    for epoch in itertools.count():
        yield from run.batches.epoch(epoch)


def _now(run: Run) -> float:
    """The clock, when the device has done what it was told."""
    if run.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class _Kept:
    """What forward passes keep for their backward passes: the most of any, in bytes, without the model's own."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.most = 0
        self._own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
        self._seen: set[int] = set()
        self._bytes = 0
        self._backward = False

    def keep(self, tensor: Tensor) -> Tensor:
        if self._backward:  # the next micro-batch
            self._seen, self._bytes, self._backward = set(), 0, False
        storage = tensor.untyped_storage()
        # Several views of one piece of memory are kept once.
        if storage.data_ptr() not in self._own | self._seen:
            self._seen.add(storage.data_ptr())
            self._bytes += storage.nbytes()
            self.most = max(self.most, self._bytes)
        return tensor

    def give(self, tensor: Tensor) -> Tensor:
        self._backward = True
        return tensor


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(state: Any) -> int:
    """Bytes of all tensors in nested mappings."""
    if isinstance(state, Mapping):
        return sum(_tensors(each) for each in state.values())
    return _size(state) if isinstance(state, Tensor) else 0
