"""Two processes in the trainer of transformers, and over shards: one writes, all go on from what it wrote."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.slow

pytest.importorskip("transformers", reason="the extra integrations is not installed")


def test_two_processes_train_one_model_and_one_of_them_writes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.getcwd()}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.two_processes", str(tmp_path)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in started:
            _, err = process.communicate(timeout=150)
            assert process.returncode == 0, err
    finally:
        for process in started:
            process.kill()
            process.wait()
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    checkpoint = tmp_path / "trainer" / "checkpoint-6"
    assert torch.load(checkpoint / "sparsifier.pt", weights_only=True)["steps"] == 6
    assert not list(checkpoint.glob("*.partial"))
