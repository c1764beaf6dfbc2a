"""What each of two processes does in test_translation.py: ``python -m tests.train.two_translators FOLDER``."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch

from rarefy.cli import leave
from rarefy.train import TrainingInterruptedError, prepare
from tests.train.test_translation import recipe, weights


def work(folder: Path) -> None:
    made = recipe(folder / "text", schedule={"batch_size": 160})
    rank = os.environ["RANK"]
    whole = prepare(made, folder / "whole")
    summary = whole.train()
    told = {"summary": summary, "weights": weights(whole)}
    for stop in (3, None):
        whole.accelerator.wait_for_everyone()
        run = prepare(made, folder / "pieces", resume=stop is None)
        try:
            run.train(lambda seen, stop=stop: rank == "1" and seen.step == stop)
        except TrainingInterruptedError:
            told["stopped"] = run.step
    told["resumed"] = weights(run)
    split = prepare(recipe(folder / "text", schedule={"batch_size": 160}, shard=True), folder / "split")
    told["split"] = split.train()
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
    whole.accelerator.wait_for_everyone()
    kept.extend([whole, run, split])


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    kept: list[object] = []  # to the end: a run's process group must not be destroyed
    work(Path(sys.argv[1]))
    leave(0)
