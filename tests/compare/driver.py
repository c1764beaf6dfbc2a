"""rarefy.compare.worker on synthetic data, as a process of its own.

With ``TOLD``, the path of a named pipe, in the environment it writes a dot there after its first checkpoint, and leaves
the pipe open until it ends.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from rarefy.compare import worker
from rarefy.train.run_folder import RunFolder
from tests.train.runs import prepare


def tell_of_the_first_checkpoint(pipe: str, patch: pytest.MonkeyPatch) -> None:
    save = RunFolder.save

    def saved(folder: RunFolder, name: str, state: Mapping[str, Any]) -> None:
        save(folder, name, state)
        if name == "last":
            patch.setattr(RunFolder, "save", save)
            os.write(os.open(pipe, os.O_WRONLY), b".")

    patch.setattr(RunFolder, "save", saved)


if __name__ == "__main__":
    patch = pytest.MonkeyPatch()
    prepare(patch)
    if pipe := os.environ.get("TOLD"):
        tell_of_the_first_checkpoint(pipe, patch)
    sys.exit(worker.main())
