"""The loader is tested on files of a few images each, whose hashes take the place of the real ones."""

from __future__ import annotations

import gzip
import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from rarefy.data import DataNotFoundError, fashion_mnist

TRAIN, TEST = 6, 3
PLACE = "usr/share/datasets/fashion-mnist"


def idx(count: int, *shape: int, seed: int) -> bytes:
    """An idx file of `count` bytes arrays of this shape, labels when there is none."""
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(0, 256 if shape else 10, (count, *shape), generator=generator, dtype=torch.uint8)
    return struct.pack(f">{2 + len(shape)}I", 0x801 + len(shape), count, *shape) + bytes(content.flatten().tolist())


CONTENT = {
    "train-images-idx3-ubyte": idx(TRAIN, 28, 28, seed=0),
    "train-labels-idx1-ubyte": idx(TRAIN, seed=1),
    "t10k-images-idx3-ubyte": idx(TEST, 28, 28, seed=2),
    "t10k-labels-idx1-ubyte": idx(TEST, seed=3),
}


def write(folder: Path, *, packed: bool = True, content: Mapping[str, bytes] = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in content.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(value) if packed else value)
    return folder


def check(data: fashion_mnist.FashionMNIST) -> None:
    assert (data.train_images.shape, data.train_images.dtype) == ((TRAIN, 28, 28), torch.uint8)
    assert (data.test_images.shape, data.test_images.dtype) == ((TEST, 28, 28), torch.uint8)
    assert (data.train_labels.dtype, data.test_labels.dtype) == (torch.int64, torch.int64)
    assert bytes(data.train_images.flatten().tolist()) == CONTENT["train-images-idx3-ubyte"][16:]
    assert bytes(data.test_images.flatten().tolist()) == CONTENT["t10k-images-idx3-ubyte"][16:]
    assert bytes(data.train_labels.tolist()) == CONTENT["train-labels-idx1-ubyte"][8:]
    assert bytes(data.test_labels.tolist()) == CONTENT["t10k-labels-idx1-ubyte"][8:]
    assert len(data.classes) == 10


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on it: no data, no command, no network; returns the cache folder that it would use."""
    hashes = {name: hashlib.sha256(value).hexdigest() for name, value in CONTENT.items()}
    monkeypatch.setattr(fashion_mnist, "_SHA256", hashes)
    monkeypatch.setattr(fashion_mnist, "_SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setattr(fashion_mnist, "_HOME", (tmp_path / "home").as_uri() + "/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "cache" / "rarefy" / "fashion-mnist"


def install_apt(folder: Path, *, needs_lists: bool) -> None:
    """Stand-ins for apt-get and dpkg-deb that take the package's content from `folder`."""
    commands = folder / "bin"
    commands.mkdir()
    condition = (
        'case "$*" in *State::lists=*) ;; *) echo "E: no package lists" >&2; exit 100;; esac' if needs_lists else ":"
    )
    scripts = {
        "apt-get": f'{condition}\ncase "$*" in *download*) : > dataset-fashion-mnist_1_all.deb;; esac',
        "dpkg-deb": f'/bin/mkdir -p "$3/usr/share/datasets"\n/bin/cp -r {folder}/package "$3/{PLACE}"',
    }
    for name, script in scripts.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_an_explicit_folder(tmp_path: Path, packed: bool, below: str) -> None:
    write(tmp_path / "mine" / below, packed=packed)
    check(fashion_mnist.load(tmp_path / "mine", download=False))
    check(fashion_mnist.load(str(tmp_path / "mine"), download=False))


def test_images_may_be_written_to(tmp_path: Path) -> None:
    data = fashion_mnist.load(write(tmp_path / "mine"))
    data.train_images.zero_()
    check(fashion_mnist.load(tmp_path / "mine"))


def test_the_system_and_then_the_cache(tmp_path: Path, machine: Path) -> None:
    write(machine)
    check(fashion_mnist.load(download=False))
    # The system's copy comes first: a bad one there is seen.
    write(tmp_path / "system", content={**CONTENT, "t10k-labels-idx1-ubyte": b"other"})
    with pytest.raises(ValueError, match="system"):
        fashion_mnist.load(download=False)


def test_the_cache_without_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    write(tmp_path / "user" / ".cache" / "rarefy" / "fashion-mnist")
    for value in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        check(fashion_mnist.load(download=False))
    monkeypatch.delenv("XDG_CACHE_HOME")
    check(fashion_mnist.load(download=False))


@pytest.mark.parametrize("needs_lists", [False, True])
def test_the_debian_package(tmp_path: Path, machine: Path, needs_lists: bool) -> None:
    write(tmp_path / "package")
    install_apt(tmp_path, needs_lists=needs_lists)
    check(fashion_mnist.load())
    assert sorted(path.name for path in machine.iterdir()) == sorted(f"{name}.gz" for name in CONTENT)
    check(fashion_mnist.load(download=False))


def test_a_package_without_the_files_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    install_apt(tmp_path, needs_lists=False)
    with pytest.raises(DataNotFoundError, match=r"dataset-fashion-mnist_1_all\.deb does not hold train-images"):
        fashion_mnist.load()
    write(tmp_path / "home")
    check(fashion_mnist.load())


def test_the_own_home(tmp_path: Path, machine: Path) -> None:
    write(tmp_path / "home")
    check(fashion_mnist.load())
    assert sorted(path.name for path in machine.iterdir()) == sorted(f"{name}.gz" for name in CONTENT)


def test_a_half_filled_cache_is_filled(tmp_path: Path, machine: Path) -> None:
    write(machine)
    (machine / "t10k-labels-idx1-ubyte.gz").unlink()
    write(tmp_path / "home")
    check(fashion_mnist.load())


def test_nothing_unchecked_reaches_the_cache(tmp_path: Path, machine: Path) -> None:
    write(tmp_path / "home", content={**CONTENT, "t10k-labels-idx1-ubyte": b"a log-in page"})
    with pytest.raises(DataNotFoundError, match="cut or altered"):
        fashion_mnist.load()
    assert list(machine.iterdir()) == []


def test_offline_without_any_the_error_names_the_three_ways(machine: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"into a folder .*apt-get install .*fetched, with a connection"
    ) as caught:
        fashion_mnist.load()
    assert "apt-get" in str(caught.value)
    assert list(machine.iterdir()) == []
    with pytest.raises(DataNotFoundError, match="download=False"):
        fashion_mnist.load(download=False)


def test_without_a_cache_the_error_names_the_three_ways(
    tmp_path: Path, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # as one that may not be written
    with pytest.raises(DataNotFoundError, match=r"Not a directory.*three ways"):
        fashion_mnist.load()

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(DataNotFoundError, match=r"there is no home folder.*XDG_CACHE_HOME.*three ways"):
        fashion_mnist.load()


def test_a_folder_without_all_four_files(tmp_path: Path, machine: Path) -> None:
    write(machine)
    folder = write(tmp_path / "mine")
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataNotFoundError, match=r"mine does not hold Fashion-MNIST: it needs train-images"):
        fashion_mnist.load(folder)


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("damage", ["cut", "packed cut", "altered", "checksum", "not packed", "stream"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = write(tmp_path / "mine")
    path = folder / f"{name}.gz"
    content, packed = CONTENT[name], path.read_bytes()
    path.write_bytes(
        {
            "cut": gzip.compress(content[:-1]),
            "packed cut": packed[:-9],
            "altered": gzip.compress(content[:-1] + bytes([content[-1] ^ 1])),
            "checksum": packed[:-8] + b"\0" * 8,
            "not packed": content,
            "stream": packed[:10] + b"\xff" * (len(packed) - 10),
        }[damage]
    )
    with pytest.raises(ValueError, match=f"{path} is not the original file .*delete it and load again"):
        fashion_mnist.load(folder)


def test_the_real_hashes_are_of_sha256_and_the_real_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert list(fashion_mnist._SHA256) == list(CONTENT)
    assert all(len(bytes.fromhex(value)) == 32 for value in fashion_mnist._SHA256.values())
