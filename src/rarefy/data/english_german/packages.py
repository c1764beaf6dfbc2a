"""The packages of the corpus: which they are, fetched and unpacked."""

from __future__ import annotations

import sys
from pathlib import Path

from rarefy.data import debian

#: Packages whose messages are in a gettext catalogue, with English as the key.
CATALOGUES = (
    *("libreoffice-l10n-de", "gcc-12-locales", "evolution-common", "gnucash-common", "gramps", "gnumeric-common"),
    *("claws-mail-i18n", "pidgin-data", "vlc-l10n", "filezilla-common", "git", "gimp-data", "util-linux-locales"),
    *("gnupg-l10n", "libc-l10n", "aptitude-common", "coreutils", "dpkg", "e2fsprogs-l10n", "phpmyadmin", "darktable"),
    *("digikam-data", "krita-l10n", "kmymoney-common", "lyx-common", "libgtk-3-common", "gnome-control-center-data"),
    "grisbi-common",
)
OFFICE_HELP = ("libreoffice-help-en-us", "libreoffice-help-de")
DESKTOP_HELP = "gnome-user-docs"
GERMAN_MANUALS = ("manpages-de", "manpages-de-dev")
ENGLISH_MANUALS = ("manpages", "manpages-dev", "systemd", "util-linux", "btrfs-progs", "apt", "dpkg-dev")
DOCUMENTS = (
    ("debian-reference-en", "debian-reference-de"),
    ("maint-guide", "maint-guide-de"),
    ("developers-reference", "developers-reference-de"),
    ("debian-faq", "debian-faq-de"),
)
WHEEL = "homeassistant==2026.2.3"


def names() -> list[str]:
    """The packages of Debian, in a fixed order."""
    documents = [name for pair in DOCUMENTS for name in pair]
    return [*CATALOGUES, *OFFICE_HELP, DESKTOP_HELP, *GERMAN_MANUALS, *ENGLISH_MANUALS, *documents]


def files(folder: Path) -> list[Path]:
    """What was fetched, in a fixed order."""
    return [*sorted((folder / "deb").glob("*.deb")), *sorted((folder / "whl").glob("*.whl"))]


def fetch(folder: Path) -> None:
    """Get what is missing; the descriptions of packages come with the lists of them."""
    wheels = folder / "whl"
    wheels.mkdir(parents=True, exist_ok=True)
    if index_of_descriptions(folder, "de") is None:
        debian.update(folder, languages="de,en")
    debian.download(names(), folder)
    if not list(wheels.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        debian.run([*pip, "--python-version", "3.14", "--platform", "any", WHEEL], wheels)


def unpacked(folder: Path) -> dict[str, str]:
    """The folder of each package, unpacked once. Raises FileNotFoundError with the names of those that lack."""
    found = debian.require(names(), folder / "deb")
    places = {}
    for name in names():
        place, beside = folder / "unpacked" / name, folder / "unpacked" / f"{name}.partial"
        if not place.is_dir():
            beside.mkdir(parents=True, exist_ok=True)
            debian.run(["dpkg-deb", "-x", str(found[name].resolve()), str(beside.resolve())], folder)
            beside.rename(place)
        places[name] = str(place)
    return places


def index_of_descriptions(folder: Path, language: str) -> Path | None:
    """The index of descriptions of the release itself: its updates and others have smaller ones."""
    found = (folder / "lists").glob(f"*_main_i18n_Translation-{language}*")
    return max(found, key=lambda path: path.stat().st_size, default=None)
