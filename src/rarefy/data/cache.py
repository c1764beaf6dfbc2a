"""Where data sets that were fetched stay."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return rarefy below $XDG_CACHE_HOME or ~/.cache; it may not be there yet.

    Raises FileNotFoundError for a user without a home.
    """
    # The XDG base directory specification has an empty or relative value ignored.
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        try:
            root = Path.home() / ".cache"
        except RuntimeError as error:
            raise FileNotFoundError("there is no home folder to keep data in: name one by XDG_CACHE_HOME") from error
    return root / "rarefy"
