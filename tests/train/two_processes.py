"""What each of two processes does in test_processes.py: ``python -m tests.train.two_processes FOLDER``."""

import atexit
import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from rarefy.cli import leave, main
from rarefy.train import Classification, TrainingInterruptedError, classification
from rarefy.train.run import Progress
from tests.train.runs import AUTOSPARSE, STEPS, digest, plain, prepare, recipe, use_model, without_norm


def work(folder: Path, patch: pytest.MonkeyPatch) -> int:
    prepare(patch)
    patch.setattr(classification, "EVALUATION_BATCH", 32)  # 80 images: two batches here, one there
    rank = int(os.environ["RANK"])
    told: dict[str, object] = {}

    made = recipe(**AUTOSPARSE, data={"augment": "crop-flip"}, schedule={"accumulate": 2})
    whole = Classification(made, folder / "whole")
    before: dict[str, str] = {}

    def observe(seen: Progress) -> None:
        if seen.step == STEPS:
            before.update({key: digest(p) for key, p in whole.plain_model.named_parameters()})

    told["summary"] = whole.train(observe)
    told["trained"] = before
    told["finalized"] = {key: digest(p) for key, p in whole.plain_model.named_parameters()}

    for stop in (7, None):
        whole.accelerator.wait_for_everyone()
        run = Classification(made, folder / "pieces", resume=stop is None)
        try:
            # Only one process is asked to stop, and not the one that writes.
            run.train(lambda seen, stop=stop: rank == 1 and seen.step == stop)  # type: ignore[misc]
        except TrainingInterruptedError:
            told["stopped"] = run.step

    use_model(patch, without_norm)
    plainly = Classification(recipe(schedule={"epochs": 1}), folder / "plain")
    plainly.train()
    (folder / f"rank{rank}.json").write_text(json.dumps(told))

    if rank == 0:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(plain()))
    whole.accelerator.wait_for_everyone()
    patch.undo()
    prepare(patch)
    return main(["train", str(folder / "recipe.yaml"), "--run", str(folder / "cli"), "--json"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    folder = Path(sys.argv[1])
    atexit.register((folder / f"ended{os.environ['RANK']}").touch)
    with pytest.MonkeyPatch.context() as patch:
        leave(work(folder, patch))
