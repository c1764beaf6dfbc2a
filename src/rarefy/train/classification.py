"""Training an image classifier by a recipe."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.data import fashion_mnist
from rarefy.train.batches import Batches, normalise
from rarefy.train.recipe import Data, build
from rarefy.train.run import Run

#: Test images at once.
EVALUATION_BATCH = 1000


class Classification(Run):
    """One run of a recipe that trains an image classifier; see :class:`~rarefy.train.run.Run`."""

    metric, larger_is_better = "test_accuracy", True

    def _load_data(self) -> None:
        data, schedule = self.recipe.data, self.recipe.schedule
        assert isinstance(data, Data)
        with self.accelerator.main_process_first():
            loaded = fashion_mnist.load(data.folder)
        size = data.train_size or len(loaded.train_images)
        if size > len(loaded.train_images):
            raise ValueError(f"data.train_size must be at most {len(loaded.train_images)}, got {size}")
        device = self.accelerator.device
        self.batches = Batches(
            loaded.train_images[:size].to(device),
            loaded.train_labels[:size].to(device),
            batch_size=schedule.batch_size,
            accumulate=schedule.accumulate,
            augment=data.augment,
            seed=self.recipe.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        self.test_images, self.test_labels = normalise(loaded.test_images), loaded.test_labels
        self.classes = len(loaded.classes)

    def _make_model(self) -> nn.Module:
        """The recipe's model, for the images and the classes of the data."""
        name, example = self.recipe.model.name, self.test_images[:1]
        self.example = (example,)
        model = build(self.recipe.model, in_channels=example.shape[1], num_classes=self.classes)
        try:
            with torch.no_grad():
                outputs = model.eval()(example).shape[1:]
        except RuntimeError as error:
            raise ValueError(f"{name} does not take images of shape {tuple(example.shape[1:])}: {error}") from error
        if outputs != (self.classes,):
            raise ValueError(
                f"{name} gives {tuple(outputs)} numbers an image, but {self.recipe.data.name} has {self.classes} "
                f"classes: leave model.num_classes out, or set it to {self.classes}"
            )
        return model

    def _learn(self, content: list[tuple[Tensor, Tensor]]) -> None:
        smoothing = self.recipe.schedule.label_smoothing
        for x, y in content:
            with self.accelerator.accumulate(self.model):
                output = self.model(self._to_device(x)).float()
                loss = F.cross_entropy(output, y.to(self.accelerator.device), label_smoothing=smoothing)
                self._step_on(loss)
            self._losses.append(loss.detach())

    def _to_device(self, x: Tensor) -> Tensor:
        kind = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        return x.to(self.accelerator.device, memory_format=kind)

    def _evaluate(self) -> dict[str, float]:
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        images, labels = (torch.split(t, EVALUATION_BATCH)[rank::world] for t in (self.test_images, self.test_labels))
        for x, y in zip(images, labels, strict=True):
            output, truth = self.plain_model(self._to_device(x)).float(), y.to(device)
            sums[0] += (output.argmax(1) == truth).sum()
            sums[1] += F.cross_entropy(output, truth, reduction="sum").double()
        accuracy, loss = (self.accelerator.reduce(sums) / len(self.test_images)).tolist()
        return {"test_accuracy": accuracy, "test_loss": loss}
