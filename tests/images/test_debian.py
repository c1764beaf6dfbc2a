"""Packages of Debian: which there are, what is in them, and what is fetched, by an apt-get made for it."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from rarefy.data import debian

APT = """#!/bin/sh
echo "$@" >> "{log}"
for word; do last=$word; done
case " $* " in
*" update "*) touch "{lists}" ;;
*" download "*)
    [ -e "{lists}" ] || {{ echo "E: Unable to locate package" >&2; exit 100; }}
    [ "$last" != gone ] || {{ echo "E: No such package:  gone" >&2; exit 100; }}
    seen=
    for word; do [ -z "$seen" ] || echo content > "${{word}}_1.0_all.deb"; [ "$word" != download ] || seen=1; done ;;
esac
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the calls of apt-get, a line each."""
    log, tools = tmp_path / "log", tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text(APT.format(log=log, lists=tmp_path / "lists"))
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    return log


def actions(log: Path) -> list[str]:
    return [" ".join(line.split()[8:]) for line in log.read_text().splitlines()]


def test_packages_are_fetched_once(apt, tmp_path):
    folder = tmp_path / "packages"
    debian.download(["one", "two"], folder)
    assert actions(apt) == ["download one two", "update", "download one two"]
    first = apt.read_text().splitlines()[0]
    assert f"Dir::State::lists={folder}/lists " in first
    assert f"Dir::Cache={folder}/cache " in first
    assert sorted(debian.found(folder / "deb")) == ["one", "two"]
    debian.download(["two", "three"], folder)
    assert actions(apt)[3:] == ["download three"]
    debian.download(["one", "two", "three"], folder)
    assert len(actions(apt)) == 4


def test_what_apt_says_is_handed_on(apt, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"apt-get .*failed, so the data set has no source: E: No such package: gone"
    ):
        debian.download(["gone"], tmp_path / "packages")


def test_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get is not on this machine: the data set is built on Debian"):
        debian.download(["one"], tmp_path / "packages")


def test_which_packages_there_are(tmp_path):
    for name in ("fonts-a_1.0_all.deb", "fonts-a_1.1_all.deb", "fonts-b_2_all.deb", "notes.txt"):
        (tmp_path / name).write_text(name)
    assert debian.found(tmp_path) == {
        "fonts-a": tmp_path / "fonts-a_1.1_all.deb",
        "fonts-b": tmp_path / "fonts-b_2_all.deb",
    }
    assert debian.require(["fonts-b"], tmp_path) == {"fonts-b": tmp_path / "fonts-b_2_all.deb"}
    with pytest.raises(FileNotFoundError, match=r"lacks the packages fonts-c, fonts-d$"):
        debian.require(["fonts-c", "fonts-a", "fonts-d"], tmp_path)
    assert debian.sha256(tmp_path / "notes.txt") == hashlib.sha256(b"notes.txt").hexdigest()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is Debian's")
def test_files_of_a_package(tmp_path):
    path = package(tmp_path, "fonts-a", {"usr/share/fonts/a.ttf": b"A", "usr/share/b.ttf": b"B", "usr/a.txt": b"T"})
    assert sorted(debian.files(path, {"a.ttf", "b.ttf", "share", "c.ttf"})) == [("a.ttf", b"A"), ("b.ttf", b"B")]
    assert list(debian.files(path, set())) == []


def package(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """Make a package of Debian's with these files."""
    root = folder / f"{name}-root"
    (root / "DEBIAN").mkdir(parents=True)
    about = (
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: x\n"
    )
    (root / "DEBIAN" / "control").write_text(about)
    for file, content in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)
    folder.joinpath("deb").mkdir(exist_ok=True)
    made = folder / "deb" / f"{name}_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", root, made], check=True, capture_output=True)
    return made
