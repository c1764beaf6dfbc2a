"""One run of a comparison as a process of its own: ``python -m rarefy.compare.worker FOLDER < recipe.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def train(plain: dict[str, Any], folder: Path) -> None:
    """Train the recipe into the folder, going on after its last checkpoint if there is one."""
    from rarefy.train import parse, prepare

    resume = (folder / "checkpoints" / "last.pt").is_file()
    prepare(parse(plain), folder, resume=resume).train()


def main() -> int:
    """Run what standard input says; an error is told in one line, and gives the exit status 1."""
    try:
        train(json.load(sys.stdin), Path(sys.argv[1]))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
