"""The training loop with methods that watch the optimizer: resumed runs are the uninterrupted ones to the bit."""

import pytest

from tests.train.runs import outcome, recipe, run

METHODS = {
    "rigl": {"target": 0.8, "update_every": 2},
    "snfs": {"target": 0.8, "update_every": 2},
    "granet": {"target": 0.8, "update_every": 2},
    "topkast": {"target": 0.8},
    "st3": {"target": 0.8},
    "dst": {"target": 0.8},
    "cs": {"target": 0.8},
    "nm": {"exclude": ["conv1"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_resuming_changes_no_bit(name, tmp_path):
    made = recipe(method={"name": name, **METHODS[name]})
    summary = run(made, tmp_path / "straight")
    run(made, tmp_path / "stopped", stops=[4, 11])
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "straight")
    if "target" in METHODS[name]:
        assert summary["sparsity"] == pytest.approx(0.8, abs=1e-4)
