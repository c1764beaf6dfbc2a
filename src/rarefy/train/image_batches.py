"""Pictures on disk, cut into batches by pure functions of the seed, the epoch and the step: resuming needs no state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.data.images import Images
from rarefy.data.loading import HOPELESS, Batch, Loader, Pictures, Request, cores
from rarefy.data.photograph import photograph
from rarefy.data.pictures import Augmentation
from rarefy.train.batches import check_sizes, mixed_seed
from rarefy.train.recipe import Images as Data

#: Mean and standard deviation of ImageNet's training pictures by channel, as shares of 255.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: Pictures that are evaluated at once, and the seed of those that are photographed for it.
EVALUATION_BATCH, EVALUATION_SEED = 250, 1

#: What is told of pictures that are damaged: the path of each, and why.
Told = Callable[[list[tuple[str, str]]], None]


def normalise(images: Tensor) -> Tensor:
    """(B, 3, H, W), uint8 or in [0, 1] -> float32 of mean 0 and variance 1."""
    whole = 255.0 if images.dtype == torch.uint8 else 1.0
    mean, std = (torch.tensor(each, device=images.device).view(3, 1) for each in (MEAN, STD))
    # By whole planes and in place: a processor takes ten times as long for bytes times a column of numbers.
    planes = images.flatten(2).to(torch.float32, copy=True).sub_(whole * mean)
    return planes.mul_(1 / (whole * std)).view_as(images)


class ImageBatches:
    """The micro-batches of one process, decoded and augmented by worker processes, normalised on the device.

    Args:
        images: the training split.
        data: what is done with them.
        classes: how many there are; mixed labels are shares of each.
        batch_size: pictures an optimizer step over all processes; the last incomplete one of an epoch is left out.
        accumulate: micro-batches an optimizer step.
        seed: of order and augmentation.
        rank, world, local: this process among how many, and how many of them are on this machine.
        device: where batches go.
        tell: hears of damaged pictures.

    Raises:
        ValueError: a batch that does not divide, or is larger than the split; while an epoch runs, pictures of which
            none can be read.

    """

    def __init__(
        self,
        images: Images,
        data: Data,
        *,
        classes: int,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        local: int = 1,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        tell: Told = lambda damaged: None,
    ) -> None:
        check_sizes(len(images), batch_size, accumulate, world)
        self.images, self.data, self.classes = images, data, classes
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed
        self.rank, self.world, self.device, self.tell = rank, world, device, tell
        low, high = data.scale
        how = Augmentation(scale=(low, high), flip=data.augment == "crop-flip", jitter=data.jitter)
        self._load = loader(
            Pictures(images, data.size, crop=data.crop, augmentation=None if data.augment == "none" else how),
            data,
            local,
            device,
        )

    def __len__(self) -> int:
        """Optimizer steps an epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The micro-batches of each optimizer step of an epoch from step ``first`` of it on.

        Each is (B, 3, size, size) float32 and (B,) int64, or with mixup (B, classes) float32.
        """
        batches = self.bytes_of(epoch, first)
        for step in range(first, len(self)):
            yield [
                self._finished(next(batches), mixed_seed(self.seed, epoch, step, self.rank, micro))
                for micro in range(self.accumulate)
            ]

    def bytes_of(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The micro-batches of :meth:`epoch`, one after another, as the workers make them: what a device gets."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(mixed_seed(self.seed, epoch)))

        def requests() -> Iterator[Request]:
            for step in range(first, len(self)):
                mine = order[step * self.batch_size : (step + 1) * self.batch_size].chunk(self.world)[self.rank]
                for part in mine.chunk(self.accumulate):
                    indices = part.tolist()
                    yield Request(indices, [mixed_seed(self.seed, epoch, index) for index in indices])

        return self._load(requests())

    def _finished(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
        self.tell(batch.damaged)
        if len(batch.labels) < self.batch_size // (self.world * self.accumulate):
            path, why = batch.damaged[-1]
            raise ValueError(
                f"{HOPELESS} pictures in a row cannot be read, the last {path} ({why}): is the disk there?"
            )
        images, labels = (each.to(self.device, non_blocking=True) for each in (batch.images, batch.labels))
        if self.data.photograph:
            generator = torch.Generator(self.device).manual_seed(seed)
            images = photograph(images, self.data.photograph, generator=generator)
        images = normalise(images)
        if not self.data.mixup:
            return images, labels
        # Zhang et al., mixup (arXiv 1710.09412): one share for all pictures, each with its opposite of the batch.
        share = random.Random(seed).betavariate(self.data.mixup, self.data.mixup)
        shares = F.one_hot(labels, self.classes).float()
        return images.lerp(images.flip(0), share), shares.lerp(shares.flip(0), share)


def loader(pictures: Pictures, data: Data, local: int, device: torch.device) -> Loader:
    """Give the loader of these pictures, with the workers that the recipe or the machine has for this process."""
    workers = cores(local) if data.workers is None else data.workers
    return Loader(pictures, workers, pin_memory=device.type == "cuda")


class HeldOut:
    """The pictures that a process evaluates, or ``only`` these: the same in every epoch, each in one process.

    Damaged ones are left out. Photographs of drawings are made from a seed on the CPU, so that they are the same
    whatever the device and the number of processes.
    """

    def __init__(
        self,
        images: Images,
        data: Data,
        *,
        rank: int = 0,
        world: int = 1,
        local: int = 1,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        tell: Told = lambda damaged: None,
        only: Sequence[int] | None = None,
    ) -> None:
        self.data, self.device, self.tell = data, device, tell
        self._chosen = range(len(images)) if only is None else only
        self._load = loader(Pictures(images, data.size, crop=data.crop), data, local, device)
        self._mine = range(rank, -(-len(self._chosen) // EVALUATION_BATCH), world)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = EVALUATION_BATCH
        requests = (Request(self._chosen[n * size : (n + 1) * size]) for n in self._mine)
        for number, batch in zip(self._mine, self._load(requests), strict=True):
            self.tell(batch.damaged)
            if not len(batch.labels):
                continue
            images, labels = (each.to(self.device, non_blocking=True) for each in (batch.images, batch.labels))
            if self.data.photograph:
                generator = torch.Generator().manual_seed(mixed_seed(EVALUATION_SEED, number))
                images = photograph(images, self.data.photograph, generator=generator)
            yield normalise(images), labels
