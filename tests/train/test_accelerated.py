"""A recipe with accelerate: true trains alike, and says what it saved."""

from pathlib import Path

import pytest
import torch

from rarefy import kernels, report
from rarefy.sparse.acceleration import choices
from rarefy.train import Classification, parse
from tests.train.runs import plain, recipe, run, use_model, without_norm

METHOD = {"name": "rigl", "target": 0.8}

pytestmark = pytest.mark.skipif(
    not any(k.name == "sparse_forward_f32" for k in kernels.table()), reason="no native library"
)


@pytest.fixture(autouse=True)
def _sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "fastest", lambda dense, sparse: (3.0, 1.0))
    use_model(monkeypatch, without_norm)


def test_a_run_says_what_it_saved(tmp_path: Path) -> None:
    dense = run(recipe(method=METHOD), tmp_path / "plain")
    found = run(recipe(method=METHOD, accelerate=True), tmp_path / "accelerated")
    assert dense["seconds_saved"] is None
    assert found["seconds_saved"] > 0.0
    assert found["training_flops_ratio"] == dense["training_flops_ratio"]
    assert found["test_accuracy"] == pytest.approx(dense["test_accuracy"], abs=0.1)
    assert "saved by sparse steps" in report.write(tmp_path / "accelerated").read_text()
    assert "saved by sparse steps" not in report.write(tmp_path / "plain").read_text()


def test_a_resumed_run_adds_up(tmp_path: Path) -> None:
    made = recipe(method=METHOD, accelerate=True)
    whole = run(made, tmp_path / "whole")
    pieces = run(made, tmp_path / "pieces", [4])
    assert pieces["seconds_saved"] == pytest.approx(whole["seconds_saved"], rel=0.01)


@pytest.mark.parametrize("changes", [{"method": {"name": "dense"}}, {"method": METHOD, "precision": "bf16"}])
def test_what_nothing_is_saved_by_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="accelerate must be false for the method dense, and without precision: fp32"):
        parse({**plain(), **changes, "accelerate": True})


def test_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.Accelerator.device", torch.device("cuda"))
    with pytest.raises(ValueError, match="accelerate: true is for the CPU, and this run is on cuda"):
        Classification(recipe(method=METHOD, accelerate=True), tmp_path)
