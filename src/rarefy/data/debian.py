"""Debian's packages as a source of data: fetched by apt-get, which needs no root, and kept for the next time."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path


def run(command: Sequence[str], folder: Path) -> bytes:
    """Run a command in a folder; gives what it writes.

    Raises FileNotFoundError, saying what it said, for one that is not on this machine or that fails.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{command[0]} is not on this machine: the data set is built on Debian") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise FileNotFoundError(f"{' '.join(command[:6])} ... failed, so the data set has no source: {said}")
    return done.stdout


def update(folder: Path, languages: str = "none") -> list[str]:
    """Fetch the lists of packages into ``folder``, with the descriptions in these languages; see :func:`download`."""
    command = _apt(folder, languages)
    run([*command, "update"], folder)
    return command


def download(names: Sequence[str], folder: Path) -> None:
    """Fetch those of the packages that ``folder``/deb lacks, by the lists in ``folder``: new ones where they are old.

    Raises FileNotFoundError where apt-get is not on this machine or does not get them.
    """
    debs = folder / "deb"
    debs.mkdir(parents=True, exist_ok=True)
    have = found(debs)
    missing = [name for name in names if name not in have]
    if not missing:
        return
    command = _apt(folder, "none")
    try:
        run([*command, "download", *missing], debs)
    except FileNotFoundError:  # there are no lists yet, or the archive has gone on since
        run([*update(folder), "download", *missing], debs)


def _apt(folder: Path, languages: str) -> list[str]:
    """Begin an apt-get command with lists of packages of its own: the machine's stay as they are."""
    for each in (folder / "lists" / "partial", folder / "cache" / "archives" / "partial"):
        each.mkdir(parents=True, exist_ok=True)
    # As root, apt would hand the download to a user who cannot write into a private folder; for others nothing changes.
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "-o", f"Dir::State::lists={(folder / 'lists').resolve()}"]
    return [*command, "-o", f"Dir::Cache={(folder / 'cache').resolve()}", "-o", f"Acquire::Languages={languages}"]


def found(debs: Path) -> dict[str, Path]:
    """Give the packages in a folder by name; of several versions the last in order."""
    return {path.name.split("_")[0]: path for path in sorted(debs.glob("*.deb"))}


def require(names: Sequence[str], debs: Path) -> dict[str, Path]:
    """Give these packages. Raises FileNotFoundError with the names of those that the folder lacks."""
    have = found(debs)
    missing = [name for name in names if name not in have]
    if missing:
        raise FileNotFoundError(f"{debs} lacks the packages {', '.join(missing)}")
    return {name: have[name] for name in names}


def files(package: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Read the files of these names, wherever they lie in a package, without unpacking it."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            name = member.name.rpartition("/")[2]
            content = tar.extractfile(member) if name in names and member.isfile() else None
            if content is not None:
                yield name, content.read()


def sha256(path: Path) -> str:
    """Give the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
