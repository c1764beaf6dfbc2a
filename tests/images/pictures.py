"""Small made-up pictures, sets of them in class folders, and the same in tar shards."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rarefy.data.images import CLASSES

#: The classes of a made set, and the colour of their pictures.
COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}


def picture(
    colour: tuple[int, int, int] = (200, 120, 40), size: tuple[int, int] = (40, 32), seed: int = 0
) -> Image.Image:
    """Make a picture of one colour, width and height given, with noise that follows from the seed."""
    width, height = size
    noise = np.random.default_rng(seed).integers(-25, 26, (height, width, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """Encode a picture as Pillow does."""
    into = io.BytesIO()
    image.save(into, kind, **options)
    return into.getvalue()


def folder(path: Path, train: int = 16, val: int = 7) -> Path:
    """Make class folders with so many pictures of each colour in either split; no two are the same."""
    seed = 0
    for split, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            place = path / split / name
            place.mkdir(parents=True)
            for number in range(count):
                size = (36 + number % 5, 30 + number % 3)
                (place / f"{number:03}.jpg").write_bytes(encoded(picture(colour, size, seed)))
                seed += 1
    return path


def shards(path: Path, root: Path, each: int = 20) -> Path:
    """Pack class folders into tar shards of so many pictures, in an order that mixes the classes."""
    for split in ("train", "val"):
        (path / split).mkdir(parents=True)
        files = sorted((root / split).glob("*/*.*"), key=lambda file: (file.stem, file.parent.name))
        classes = sorted({file.parent.name for file in files})
        for number, begin in enumerate(range(0, len(files), each)):
            with tarfile.open(path / split / f"{number:05}.tar", "w") as tar:
                for file in files[begin : begin + each]:
                    key = f"{file.parent.name}-{file.stem}"
                    add(tar, key + file.suffix, file.read_bytes())
                    add(tar, f"{key}.cls", str(classes.index(file.parent.name)).encode())
    (path / CLASSES).write_text("\n".join(classes) + "\n")
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Write a file into a shard."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
