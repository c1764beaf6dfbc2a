"""A comparison through a local Ray of two workers, in a process of its own since Ray leaves much behind in one."""

import json
import os
import subprocess
import sys

import pytest

from tests.compare.test_compare import ROOT, comparison

pytestmark = pytest.mark.slow

CODE = """
import sys
from pathlib import Path
from rarefy.compare import load, run, runner
runner.WORKER = ("-m", "tests.compare.driver")
failed = run(load(Path(sys.argv[1])), Path(sys.argv[2]), jobs=2, ray_address="local")
print(sorted(failed.items()))
"""


def test_two_workers_bring_their_results_back(tmp_path):
    methods = {"dense": {"name": "dense"}, "SET": {"name": "set"}, "bad": {"name": "set", "drop_fraction": 2.0}}
    path = comparison(tmp_path, methods=methods)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(  # noqa: PLW1510 - the code is looked at below
        [sys.executable, "-c", CODE, str(path), str(tmp_path / "runs")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "drop_fraction must be in (0, 1), got 2.0" in done.stdout
    for name in ("dense_seed0", "SET_0.8_seed0"):
        folder = tmp_path / "runs" / name
        assert json.loads((folder / "summary.json").read_text())["steps"] == 15
        assert (folder / "metrics.jsonl").read_text().count("\n") > 3
    assert not (tmp_path / "runs" / "bad_0.8_seed0" / "summary.json").exists()
