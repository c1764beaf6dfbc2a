"""Pictures a second of one core: ``python benchmarks/images.py`` writes results/images.csv.

The pictures are the photographs of Debian's package mate-backgrounds, fetched once: tiles of 500 x 375 pixels, about
what ImageNet has, at quality 95 from the photographs at 1,000 and at 1,500 pixels of width, and the photographs as they
are. Each set is decoded alone (Pillow, to RGB), and loaded for training at 224 pixels (random crop, mirror, normalise):
by a plain DataLoader whose dataset is written with Pillow as people write it, by rarefy, and by rarefy up to the bytes
that a device gets and normalises. All in this process, on one thread, in turn; medians over the rounds. ``--print``
prints the table of docs/guides/images.md from the file.
"""

from __future__ import annotations

import argparse
import io
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import results
from rarefy.data import debian, images
from rarefy.data.cache import cache_folder
from rarefy.train.image_batches import MEAN, STD, ImageBatches
from rarefy.train.recipe import Images as Data

PACKAGE, SIZE, BATCH, TILE = "mate-backgrounds", 224, 32, (500, 375)
WIDTHS = (1000, 1500)


class Plain(Dataset[tuple[Tensor, int]]):
    """A folder of classes, as a script for ImageNet reads it."""

    def __init__(self, root: Path) -> None:
        self.samples = [
            (path, label) for label, place in enumerate(sorted(root.iterdir())) for path in sorted(place.iterdir())
        ]
        self.mean, self.std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        with path.open("rb") as file:
            image = Image.open(file).convert("RGB")
        left, top, width, height = _crop(*image.size)
        view = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
        if random.random() < 0.5:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous().float().div(255)
        return (pixels - self.mean) / self.std, label


def _crop(width: int, height: int) -> tuple[int, int, int, int]:
    while True:
        area, aspect = (
            width * height * random.uniform(0.08, 1),
            math.exp(random.uniform(-math.log(4 / 3), math.log(4 / 3))),
        )
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h


def photographs() -> dict[str, bytes]:
    """Fetch the package's photographs, by name."""
    folder = cache_folder() / "packages"
    debian.download([PACKAGE], folder)
    package = debian.require([PACKAGE], folder / "deb")[PACKAGE]
    names = {
        *("Aqua.jpg", "Blinds.jpg", "Dune.jpg", "FreshFlower.jpg", "Garden.jpg", "GreenMeadow.jpg", "LadyBird.jpg"),
        *("RainDrops.jpg", "Storm.jpg", "TwoWings.jpg", "Wood.jpg", "YellowFlower.jpg"),
    }
    return dict(debian.files(package, names))


def write_sets(root: Path) -> dict[str, Path]:
    """Write the tiles and the photographs as class folders, one class a photograph; gives their folders by name."""
    places = {"500 x 375": root / "tiles", "as they are": root / "whole"}
    for name, data in sorted(photographs().items()):
        for place in places.values():
            (place / "train" / Path(name).stem).mkdir(parents=True)
        (root / "whole" / "train" / Path(name).stem / name).write_bytes(data)
        photograph = Image.open(io.BytesIO(data)).convert("RGB")
        for wide in WIDTHS:
            scaled = photograph.resize((wide, wide * photograph.height // photograph.width), Image.Resampling.LANCZOS)
            for top in range(0, scaled.height - TILE[1] + 1, TILE[1]):
                for left in range(0, wide - TILE[0] + 1, TILE[0]):
                    tile = scaled.crop((left, top, left + TILE[0], top + TILE[1]))
                    tile.save(root / "tiles" / "train" / Path(name).stem / f"{wide}-{top}-{left}.jpg", quality=95)
    return places


def loops(root: Path) -> dict[str, Callable[[], int]]:
    """Give what is timed, by name; each goes once over all pictures and tells how many it gave."""
    found, plain = images.find(root, "train"), Plain(root / "train")
    batch = min(BATCH, len(found))
    data = Data(folder=str(root), size=SIZE, workers=0)
    ours = ImageBatches(found, data, classes=len(found.classes), batch_size=batch)
    epochs = iter(range(1 << 20))

    def decode() -> int:
        for path, _ in plain.samples:
            Image.open(path).convert("RGB")
        return len(plain)

    def load() -> int:
        return sum(len(y) for _, y in DataLoader(plain, batch, shuffle=True, drop_last=True))

    def rarefy() -> int:
        return sum(len(y) for ((_, y),) in ours.epoch(next(epochs)))

    def as_bytes() -> int:
        return sum(len(batch.labels) for batch in ours.bytes_of(next(epochs)))

    return {"decoding alone": decode, "plain DataLoader": load, "rarefy": rarefy, "rarefy, bytes": as_bytes}


def table() -> str:
    """One row a set of pictures."""
    lines = ["| pictures | decoding alone | plain DataLoader | rarefy | rarefy, bytes | to the plain one |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    rows = results.read("images")
    for name in dict.fromkeys(row["pictures"] for row in rows):
        speed = {row["entry"]: float(row["per_second"]) for row in rows if row["pictures"] == name}
        alone, plain, ours, left = speed.values()
        count = next(row for row in rows if row["pictures"] == name)
        about = f"{count['number']} of {name}, {float(count['kilobytes']):.0f} kB each"
        lines.append(f"| {about} | {alone:.0f} | {plain:.0f} | {ours:.0f} | {left:.0f} | {ours / plain:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure each set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="how often each is measured (default: 9)")
    parser.add_argument("--print", action="store_true", help="print the table of the stored results")
    options = parser.parse_args()
    if options.print:
        print(table())
        return
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, root in write_sets(Path(folder)).items():
            files = list(root.glob("train/*/*.jpg"))
            timed = loops(root)
            rates: dict[str, list[float]] = {entry: [] for entry in timed}
            for round_ in range(options.rounds + 1):
                for entry, loop in timed.items():
                    began = time.perf_counter()
                    given = loop()
                    if round_:  # the first fills the caches
                        rates[entry].append(given / (time.perf_counter() - began))
            for entry, each in rates.items():
                about = {"pictures": name, "number": len(files), "entry": entry}
                about["kilobytes"] = round(sum(path.stat().st_size for path in files) / len(files) / 1e3, 1)
                rows.append({**about, "per_second": round(statistics.median(each), 1), "size": SIZE})
    results.write("images", [{**row, **results.provenance()} for row in rows])
    print(table())


if __name__ == "__main__":
    main()
