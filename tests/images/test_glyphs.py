"""The glyph builder on fonts made here, each character a rectangle of its own, in packages of Debian's form."""

import hashlib
import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont
from fontTools.ttLib.ttCollection import TTCollection
from PIL import Image

from rarefy.cli import main
from rarefy.data import debian, glyphs
from rarefy.data.glyphs import INK, SIDE, Face
from rarefy.data.images import CLASSES, load
from tests.cli import printed, refused
from tests.images.test_debian import package

CHARACTERS = glyphs.common_characters()
UNITS = 1000

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is Debian's")


def rectangle(left: int, bottom: int, right: int, top: int):
    pen = TTGlyphPen(None)
    pen.moveTo((left, bottom))
    for point in ((left, top), (right, top), (right, bottom)):
        pen.lineTo(point)
    pen.closePath()
    return pen.glyph()


def font(boxes: dict[str, tuple[int, int, int, int]]) -> bytes:
    """Make a TrueType font that draws each character as a rectangle: left, bottom, right, top of a thousand."""
    names = {ord(character): f"uni{ord(character):04X}" for character in boxes}
    builder = FontBuilder(UNITS, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    drawn = {names[ord(character)]: rectangle(*box) for character, box in boxes.items()}
    builder.setupGlyf({".notdef": rectangle(0, 0, UNITS, UNITS), **drawn})
    lefts = {names[ord(character)]: box[0] for character, box in boxes.items()}
    builder.setupHorizontalMetrics({name: (UNITS, left) for name, left in ((".notdef", 0), *lefts.items())})
    builder.setupHorizontalHeader(ascent=UNITS, descent=0)
    builder.setupNameTable({"familyName": "Made", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=UNITS, usWinAscent=UNITS)
    builder.setupPost()
    into = io.BytesIO()
    builder.save(into)
    return into.getvalue()


def boxes(characters: list[str], above: int = 0) -> dict[str, tuple[int, int, int, int]]:
    """Give each character a rectangle like no other's, so far above the baseline."""
    sides = itertools.product(range(0, 400, 40), range(0, 400, 40))
    return {
        character: (left, bottom + above, 900, 900 + above)
        for character, (left, bottom) in zip(characters, sides, strict=False)
    }


def pixels(drawn: np.ndarray) -> np.ndarray:
    return np.stack((drawn >> 4, drawn & 15), -1).reshape(-1, SIDE, SIDE)


# What is pure


def test_which_characters_are_common():
    assert len(CHARACTERS) == len(set(CHARACTERS)) == 1551
    assert sorted(CHARACTERS) == CHARACTERS
    assert set("一人大中日本") <= set(CHARACTERS)
    assert not set("们の가a") & set(CHARACTERS)


def test_the_table_of_faces():
    table = glyphs.faces()
    assert len(table) == len({(face.package, face.file, face.number) for face in table}) == 84
    assert len({face.name for face in table}) == 84
    assert {face.split for face in table} == {"train", "val", "test"}
    assert all(face.licence and face.file.rpartition(".")[2] in ("ttf", "ttc", "otf", "otc") for face in table)
    split = {}
    for face in table:  # validation and test show designs that training has not seen
        assert split.setdefault(face.design, face.split) == face.split


def test_the_name_of_a_face():
    face = Face("train", "sans", "made", "fonts-made", "OFL-1.1", "Made.Sans-Bold.ttc", 3)
    assert face.name == "Made.Sans-Bold-3"


# Drawing


def test_drawings_are_the_rectangles():
    some = CHARACTERS[:60]
    drawn = glyphs.draw(font(boxes(some)), 0, some)
    assert (drawn.dtype, drawn.shape) == (np.uint8, (60, SIDE * SIDE // 2))
    seen = pixels(drawn)
    assert (seen.max((1, 2)) == 15).all()
    for picture, (left, bottom, right, top) in zip(seen, boxes(some).values(), strict=True):
        share = INK / UNITS  # the largest box, which is as wide as the line goes on
        expected = ((right - left) * share, (top - bottom) * share)
        ink = picture / 15
        across, down = ink.max(0).sum(), ink.max(1).sum()
        assert (across, down) == pytest.approx(expected, abs=1.6)
        assert ink.sum() == pytest.approx(across * down, rel=0.08)
    assert len({picture.tobytes() for picture in drawn}) == 60


def test_drawings_are_in_the_middle_wherever_the_font_has_them():
    some = CHARACTERS[:60]
    for above in (-400, -500, -600):  # as characters lie: on both sides of the baseline
        rows = pixels(glyphs.draw(font(boxes(some, above)), 0, some)).sum((0, 2), dtype=float)
        # The median of the middles of 60 rectangles is at 180 + 900 halves; that of their ink is close by.
        assert (rows * (np.arange(SIDE) + 0.5)).sum() / rows.sum() == pytest.approx(SIDE / 2, abs=1)


def test_what_a_face_lacks_and_placeholders_are_blank():
    some = CHARACTERS[:40]
    has = boxes(some)
    for lacking in some[3:6]:
        del has[lacking]
    has[some[10]] = has[some[20]] = has[some[30]] = (100, 100, 800, 850)  # a box for what there is no drawing of
    blank = ~pixels(glyphs.draw(font(has), 0, some)).any((1, 2))
    assert np.flatnonzero(blank).tolist() == [3, 4, 5, 10, 20, 30]


def test_a_face_of_several():
    some = CHARACTERS[:30]
    alone = [font(boxes(some)), font({c: (*box[:3], box[3] // 2 + 250) for c, box in boxes(some).items()})]
    collection = TTCollection()
    collection.fonts = [TTFont(io.BytesIO(one)) for one in alone]
    into = io.BytesIO()
    collection.save(into)
    drawn = [glyphs.draw(into.getvalue(), number, some) for number in (0, 1)]
    for number in (0, 1):
        assert np.array_equal(drawn[number], glyphs.draw(alone[number], 0, some))
    assert not np.array_equal(*drawn)


# Building

COMMON = CHARACTERS[::20]  # 78 of them


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages with four faces; the last lacks some characters."""
    folder = tmp_path / "packages"
    folder.mkdir()
    fonts = [font(boxes(COMMON)), font(boxes(COMMON[::-1])), font(boxes(COMMON[1:])), font(boxes(COMMON[:70]))]
    package(folder, "fonts-one", {f"usr/share/fonts/one/{n}.ttf": data for n, data in zip("ab", fonts, strict=False)})
    package(
        folder, "fonts-two", {f"usr/share/fonts/two/{n}.ttf": data for n, data in zip("cd", fonts[2:], strict=True)}
    )
    rows = [("train", "x", "one", "a"), ("train", "x", "one", "b"), ("val", "y", "two", "c"), ("test", "z", "two", "d")]
    table = [
        Face(split, "sans", design, f"fonts-{of}", f"licence {of}", f"{n}.ttf", 0) for split, design, of, n in rows
    ]
    monkeypatch.setattr(glyphs, "faces", lambda: table)
    return folder


@needs_dpkg
def test_the_set_is_built_and_can_be_trained_with(packages, tmp_path):
    out = tmp_path / "glyphs"
    manifest = glyphs.build(packages, out, classes=10, fetch=False)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    train, val = load(out)
    assert (len(train), len(val), len(list(out.glob("test/*/*.png")))) == (20, 10, 10)
    shared = COMMON[1:70]
    chosen = [shared[number * len(shared) // 10] for number in range(10)]
    assert train.classes == val.classes == tuple(f"U+{ord(character):04X}" for character in chosen)
    assert manifest["classes"] == 10
    assert manifest["pictures"] == {"train": 20, "val": 10, "test": 10}
    assert manifest["designs"] == {"train": 1, "val": 1, "test": 1}
    assert manifest["licences"] == {"fonts-one": "licence one", "fonts-two": "licence two"}
    assert manifest["packages"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (packages / "deb").iterdir()
    }
    image = Image.open(out / "train" / train.classes[0] / "a-0.png")
    assert (image.mode, image.size) == ("L", (SIDE, SIDE))
    levels = np.unique(np.asarray(image))
    assert (levels % 17 == 0).all()
    assert {0, 255} <= set(levels.tolist())  # dark on light
    assert np.asarray(image)[0, 0] == 255


@needs_dpkg
def test_building_again_gives_the_same_bytes(packages, tmp_path):
    made = [glyphs.build(packages, tmp_path / name, classes=5, fetch=False) for name in ("one", "two")]
    assert made[0] == made[1]
    for path in (tmp_path / "one").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    assert glyphs.build(packages, tmp_path / "more", classes=6, fetch=False)["sha256"] != made[0]["sha256"]


@needs_dpkg
def test_shards_hold_the_same_pictures(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "SHARD", 6)
    manifests = [
        glyphs.build(packages, tmp_path / name, classes=5, shards=name == "shards", fetch=False)
        for name in ("folder", "shards")
    ]
    assert manifests[0] == manifests[1]
    assert [path.name for path in sorted((tmp_path / "shards" / "train").iterdir())] == ["00000.tar", "00001.tar"]
    assert len((tmp_path / "shards" / CLASSES).read_text().splitlines()) == 5
    for one, other in zip(*(load(tmp_path / name) for name in ("folder", "shards")), strict=True):
        assert one.classes == other.classes
        contents = [sorted((int(s.labels[i]), s.read(i)) for i in range(len(s))) for s in (one, other)]
        assert contents[0] == contents[1]


@needs_dpkg
def test_too_many_classes(packages, tmp_path):
    with pytest.raises(ValueError, match=r"classes must be in \[2, 69\], as many as all faces draw, got 70"):
        glyphs.build(packages, tmp_path / "out", classes=70, fetch=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("classes", [1, 0, -3, 1552])
def test_classes_are_looked_at_before_anything_is_fetched(tmp_path, monkeypatch, classes):
    monkeypatch.setattr(debian, "download", None)
    with pytest.raises(ValueError, match=rf"classes must be in \[2, 1551\], as many as are common, got {classes}"):
        glyphs.build(tmp_path / "packages", tmp_path / "out", classes=classes)


@needs_dpkg
def test_a_release_with_other_fonts(packages, tmp_path, monkeypatch):
    table = [*glyphs.faces(), Face("val", "sans", "w", "fonts-two", "licence two", "e.ttf", 0)]
    monkeypatch.setattr(glyphs, "faces", lambda: table)
    with pytest.raises(ValueError, match=r"no such fonts in the packages of this release: fonts-two/e\.ttf"):
        glyphs.build(packages, tmp_path / "out", classes=5, fetch=False)


@needs_dpkg
def test_the_command(packages, tmp_path, capsys):
    words = ["data", "glyphs", "--packages", str(packages), "--no-fetch", "--classes", "4", "--output"]
    about = printed(capsys, *words, str(tmp_path / "one"))
    assert about == {"path": str(tmp_path / "one"), **json.loads((tmp_path / "one" / "manifest.json").read_text())}
    assert main([*words, str(tmp_path / "two"), "--format", "shards"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "licence one: fonts-one",
        "licence two: fonts-two",
        f"{tmp_path}/two: 4 classes, 8 train (1 designs), 4 val (1 designs), 4 test (1 designs)",
        f"drawn by {about['made_with']}, sha256 {about['sha256']}",
    ]
    assert main(["data", "check", str(tmp_path / "two")]) == 0
    capsys.readouterr()
    assert "two is not empty: name another --output, or empty it" in refused(capsys, *words, str(tmp_path / "two"))
    (packages / "deb" / "fonts-two_1.0_all.deb").unlink()
    assert "deb lacks the packages fonts-two" in refused(capsys, *words, str(tmp_path / "three"))
    assert "classes must be in [2, 1551]" in refused(capsys, *words, str(tmp_path / "three"), "--classes", "1")
