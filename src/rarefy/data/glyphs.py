"""A thousand Chinese characters as the free fonts of Debian draw them: classes for :mod:`rarefy.data.images`.

Classes are characters that are common in China, Taiwan, Japan and Korea alike, so that every font draws them. Pictures
are drawings by the faces of ``glyph_faces.tsv``, which are split by design: validation and test show type designs that
training has not seen, and weights, regional variants and derivatives of one design are on one side. The drawings are
real and the labels exact; photographs of them (:mod:`rarefy.data.photograph`) are synthetic.

The licences of the fonts are mixed, so the set is built on the machine that uses it, and not handed on. Other packages,
or another Pillow, draw other pixels: a figure goes with the SHA-256 of the drawings that it was measured on.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import random
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from rarefy._files import write_atomically
from rarefy.data import debian
from rarefy.data.images import CLASSES

#: Side of a drawing in pixels, and of the box that nearly every character of a face fits into.
SIDE, INK = 64, 54

#: Pictures in a shard.
SHARD = 4000


class Face(NamedTuple):
    """One face of a font: its split and design, and where its outlines are."""

    split: str
    style: str
    design: str
    package: str
    licence: str
    file: str
    number: int

    @property
    def name(self) -> str:
        """What tells it apart: NotoSansCJK-Bold-3."""
        return f"{self.file.rpartition('.')[0]}-{self.number}"


def faces() -> list[Face]:
    """List the faces of the set, one entry each."""
    listed = files("rarefy.data").joinpath("glyph_faces.tsv").read_text(encoding="utf-8").splitlines()
    found = []
    for row in csv.DictReader(listed, delimiter="\t"):
        for name in row["files"].split():
            file, _, number = name.partition("#")
            about = (row["split"], row["style"], row["design"], row["package"], row["licence"])
            found.append(Face(*about, file, int(number or 0)))
    return found


def common_characters() -> list[str]:
    """List what is in level 1 of GB 2312, of Big5 and of JIS X 0208, and in KS X 1001: 1,551, in Unicode's order."""

    def is_common(character: str) -> bool:
        try:
            china, taiwan, japan, _ = (character.encode(code) for code in ("gb2312", "big5", "euc_jp", "euc_kr"))
        except UnicodeEncodeError:
            return False
        return china[0] <= 0xD7 and taiwan <= b"\xc6\x7e" and 0xB0 <= japan[0] <= 0xCF

    return [chr(code) for code in range(0x4E00, 0xA000) if is_common(chr(code))]


def build(folder: Path, out: Path, *, classes: int = 1000, shards: bool = False, fetch: bool = True) -> dict[str, Any]:
    """Write the drawings, 64 x 64 in 16 greys, dark on light, as train, val and test; gives what they are.

    Args:
        folder: for the packages (466 MB, kept for the next time).
        out: an empty or a new folder.
        classes: how many of the characters that every face draws, evenly spaced in Unicode's order.
        shards: tar files of PNGs and labels in place of class folders of PNGs.
        fetch: whether to fetch what is not in ``folder``, by apt-get, which needs no root.

    Returns:
        The SHA-256 of the drawings, pictures and designs by split, licences by package, the SHA-256 of every package,
        versions; ``manifest.json`` in ``out`` has it, too.

    Raises:
        FileNotFoundError: a package that is neither in the folder nor to be had.
        ValueError: more classes than there are characters in all faces, or fewer than two; a font without a face.

    """
    characters = common_characters()
    if not 2 <= classes <= len(characters):  # before half a gigabyte is fetched
        raise ValueError(f"classes must be in [2, {len(characters)}], as many as are common, got {classes}")
    table = faces()
    names = sorted({face.package for face in table})
    if fetch:
        debian.download(names, folder)
    found = debian.require(names, folder / "deb")
    drawn = _drawn(table, found, characters)
    everywhere = np.flatnonzero(drawn.any(axis=2).all(axis=0))
    if classes > len(everywhere):
        raise ValueError(f"classes must be in [2, {len(everywhere)}], as many as all faces draw, got {classes}")
    chosen = everywhere[np.arange(classes) * len(everywhere) // classes]
    drawn = drawn[:, chosen]
    labels = [f"U+{ord(characters[number]):04X}" for number in chosen]
    write = _write_shards if shards else _write_folders
    for split in ("train", "val", "test"):
        write(out, split, [(face, drawn[row]) for row, face in enumerate(table) if face.split == split], labels)
    if shards:
        write_atomically(out / CLASSES, lambda path: path.write_text("".join(f"{label}\n" for label in labels)))
    manifest = {
        "sha256": hashlib.sha256(drawn.tobytes()).hexdigest(),
        "classes": classes,
        "pictures": {split: n * classes for split, n in Counter(face.split for face in table).items()},
        "designs": dict(Counter(split for split, _ in {(face.split, face.design) for face in table})),
        "licences": {face.package: face.licence for face in table},
        "packages": {path.name: debian.sha256(path) for path in found.values()},
        "made_with": f"Pillow {PIL.__version__}, FreeType {features.version('freetype2')}",
    }
    text = json.dumps(manifest, indent=1) + "\n"
    write_atomically(out / "manifest.json", lambda path: path.write_text(text, encoding="utf-8"))
    return manifest


def _drawn(table: Sequence[Face], packages: dict[str, Path], characters: Sequence[str]) -> NDArray[np.uint8]:
    """Draw every character by every face: (faces, characters, bytes); see :func:`draw`."""
    drawn = np.zeros((len(table), len(characters), SIDE * SIDE // 2), np.uint8)
    wanted: dict[tuple[str, str], list[int]] = {(face.package, face.file): [] for face in table}
    for row, face in enumerate(table):
        wanted[face.package, face.file].append(row)
    for package, path in packages.items():
        for name, font in debian.files(path, {file for of, file in wanted if of == package}):
            for row in wanted.pop((package, name), []):
                drawn[row] = draw(font, table[row].number, characters)
    if wanted:
        raise ValueError(f"no such fonts in the packages of this release: {', '.join(map('/'.join, wanted))}")
    return drawn


def draw(font: bytes, index: int, characters: Sequence[str]) -> NDArray[np.uint8]:
    """Draw characters by a face, ink 15 and paper 0, two pixels a byte: (characters, SIDE * SIDE / 2) uint8.

    All are centred and scaled alike, so that their sizes relative to each other stay. Blank is one that the face lacks,
    and one that it draws as another: a placeholder.
    """
    from fontTools.ttLib import TTFont

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # of odd tables that do not matter here
    encoded = TTFont(io.BytesIO(font), fontNumber=index, lazy=True).getBestCmap()

    def sized(size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(io.BytesIO(font), size, index=index, layout_engine=ImageFont.Layout.BASIC)

    trial = sized(2 * SIDE)
    boxes = np.array([trial.getbbox(c, anchor="ls") for c in characters[::6] if ord(c) in encoded], dtype=float)
    extent = np.percentile(np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]), 95)
    size = round(2 * SIDE * 2 * INK / extent)  # twice too large: halving it hides the hinting
    centre = np.median(boxes[:, :2] + boxes[:, 2:], axis=0) / 2 * size / (2 * SIDE)
    x, y = (SIDE - centre).round().astype(int).tolist()
    fitted = sized(size)
    drawn = np.zeros((len(characters), SIDE * SIDE // 2), np.uint8)
    seen: dict[bytes, int] = {}
    for number, character in enumerate(characters):
        if ord(character) not in encoded:
            continue
        image = Image.new("L", (2 * SIDE, 2 * SIDE))
        ImageDraw.Draw(image).text((x, y), character, font=fitted, fill=255, anchor="ls")
        grey = ((np.asarray(image.reduce(2), np.uint16) * 15 + 127) // 255).astype(np.uint8)
        drawn[number] = (grey[:, 0::2] << 4 | grey[:, 1::2]).ravel()
        twin = seen.setdefault(drawn[number].tobytes(), number)
        if twin != number:
            drawn[[twin, number]] = 0
    return drawn


def _png(packed: NDArray[np.uint8]) -> bytes:
    """Encode a drawing, dark on light."""
    grey = 255 - 17 * np.stack((packed >> 4, packed & 15), axis=-1).reshape(SIDE, SIDE)
    file = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(file, "PNG", compress_level=9)
    return file.getvalue()


_Drawings = Sequence[tuple[Face, NDArray[np.uint8]]]


def _write_folders(out: Path, split: str, drawings: _Drawings, labels: Sequence[str]) -> None:
    for label, name in enumerate(labels):
        place = out / split / name
        place.mkdir(parents=True, exist_ok=True)
        for face, drawn in drawings:
            (place / f"{face.name}.png").write_bytes(_png(drawn[label]))


def _write_shards(out: Path, split: str, drawings: _Drawings, labels: Sequence[str]) -> None:
    """Write tar files of pictures in a mixed order, which is the same every time."""
    order = [(row, label) for row in range(len(drawings)) for label in range(len(labels))]
    random.Random(0).shuffle(order)
    (out / split).mkdir(parents=True, exist_ok=True)
    for begin in range(0, len(order), SHARD):
        some = order[begin : begin + SHARD]
        members = [
            (f"{labels[label]}_{drawings[row][0].name.replace('.', '_')}", drawings[row][1][label], label)
            for row, label in some
        ]
        write_atomically(out / split / f"{begin // SHARD:05}.tar", partial(_write_tar, members))


def _write_tar(members: Sequence[tuple[str, NDArray[np.uint8], int]], path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for key, drawn, label in members:
            for name, content in ((f"{key}.png", _png(drawn)), (f"{key}.cls", str(label).encode())):
                about = tarfile.TarInfo(name)
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
