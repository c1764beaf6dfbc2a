"""Where data sets that were fetched stay."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return rarefy below $XDG_CACHE_HOME or ~/.cache; it may not be there yet."""
    # The XDG base directory specification has an empty or relative value ignored.
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "rarefy"
