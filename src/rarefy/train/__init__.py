"""Training by a recipe: ``rarefy train RECIPE`` prepares a :class:`Run` and trains it."""

from __future__ import annotations

try:
    from rarefy.train.classification import Classification
    from rarefy.train.recipe import Recipe, load, parse
    from rarefy.train.run import Run, TrainingDivergedError, TrainingInterruptedError
    from rarefy.train.starting import prepare
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("rarefy"):
        raise
    raise ImportError(f"rarefy.train needs {missing.name}: pip install 'rarefy[train]'") from missing

__all__ = [
    "Classification",
    "Recipe",
    "Run",
    "TrainingDivergedError",
    "TrainingInterruptedError",
    "load",
    "parse",
    "prepare",
]
