"""Finding pictures: class folders and tar shards as people have them, and what is said of what is out of order."""

import io
import os
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest

from rarefy.data.fashion_mnist import DataNotFoundError
from rarefy.data.images import CLASSES, FolderImages, ShardImages, find, load, wrong
from tests.images.pictures import add, encoded, folder, picture, shards

ONE = encoded(picture())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path / "set", train=3, val=2)


# Class folders


def test_class_folders_are_found_in_an_order_of_their_own(root):
    found = find(root, "train")
    assert isinstance(found, FolderImages)
    assert (found.classes, len(found), found.problems, found.ignored) == (("blue", "green", "red"), 9, [], 0)
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert found.counts.tolist() == [3, 3, 3]
    assert found.name(4) == str(root / "train" / "green" / "001.jpg")
    assert found.read(4) == (root / "train" / "green" / "001.jpg").read_bytes()
    assert len(find(root, "val")) == 6
    assert [len(split) for split in load(root)] == [9, 6]


def test_which_files_are_pictures(root):
    place = root / "train" / "red"
    (place / "upper.JPG").write_bytes(ONE)
    (place / "mixed.JpEg").write_bytes(ONE)
    (place / "other.webp").write_bytes(ONE)
    for name in ("Thumbs.db", "notes.txt", "jpg", ".jpg"):
        (place / name).write_bytes(b"none")
    (root / "train" / ".cache").mkdir()
    found = find(root, "train")
    assert found.classes == ("blue", "green", "red")
    assert found.counts.tolist() == [3, 3, 6]
    assert found.ignored == 4
    assert [Path(found.name(i)).name for i in range(9, 12)] == ["mixed.JpEg", "other.webp", "upper.JPG"]


def test_links_are_followed(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_bytes(ONE)
    (root / "train" / "red" / "zz.png").symlink_to(tmp_path / "elsewhere" / "file")
    (root / "train" / "yellow").symlink_to(root / "val" / "red")
    (root / "train" / "blue" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    found = find(root, "train")
    assert found.counts.tolist() == [4, 3, 4, 2]
    assert found.read(10) == ONE
    assert found.name(3).endswith("gone.jpg")
    with pytest.raises(FileNotFoundError):
        found.read(3)


def test_links_below_a_class_are_followed_to_their_end(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "more.png").write_bytes(ONE)
    (root / "train" / "red" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "red" / "round").symlink_to(root / "train")
    (root / "train" / "red" / "itself").symlink_to(root / "train" / "red")
    found = find(root, "train")
    names = [found.name(index) for index in range(len(found))]
    assert str(root / "train" / "red" / "linked" / "more.png") in names
    assert len(set(names)) == len(names) < 40


def test_a_digest_tells_pictures_apart_wherever_they_lie(root, tmp_path):
    before = find(root, "train").digest()
    root.rename(tmp_path / "moved")
    assert find(tmp_path / "moved", "train").digest() == before
    (tmp_path / "moved" / "train" / "red" / "000.jpg").rename(tmp_path / "moved" / "train" / "red" / "zero.jpg")
    assert find(tmp_path / "moved", "train").digest() != before


def test_names_that_are_no_text(root):
    odd = os.fsencode(root / "train" / "red") + b"/\xff\xfe.jpg"
    Path(os.fsdecode(odd)).write_bytes(ONE)
    (root / "train" / "red" / "ümläut ü.jpg").write_bytes(ONE)
    found = find(root, "train")
    assert {os.fsencode(found.name(i)) for i in range(9, 11)} == {
        odd,
        os.fsencode(root / "train" / "red" / "ümläut ü.jpg"),
    }
    assert found.read(9) == found.read(10) == ONE


def test_a_class_without_pictures(root):
    (root / "train" / "yellow").mkdir()
    (root / "val" / "yellow").mkdir()
    (root / "val" / "yellow" / "notes.txt").write_text("none")
    assert list(wrong(find(root, "train"), find(root, "val"))) == [
        f"{root}/train has no pictures of 'yellow': add some, or take the class out",
        f"{root}/val has no pictures of 'yellow': add some, or take the class out",
    ]
    with pytest.raises(ValueError, match=r"no pictures of 'yellow': .* \(and 1 more: rarefy data check "):
        load(root)


def test_classes_that_differ(root):
    (root / "train" / "red").rename(root / "train" / "rot")
    for number in range(5):
        (root / "val" / f"new{number}").mkdir()
        (root / "val" / f"new{number}" / "a.png").write_bytes(ONE)
    assert list(wrong(find(root, "train"), find(root, "val"))) == [
        f"{root}/train has classes that {root}/val has not: 'rot'",
        f"{root}/val has classes that {root}/train has not: 'new0', 'new1', 'new2' and 3 more",
    ]
    assert list(wrong(find(root, "train"))) == []


def test_pictures_in_the_wrong_place(root):
    (root / "train" / "loose.jpg").write_bytes(ONE)
    (root / "train" / "red" / "loose.txt").write_bytes(b"")
    (root / "val" / "deep" / "deeper").mkdir(parents=True)
    (root / "val" / "deep" / "deeper" / "a.jpg").write_bytes(ONE)
    train, val = find(root, "train"), find(root, "val")
    assert train.problems == [f"{root}/train has 1 pictures in no class's folder, such as 'loose.jpg'"]
    assert train.ignored == 1
    assert val.problems == []
    assert (val.classes, val.counts[val.classes.index("deep")]) == (tuple(sorted([*train.classes, "deep"])), 1)


def test_pictures_below_a_classs_folder_are_its(root):
    before = find(root, "train")
    (root / "train" / "red" / "images" / ".hidden").mkdir(parents=True)
    (root / "train" / "red" / "images" / ".hidden" / "no.jpg").write_bytes(ONE)
    (root / "train" / "red" / "images" / "yes.jpg").write_bytes(ONE)
    found = find(root, "train")
    assert (len(found), found.problems) == (len(before) + 1, [])
    (index,) = [index for index in range(len(found)) if found.name(index) == f"{root}/train/red/images/yes.jpg"]
    assert (found.classes[found.labels[index]], found.read(index)) == ("red", ONE)


def test_one_class_and_none(tmp_path):
    (tmp_path / "train" / "only").mkdir(parents=True)
    (tmp_path / "train" / "only" / "a.jpg").write_bytes(ONE)
    (tmp_path / "val").mkdir()
    problems = list(wrong(find(tmp_path, "train"), find(tmp_path, "val")))
    assert f"{tmp_path}/train has one class, 'only': there is nothing to tell apart" in problems
    assert any(line.startswith(f"{tmp_path}/val has no pictures (of .bmp, .gif, .jpeg, ") for line in problems)


def test_what_is_not_there_is_said(root, tmp_path):
    with pytest.raises(DataNotFoundError, match=r"there is no folder .*nowhere; expected one with FOLDER/train/CLASS/"):
        find(tmp_path / "nowhere", "train")
    with pytest.raises(DataNotFoundError, match=r"there is no folder .*001\.jpg"):
        find(root / "train" / "red" / "001.jpg", "train")
    with pytest.raises(DataNotFoundError, match=r"has no test; expected .*; there is train/, val/$"):
        find(root, "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match=r"has no val or validation or valid; .*; there is nothing$"):
        find(tmp_path / "empty", "val")
    for number in range(9):
        (tmp_path / "empty" / f"f{number}").write_text("")
    with pytest.raises(DataNotFoundError, match=r"there is f0, f1, f2, f3, f4, f5, f6, f7, \.\.\.$"):
        find(tmp_path / "empty", "train")


@pytest.mark.parametrize("name", ["validation", "valid"])
def test_other_names_of_val(root, name):
    (root / "val").rename(root / name)
    assert len(load(root)[1]) == 6


# Shards


def test_shards_hold_what_the_folders_do(root, tmp_path):
    packed = shards(tmp_path / "packed", root, each=4)
    assert len(list((packed / "train").iterdir())) == 3
    one, other = find(root, "train"), find(packed, "train")
    assert isinstance(other, ShardImages)
    assert (other.classes, len(other), other.problems, other.ignored) == (one.classes, len(one), [], 0)
    assert other.counts.tolist() == one.counts.tolist()

    def content(found):
        return sorted((found.classes[found.labels[i]], found.read(i)) for i in range(len(found)))

    assert content(one) == content(other)
    assert other.name(0) == f"{packed}/train/00000.tar:blue-000.jpg"
    assert list(wrong(*load(packed))) == []


def shard(path: Path, files: dict[str, bytes], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return path


def test_labels_of_shards(tmp_path):
    files = {
        "a.jpg": ONE,
        "a.cls": b"2",
        "sub/a.JPEG": ONE,
        "sub/a.json": b'{"label": 0, "more": "x"}',
        "b.CLS": b" 1\n",
        "b.png": ONE,
        "b.txt": b"a caption",
        "b.seg.png": ONE,
    }
    shard(tmp_path / "set-train-0.tar", files)
    found = find(tmp_path, "train")
    names = {found.name(i).rpartition(":")[2]: int(label) for i, label in enumerate(found.labels)}
    assert names == {"a.jpg": 2, "sub/a.JPEG": 0, "b.png": 1}
    assert (found.classes, found.ignored, found.problems) == (("0", "1", "2"), 2, [])
    assert all(found.read(i) == ONE for i in range(3))


def test_what_has_cls_may_tell_of_other_things_in_json(tmp_path):
    files = {"a.json": b'{"width": 3}', "a.cls": b"1", "a.jpg": ONE, "b.cls": b"0", "b.json": b"{", "b.jpg": ONE}
    shard(tmp_path / "train" / "0.tar", files)
    found = find(tmp_path, "train")
    assert (found.labels.tolist(), found.problems) == ([1, 0], [])


def test_a_second_name_of_a_picture(tmp_path):
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as tar:
        for name, content in {"a.jpg": ONE, "a.cls": b"0", "b.cls": b"1", "c.cls": b"2", "d.cls": b"3"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, of in {"b.jpg": "a.jpg", "c.jpg": "b.jpg", "d.jpg": "nowhere.jpg"}.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.LNKTYPE, of
            tar.addfile(member)
    found = find(tmp_path, "train")
    assert found.labels.tolist() == [0, 1, 2]
    assert all(found.read(index) == ONE for index in range(3))
    assert [each.partition(": ")[2] for each in found.problems[:1]] == [
        "d.jpg is a link to nowhere.jpg, which is not before it"
    ]
    assert "1 labels without a picture, such as '/d'" in found.problems[1]


@pytest.mark.parametrize("name", ["trains", "retrieval", "val-of-train", "imagenet1k"])
@pytest.mark.parametrize("end", ["00000.tar", "00000-of-00001.tar"])
def test_a_shard_is_of_the_split_that_its_name_ends_in(tmp_path, name, end):
    shard(tmp_path / f"{name}-train-{end}", {"a.cls": b"0", "a.jpg": ONE})
    shard(tmp_path / f"{name}-val-{end}", {"b.cls": b"1", "b.jpg": ONE})
    assert [find(tmp_path, split).labels.tolist() for split in ("train", "val")] == [[0], [1]]


def test_names_of_long_paths_in_either_format(tmp_path):
    long = "folder/" * 30 + "n" * 120
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        shard(tmp_path / "train" / f"{number}.tar", {f"{long}.jpg": ONE, f"{long}.cls": b"%d" % number}, format=kind)
    found = find(tmp_path, "train")
    assert found.problems == []
    assert [found.read(i) for i in range(2)] == [ONE, ONE]
    assert found.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.jpg": ONE}, "has 1 pictures without .cls or .json, such as '/a'"),
        ({"a.jpg": ONE, "a.png": ONE, "a.cls": b"0"}, "has two pictures of the key 'a'"),
        ({"a.jpg": ONE, "a.cls": b"cat"}, "a.cls must be a number (.cls), or JSON with a number 'label', got b'cat'"),
        ({"a.jpg": ONE, "a.cls": b"-1"}, "a.cls must give a class from 0 on, got -1"),
        ({"a.jpg": ONE, "a.json": b"[]"}, "a.json must be a number (.cls), or JSON with a number 'label', got b'[]'"),
        (
            {"a.jpg": ONE, "a.json": b'{"label": ' + b"[" * 100_000},
            "a.json must be a number (.cls), or JSON with a number 'label', got b'{\"label\": [[",
        ),
        ({"a.jpg": ONE, "a.json": b'{"label": "x"}'}, "a.json must give a class from 0 on, got 'x'"),
        ({"a.jpg": ONE, "a.json": b'{"label": true}'}, "a.json must give a class from 0 on, got True"),
        ({"a.jpg": ONE, "a.json": b'{"label": 1e300}'}, "a.json must give a class from 0 on, got 1e+300"),
        ({"a.jpg": ONE, "a.json": b'{"label": 99999999}'}, "a.json must give a class from 0 on, got 99999999"),
    ],
)
def test_labels_that_are_none(tmp_path, files, said):
    path = shard(tmp_path / "train" / "0.tar", {"z.jpg": ONE, "z.cls": b"0", **files})
    found = find(tmp_path, "train")
    assert any(line.startswith(str(path)) and said in line for line in found.problems)
    assert "z.jpg" in found.name(len(found) - 1)


def test_names_of_classes_too_few(tmp_path):
    shard(tmp_path / "train" / "0.tar", {"a.jpg": ONE, "a.cls": b"2"})
    (tmp_path / CLASSES).write_text("cat\ndog\n")
    found = find(tmp_path, "train")
    assert found.classes == ("0", "1", "2")
    assert found.problems == [f"{tmp_path}/{CLASSES} has 2 lines, and a picture has the class 2, counted from 0"]
    (tmp_path / "train" / CLASSES).write_text("cat\ndog\nbird\nfish\n")
    assert find(tmp_path, "train").classes == ("cat", "dog", "bird", "fish")


def test_names_of_classes_that_are_no_text(tmp_path):
    shard(tmp_path / "train" / "0.tar", {"a.jpg": ONE, "a.cls": b"1"})
    (tmp_path / CLASSES).write_bytes(b"cat\nd\xf6g\n")
    found = find(tmp_path, "train")
    assert (found.classes, found.problems) == (("0", "1"), [f"{tmp_path}/{CLASSES} is not UTF-8 text"])


def test_the_same_classes_in_another_order(root, tmp_path):
    packed = shards(tmp_path / "packed", root)
    (packed / "val" / CLASSES).write_text("red\nblue\ngreen\n")
    assert list(wrong(find(packed, "train"), find(packed, "val"))) == [
        f"{packed}/train and {packed}/val have the same classes in different orders"
    ]


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A shard of three pictures of 3000 bytes: 512 and 3072 for a picture, twice 512 for its label."""
    return shard(
        tmp_path / "train" / "0.tar",
        {f"{n}.{end}": data for n in range(3) for end, data in (("jpg", bytes(3000)), ("cls", b"%d" % n))},
    )


@pytest.mark.parametrize(
    ("keep", "pictures", "last"),
    [
        (0, 0, "its beginning"),
        (300, 0, "its beginning"),
        (2000, 0, "its beginning"),
        (4608 + 100, 1, "0.cls"),
        (4608 + 2000, 1, "0.cls"),
        (2 * 4608 - 1024 + 512, 1, "1.jpg"),
        (2 * 4608 + 2000, 2, "1.cls"),
    ],
)
def test_shards_that_are_cut_off(three, keep, pictures, last):
    cut(three, keep)
    found = find(three.parent.parent, "train")
    assert len(found) == pictures
    damage = [line for line in found.problems if f"is damaged or cut off after {last} (" in line]
    assert len(damage) == 1
    assert damage[0].startswith(str(three))
    assert damage[0].endswith("): fetch it again")


def test_a_shard_without_its_last_zeros_may_have_had_more(three):
    cut(three, 3 * 4608)
    (problem,) = find(three.parent.parent, "train").problems
    assert problem.startswith(f"{three} is damaged or cut off after 2.")
    assert problem.endswith("(its end is missing): fetch it again")


def test_shards_that_are_damaged_inside(three):
    data = bytearray(three.read_bytes())
    data[4608 : 4608 + 512] = b"\x5a" * 512  # the header of the second picture
    three.write_bytes(data)
    found = find(three.parent.parent, "train")
    assert len(found) == 1
    (line,) = found.problems
    assert f"{three} is damaged or cut off after 0.cls (" in line


def header(kind: bytes, size: int, content: bytes = b"") -> bytes:
    """A tar header of any size, and what follows it."""
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT) + content.ljust(512, b"\0")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (header(b"x", 26, b"999999999999999999999 a=b\n"), "Python int too large to convert to C ssize_t"),
        (header(b"x", 0)[:512] * 3000, ""),
        (header(b"0", -1024), "it ends in x"),
        (header(b"0", 1 << 62), "it ends in x"),
        (header(b"L", 1 << 62), ""),
    ],
    ids=["pax", "deep", "backwards", "huge", "huge name"],
)
def test_headers_of_shards_that_lie(three, damage, why):
    three.write_bytes(three.read_bytes()[:4608] + damage + three.read_bytes()[4608:])
    found = find(three.parent.parent, "train")
    assert (len(found), found.read(0)) == (1, bytes(3000))
    (line,) = found.problems
    assert line.startswith(f"{three} is damaged or cut off after 0.cls ({why}")
    assert line.endswith("): fetch it again")


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\x1f\x8b" + bytes(1000)])
def test_files_that_are_no_shards(tmp_path, content):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.tar").write_bytes(content)
    found = find(tmp_path, "train")
    assert len(found) == 0
    assert any("is damaged or cut off after its beginning" in line for line in found.problems)


def test_a_shard_that_is_cut_off_later(three):
    found = find(three.parent.parent, "train")
    cut(three, 4608 + 2000)
    assert found.read(0) == bytes(3000)
    with pytest.raises(OSError, match=r"0\.tar ends in it"):
        found.read(1)


# Hugging Face


@pytest.mark.parametrize("name", ["dataset_dict.json", "data/train-00000-of-00001.parquet"])
def test_data_sets_of_hugging_face_need_its_package(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ImportError, match=r"is a data set of Hugging Face's: reading it needs pip install datasets"):
        find(tmp_path, "train")


class Rows:
    """What rarefy asks of a data set of Hugging Face's, by a list of rows."""

    def __init__(self, features, rows):
        self.features, self.rows = features, rows

    def cast_column(self, name, kind):
        assert kind.decode is False
        return Rows({**self.features, name: kind}, self.rows)

    def select_columns(self, names):
        return Rows({name: self.features[name] for name in names}, [{n: row[n] for n in names} for row in self.rows])

    def with_format(self, kind, columns):
        assert kind == "numpy"
        return self.select_columns(columns)

    def __getitem__(self, index):
        if isinstance(index, int):
            return self.rows[index]
        return {name: np.array([row[name] for row in self.rows[index]]) for name in self.features}


@pytest.fixture
def hugging_face(monkeypatch, tmp_path):
    """Stand in for the package, which is large: it gives a train split of four rows, one of them without a class."""
    module = types.ModuleType("datasets")
    module.Image = type("Image", (), {"__init__": lambda self, decode=True: setattr(self, "decode", decode)})
    module.ClassLabel = type("ClassLabel", (), {"names": ["cat", "dog"]})
    module.Value = type("Value", (), {})
    (tmp_path / "a.jpg").write_bytes(ONE)
    pictures = [(ONE, None), (b"two", None), (None, str(tmp_path / "a.jpg")), (b"four", None)]
    features = {"id": module.Value(), "img": module.Image(), "label": module.ClassLabel()}
    rows = [
        {"id": number, "img": {"bytes": data, "path": path}, "label": label}
        for number, ((data, path), label) in enumerate(zip(pictures, (1, -1, 0, 1), strict=True))
    ]
    module.load_from_disk = lambda folder: {"train": Rows(features, rows)}
    module.load_dataset = lambda kind, data_files, split: Rows(features, rows * len(data_files))
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_rows_without_a_class_are_left_out(tmp_path, hugging_face):
    (tmp_path / "dataset_dict.json").write_text("{}")
    found = find(tmp_path, "train")
    assert (found.classes, found.labels.tolist()) == (("cat", "dog"), [1, 0, 1])
    assert found.problems == [f"{tmp_path} (train) has 1 pictures without a class"]
    assert [found.read(i) for i in range(3)] == [ONE, ONE, b"four"]
    assert found.name(1) == f"{tmp_path} (train), row 2"
    with pytest.raises(DataNotFoundError, match="has no val or validation or valid; there is train"):
        find(tmp_path, "val")


def test_parquet_files_of_a_split(tmp_path, hugging_face):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        (tmp_path / "data" / f"{name}.parquet").write_text("")
    assert [len(find(tmp_path, split)) for split in ("train", "val")] == [6, 3]


def test_columns_that_are_none(tmp_path, hugging_face):
    (tmp_path / "dataset_dict.json").write_text("{}")
    hugging_face.load_from_disk = lambda folder: {"train": Rows({"a": hugging_face.Image()}, [])}
    with pytest.raises(ValueError, match="must have a column of Image and one of ClassLabel, it has a: Image"):
        find(tmp_path, "train")
