"""Files are replaced whole or not at all."""

import errno
import io
import os
from pathlib import Path
from typing import IO

import pytest

from rarefy._files import _through, write_atomically, write_csv


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, lambda p: p.write_text("one"))
    write_atomically(path, lambda p: p.write_text("two"))
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("ne")
        assert path.read_text() == "old"
        raise error("no space left")

    with pytest.raises(error):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def slow(partial: Path) -> None:
        write_atomically(path, lambda other: other.write_text("other"))
        assert path.read_text() == "other"
        partial.write_text("own")

    write_atomically(path, slow)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "own")]


def test_permissions_are_those_of_a_plain_open(tmp_path: Path) -> None:
    def private(partial: Path) -> None:
        partial.unlink()
        partial.touch(0o600)

    plain, path = tmp_path / "plain", tmp_path / "file"
    plain.write_text("")
    write_atomically(path, private)
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    write_atomically(path, private)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["a" * 255, "模" * 85, "é" * 127, "a" * 99 + "模" * 52, os.fsdecode(b"\xff" * 255)])
def test_names_as_long_as_a_file_can_have(name: str, tmp_path: Path) -> None:
    def text(partial: Path) -> None:
        str(partial).encode()  # writers in other languages refuse what is no text
        partial.write_text("all")

    write_atomically(tmp_path / name, text)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "all")]


def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path: Path) -> None:
    def full(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: '.*file'") as caught:
        write_atomically(tmp_path / "file", full)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_writer_with_errors_of_its_own_for_a_full_disk() -> None:
    def hides(file: IO[bytes]) -> None:
        try:
            file.write(b"x" * 100_000)
        except OSError:
            raise RuntimeError("file write failed") from None

    with pytest.raises(OSError, match="No space left"):
        _through(_Full(), hides)


class _Full(io.BytesIO):
    def write(self, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    rows = [{"name": "ä, b", "ns": 0.1, "none": None}, {"name": 'c"d', "ns": 2, "none": ""}]
    assert write_csv(tmp_path / "new" / "a.csv", rows) == tmp_path / "new" / "a.csv"
    text = (tmp_path / "new" / "a.csv").read_bytes()
    assert text == 'name,ns,none\n"ä, b",0.1,\n"c""d",2,\n'.encode()
