"""A process that a signal ended, wherever it was, is gone on from to the bits of one that nothing ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.train.runs import AUTOSPARSE, outcome, plain, recipe, run

pytestmark = pytest.mark.slow

CHANGES = {**AUTOSPARSE, "data": {"augment": "crop-flip"}, "optimizer": {"ema": 0.9}}


def train(when: str, folder: Path, *more: str) -> tuple[int, str]:
    """How the command ended, and what it said."""
    command = ["train", str(folder / "recipe.yml"), "--run", str(folder / "pieces"), "--json", *more]
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.killed", when, *command],
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stderr


def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    run(recipe(**CHANGES), tmp_path / "whole")
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(plain(**CHANGES)))
    last = tmp_path / "pieces" / "checkpoints" / "last.pt"

    status, _ = train("SIGKILL:8", tmp_path)
    assert status == -signal.SIGKILL
    assert torch.load(last, weights_only=True)["step"] == 5

    status, said = train("SIGTERM:6", tmp_path, "--resume")
    assert status == 128 + signal.SIGTERM
    assert "stopped after step 7 of 15" in said
    assert torch.load(last, weights_only=True)["step"] == 7

    status, _ = train("writing:10", tmp_path, "--resume")
    assert status == -signal.SIGKILL
    assert torch.load(last, weights_only=True)["step"] == 7
    assert list(last.parent.glob(".*.partial"))

    status, said = train("never", tmp_path, "--resume")
    assert status == 0, said
    (tmp_path / "pieces" / "report.html").unlink()
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")
