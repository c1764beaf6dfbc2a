"""What each of two processes does in test_robust.py: ``python -m tests.train.two_robust FOLDER``."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

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

#: Everything in a step that processes must agree on.
FULL: dict[str, Any] = {
    "method": METHODS["autosparse"],
    "optimizer": {"clip_norm": 1.0, "ema": 0.9},
    "schedule": {"accumulate": 2},
}


def network() -> nn.Module:
    """Without norms, that see a part of a batch; with a block, tied weights, and rows that two do not divide."""
    tied = nn.Linear(31, 31)
    block = nn.Sequential(nn.Sequential(nn.Linear(31, 31), nn.ReLU()), nn.Linear(31, 31))
    first = nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(200, 31), nn.ReLU()
    return nn.Sequential(*first, tied, nn.Sequential(nn.ReLU(), tied), block, nn.Linear(31, 10))


def long(name: str, shard: bool) -> Recipe:
    """Of 52 steps."""
    return recipe(method=METHODS[name], schedule={"epochs": 2, "batch_size": 6}, shard=shard)


def work(folder: Path, patch: pytest.MonkeyPatch) -> int:
    prepare(patch)
    use_model(patch, without_norm)
    for name in METHODS:
        for kind in ("ddp", "fsdp2"):
            Classification(long(name, kind == "fsdp2"), folder / f"{name} {kind}").train()

    use_model(patch, network)
    told = {}
    for kind in ("ddp", "fsdp2"):
        made = recipe(**FULL, shard=kind == "fsdp2")
        whole = Classification(made, folder / f"whole {kind}")
        whole.train()
        for pieces in ("begun", "pieces"):
            with pytest.raises(TrainingInterruptedError):
                Classification(made, folder / f"{pieces} {kind}").train(stop_at(8))
        whole.accelerator.wait_for_everyone()  # for the one that writes
        resumed = Classification(made, folder / f"pieces {kind}", resume=True)
        resumed.train()
        split = [isinstance(p, DTensor) for p in resumed.plain_model.parameters()]
        told[kind] = [all(split), any(split)]
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    with pytest.MonkeyPatch.context() as patch:
        leave(work(Path(sys.argv[1]), patch))
