"""Training by a recipe, resumable to the bit: all that does not depend on what is learned."""

from __future__ import annotations

import copy
import errno
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from safetensors.torch import save
from torch import Tensor, nn

from rarefy import cost, engine, sparse
from rarefy._files import write_atomically
from rarefy.environment import environment
from rarefy.latency import Latency
from rarefy.sparse import Sparsifier
from rarefy.sparse.layers import local
from rarefy.train.averaging import Average, tensors
from rarefy.train.batches import mixed_seed
from rarefy.train.memory import keep_freed
from rarefy.train.optimizer import learning_rate, make_optimizer
from rarefy.train.recipe import Recipe
from rarefy.train.recorder import Recorder, histograms
from rarefy.train.resuming import to_resume
from rarefy.train.run_folder import MODEL, RunFolder, Writer
from rarefy.train.sharding import load_model, load_optimizer, shard, snapshot, whole

#: Seconds after which a checkpoint is written in the middle of an epoch, with the next training record.
CHECKPOINT_SECONDS = 600.0

#: The file of the table of latencies that a run with target_ms lands by.
LATENCY = "latency.json"

#: How often a run writes a training record when no sparsifier says.
RECORDS = 125

#: A run with a target keeps as best only what is at most this much denser than the target.
BEST_SLACK = 1.02


class TrainingDivergedError(RuntimeError):
    """The loss or a weight is no longer a finite number; the last checkpoint is from before."""


class TrainingInterruptedError(RuntimeError):
    """The run was asked to stop; its checkpoint is written."""


@dataclass(frozen=True)
class Progress:
    """What an observer sees after every optimizer step; loss, sparsity and metrics are the ones last recorded."""

    step: int
    total_steps: int
    epoch: float
    loss: float | None
    sparsity: float | None
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


Observer = Callable[[Progress], bool | None]


class Batched(Protocol):
    """Training data, cut into optimizer steps."""

    def __len__(self) -> int:
        """Optimizer steps an epoch."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Any]:
        """Give what each optimizer step of an epoch learns from, from step ``first`` of it on."""


class Run(ABC):
    """One run of a recipe into a folder. What it learns, and how well, is told by the class of its task.

    Args:
        recipe: what to do.
        folder: where to; nothing is written before :meth:`train`.
        resume: go on after the last checkpoint in the folder, to the same bits as without the interruption (on the
            same machine, with as many threads and processes). On another number of processes it goes on with the same
            batches, but their gradients are summed in another order, the statistics of batch norms are those of other
            parts, and augmentation and dropout draw by process: it is the same run but not to the bit.

    Raises:
        ValueError: something in the recipe that the data, the model or the method refuses; when resuming, another
            recipe than the run's (only ``data.folder``, ``data.workers`` and ``shard`` may differ), a damaged
            checkpoint, or a number of processes with which the batches are other ones (of sentences they are cut by
            it).
        FileNotFoundError: no run to resume, or no data.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, resume: bool = False) -> None:
        self.recipe = recipe
        self.folder = RunFolder(folder)
        state = to_resume(self.folder, recipe) if resume else None
        self._resumed = state is not None
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        # As a plugin, since the environment would override a mere number of steps.
        accumulation = GradientAccumulationPlugin(num_steps=recipe.schedule.accumulate)
        precision = "no" if recipe.precision == "fp32" else recipe.precision
        self.accelerator = Accelerator(mixed_precision=precision, gradient_accumulation_plugin=accumulation)
        if recipe.precision == "fp16" and self.accelerator.scaler is None:
            raise ValueError(f"precision: fp16 does not run on {self.accelerator.device.type}; take bf16 or fp32")
        if recipe.accelerate and self.accelerator.device.type != "cpu":
            raise ValueError(f"accelerate: true is for the CPU, and this run is on {self.accelerator.device.type}")
        if self.accelerator.device.type == "cpu":
            keep_freed()
        self._load_data()
        self._build()
        self.step = 0
        self.seconds = 0.0
        self.seconds_saved = 0.0  # before a checkpoint that the run went on from
        self.best: float | None = None
        self._saved: int | None = None  # the step of the last checkpoint that is written
        self._writer = Writer()
        self._losses: list[Tensor] = []  # since the last record
        if state is not None:
            self._restore(state)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return len(self.batches) * self.recipe.schedule.epochs

    # What a task says

    #: The metric by which the best checkpoint is chosen, and whether the larger is the better.
    metric: str
    larger_is_better: bool
    #: What an optimizer step learns from.
    batches: Batched
    #: The arguments of the model for one example, on the CPU.
    example: tuple[Any, ...]

    #: The model that trains, without wrappers; its parameters may be parts.
    plain_model: nn.Module
    #: The model that is evaluated and written: that one, or a whole copy of it, of the average if there is one.
    evaluated: nn.Module

    @abstractmethod
    def _load_data(self) -> None:
        """Set ``batches``, and what the model is evaluated on."""

    @abstractmethod
    def _make_model(self) -> nn.Module:
        """Return the recipe's model, freshly initialised, and set ``example``."""

    @abstractmethod
    def _learn(self, content: Any) -> None:
        """Take one optimizer step from what ``batches`` gave, adding the losses of the micro-batches to ``_losses``."""

    @abstractmethod
    def _evaluate(self) -> dict[str, float]:
        """Return the metrics of the model as it is, over all processes: the same in each."""

    def _beside(self) -> dict[str, str]:
        """Return the files, by name, that the run needs besides its recipe to be resumed or used."""
        return {}

    def _results(self) -> dict[str, Any]:
        """Return what else the summary holds of the finished model; called in the main process alone."""
        return {}

    def _step_on(self, loss: Tensor) -> None:
        """Take the gradient of a micro-batch's loss, and after the last one of a step move."""
        self.accelerator.backward(loss)
        clip = self.recipe.optimizer.clip_norm
        if clip is not None and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.plain_model.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    # Setting up

    def _build(self) -> None:
        recipe = self.recipe
        torch.manual_seed(mixed_seed(recipe.seed))
        model = self._make_model()
        self.cost = cost.count(model, self.example)
        self.latency: Latency | None = None
        options = dict(recipe.method.options)
        if options.get("target_ms") is not None:
            self.latency = options["latency"] = self._measure(model, options.get("block", 1))
        model = model.to(self.accelerator.device)
        split = recipe.shard and self.accelerator.num_processes > 1
        # Of a model that is split the images alone are, since fully_shard takes contiguous parameters.
        if recipe.channels_last and not split and any(p.dim() == 4 for p in model.parameters()):
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.sparsifier: Sparsifier | None = None
        if recipe.method.name != "dense":
            if options.get("target_flops") is not None:
                options["example_input"] = self.example
            self.sparsifier = sparse.create(recipe.method.name, model, total_steps=self.total_steps, **options)
        self.plain_model = self.evaluated = model
        if split or recipe.optimizer.ema is not None:
            self.evaluated = copy.deepcopy(model)
        if split:
            shard(model, self.accelerator.device)
        self.average = None if recipe.optimizer.ema is None else Average(model, recipe.optimizer.ema)
        self.interval = max(1, self.total_steps // RECORDS) if self.sparsifier is None else self.sparsifier.interval
        self.recorder = Recorder(self.folder, self.cost, self.sparsifier, len(self.batches))
        optimizer = make_optimizer(recipe.optimizer, model)
        if self.sparsifier is not None:
            self.sparsifier.attach(optimizer)
        self.acceleration: sparse.Acceleration | None = None
        if recipe.accelerate and self.sparsifier is not None:
            self.acceleration = sparse.accelerate(self.sparsifier)
        # "Evaluation" leaves DDP out, which what is split has no need of.
        self.model = self.accelerator.prepare_model(model, evaluation_mode=split)
        if recipe.compile:
            self.model = torch.compile(self.model)
        self.optimizer = self.accelerator.prepare(optimizer)

    def _measure(self, model: nn.Module, block: int | Sequence[int]) -> Latency:
        """What the engine takes by the weights that live: as measured when the run began, for all processes alike."""
        measured, found = self.folder.path / LATENCY, list[Latency | None]([None])
        if self._resumed and not measured.is_file():
            raise FileNotFoundError(
                f"{measured} is missing: a resumed run goes by the table of latencies that it began with; put the file "
                "back, or begin a new run"
            )
        if self.is_main and self._resumed:
            found = [Latency.load(measured)]
        elif self.is_main:
            found = [engine.latency(model.eval(), self.example, block=block)]
        broadcast_object_list(found)
        assert found[0] is not None
        return found[0]

    # Training

    def train(self, observer: Observer | None = None) -> dict[str, Any]:
        """Train to the end and write the results; gives what ``summary.json`` holds, in the main process.

        ``observer`` is called after every step, and stops the run by returning True. A run that has finished before is
        left alone.

        Raises TrainingDivergedError on a loss that is not finite, TrainingInterruptedError when the observer stops it,
        OSError where something cannot be written, where another process trains in the folder, or where it holds a run
        that this one does not resume; what was there before is whole then.
        """
        if self.step == self.total_steps and (summary := self.folder.summary()) is not None:
            return summary if self.is_main else {}
        with ExitStack() as ending:
            ending.enter_context(self._told_of_full_disks())
            if self.is_main:
                ending.enter_context(self.folder.held(new=not self._resumed))
            ending.callback(self.recorder.close)
            ending.callback(self._writer.wait)
            if self.is_main:
                about = environment(self.accelerator.num_processes, str(self.accelerator.device))
                self.folder.write_yaml("recipe.yaml", self.recipe.to_dict())
                self.folder.write_json("environment.json", about)
                if self.latency is not None:
                    self.latency.save(self.folder.path / LATENCY)
                for name, text in self._beside().items():
                    self.folder.write_text(name, text)
                self.recorder.open(self.step)
            if self.step == 0:
                self._record(None)
            self._loop(observer)
            self._writer.wait()
            return self._finish()

    @contextmanager
    def _told_of_full_disks(self) -> Iterator[None]:
        """Say of a disk without room what there is to go back to."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = f"{error.strerror}; {self._kept()}: make room, and resume the run"
            raise OSError(error.errno, reason, error.filename) from error

    def _record(self, loss: float | None) -> None:
        lr = self.recipe.optimizer.lr * self._lr()
        self.recorder.train(self.step, loss=loss, learning_rate=lr, seconds=self.seconds)

    def _lr(self) -> float:
        warmup = self.recipe.schedule.warmup_epochs * len(self.batches)
        return learning_rate(self.step, warmup, self.total_steps)

    def _loop(self, observer: Observer | None) -> None:
        steps = len(self.batches)
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        loss = None
        metrics: dict[str, float] = {}
        for epoch in range(self.step // steps, self.recipe.schedule.epochs):
            for content in self.batches.epoch(epoch, self.step - epoch * steps):
                self._optimizer_step(content)
                self.seconds = time.monotonic() - began
                end_of_epoch = self.step == (epoch + 1) * steps
                record = self.step % self.interval == 0 or end_of_epoch
                if record:
                    loss = self._mean_loss()
                    self._record(loss)
                names = ["last"]
                if end_of_epoch:
                    metrics = self._checked_metrics()
                    self.recorder.evaluation(self.step, **metrics)
                    if self._is_better(metrics[self.metric]) and self._within_budget():
                        self.best = metrics[self.metric]
                        names = ["best", "last"]
                sparsity = self.recorder.sparsity
                seen = Progress(self.step, self.total_steps, self.step / steps, loss, sparsity, self.seconds, metrics)
                stop = self._agreed(observer is not None and bool(observer(seen)))
                if stop or end_of_epoch or (record and time.monotonic() - saved > CHECKPOINT_SECONDS):
                    self._save(names)
                    saved = time.monotonic()
                if stop and self.step < self.total_steps:
                    raise TrainingInterruptedError(f"stopped after step {self.step} of {self.total_steps}")

    def _optimizer_step(self, content: Any) -> None:
        self.model.train()
        # Every step's randomness follows from the seed and the step, so a resumed run needs no generator state.
        torch.manual_seed(mixed_seed(self.recipe.seed, self.step, self.accelerator.process_index))
        factor = self._lr()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self._learn(content)
        if self.average is not None:
            self.average.update(self.plain_model, self.step)
        self.step += 1

    def _mean_loss(self) -> float:
        """Over the steps since the last record and over all processes, checked."""
        loss: float = self._summed_losses().mean().item() / self.accelerator.num_processes
        self._losses.clear()
        self._check_finite(loss, "the loss")
        return loss

    def _summed_losses(self) -> Tensor:
        """The losses since the last record, each summed over all processes."""
        if not self._losses:
            return torch.zeros(0)
        losses: Tensor = self.accelerator.reduce(torch.stack(self._losses))
        return losses

    def _agreed(self, stop: bool) -> bool:
        """Whether any process was asked to stop: all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return stop
        return bool(self.accelerator.reduce(torch.tensor([float(stop)], device=self.accelerator.device)) > 0)

    def _check_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"{what} is {value} at step {self.step} (epoch {self.step / len(self.batches):.2f}); a lower "
                f"optimizer.lr (now {self.recipe.optimizer.lr:g}) or a warm-up (schedule.warmup_epochs) usually helps; "
                f"{self._kept()}"
            )

    def _kept(self) -> str:
        """What there is to go back to."""
        self._writer.settle()
        if self._saved is None:
            return "no checkpoint was written before"
        return f"the checkpoint {self.folder.checkpoint('last')}, from step {self._saved}, is whole"

    def _is_better(self, value: float) -> bool:
        return self.best is None or (value > self.best if self.larger_is_better else value < self.best)

    @torch.no_grad()
    def _checked_metrics(self) -> dict[str, float]:
        # The processes may have unequal numbers of batches, so each runs a whole model itself and no wrapper; the main
        # process's running statistics count, as they do there.
        self._refresh()
        if self.accelerator.num_processes > 1:
            for buffer in self.evaluated.buffers():
                torch.distributed.broadcast(buffer, src=0)
        self.evaluated.eval()
        metrics = self._evaluate()
        for name, value in metrics.items():
            self._check_finite(value, f"the {name.replace('_', ' ')}")
        return metrics

    def _refresh(self) -> None:
        """Let the model that is evaluated be what was trained, if it is another one."""
        if self.evaluated is self.plain_model:
            return
        source = tensors(self.plain_model)
        if self.average is not None:
            source = self.average.tensors if self.sparsifier is None else self.average.masked(self.plain_model)
        for name, tensor in tensors(self.evaluated).items():
            tensor.copy_(whole(source[name]))

    def _within_budget(self) -> bool:
        """True for a dense run, one without a target, and one that is about as sparse as its target asks."""
        if self.sparsifier is None or self.sparsifier.budget is None:
            return True
        budget = self.sparsifier.budget
        return budget.density([layer.live for layer in self.sparsifier.layers()]) <= BEST_SLACK * budget.goal

    # Checkpoints and results

    def _save(self, names: Sequence[str]) -> None:
        """Write checkpoints of these names, aside: what they hold is copied before anything moves on."""
        parameters = dict(self.plain_model.named_parameters())
        finite = torch.stack([local(parameter).isfinite().all() for parameter in parameters.values()])
        for key, parts in zip(parameters, self.accelerator.reduce(finite.int()).tolist(), strict=True):
            if parts < self.accelerator.num_processes:
                self._check_finite(math.nan, f"a number in {key}")
        self._writer.wait()  # at most one copy is held
        state, step = snapshot(self._state(), keep=self.is_main), self.step

        def write() -> None:
            for name in names:
                self.folder.save(name, state)
            self._saved = step

        if self.is_main:
            self._writer.start(write)
        else:
            self._saved = step

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "processes": self.accelerator.num_processes,
            "seconds": self.seconds,
            "seconds_saved": self._seconds_saved(),
            "best": self.best,
            "losses": self._summed_losses(),
            "recipe": self.recipe.to_dict(),
            "model": self.plain_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": None if self.sparsifier is None else self.sparsifier.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "average": None if self.average is None else self.average.tensors,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        before, now = state["processes"], self.accelerator.num_processes
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"{self.folder.path} was begun by {before} processes, in {state['total_steps']} optimizer steps, and "
                f"{now} would cut the data into {self.total_steps} other ones: resume it with {before}, or start a new "
                "run"
            )
        try:
            self._load(state)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # there is no end to what a damaged state makes its readers stumble over
            raise self.folder.damaged("last", error) from error
        # They are sums over the processes, of which there may be others now.
        losses = state["losses"].to(self.accelerator.device) * (now / before)
        self._losses = list(losses if self.is_main else torch.zeros_like(losses))
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.seconds_saved = state["seconds_saved"] or 0.0
        self._saved = self.step

    def _load(self, state: dict[str, Any]) -> None:
        load_model(self.plain_model, state["model"])
        scaler, optimizer = self.accelerator.scaler, self.recipe.optimizer
        # A scaler may have left out every step so far.
        remembers = scaler is None and (optimizer.name == "adamw" or optimizer.momentum > 0)
        if remembers and state["step"] and not state["optimizer"]["state"]:
            raise ValueError("the optimizer remembers nothing")
        load_optimizer(self.optimizer, state["optimizer"])
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(state["sparsifier"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load(state["average"])

    def _finish(self) -> dict[str, Any]:
        """Finalize the model, and write what the run came to."""
        states = [] if self.sparsifier is None else self.sparsifier.layers()
        magnitudes = [] if self.sparsifier is None else histograms(self.sparsifier)
        saved = self._seconds_saved()
        if self.acceleration is not None:
            self.acceleration.restore()
        if self.sparsifier is not None:
            self.sparsifier.finalize()
        metrics = self._checked_metrics()
        last, latency_ms = metrics[self.metric], self.recorder.latency_ms()
        if not self.is_main:
            return {}
        final = cost.count(self.evaluated, self.example)
        summary = {
            **self.recorder.summary(self.recipe, final, {state.name: state.threshold for state in states}, latency_ms),
            **metrics,
            f"best_{self.metric}": last if self._is_better(last) else self.best,
            "steps": self.step,
            "seconds": self.seconds,
            "seconds_saved": saved,
            "measured_ms": self._measured_ms(),
            **self._results(),
        }
        # Clones, since a file of tied weights holds each of them.
        form = torch.contiguous_format
        content = {key: value.clone(memory_format=form) for key, value in self.evaluated.state_dict().items()}
        path = self.folder.path / MODEL
        data = save(content, metadata={"format": "pt"})
        write_atomically(path, lambda p: p.write_bytes(data))
        if magnitudes:
            self.folder.write_json("histograms.json", {"layers": magnitudes})
        self.folder.write_json("summary.json", summary)
        return summary

    def _seconds_saved(self) -> float | None:
        """By sparse products, as timed in this process; None where the recipe asks for none."""
        return None if self.acceleration is None else self.seconds_saved + self.acceleration.seconds_saved

    def _measured_ms(self) -> float | None:
        """Milliseconds of the engine for one image on this machine, in a run that had a target for them."""
        if self.latency is None:
            return None
        model = copy.deepcopy(self.evaluated).cpu().eval()
        return 1e3 * engine.compile(model, self.example, threads=1).seconds(*self.example)
