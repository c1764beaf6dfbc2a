"""From pairs of texts to pairs of sentences, and which of them are kept."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from rarefy.data.english_german.texts import Pair

#: Sentences held out for validation, and for the test.
HELD_OUT = 2000

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


def sentences(pairs: Iterator[Pair], raw: Counter[str]) -> Iterator[Pair]:
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


def distinct(pairs: Iterator[Pair]) -> list[Pair]:
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


def split(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
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
