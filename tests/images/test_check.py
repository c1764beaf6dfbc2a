"""`rarefy data check`: what a set of pictures holds, what is damaged in it, and by its exit code whether it is fit."""

import os
import sys
from pathlib import Path

import pytest

from rarefy.cli import main
from rarefy.data import check as check_module
from rarefy.data.check import check
from tests.cli import printed, refused
from tests.images.pictures import encoded, folder, picture, shards


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path / "set", train=4, val=2)


def told(capsys: pytest.CaptureFixture[str], root: Path, status: int) -> list[str]:
    assert main(["data", "check", str(root)]) == status
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_a_set_in_order(root, capsys):
    (root / "train" / "red" / "notes.txt").write_text("by hand")
    (root / "train" / "red" / "small.png").write_bytes(encoded(picture(size=(8, 9)), "PNG"))
    (root / "train" / "blue" / "large.png").write_bytes(encoded(picture(size=(300, 200)), "PNG"))
    (root / "train" / "blue" / "large2.png").write_bytes(encoded(picture(size=(200, 201)), "PNG"))
    size = sum(path.stat().st_size for path in (root / "train").glob("*/*.[jp]*"))
    about = printed(capsys, "data", "check", str(root))
    assert about["problems"] == []
    assert list(about["splits"]) == ["train", "val"]
    train = about["splits"]["train"]
    assert train == {
        "place": str(root / "train"),
        "pictures": 15,
        "classes": {"blue": 6, "green": 4, "red": 5},
        "bytes": size,
        "ignored": 1,
        "smallest": [8, 9],
        "median": [38, 31],
        "largest": [300, 200],
        "damaged": {},
        "repeated": [],
    }
    assert told(capsys, root, 0)[:4] == [
        f"train: 15 pictures of 3 classes, {size / 1e6:.1f} MB, in {root}/train",
        "  by class from 4 (green) to 6 (blue)",
        "  8 x 9 to 300 x 200 pixels, 38 x 31 in the middle",
        "  1 other files, left alone",
    ]


def test_damaged_pictures_are_all_named(root, capsys):
    empty, cut, text = (root / "train" / name for name in ("red/000.jpg", "green/001.jpg", "blue/002.jpg"))
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-200])
    text.write_text("<html>")
    (root / "val" / "red" / "gone.jpg").symlink_to(root / "nowhere")
    about = printed(capsys, "data", "check", str(root), status=1)
    assert about["problems"] == []
    damaged = about["splits"]["train"]["damaged"]
    assert set(damaged) == {str(empty), str(cut), str(text)}
    assert damaged[str(empty)] == damaged[str(text)] == "no picture of a known format"
    assert "truncated" in damaged[str(cut)]
    assert about["splits"]["val"]["damaged"] == {str(root / "val/red/gone.jpg"): "No such file or directory"}
    assert about["splits"]["train"]["pictures"] == 12
    lines = told(capsys, root, 1)
    assert "  3 damaged:" in lines
    assert f"    {empty}: no picture of a known format" in lines


def test_what_is_no_ordinary_file_is_damaged_and_not_waited_for(root, tmp_path, capsys):
    pipe, link, shard = root / "train/red/pipe.jpg", root / "train/red/link.jpg", root / "test/0.tar"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    shard.parent.mkdir()
    os.mkfifo(shard)
    about = printed(capsys, "data", "check", str(root), status=1)
    assert about["splits"]["train"]["damaged"] == dict.fromkeys((str(link), str(pipe)), "not an ordinary file")
    assert about["splits"]["train"]["pictures"] == 14
    assert (
        f"{shard} is damaged or cut off after its beginning (not an ordinary file): fetch it again"
        in (about["problems"])
    )


def test_many_damaged_pictures_are_listed_in_part(root, capsys):
    for number in range(130):
        (root / "train" / "red" / f"bad{number:03}.jpg").write_bytes(b"")
    lines = told(capsys, root, 1)
    assert "  130 damaged:" in lines
    assert sum("no picture of a known format" in line for line in lines) == 100
    assert "    ... (all by --json)" in lines
    assert len(printed(capsys, "data", "check", str(root), status=1)["splits"]["train"]["damaged"]) == 130


def test_pictures_of_training_that_are_held_out_too_are_told(root, capsys):
    copy = root / "val" / "red" / "copy.jpg"
    copy.write_bytes((root / "train" / "red" / "000.jpg").read_bytes())
    (root / "train" / "red" / "again.jpg").write_bytes(copy.read_bytes())
    about = printed(capsys, "data", "check", str(root))  # which is said, and no reason to fail
    assert about["splits"]["val"]["repeated"] == [str(copy)]
    assert about["splits"]["train"]["repeated"] == []
    lines = told(capsys, root, 0)
    assert lines[lines.index("  1 in train, too:") + 1] == f"    {copy}"


def test_problems_of_the_whole_set(root, capsys):
    (root / "train" / "yellow").mkdir()
    (root / "test" / "red").mkdir(parents=True)
    (root / "test" / "red" / "a.png").write_bytes(encoded(picture(), "PNG"))
    about = printed(capsys, "data", "check", str(root), status=1)
    assert list(about["splits"]) == ["train", "val", "test"]
    assert about["problems"] == [
        f"{root}/train has no pictures of 'yellow': add some, or take the class out",
        f"{root}/train has classes that {root}/val has not: 'yellow'",
        f"{root}/train has classes that {root}/test has not: 'blue', 'green', 'yellow'",
    ]
    assert f"problem: {about['problems'][0]}" in told(capsys, root, 1)


def test_a_set_without_a_held_out_split_and_one_without_pictures(root, capsys):
    for path in (root / "val").glob("*/*"):
        path.unlink()
    about = printed(capsys, "data", "check", str(root), status=1)
    assert about["splits"]["val"]["smallest"] is None
    assert about["splits"]["val"]["pictures"] == 0
    (root / "val").rename(root.parent / "val")
    about = printed(capsys, "data", "check", str(root), status=1)
    assert list(about["splits"]) == ["train"]
    assert about["problems"] == [f"{root} has neither val nor test: there is nothing to evaluate on"]
    (root / "train").rename(root / "trian")
    said = refused(capsys, "data", "check", str(root))
    assert "has no train; expected FOLDER/train/CLASS/IMAGE.jpg" in said
    assert said.endswith("there is trian/\n")
    assert "there is no folder" in refused(capsys, "data", "check", str(root / "none"))


def test_a_shard_that_is_cut_off(root, tmp_path, capsys):
    packed = shards(tmp_path / "packed", root, each=5)
    assert printed(capsys, "data", "check", str(packed))["splits"]["train"]["classes"] == dict.fromkeys(
        ("blue", "green", "red"), 4
    )
    last = packed / "train" / "00002.tar"
    last.write_bytes(last.read_bytes()[:700])
    about = printed(capsys, "data", "check", str(packed), status=1)
    assert about["splits"]["train"]["pictures"] == 10
    assert about["splits"]["train"]["damaged"] == {}
    (problem,) = about["problems"]
    assert problem.startswith(f"{last} is damaged or cut off after its beginning (")


def test_workers_find_the_same(root, monkeypatch):
    (root / "train" / "red" / "000.jpg").write_bytes(b"")
    alone = check(root)
    asked = []
    monkeypatch.setattr(check_module, "_CHUNK", 5)
    monkeypatch.setattr(check_module, "cores", lambda: 2)
    assert check(root, tell=lambda *told: asked.append(told)) == alone
    assert asked[-1] == ("val", 6, 6)
    assert [told for told in asked if told[0] == "train"] == [("train", n, 12) for n in range(1, 13) if n != 9]


def test_without_pillow_it_is_said_what_to_install(root, capsys, monkeypatch):
    for name in ("rarefy.data.check", "rarefy.data.pictures", "rarefy.data.loading"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("rarefy.data.check")
    monkeypatch.delattr("rarefy.data.pictures")
    monkeypatch.delattr("rarefy.data.loading")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pictures need PIL: pip install 'rarefy[images]'" in refused(capsys, "data", "check", str(root))
