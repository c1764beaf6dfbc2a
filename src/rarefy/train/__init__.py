"""Training by a recipe: ``rarefy train RECIPE`` runs :class:`Classification`."""

try:
    from rarefy.train.classification import Classification
    from rarefy.train.recipe import Recipe, load, parse
    from rarefy.train.run import TrainingDivergedError, TrainingInterruptedError
except ModuleNotFoundError as missing:
    if (missing.name or "").startswith("rarefy"):
        raise
    raise ImportError(f"rarefy.train needs {missing.name}: pip install 'rarefy[train]'") from missing

__all__ = ["Classification", "Recipe", "TrainingDivergedError", "TrainingInterruptedError", "load", "parse"]
