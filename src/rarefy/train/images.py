"""Training a classifier of pictures on disk by a recipe."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy._json import read_fields, read_lines
from rarefy.data import images
from rarefy.train.classification import Classification
from rarefy.train.image_batches import HeldOut, ImageBatches
from rarefy.train.recipe import Images as Data
from rarefy.train.run_folder import ABOUT

#: The file of a run that says which pictures were found damaged.
DAMAGED = "damaged.jsonl"

_LOG = logging.getLogger("rarefy")


class ImageClassification(Classification):
    """One run of a recipe that trains on pictures on disk; see :class:`~rarefy.train.run.Run`.

    A damaged picture is logged once, with its path, and stands in ``damaged.jsonl``; the summary has their number.
    """

    def _load_data(self) -> None:
        data, schedule = self._data, self.recipe.schedule
        assert data.folder is not None
        train, held_out = images.load(data.folder, data.held_out)
        splits = {"train": train, "held_out": held_out}
        self.class_names = train.classes
        self.classes = len(train.classes)
        self._about = {
            "classes": list(train.classes),
            **{name: {"pictures": len(some), "sha256": some.digest()} for name, some in splits.items()},
        }
        self._damaged = _damaged(self.folder.path / DAMAGED) if self._resumed else set()
        if self._resumed:
            self.folder.compare(ABOUT, self._about, f"the pictures in {data.folder}")
        world = self.accelerator.num_processes
        share: dict[str, Any] = {
            "rank": self.accelerator.process_index,
            "world": world,
            "local": int(os.environ.get("LOCAL_WORLD_SIZE", world)),
            "device": self.accelerator.device,
            "tell": self._tell,
        }
        self.batches = ImageBatches(
            train,
            data,
            classes=self.classes,
            batch_size=schedule.batch_size,
            accumulate=schedule.accumulate,
            seed=self.recipe.seed,
            **share,
        )
        self._held = HeldOut(held_out, data, **share)
        self.one_image = torch.zeros(1, 3, data.size, data.size)

    @property
    def _data(self) -> Data:
        assert isinstance(self.recipe.data, Data)
        return self.recipe.data

    def _tell(self, damaged: list[tuple[str, str]]) -> None:
        for path, why in damaged:
            if path not in self._damaged:
                self._damaged.add(path)
                _LOG.warning("%s is damaged (%s) and was not used", path, why)
                self.folder.path.mkdir(parents=True, exist_ok=True)  # the main process may not have come to it yet
                self.folder.append_line(DAMAGED, json.dumps([path, why]))

    def _held_out(self) -> Iterable[tuple[Tensor, Tensor]]:
        return self._held

    def _beside(self) -> dict[str, str]:
        return {ABOUT: json.dumps(self._about, indent=1) + "\n"}

    def _results(self) -> dict[str, Any]:
        return {"damaged_pictures": len(_damaged(self.folder.path / DAMAGED))}


def _damaged(path: Path) -> set[str]:
    """The pictures that were found damaged; a last line that a crash cut off is left out. Raises ValueError."""
    advice, found = "delete that line to go on without it", set()
    for where, line in read_lines(path, advice):
        if not isinstance(line, list) or len(line) != 2 or not isinstance(line[0], str):
            raise ValueError(f"{where}: expected a picture's path and what is wrong, got {line!r:.80}; {advice}")
        found.add(line[0])
    return found


def class_names(run: Path) -> list[str]:
    """Give the names of the classes that a run tells apart.

    Raises FileNotFoundError where the run does not say, ValueError where what it says is damaged.
    """
    path = run / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it says which classes the run tells apart; put it back")
    return list(read_fields(path, "put back what the run wrote").texts("classes"))
