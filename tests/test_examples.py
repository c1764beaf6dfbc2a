"""The examples run as they stand, each in a process of its own, and end with the zeros that they ask for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = {"plain_loop": None, "hf_trainer": "transformers", "lightning_trainer": "lightning"}


def test_all_examples_are_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(NEEDED)


@pytest.mark.parametrize("name", NEEDED)
def test_an_example_ends_with_its_zeros(tmp_path, name):
    if NEEDED[name] is not None:
        pytest.importorskip(NEEDED[name], reason="the extra integrations is not installed")
    path = ROOT / "examples" / f"{name}.py"
    code = path.read_text()
    assert 20 <= len(code.splitlines()) <= 40
    ran = subprocess.run(
        [sys.executable, str(path), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    target = re.search(r"target=(0\.\d)", code)
    (zeros,) = re.findall(r"^(\d+\.\d) % zeros", ran.stdout, re.M)
    assert float(zeros) == 100 * float(target[1])
