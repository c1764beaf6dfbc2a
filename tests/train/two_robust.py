"""What each of two processes does in test_robust.py: ``python -m tests.train.two_robust FOLDER``."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.cli import leave
from rarefy.train import Classification, Recipe, TrainingInterruptedError
from tests.train.runs import prepare, recipe, stop_at, use_model, without_norm

METHODS: dict[str, dict[str, Any]] = {
    "autosparse": {"name": "autosparse", "target": 0.8},
    "str": {"name": "str", "target": 0.8},
    "rigl": {"name": "rigl", "target": 0.8},
    "mest": {"name": "mest", "target": 0.8},
    "st3": {"name": "st3", "target": 0.8},
}


def long(name: str) -> Recipe:
    """Of 25 steps."""
    return recipe(method=METHODS[name], schedule={"epochs": 5})


def work(folder: Path, patch: pytest.MonkeyPatch) -> int:
    prepare(patch)
    use_model(patch, without_norm)
    for name in METHODS:
        Classification(long(name), folder / name).train()
    try:
        Classification(recipe(method=METHODS["autosparse"]), folder / "begun").train(stop_at(8))
    except TrainingInterruptedError:
        return 0
    return 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with pytest.MonkeyPatch.context() as patch:
        leave(work(Path(sys.argv[1]), patch))
