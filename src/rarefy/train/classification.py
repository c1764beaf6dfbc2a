"""Training an image classifier by a recipe, resumable to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from rarefy import cost, models, sparse
from rarefy.data import fashion_mnist
from rarefy.environment import environment
from rarefy.sparse import Sparsifier
from rarefy.train.batches import Batches, mixed_seed, normalise
from rarefy.train.recipe import Recipe
from rarefy.train.recorder import Recorder, histograms
from rarefy.train.run_folder import RunFolder, write_atomically

#: Seconds after which a checkpoint is written in the middle of an epoch.
CHECKPOINT_SECONDS = 600.0

#: How often a run writes a training record when no sparsifier says.
RECORDS = 125

#: A run with a target keeps as best only what is at most this much denser than the target.
BEST_SLACK = 1.02


class TrainingDivergedError(RuntimeError):
    """The loss is no longer a finite number."""


class TrainingInterruptedError(RuntimeError):
    """The run was asked to stop; its checkpoint is written."""


@dataclass(frozen=True)
class Progress:
    """What an observer sees after every optimizer step; loss, accuracy and sparsity are the ones last recorded."""

    step: int
    total_steps: int
    epoch: float
    loss: float | None
    accuracy: float | None
    sparsity: float | None
    seconds: float


Observer = Callable[[Progress], bool | None]


def learning_rate(step: float, warmup: float, total: float) -> float:
    """Factor on the learning rate: linear from 0 over ``warmup`` steps, then half a cosine down to 0 at ``total``."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2.0


class Classification:
    """One run of a recipe into a folder; ``observer`` is called after every step, and stops it by returning True."""

    def __init__(self, recipe: Recipe, folder: Path, *, resume: bool = False, observer: Observer | None = None) -> None:
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.recipe = recipe
        self.folder = RunFolder(folder)
        self.observer = observer
        self.accelerator = Accelerator(
            mixed_precision=recipe.precision, gradient_accumulation_steps=recipe.schedule.accumulate
        )
        self._load_data()
        self._build()
        self.step = 0
        self.seconds = 0.0
        self.best = -1.0
        state = self.folder.load("last") if resume else None
        if state is not None:
            self._restore(state)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return len(self.batches) * self.recipe.schedule.epochs

    def _load_data(self) -> None:
        data, schedule = self.recipe.data, self.recipe.schedule
        with self.accelerator.main_process_first():
            loaded = fashion_mnist.load(data.folder)
        size = data.train_size or len(loaded.train_images)
        if size > len(loaded.train_images):
            raise ValueError(f"data.train_size must be at most {len(loaded.train_images)}, got {size}")
        self.batches = Batches(
            loaded.train_images[:size],
            loaded.train_labels[:size],
            batch_size=schedule.batch_size,
            accumulate=schedule.accumulate,
            augment=data.augment,
            seed=self.recipe.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        self.test_images, self.test_labels = normalise(loaded.test_images), loaded.test_labels

    def _build(self) -> None:
        recipe = self.recipe
        torch.manual_seed(mixed_seed(recipe.seed))
        options = dict(recipe.model.options)
        if "in_channels" in models.options(recipe.model.name):
            options.setdefault("in_channels", 1)
        model = models.create(recipe.model.name, **options)
        example = self.test_images[:1]
        self.cost = cost.count(model, example)
        model = model.to(self.accelerator.device)
        if recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.sparsifier: Sparsifier | None = None
        if recipe.method.name != "dense":
            self.sparsifier = sparse.create(
                recipe.method.name,
                model,
                total_steps=self.total_steps,
                example_input=example.to(self.accelerator.device),
                **recipe.method.options,
            )
        self.plain_model = model
        self.interval = max(1, self.total_steps // RECORDS) if self.sparsifier is None else self.sparsifier.interval
        self.recorder = Recorder(self.folder, self.cost, self.sparsifier, len(self.batches))
        self.model, self.optimizer = self.accelerator.prepare(model, self._make_optimizer(model))

    def _make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        options = self.recipe.optimizer
        defaults = {"lr": options.lr, "weight_decay": options.weight_decay}
        if self.sparsifier is None:
            groups: list[dict[str, Any]] = [{"params": list(model.parameters()), **defaults}]
        else:
            groups = self.sparsifier.param_groups(**defaults)
        linear_biases = {id(m.bias) for m in model.modules() if isinstance(m, nn.Linear)}
        everything = groups[0]["params"]
        norms = [p for p in everything if p.dim() <= 1 and id(p) not in linear_biases]
        chosen = {id(p) for p in norms}
        groups[0]["params"] = [p for p in everything if id(p) not in chosen]
        groups.append({"params": norms, "lr": options.lr, "weight_decay": options.norm_weight_decay})
        for group in groups:
            group["peak_lr"] = group["lr"]
        if options.name == "adamw":
            return torch.optim.AdamW(groups, lr=options.lr)
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov)

    # Training

    def train(self) -> dict[str, Any]:
        """Train to the end and write the results; gives what ``summary.json`` holds.

        Raises TrainingDivergedError on a loss that is not finite, TrainingInterruptedError when the observer stops it.
        """
        main = self.accelerator.is_main_process
        try:
            if main:
                about = environment(self.accelerator.num_processes, str(self.accelerator.device))
                self.folder.write_yaml("recipe.yaml", self.recipe.to_dict())
                self.folder.write_json("environment.json", about)
                self.recorder.open(self.step)
                if self.step == 0:
                    self._record(None)
            self._loop()
            return self._finish()
        finally:
            self.recorder.close()

    def _record(self, loss: float | None) -> None:
        lr = self.recipe.optimizer.lr * self._lr()
        self.recorder.train(self.step, loss=loss, learning_rate=lr, seconds=self.seconds)

    def _lr(self) -> float:
        warmup = self.recipe.schedule.warmup_epochs * len(self.batches)
        return learning_rate(self.step, warmup, self.total_steps)

    def _loop(self) -> None:
        device = self.accelerator.device
        steps = len(self.batches)
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        losses: list[Tensor] = []
        stop, loss_value, accuracy = False, None, None
        for epoch in range(self.step // steps, self.recipe.schedule.epochs):
            for micro_batches in self.batches.epoch(epoch, self.step - epoch * steps):
                self.model.train()
                # Every step's randomness follows from the seed and the step, so a resumed run needs no generator state.
                torch.manual_seed(mixed_seed(self.recipe.seed, self.step, self.accelerator.process_index))
                factor = self._lr()
                for group in self.optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
                for x, y in micro_batches:
                    with self.accelerator.accumulate(self.model):
                        output = self.model(self._to_device(x))
                        smoothing = self.recipe.schedule.label_smoothing
                        loss = F.cross_entropy(output.float(), y.to(device), label_smoothing=smoothing)
                        self.accelerator.backward(loss)
                        self.optimizer.step()
                        self.optimizer.zero_grad()
                    losses.append(loss.detach())
                self.step += 1
                if self.sparsifier is not None:
                    self.sparsifier.step()
                self.seconds = time.monotonic() - began
                end_of_epoch = self.step == (epoch + 1) * steps
                if self.step % self.interval == 0 or end_of_epoch:
                    loss_value = float(torch.stack(losses).mean())
                    losses.clear()
                    self._check_finite(loss_value)
                    if self.accelerator.is_main_process:
                        self._record(loss_value)
                if end_of_epoch:
                    accuracy = self._evaluate_and_record()
                if self.observer is not None:
                    where = (self.step, self.total_steps, self.step / steps)
                    stop = bool(
                        self.observer(Progress(*where, loss_value, accuracy, self.recorder.sparsity, self.seconds))
                    )
                if stop or end_of_epoch or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    if losses:
                        self._check_finite(float(torch.stack(losses).mean()))
                    self._save("last")
                    saved = time.monotonic()
                if stop and self.step < self.total_steps:
                    raise TrainingInterruptedError(f"stopped after step {self.step} of {self.total_steps}")

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss is {loss} at step {self.step} (epoch {self.step / len(self.batches):.2f}); a lower "
                f"optimizer.lr (now {self.recipe.optimizer.lr:g}) or a warm-up (schedule.warmup_epochs) usually helps"
            )

    def _to_device(self, x: Tensor) -> Tensor:
        kind = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        return x.to(self.accelerator.device, memory_format=kind)

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, batch: int = 1000) -> tuple[float, float]:
        """(accuracy, loss) on the test images, over all processes."""
        model.eval()
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        images, labels = (torch.split(t, batch)[rank::world] for t in (self.test_images, self.test_labels))
        for x, y in zip(images, labels, strict=True):
            output, truth = model(self._to_device(x)).float(), y.to(device)
            sums[0] += (output.argmax(1) == truth).sum()
            sums[1] += F.cross_entropy(output, truth, reduction="sum").double()
        accuracy, loss = (self.accelerator.reduce(sums) / len(self.test_images)).tolist()
        return accuracy, loss

    def _evaluate_and_record(self) -> float:
        accuracy, loss = self._evaluate(self.model)
        if self.accelerator.is_main_process:
            self.recorder.evaluation(self.step, test_accuracy=accuracy, test_loss=loss)
        if accuracy > self.best and self._within_budget():
            self.best = accuracy
            self._save("best")
        return accuracy

    def _within_budget(self) -> bool:
        """True for a dense run, one without a target, and one that is about as sparse as its target asks."""
        if self.sparsifier is None or self.sparsifier.budget is None:
            return True
        budget = self.sparsifier.budget
        return budget.density([layer.live for layer in self.sparsifier.layers()]) <= BEST_SLACK * budget.goal

    # Checkpoints and results

    def _save(self, name: str) -> None:
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "recipe": self.recipe.to_dict(),
            "model": self.plain_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": None if self.sparsifier is None else self.sparsifier.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        self.folder.save(name, state)

    def _restore(self, state: dict[str, Any]) -> None:
        if state["recipe"] != self.recipe.to_dict():
            old, new = state["recipe"], self.recipe.to_dict()
            changed = [key for key in new if old.get(key) != new[key]]
            raise ValueError(
                f"{self.folder.path} was started with another recipe (it differs in {', '.join(changed)}); "
                "resume with the same one, or start a new run"
            )
        self.plain_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(state["sparsifier"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]

    def _finish(self) -> dict[str, Any]:
        """Finalize the model, and write what the run came to."""
        states = [] if self.sparsifier is None else self.sparsifier.layers()
        magnitudes = [] if self.sparsifier is None else histograms(self.plain_model, self.sparsifier)
        if self.sparsifier is not None:
            self.sparsifier.finalize()
        accuracy, loss = self._evaluate(self.model)
        if not self.accelerator.is_main_process:
            return {}
        final = cost.count(self.plain_model, self._to_device(self.test_images[:1]))
        summary = {
            **self.recorder.summary(self.recipe, final, {state.name: state.threshold for state in states}),
            "test_accuracy": accuracy,
            "test_loss": loss,
            "best_test_accuracy": max(self.best, accuracy),
            "steps": self.step,
            "seconds": self.seconds,
        }
        tensors = {key: tensor.contiguous() for key, tensor in self.plain_model.state_dict().items()}
        path = self.folder.path / "model.safetensors"
        write_atomically(path, lambda p: save_file(tensors, p, metadata={"format": "pt"}))
        if magnitudes:
            self.folder.write_json("histograms.json", {"layers": magnitudes})
        self.folder.write_json("summary.json", summary)
        return summary
