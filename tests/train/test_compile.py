"""A recipe with compile: true trains by what torch.compile made, to the results of what runs as it is written."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.train.runs import AUTOSPARSE, outcome, recipe, records, run, use_model, without_norm

pytestmark = [
    pytest.mark.slow,
    # Of PyTorch itself, which the compiler imports.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


def test_compiled_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, without_norm)
    torch._dynamo.reset()
    counters.clear()
    made = recipe(**AUTOSPARSE, compile=True, schedule={"accumulate": 2})
    run(recipe(**AUTOSPARSE, schedule={"accumulate": 2}), tmp_path / "eager")
    assert counters["stats"]["unique_graphs"] == 0
    run(made, tmp_path / "whole")
    assert counters["stats"]["unique_graphs"] > 0
    run(made, tmp_path / "pieces", [7])
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")
    eager, compiled = ([r["loss"] for r in records(tmp_path / name) if r.get("loss")] for name in ("eager", "whole"))
    assert compiled == pytest.approx(eager, rel=1e-4)
