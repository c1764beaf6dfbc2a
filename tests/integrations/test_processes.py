"""Two processes in the trainer of transformers, and over shards: one writes, all go on from what it wrote."""

import json

import pytest
import torch

from tests.processes import run_two

pytestmark = pytest.mark.slow

pytest.importorskip("transformers", reason="the extra integrations is not installed")


def test_two_processes_train_one_model_and_one_of_them_writes(tmp_path):
    run_two("tests.integrations.two_processes", tmp_path)
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    checkpoint = tmp_path / "trainer" / "checkpoint-6"
    assert torch.load(checkpoint / "sparsifier.pt", weights_only=True)["steps"] == 6
    assert not list(checkpoint.glob("*.partial"))
