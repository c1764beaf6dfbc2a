"""Batches of decoded pictures by PyTorch's DataLoader: the same bits whatever the number of its worker processes."""

from __future__ import annotations

import os
import random
import signal
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rarefy.data import pictures
from rarefy.data.images import Images
from rarefy.data.pictures import Augmentation

#: So many pictures in a row that cannot be read are not damage of theirs.
HOPELESS = 100


class Request(NamedTuple):
    """Which pictures, and the seed of each; without seeds they are made for evaluation."""

    indices: Sequence[int]
    seeds: Sequence[int] | None = None


class Batch(NamedTuple):
    """Pictures (B, 3, size, size) uint8, labels (B,) int64, and what was found damaged: its path and why."""

    images: Tensor
    labels: Tensor
    damaged: list[tuple[str, str]]


class Pictures(Dataset[Batch]):
    """The batches that are asked for, each a function of the request and the files.

    A picture that does not decode is named in ``damaged``. In training the next one of the split that does takes its
    place, which mostly is of the same class, and is augmented as it would have been; in evaluation it is left out.

    Args:
        images: the split.
        size: side of the pictures.
        crop: in evaluation the share of the shorter side that is seen.
        augmentation: of training; None sees there what evaluation sees.

    """

    def __init__(
        self, images: Images, size: int, *, crop: float = 0.875, augmentation: Augmentation | None = None
    ) -> None:
        self.images, self.size, self.crop, self.augmentation = images, size, crop, augmentation

    def __getitem__(self, request: Request) -> Batch:
        """Make a batch; of too many pictures in a row that cannot be read it has fewer pictures than asked for."""
        made = torch.empty(len(request.indices), 3, self.size, self.size, dtype=torch.uint8)
        labels: list[int] = []
        damaged: list[tuple[str, str]] = []
        for row, first in enumerate(request.indices):
            seed = None if request.seeds is None else request.seeds[row]
            for index in range(first, first + (1 if seed is None else HOPELESS)):
                place = index % len(self.images)
                try:
                    made[len(labels)] = self._picture(self.images.read(place), seed)
                except Exception as error:  # there is no end to what a decoder stumbles over in a damaged picture
                    damaged.append((self.images.name(place), reason(error)))
                    continue
                labels.append(int(self.images.labels[place]))
                break
        return Batch(made[: len(labels)], torch.tensor(labels, dtype=torch.int64), damaged)

    def _picture(self, data: bytes, seed: int | None) -> Tensor:
        if seed is None or self.augmentation is None:
            return pictures.for_evaluation(data, self.size, self.crop)
        return pictures.for_training(data, self.size, self.augmentation, random.Random(seed))


def reason(error: Exception) -> str:
    """Say in one line why a picture could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture of a known format"
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(said.split())[:200]


def cores(world: int = 1) -> int:
    """Give the cores that are left to each of ``world`` processes of this machine, at least one."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available // world)


class Loader:
    """Serves requests one after another, by worker processes that stay.

    Args:
        dataset: what a request is given to.
        workers: processes; 0 does the work here.
        pin_memory: whether batches come in memory that a GPU copies from in the background.

    """

    def __init__(self, dataset: Dataset[Any], workers: int, *, pin_memory: bool = False) -> None:
        self._given = _Given()
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self._given,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_begin,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # which the loader draws from, and nobody else
        )
        # At the end of the process, too, before multiprocessing waits for what it has told to end by SIGTERM.
        weakref.finalize(self, _ended, self._loader)

    def __call__(self, requests: Iterable[Any]) -> Iterator[Any]:
        """Give what the dataset makes of each request, in order."""
        self._given.requests = requests
        yield from self._loader  # which holds this loader, and so its workers, for as long


class _Given:
    """What a loader takes for its sampler: the requests of the moment."""

    requests: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.requests)


def _ended(loader: DataLoader[Any]) -> None:
    """Let a loader's workers end: they leave signals to others."""
    workers: Any = loader._iterator  # which PyTorch has no public way to close
    if workers is not None:
        workers._shutdown_workers()


def _begin(worker: int) -> None:
    # Ctrl-C, and what ends a whole group of processes, are for who asks: it may want this batch yet.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


def _as_it_is(made: Any) -> Any:
    return made
