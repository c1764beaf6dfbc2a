"""From a recipe to the run of its task."""

from __future__ import annotations

from pathlib import Path

from rarefy.train.classification import Classification
from rarefy.train.recipe import Images, Recipe
from rarefy.train.run import Run


def prepare(recipe: Recipe, folder: Path, *, resume: bool = False) -> Run:
    """Return the run of a recipe, ready to train; see :class:`~rarefy.train.run.Run` for arguments and errors.

    Raises ImportError, saying what to install, where the task needs a library that is not there.
    """
    if isinstance(recipe.data, Images):
        try:
            from rarefy.train.images import ImageClassification
        except ModuleNotFoundError as missing:
            if missing.name != "PIL":
                raise
            raise ImportError("pictures need Pillow: pip install 'rarefy[images]'") from missing
        return ImageClassification(recipe, folder, resume=resume)
    if recipe.data.name != "translation":
        return Classification(recipe, folder, resume=resume)
    try:
        import sacrebleu  # type: ignore[import-untyped,unused-ignore] # noqa: F401
        import tokenizers  # noqa: F401
    except ModuleNotFoundError as missing:
        raise ImportError(f"translation needs {missing.name}: pip install 'rarefy[translation]'") from missing
    from rarefy.train.translation import Translation

    return Translation(recipe, folder, resume=resume)
