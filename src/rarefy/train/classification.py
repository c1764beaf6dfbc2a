"""Training an image classifier by a recipe."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.data import fashion_mnist
from rarefy.train.batches import Batches, normalise
from rarefy.train.recipe import Data, build
from rarefy.train.run import Run

#: Test images at once.
EVALUATION_BATCH = 1000

#: With more than twice as many classes, how often the right one is among the first so many is told, too.
FIRST = 5


class Classification(Run):
    """One run of a recipe that trains an image classifier; see :class:`~rarefy.train.run.Run`."""

    metric, larger_is_better = "test_accuracy", True
    #: How many classes there are, and one image as the model sees it, on the CPU; set with the data.
    classes: int
    one_image: Tensor

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
        self._images, self._labels = normalise(loaded.test_images), loaded.test_labels
        self.classes = len(loaded.classes)
        self.one_image = self._images[:1]

    def _make_model(self) -> nn.Module:
        """The recipe's model, for the images and the classes of the data."""
        name, example = self.recipe.model.name, self.one_image
        self.example = (example,)
        model = build(self.recipe.model, in_channels=example.shape[1], num_classes=self.classes)
        try:
            with torch.no_grad():
                output = model.eval()(example)
        except RuntimeError as error:
            raise ValueError(f"{name} does not take images of shape {tuple(example.shape[1:])}: {error}") from error
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{name} must give a tensor (B, classes), got {type(output).__name__}: wrap it in one that does"
            )
        outputs = output.shape[1:]
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

    def _held_out(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Give this process's share of what is evaluated on, in batches of images and labels."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        images, labels = (torch.split(t, EVALUATION_BATCH)[rank::world] for t in (self._images, self._labels))
        return zip(images, labels, strict=True)

    def _evaluate(self) -> dict[str, float]:
        device = self.accelerator.device
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for x, y in self._held_out():
            with self.accelerator.autocast():
                output, truth = self.evaluated(self._to_device(x)).float(), y.to(device)
            best = output.topk(min(FIRST, self.classes), dim=1).indices == truth.unsqueeze(1)
            sums[0] += best[:, 0].sum()
            sums[1] += best.sum()
            sums[2] += F.cross_entropy(output, truth, reduction="sum").double()
            sums[3] += len(truth)
        right, among, loss, total = self.accelerator.reduce(sums).tolist()
        if not total:
            raise ValueError("none of the pictures that are evaluated on can be read: rarefy data check says why")
        top = {f"test_top{FIRST}": among / total} if self.classes > 2 * FIRST else {}
        return {"test_accuracy": right / total, **top, "test_loss": loss / total}
