"""A recipe with target_ms measures by itself, once, and tells what was reached."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rarefy import engine, report
from rarefy.latency import Latency, LayerLatency
from rarefy.train import Classification, parse
from tests.train.runs import outcome, plain, recipe, run, stop_at, use_model, without_norm

MILLISECONDS = {"method": {"name": "autosparse", "target_ms": 1.5}}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of engine.latency, whose table is a fixed one."""
    calls = []

    def latency(model: nn.Module, example: tuple[Any, ...], **options: Any) -> Latency:
        assert not model.training
        calls.append({"shape": tuple(example[0].shape), **options})
        sizes = {"0": 72, "3": 200 * 32, "5": 320}
        layers = [LayerLatency(name, n, (0.0, 0.5, 1.0), (0.0001, 0.0007, 0.0008)) for name, n in sizes.items()]
        return Latency(tuple(layers), 0.0006, "float32", (1, options["block"]), {})

    use_model(monkeypatch, without_norm)
    monkeypatch.setattr(engine, "latency", latency)
    return calls


def test_a_run_lands_and_says_so(tmp_path: Path, measured: list[dict[str, Any]]) -> None:
    summary = run(recipe(**MILLISECONDS), tmp_path)
    assert measured == [{"shape": (1, 1, 12, 12), "block": 1}]
    assert (summary["target_kind"], summary["target"]) == ("ms", pytest.approx(1.5))
    table = Latency.load(tmp_path / "latency.json")
    live = {layer["name"]: int(layer["nonzeros"]) for layer in summary["layers"]}
    assert summary["latency_ms"] == pytest.approx(1000 * table.seconds(live))
    assert 1.45 <= summary["latency_ms"] <= 1.5
    assert summary["measured_ms"] > 0
    page = report.write(tmp_path).read_text()
    assert "target 1.5\u00a0ms" in page
    assert "by the table measured before training" in page
    assert report.load(tmp_path).target_kind == "ms"


def test_a_resumed_run_keeps_its_table(tmp_path: Path, measured: list[dict[str, Any]], monkeypatch: Any) -> None:
    monkeypatch.setattr(Classification, "_measured_ms", lambda self: 1.0)
    made = recipe(**MILLISECONDS)
    run(made, tmp_path / "whole")
    run(made, tmp_path / "pieces", [4])
    assert len(measured) == 2, "a table a run"
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")


def test_a_resumed_run_needs_its_table(tmp_path: Path, measured: list[dict[str, Any]]) -> None:
    with pytest.raises(RuntimeError, match="stopped after step 4"):
        Classification(recipe(**MILLISECONDS), tmp_path).train(stop_at(4))
    (tmp_path / "latency.json").unlink()
    with pytest.raises(FileNotFoundError, match="latency.json is missing: a resumed run goes by the table"):
        Classification(recipe(**MILLISECONDS), tmp_path, resume=True)
    assert len(measured) == 1


def test_an_unfinished_run_tells_its_target(tmp_path: Path, measured: list[dict[str, Any]]) -> None:
    with pytest.raises(RuntimeError, match="stopped after step 4"):
        Classification(recipe(**MILLISECONDS), tmp_path).train(stop_at(4))
    found = report.load(tmp_path)
    assert (found.target, found.target_kind) == (1.5, "ms")
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert 2.9 < first["latency_ms"] < 3.0, "the first thresholds mask a few"


def test_what_cannot_be_reached_is_told_before_training(tmp_path: Path, measured: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"target_ms=9 leaves nothing to prune.* 3 ms with all"):
        Classification(recipe(method={"name": "autosparse", "target_ms": 9.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="option of method 'autosparse': 'latency'"):
        parse(plain(method={"name": "autosparse", "target_ms": 9.0, "latency": "a.json"}))
