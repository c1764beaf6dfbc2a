"""Sets of pictures by class as people have them: class folders, tar shards, data sets of Hugging Face.

    FOLDER/train/n01440764/x.JPEG        FOLDER/val/n01440764/y.JPEG         class folders, as ImageNet is unpacked
    FOLDER/train/00000.tar               FOLDER/val/00000.tar                shards: KEY.jpg with KEY.cls or KEY.json
    FOLDER/dataset_dict.json             FOLDER/data/train-00000-of-9.parquet  what `datasets` saves and the hub holds

A set is indexed by number, in an order that is the same on every machine, and read a picture at a time; decoding is for
:mod:`rarefy.data.pictures`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from rarefy.data.fashion_mnist import DataNotFoundError

#: The endings of pictures, in any case.
ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))

#: The folders that hold a split, by what it is asked for.
_ALSO = {"val": ("val", "validation", "valid")}

#: The names of a shard's classes, a line each in the order of their numbers; without it they are called by these.
CLASSES = "classes.txt"

_LAYOUT = "FOLDER/train/CLASS/IMAGE.jpg, FOLDER/train/00000.tar with KEY.jpg and KEY.cls, or what Hugging Face saves"


class Images(ABC):
    """The pictures of one split.

    Attributes:
        place: where it lies.
        classes: the names of the classes; a label is an index into them.
        labels: (N,) int64.
        problems: what is wrong with it as a whole, a line each: pictures without a class, shards that are cut off.
        ignored: files that are neither pictures nor labels.

    """

    def __init__(self, place: str, classes: Sequence[str], labels: NDArray[np.int64], problems: Sequence[str]) -> None:
        self.place, self.classes, self.labels = place, tuple(classes), labels
        self.problems = list(problems)
        self.ignored = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many pictures each class has."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def digest(self) -> str:
        """Give a SHA-256 of the classes, of every picture's name below its place, and of its label."""
        found = hashlib.sha256(json.dumps(self.classes).encode())
        for part in (*self._named(), self.labels.astype("<i8").data):
            found.update(part)
        return found.hexdigest()

    def _named(self) -> Iterable[bytes | memoryview]:
        """What tells the pictures apart by name, wherever they lie."""
        return ()

    @abstractmethod
    def name(self, index: int) -> str:
        """Say which picture it is: its path, or its place in a file."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Give an encoded picture. Raises OSError where it cannot be read."""


class _Names:
    """Many names in two arrays: a list of strings would be copied into every process that touches it."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())

    def parts(self) -> tuple[bytes | memoryview, ...]:
        """The bytes of all, and where each ends."""
        return self._bytes.data, self._ends.astype("<i8").data


class FolderImages(Images):
    """Pictures in a folder for each class, whose name is the class's, and in the folders below it."""

    def __init__(self, folder: Path) -> None:
        names: list[str] = []
        labels: list[int] = []
        problems = []
        ignored = 0
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
        classes = [entry.name for entry in inside if entry.is_dir() and not entry.name.startswith(".")]
        loose = [entry.name for entry in inside if not entry.is_dir() and _is_picture(entry.name)]
        if loose:
            problems.append(f"{folder} has {len(loose)} pictures in no class's folder, such as {loose[0]!r}")
        for label, name in enumerate(classes):
            files = sorted(_below(folder / name))
            pictures = [file for file in files if _is_picture(file)]
            ignored += len(files) - len(pictures)
            names += pictures
            labels += [label] * len(pictures)
        super().__init__(str(folder), classes, np.array(labels, np.int64), problems)
        self._names, self.ignored = _Names(names), ignored

    def _named(self) -> Iterable[bytes | memoryview]:
        return self._names.parts()

    def name(self, index: int) -> str:  # noqa: D102
        return os.path.join(self.place, self.classes[self.labels[index]], self._names[index])

    def read(self, index: int) -> bytes:  # noqa: D102
        path = self.name(index)
        _ordinary(path)
        with open(path, "rb", buffering=0) as file:
            return file.readall()


def _ordinary(path: str | Path) -> None:
    """Raise OSError for what is no file: whoever opens a pipe waits for its writer."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))


def _below(folder: Path) -> Iterator[str]:
    """Give the files in a folder and in those below it, by their paths from there; hidden folders are left out.

    Links are followed, but not to a folder that it is in: that would have no end.
    """
    above: dict[str, tuple[str, ...]] = {str(folder): (os.path.realpath(folder),)}
    for place, folders, files in os.walk(folder, onerror=_raised, followlinks=True):
        within = above.pop(place)
        real = {name: os.path.realpath(os.path.join(place, name)) for name in folders if not name.startswith(".")}
        folders[:] = [name for name in real if real[name] not in within]
        above.update({os.path.join(place, name): (*within, real[name]) for name in folders})
        for name in files:
            yield os.path.relpath(os.path.join(place, name), folder)


def _raised(error: OSError) -> NoReturn:
    raise error


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ENDINGS


class ShardImages(Images):
    """Pictures in tar files as webdataset writes them: KEY.jpg beside KEY.cls, or KEY.json with a label.

    A shard is looked through once; pictures are then read where they lie, in any order.
    """

    def __init__(self, folder: Path, shards: Sequence[Path]) -> None:
        self.shards = list(shards)
        problems: list[str] = []
        names: list[str] = []
        places: list[tuple[int, int, int]] = []
        labels: list[int] = []
        ignored = 0
        for number, shard in enumerate(self.shards):
            pictures, classes, others, damage = _indexed(shard)
            problems += damage
            ignored += others
            lost = sorted(pictures.keys() - classes.keys())
            if lost:
                problems.append(f"{shard} has {len(lost)} pictures without .cls or .json, such as {lost[0]!r}")
            alone = sorted(classes.keys() - pictures.keys())
            if alone:
                problems.append(f"{shard} has {len(alone)} labels without a picture, such as {alone[0]!r}")
            for key in sorted(pictures.keys() & classes.keys()):
                name, offset, size = pictures[key]
                names.append(name)
                places.append((number, offset, size))
                labels.append(classes[key])
        super().__init__(str(folder), _classes(folder, labels, problems), np.array(labels, np.int64), problems)
        self.ignored = ignored
        self._names, self._places = _Names(names), np.array(places, np.int64).reshape(-1, 3)

    def _named(self) -> Iterable[bytes | memoryview]:
        return self._names.parts()

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self.shards[self._places[index, 0]]}:{self._names[index]}"

    def read(self, index: int) -> bytes:  # noqa: D102
        number, offset, size = self._places[index].tolist()
        with self.shards[number].open("rb", buffering=0) as file:
            file.seek(offset)
            data: bytes = file.read(size)
        if len(data) < size:
            raise OSError(f"{self.shards[number]} ends in it")
        return data


def _indexed(shard: Path) -> tuple[dict[str, tuple[str, int, int]], dict[str, int], int, list[str]]:
    """Look through a shard: its pictures and its labels by key, how many other files it has, and what is wrong."""
    pictures: dict[str, tuple[str, int, int]] = {}
    held: dict[str, tuple[int, int]] = {}  # where a picture lies, by its whole name
    told: dict[str, dict[str, tuple[str, bytes]]] = {"cls": {}, "json": {}}
    others = 0
    last = "its beginning"
    wrong: list[str] = []
    try:
        _ordinary(shard)
        whole = shard.stat().st_size
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not 0 <= member.size <= whole - member.offset_data:
                    raise tarfile.ReadError(f"it ends in {member.name}")
                last = member.name
                if not (member.isfile() or member.islnk()):
                    continue
                # webdataset's key ends at the first dot of the last part of the name
                above, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key, ending = f"{above}/{stem}", ending.lower()
                if f".{ending}" in ENDINGS:
                    if key in pictures:
                        wrong.append(f"{shard} has two pictures of the key {stem!r}")
                    # A second name of one file is stored as a link to the first.
                    place = held.get(member.linkname) if member.islnk() else (member.offset_data, member.size)
                    if place is None:
                        wrong.append(f"{shard}: {member.name} is a link to {member.linkname}, which is not before it")
                        continue
                    held[member.name] = place
                    pictures[key] = (member.name, *place)
                elif ending in ("cls", "json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    told[ending][key] = member.name, content.read()
                else:
                    others += 1
            end = tar.offset
        with shard.open("rb") as file:
            file.seek(end)
            block = file.read(512)
            if len(block) < 512:
                raise tarfile.ReadError("its end is missing")
            if block.strip(b"\0"):
                raise tarfile.ReadError("what follows is no header")
    except Exception as error:  # there is no end to what tarfile stumbles over in a damaged header
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        wrong.append(f"{shard} is damaged or cut off after {last} ({reason}): fetch it again")
    labels: dict[str, int] = {}
    for key, (name, text) in {**told["json"], **told["cls"]}.items():  # what has both may tell of other things in JSON
        try:
            labels[key] = _label(text, "cls" if key in told["cls"] else "json")
        except ValueError as error:
            wrong.append(f"{shard}: {name} {error}")
    return pictures, labels, others, wrong


def _label(content: bytes, ending: str) -> int:
    """Read a number from .cls, or the "label" of .json. Raises ValueError saying what is there."""
    try:
        value = int(content) if ending == "cls" else json.loads(content)["label"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"must be a number (.cls), or JSON with a number 'label', got {content[:60]!r}") from error
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 20:
        raise ValueError(f"must give a class from 0 on, got {value!r:.60}")
    return value


def _classes(folder: Path, labels: Sequence[int], problems: list[str]) -> list[str]:
    """Name the classes of shards: by the file beside them or in the folder above, otherwise by number."""
    highest = max(labels, default=-1)
    for listed in (folder / CLASSES, folder.parent / CLASSES):
        if listed.is_file():
            try:
                names = listed.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError:
                problems.append(f"{listed} is not UTF-8 text")
                break
            if highest < len(names):
                return names
            problems.append(f"{listed} has {len(names)} lines, and a picture has the class {highest}, counted from 0")
    return [str(number) for number in range(highest + 1)]


class HubImages(Images):
    """Pictures of a data set that Hugging Face's `datasets` saved, or of the parquet files of one on the hub.

    It must have one column of pictures and one of class labels.
    """

    def __init__(self, place: str, rows: Any) -> None:
        import datasets

        pictures = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        classes = [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
        if not pictures or not classes:
            raise ValueError(
                f"{place} must have a column of Image and one of ClassLabel, it has "
                f"{', '.join(f'{name}: {type(kind).__name__}' for name, kind in rows.features.items())}"
            )
        self._column = pictures[0]
        self._rows = rows.cast_column(self._column, datasets.Image(decode=False)).select_columns([self._column])
        labels = np.asarray(rows.with_format("numpy", columns=[classes[0]])[:][classes[0]], np.int64)
        self._numbers = np.flatnonzero(labels >= 0)
        lost = len(labels) - len(self._numbers)
        problems = [f"{place} has {lost} pictures without a class"] if lost else []
        super().__init__(place, rows.features[classes[0]].names, labels[self._numbers], problems)

    def name(self, index: int) -> str:  # noqa: D102
        return f"{self.place}, row {self._numbers[index]}"

    def read(self, index: int) -> bytes:  # noqa: D102
        picture = self._rows[int(self._numbers[index])][self._column]
        if picture["bytes"] is not None:
            return bytes(picture["bytes"])
        _ordinary(picture["path"])
        return Path(picture["path"]).read_bytes()


def find(folder: str | os.PathLike[str], split: str) -> Images:
    """Find a split in whatever layout the folder has; its problems are listed, not raised.

    Raises DataNotFoundError where there is none, ImportError where `datasets` is needed and not installed.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataNotFoundError(f"there is no folder {root}; expected one with {_LAYOUT}")
    names = _ALSO.get(split, (split,))
    parquet = [
        path for name in names for place in (root, root / "data") for path in sorted(place.glob(f"{name}-*.parquet"))
    ]
    if (root / "dataset_dict.json").is_file() or parquet:
        return _hub(root, names, list(map(str, parquet)))
    for name in names:
        place = root / name
        shards = sorted(place.glob("*.tar")) if place.is_dir() else [*_shards_of(name, root)]
        if shards:
            return ShardImages(place if place.is_dir() else root, shards)
        if place.is_dir():
            return FolderImages(place)
    inside = sorted(entry.name + "/" * entry.is_dir() for entry in root.iterdir())
    raise DataNotFoundError(
        f"{root} has no {' or '.join(names)}; expected {_LAYOUT}; there is {', '.join(inside[:8]) or 'nothing'}"
        + (", ..." if len(inside) > 8 else "")
    )


def _shards_of(split: str, root: Path) -> Iterator[Path]:
    """Give the shards in a folder, NAME-train-00000.tar, of whose words the last that names a split names this one."""
    known = {"train", "test", *_ALSO["val"], split}
    for path in sorted(root.glob("*.tar")):
        if [word for word in re.split(r"[-_.]|(?<=[a-z])(?=\d)", path.stem) if word in known][-1:] == [split]:
            yield path


def _hub(root: Path, names: Sequence[str], parquet: list[str]) -> Images:
    try:
        import datasets
    except ModuleNotFoundError as missing:
        raise ImportError(f"{root} is a data set of Hugging Face's: reading it needs pip install datasets") from missing
    if parquet:
        rows = datasets.load_dataset("parquet", data_files=parquet, split="train")
        return HubImages(f"{root} ({names[0]})", rows)
    splits = datasets.load_from_disk(str(root))
    for name in names:
        if name in splits:
            return HubImages(f"{root} ({name})", splits[name])
    raise DataNotFoundError(f"{root} has no {' or '.join(names)}; there is {', '.join(splits)}")


def load(folder: str | os.PathLike[str], held_out: str = "val") -> tuple[Images, Images]:
    """Find the training pictures and those that are evaluated on, fit to train with.

    Raises what :func:`find` does, and ValueError, saying all there is to know, where something is :func:`wrong`.
    """
    train, other = find(folder, "train"), find(folder, held_out)
    problems = list(wrong(train, other))
    if problems:
        more = f" (and {len(problems) - 1} more: rarefy data check {folder})" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return train, other


def wrong(train: Images, held_out: Images | None = None) -> Iterator[str]:
    """Say what keeps pictures from being trained with, a line each."""
    for images in (train, held_out):
        if images is None:
            continue
        yield from images.problems
        if not len(images):
            yield f"{images.place} has no pictures (of {', '.join(sorted(ENDINGS))}): the layout is {_LAYOUT}"
            continue
        empty = [images.classes[label] for label in np.flatnonzero(images.counts == 0)]
        if empty:
            yield f"{images.place} has no pictures of {_some(empty)}: add some, or take the class out"
    if len(train.classes) == 1:
        yield f"{train.place} has one class, {train.classes[0]!r}: there is nothing to tell apart"
    if held_out is not None and train.classes != held_out.classes:
        for one, other in ((train, held_out), (held_out, train)):
            alone = sorted(set(one.classes) - set(other.classes))
            if alone:
                yield f"{one.place} has classes that {other.place} has not: {_some(alone)}"
        if set(train.classes) == set(held_out.classes):
            yield f"{train.place} and {held_out.place} have the same classes in different orders"


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
