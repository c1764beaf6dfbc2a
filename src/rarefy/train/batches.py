"""Images in memory, cut into batches by pure functions of the seed, the epoch and the step: resuming needs no state."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Mean and standard deviation of the training images of Fashion-MNIST, as shares of 255.
MEAN, STD = 0.2860, 0.3530


def normalise(images: Tensor) -> Tensor:
    """(B, H, W) uint8 -> (B, 1, H, W) float32 of mean 0 and variance 1."""
    return ((images.float() / 255.0 - MEAN) / STD).unsqueeze(1)


def crop_flip(images: Tensor, generator: torch.Generator, pad: int = 2) -> Tensor:
    """(B, H, W) uint8, each shifted by up to ``pad`` pixels either way, black moving in, and half of them mirrored."""
    batch, height, width = images.shape
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    shift = torch.randint(2 * pad + 1, (2, batch, 1, 1), generator=generator)
    rows = torch.arange(height).view(1, -1, 1) + shift[0]
    columns = torch.arange(width).view(1, 1, -1).expand(batch, 1, width)
    mirror = torch.rand(batch, 1, 1, generator=generator) < 0.5
    columns = torch.where(mirror, width - 1 - columns, columns) + shift[1]
    place = (torch.arange(batch).view(-1, 1, 1), rows, columns)
    return padded[tuple(index.to(images.device, non_blocking=True) for index in place)]


def check_sizes(images: int, batch_size: int, accumulate: int, world: int) -> None:
    """Raise ValueError for a batch that is more than all images, or that micro-batches and processes do not divide."""
    if batch_size > images:
        raise ValueError(f"schedule.batch_size={batch_size} is more than the {images} training images")
    if batch_size % (accumulate * world):
        raise ValueError(
            f"schedule.batch_size={batch_size} must be divisible by schedule.accumulate={accumulate} times "
            f"{world} processes"
        )


class Batches:
    """The micro-batches of one process.

    Args:
        images: (N, H, W) uint8; on the device that trains, so that batches are cut there.
        labels: (N,) int64, on the same device.
        batch_size: images an optimizer step over all processes; the last incomplete one of an epoch is left out.
        accumulate: micro-batches an optimizer step.
        augment: "none" or "crop-flip".
        seed: of order and augmentation.
        rank, world: this process among how many.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        accumulate: int = 1,
        augment: str = "none",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_sizes(len(images), batch_size, accumulate, world)
        self.images, self.labels = images, labels
        self.batch_size, self.accumulate, self.augment = batch_size, accumulate, augment
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self) -> int:
        """Optimizer steps an epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The micro-batches of each optimizer step of an epoch from step ``first`` of it on: (B, 1, H, W), (B,)."""
        order = torch.randperm(len(self.images), generator=self._generator(epoch)).to(self.images.device)
        for step in range(first, len(self)):
            mine = order[step * self.batch_size : (step + 1) * self.batch_size].chunk(self.world)[self.rank]
            images = self.images[mine]
            if self.augment == "crop-flip":
                images = crop_flip(images, self._generator(epoch, step, self.rank))
            pairs = zip(images.chunk(self.accumulate), self.labels[mine].chunk(self.accumulate), strict=True)
            yield [(normalise(x), y) for x, y in pairs]

    def _generator(self, *place: int) -> torch.Generator:
        return torch.Generator().manual_seed(mixed_seed(self.seed, *place))


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers (splitmix64 finalizer over each)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
