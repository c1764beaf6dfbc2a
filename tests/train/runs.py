"""Small runs on synthetic pictures, and what two runs must have in common to be the same."""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from rarefy import models
from rarefy.data import fashion_mnist
from rarefy.sparse import base
from rarefy.train import Classification, Recipe, TrainingInterruptedError, parse
from rarefy.train import run as run_module
from rarefy.train.run import Progress

TRAIN, TEST, SIZE, BATCH, EPOCHS = 160, 80, 12, 32, 3
STEPS = TRAIN // BATCH * EPOCHS


def synthetic(train: int = TRAIN, test: int = TEST) -> fashion_mnist.FashionMNIST:
    """Ten patterns under noise."""
    generator = torch.Generator().manual_seed(5)
    patterns = torch.rand(10, SIZE, SIZE, generator=generator) * 160
    labels = torch.arange(train + test) % 10
    noise = torch.rand(train + test, SIZE, SIZE, generator=generator) * 95
    images = (patterns[labels] + noise).to(torch.uint8)
    return fashion_mnist.FashionMNIST(images[:train], labels[:train], images[train:], labels[train:])


def prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Synthetic data, the CPU, and records further apart than a step (15 steps: every third)."""
    monkeypatch.setattr(fashion_mnist, "load", lambda folder=None: synthetic())
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(base, "ACTIONS", 5)
    monkeypatch.setattr(run_module, "RECORDS", 5)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()  # of a run that was stopped amid its accumulation


PLAIN: dict[str, Any] = {
    "name": "test",
    "model": {"name": "fashion_cnn"},
    "optimizer": {"lr": 0.05},
    "schedule": {"epochs": EPOCHS, "batch_size": BATCH},
}

AUTOSPARSE = {"method": {"name": "autosparse", "target": 0.8}}


def plain(**changes: Any) -> dict[str, Any]:
    """A recipe as a mapping; sections given are laid over the usual ones."""
    merged = copy.deepcopy(PLAIN)
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def recipe(**changes: Any) -> Recipe:
    return parse(plain(**changes))


def stop_at(step: int) -> Callable[[Progress], bool]:
    return lambda seen: seen.step == step


def run(made: Recipe, folder: Path, stops: Sequence[int] = ()) -> dict[str, Any]:
    """A whole run, stopped after these steps and resumed each time."""
    for index, step in enumerate(stops):
        with pytest.raises(TrainingInterruptedError, match=f"after step {step} of {STEPS}"):
            Classification(made, folder, resume=index > 0).train(stop_at(step))
    return Classification(made, folder, resume=bool(stops)).train()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run came to, but for the time it took."""

    def timeless(record: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in record.items() if key != "seconds"}

    histograms = folder / "histograms.json"
    last = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    return {
        "model": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "metrics": [timeless(record) for record in records(folder)],
        "summary": timeless(json.loads((folder / "summary.json").read_text())),
        "histograms": histograms.read_text() if histograms.exists() else None,
        "weights": {key: digest(value) for key, value in last["model"].items()},
        "best": last["best"],
        "files": sorted(path.name for path in folder.rglob("*") if "tfevents" not in path.name),
    }


def digest(value: torch.Tensor) -> str:
    return hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()


def use_model(monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module]) -> None:
    """Let the recipes' fashion_cnn be this model."""
    monkeypatch.setitem(models._MODELS, "fashion_cnn", build)


def without_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(200, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def with_dropout() -> nn.Module:
    layers = nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(200, 10)
    return nn.Sequential(*layers)
