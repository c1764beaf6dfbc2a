"""The average of the weights is what is evaluated, written and gone on with; its zeros are the trained model's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rarefy.train import Classification
from rarefy.train.averaging import Average
from tests.train.runs import AUTOSPARSE, digest, outcome, recipe, run, stop_at, use_model

EMA = {"optimizer": {"ema": 0.8}}


def test_the_average_by_hand() -> None:
    model = nn.BatchNorm1d(2)
    average = Average(model, 0.15)
    expected = model.weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([1.0, -2.0]) * (step + 2))
            model.num_batches_tracked.fill_(step + 7)  # type: ignore[union-attr]
        average.update(model, step)
        decay = (0.1, 0.15, 0.15)[step]  # (1 + 0) / (10 + 0) in the first step, then what was asked
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(average.tensors["weight"], expected)
        assert average.tensors["num_batches_tracked"] == step + 7
    assert model.weight.tolist() == [4.0, -8.0]


def test_zeros_are_those_of_the_model_and_no_others() -> None:
    model = nn.Linear(3, 1, bias=False)
    average = Average(model, 0.5)
    average.tensors["weight"] = torch.tensor([[0.5, 0.0, 2.0]])
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 1.0, -1.0]]))
    ((dead, grown, alive),) = average.masked(model)["weight"].tolist()
    assert (dead, alive) == (0.0, 2.0)
    assert 0.0 < grown < 1e-30  # a weight that has just begun to live counts as one
    assert average.tensors["weight"].tolist() == [[0.5, 0.0, 2.0]]


@pytest.mark.parametrize("changes", [{}, AUTOSPARSE], ids=["dense", "sparse"])
def test_what_is_written_is_the_average(changes: dict[str, Any], tmp_path: Path) -> None:
    made = Classification(recipe(**changes, **EMA), tmp_path)
    summary = made.train()
    assert made.average is not None
    written = load_file(tmp_path / "model.safetensors")
    for name, trained in made.plain_model.named_parameters():
        alive = trained != 0.0
        torch.testing.assert_close(written[name], torch.where(alive, made.average.tensors[name], 0.0))
        assert torch.equal(written[name] != 0.0, alive)
        assert not torch.equal(written[name], trained)
    assert torch.equal(written["bn1.running_var"], made.average.tensors["bn1.running_var"])
    # Of the model that was written, not of the one that was trained.
    model = made.evaluated.eval()
    model.load_state_dict(written)
    assert {key: summary[key] for key in ("test_accuracy", "test_loss")} == made._evaluate()
    if changes:
        assert summary["sparsity"] == pytest.approx(0.8, abs=1e-3)
    best = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert best["average"].keys() == made.average.tensors.keys()


@pytest.mark.slow
def test_resuming_changes_no_bit(tmp_path: Path) -> None:
    made = recipe(**AUTOSPARSE, **EMA)
    run(made, tmp_path / "whole")
    run(made, tmp_path / "pieces", [4, 10, 14])
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")
    averages = [
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True)["average"]
        for name in ("whole", "pieces")
    ]
    assert [digest(value) for value in averages[0].values()] == [digest(value) for value in averages[1].values()]


def test_training_is_as_without_it(tmp_path: Path) -> None:
    runs = [
        Classification(recipe(**AUTOSPARSE, **changes), tmp_path / name)
        for name, changes in {"a": EMA, "b": {}}.items()
    ]
    for each in runs:
        each.train()
    assert [digest(p) for p in runs[0].plain_model.parameters()] == [
        digest(p) for p in runs[1].plain_model.parameters()
    ]


@pytest.mark.parametrize("changes", [{}, EMA], ids=["trained", "averaged"])
def test_tied_weights_are_written(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tied() -> nn.Module:
        inner = nn.Linear(20, 20)
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 20), inner, nn.ReLU(), inner, nn.Linear(20, 10))

    use_model(monkeypatch, tied)
    made = Classification(recipe(method={"name": "set", "target": 0.5}, **changes), tmp_path)
    made.train(stop_at(15))
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written["2.weight"], written["4.weight"])
    assert torch.equal(written["2.weight"] != 0.0, made.plain_model[2].weight != 0.0)  # type: ignore[index, union-attr]
