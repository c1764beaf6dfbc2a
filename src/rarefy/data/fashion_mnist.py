"""Fashion-MNIST: 70,000 grey 28x28 pictures of clothes in ten classes (Xiao, Rasul, Vollgraf, arXiv 1708.07747; MIT).

Wherever the files come from, the SHA-256 of their content is checked, and the content is compared unpacked because
packagers compress it anew.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import subprocess
import tempfile
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rarefy.data.cache import cache_folder

__all__ = ["CLASSES", "SHAPE", "DataNotFoundError", "FashionMNIST", "load"]

#: What is on an image, by its label.
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

#: What a network takes of an image: channels, height, width.
SHAPE = (1, 28, 28)

#: The four files and the SHA-256 of each, unpacked.
_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

_LISTING = ", ".join(_SHA256) + " (each as it is or as .gz)"

#: Where the files lie below a folder that somebody names: directly, or as torchvision or the Debian package has them.
_SUBFOLDERS = ("", "raw", "FashionMNIST/raw", "fashion-mnist", "usr/share/datasets/fashion-mnist")

_PACKAGE = "dataset-fashion-mnist"
_SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_HOME = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_CONNECTION_SECONDS = 60
_COMMAND_SECONDS = 600


class DataNotFoundError(FileNotFoundError):
    """The data set is not on this machine and could not be fetched; the message says how to provide it."""


@dataclass(frozen=True, eq=False)
class FashionMNIST:
    """Images: uint8 (N, 28, 28), 0 is background, 255 full ink; labels: int64 (N,), indices into `classes`.

    N is 60,000 for training and 10,000 for testing.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...] = CLASSES


def load(folder: str | os.PathLike[str] | None = None, *, download: bool = True) -> FashionMNIST:
    """Load the data set, from the first of these places that has it:

    1. `folder` when given, and then nowhere else: the four idx files, as they are or as .gz, in it or where torchvision
       or the Debian package puts them below it;
    2. /usr/share/datasets/fashion-mnist, where Debian's package dataset-fashion-mnist installs them;
    3. the user's cache: rarefy/fashion-mnist below $XDG_CACHE_HOME or ~/.cache;
    4. with `download`, that package (fetched by apt-get and unpacked, which needs no root), or else the data set's own
       home; either way 31 MB, which stay in the cache.

    Raises DataNotFoundError when no place has it, and ValueError for a file that is not the original: cut or altered.
    """
    if folder is not None:
        found = _find(Path(folder))
        if found is None:
            raise DataNotFoundError(f"{folder} does not hold Fashion-MNIST: it needs {_LISTING}")
        return _assemble(found)
    found = _find(_SYSTEM_FOLDER)
    if found is not None:
        return _assemble(found)
    failures = [] if download else ["download=False"]
    try:
        cache = cache_folder() / "fashion-mnist"
        found = _find(cache)
        if found is None and download:
            # In the cache's file system, so that a checked file moves to its place in one step.
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix="incoming-"):
                pass  # files can be made there
    except OSError as error:
        download = False
        failures = [str(error)]
    if found is not None:
        return _assemble(found)
    for source in (_debian_package, _own_home) if download else ():
        with tempfile.TemporaryDirectory(dir=cache, prefix="incoming-") as incoming:
            try:
                found = source(Path(incoming))
                data = _assemble(found)
            except (OSError, ValueError, subprocess.SubprocessError, http.client.HTTPException) as error:
                failures.append(f"{type(error).__name__}: {error}")
                continue
            for path in found.values():
                path.replace(cache / path.name)
            return data
    raise DataNotFoundError(
        f"Fashion-MNIST is not on this machine ({'; '.join(failures)}). There are three ways: put {_LISTING} into a "
        f"folder and name it (--data FOLDER, or load(FOLDER)); install Debian's package (apt-get install {_PACKAGE}); "
        f"or let it be fetched, with a connection to a Debian mirror or to {_HOME}"
    )


def _find(folder: Path) -> dict[str, Path] | None:
    """All four files in the folder or one of its usual subfolders, by their unpacked names; None without all four."""
    for place in (folder / subfolder for subfolder in _SUBFOLDERS):
        found = {name: path for name in _SHA256 for path in (place / f"{name}.gz", place / name) if path.is_file()}
        if len(found) == len(_SHA256):
            return found
    return None


def _assemble(paths: Mapping[str, Path]) -> FashionMNIST:
    def tensor(name: str, header: int) -> Tensor:
        return torch.frombuffer(_read(paths[name], _SHA256[name]), dtype=torch.uint8, offset=header)

    # The checked hash makes the headers known: 16 bytes before the images, 8 before the labels.
    return FashionMNIST(
        train_images=tensor("train-images-idx3-ubyte", 16).view(-1, 28, 28),
        train_labels=tensor("train-labels-idx1-ubyte", 8).long(),
        test_images=tensor("t10k-images-idx3-ubyte", 16).view(-1, 28, 28),
        test_labels=tensor("t10k-labels-idx1-ubyte", 8).long(),
    )


def _read(path: Path, sha256: str) -> bytearray:
    """The unpacked content of a file, checked; a bytearray because a tensor wants memory that it may write to."""
    content = path.read_bytes()
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        intact = hashlib.sha256(content).hexdigest() == sha256
    except (gzip.BadGzipFile, EOFError, zlib.error):
        intact = False
    if not intact:
        raise ValueError(
            f"{path} is not the original file of Fashion-MNIST but cut or altered; delete it and load again"
        )
    return bytearray(content)


def _debian_package(incoming: Path) -> dict[str, Path]:
    """The files out of Debian's package, on a machine with apt-get; the machine's package lists stay as they are."""
    # As root, apt would hand the download to a user who cannot write into a private folder; for others nothing changes.
    apt = ["apt-get", "-o", "APT::Sandbox::User=root"]
    try:
        _command([*apt, "download", _PACKAGE], incoming)
    except subprocess.SubprocessError:
        # A fresh machine has no package lists, or stale ones: fetch them, in private.
        lists, cache = incoming / "lists", incoming / "cache"
        for folder in (lists, cache):
            (folder / "partial").mkdir(parents=True)
        apt += ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}", "-o", "Acquire::Languages=none"]
        _command([*apt, "update"], incoming)
        _command([*apt, "download", _PACKAGE], incoming)
    (package,) = incoming.glob(f"{_PACKAGE}*.deb")
    _command(["dpkg-deb", "-x", str(package), str(incoming)], incoming)
    found = _find(incoming)
    if found is None:
        raise FileNotFoundError(f"{package.name} does not hold {_LISTING}")
    return found


def _command(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    if result.returncode != 0:
        raise subprocess.SubprocessError(f"{command[0]} failed: {' '.join(result.stderr.split())}")


def _own_home(incoming: Path) -> dict[str, Path]:
    """The files from the data set's own home; plain HTTP is enough, as their hashes are known."""
    paths = {name: incoming / f"{name}.gz" for name in _SHA256}
    for path in paths.values():
        with (
            urllib.request.urlopen(_HOME + path.name, timeout=_CONNECTION_SECONDS) as source,
            path.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    return paths
