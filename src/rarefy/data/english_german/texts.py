"""From packages to pairs of texts: each reader gives (source, English, German) in a fixed order."""

from __future__ import annotations

import gettext
import glob
import gzip
import html
import json
import os
import re
import unicodedata
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rarefy.data import debian
from rarefy.data.english_german.packages import (
    CATALOGUES,
    DESKTOP_HELP,
    DOCUMENTS,
    GERMAN_MANUALS,
    OFFICE_HELP,
    WHEEL,
    index_of_descriptions,
)

Pair = tuple[str, str, str]  # source, English, German


def pairs_of_texts(packages: dict[str, str], folder: Path) -> Iterator[Pair]:
    """All of them, a kind of source after another."""
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
    english, german = (packages[name] for name in OFFICE_HELP)
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

    root = packages[DESKTOP_HELP] + "/usr/share/help/"
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
    for name in GERMAN_MANUALS:
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
    for english, german in DOCUMENTS:
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
        found = index_of_descriptions(folder, language)
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
        raise FileNotFoundError(f"{folder / 'whl'} lacks the wheel of {WHEEL}")
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
