"""Options that several commands have."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress


def add_json(command: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    command.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def say(text: str) -> None:
    """Say something beside the results, on standard error; who listened there may be gone."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def add_model(command: argparse.ArgumentParser) -> None:
    """Add what says of which network a file of weights is."""
    command.add_argument("--model", metavar="NAME", help="of a file of weights, its network: resnet50, ...")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an option of that network: num_classes=10"
    )


def recipe_changes(arguments: argparse.Namespace) -> list[str]:
    """Give the changes that ``--set`` and ``--data`` make to a recipe, as KEY=VALUE."""
    changes = list(arguments.set)
    if arguments.data is not None:
        changes.append(f"data.folder={json.dumps(arguments.data, ensure_ascii=False)}")
    return changes
