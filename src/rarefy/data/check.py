"""Reading all pictures of a set once: how many of each class, how large, and which are damaged."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from rarefy.data import images, pictures
from rarefy.data.fashion_mnist import DataNotFoundError
from rarefy.data.images import Images
from rarefy.data.loading import Loader, cores, reason

#: Pictures that a worker reads at once.
_CHUNK = 64

#: What is told while it goes on: the split, and how many of how many pictures are read.
Told = Callable[[str, int, int], None]


@dataclass
class Split:
    """What is known of one split after reading it.

    Attributes:
        place: where it lies.
        pictures: how many it has.
        classes: how many of each class.
        bytes: of all pictures.
        ignored: other files in it.
        smallest, median, largest: sides in pixels: of the smallest picture, in the middle each for itself, of the
            largest; None without a picture.
        damaged: why a picture cannot be decoded, by its path.
        repeated: the paths of pictures with the bytes of one in the training split.

    """

    place: str
    pictures: int
    classes: dict[str, int]
    ignored: int
    bytes: int = 0
    smallest: tuple[int, int] | None = None
    median: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)


class _Seen(NamedTuple):
    """Of one picture: size of its file, width and height, a digest of its bytes; or why it cannot be decoded."""

    size: int
    sides: tuple[int, int]
    digest: bytes
    damage: str | None


class _Whole(Dataset[list[_Seen]]):
    def __init__(self, found: Images) -> None:
        self.found = found

    def __getitem__(self, indices: Sequence[int]) -> list[_Seen]:
        return [self._seen(index) for index in indices]

    def _seen(self, index: int) -> _Seen:
        data = b""
        try:
            data = self.found.read(index)
            sides, damage = pictures.whole(data).size, None
        except Exception as error:  # there is no end to what a decoder stumbles over in a damaged picture
            sides, damage = (0, 0), reason(error)
        return _Seen(len(data), sides, hashlib.blake2b(data, digest_size=8).digest(), damage)


def check(folder: Path, *, tell: Told | None = None) -> tuple[dict[str, Split], list[str]]:
    """Read every picture of every split there is; gives what was found, and what keeps it from being trained with.

    Damaged pictures are found in the splits and do not keep from training.

    Raises DataNotFoundError where there is no training split.
    """
    found = {"train": images.find(folder, "train")}
    for name in ("val", "test"):
        try:
            found[name] = images.find(folder, name)
        except DataNotFoundError:
            continue
    problems = list(images.wrong(found["train"], found.get("val")))
    if len(found) == 1:
        problems.append(f"{folder} has neither val nor test: there is nothing to evaluate on")
    for name in found.keys() - {"train", "val"}:
        problems += [line for line in images.wrong(found["train"], found[name]) if line not in problems]
    known: set[bytes] = set()
    return {name: _read(name, split, known, tell) for name, split in found.items()}, problems


def _read(name: str, found: Images, known: set[bytes], tell: Told | None) -> Split:
    """Read a split; ``known`` are the digests of training, which this fills when it is the one."""
    counts = dict(zip(found.classes, found.counts.tolist(), strict=True))
    split = Split(found.place, len(found), counts, found.ignored)
    sides = []
    for index, seen in enumerate(_seen_of(found)):
        split.bytes += seen.size
        if seen.damage is not None:
            split.damaged[found.name(index)] = seen.damage
            continue
        sides.append(seen.sides)
        if name == "train":
            known.add(seen.digest)
        elif seen.digest in known:
            split.repeated.append(found.name(index))
        if tell is not None:
            tell(name, index + 1, len(found))
    if sides:
        by_area = sorted(sides, key=lambda pair: (pair[0] * pair[1], pair))
        width, height = np.median(np.array(sides), axis=0).astype(int).tolist()
        split.smallest, split.median, split.largest = by_area[0], (width, height), by_area[-1]
    return split


def _seen_of(found: Images) -> Iterator[_Seen]:
    chunks = [range(begin, min(begin + _CHUNK, len(found))) for begin in range(0, len(found), _CHUNK)]
    for some in Loader(_Whole(found), cores() if len(chunks) > 1 else 0)(chunks):
        yield from some
