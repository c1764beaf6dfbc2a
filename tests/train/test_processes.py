"""Two processes train one model: the same on both, written by one, resumable."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rarefy import models
from rarefy.train.batches import normalise
from tests.processes import run_two
from tests.train.runs import AUTOSPARSE, outcome, recipe, run, synthetic, use_model, without_norm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have worked."""
    folder = tmp_path_factory.mktemp("both")
    for rank, (out, err) in enumerate(run_two("tests.train.two_processes", folder)):
        (folder / f"out{rank}").write_text(out)
        (folder / f"err{rank}").write_text(err)
    return folder


def told(folder: Path, rank: int) -> dict[str, Any]:
    return dict(json.loads((folder / f"rank{rank}.json").read_text()))


def test_both_have_the_same_parameters_and_masks(both: Path) -> None:
    one, other = told(both, 0), told(both, 1)
    assert one["trained"] == other["trained"]
    assert one["finalized"] == other["finalized"]


def test_one_of_them_writes(both: Path) -> None:
    assert told(both, 0)["summary"]["test_accuracy"] > 0
    assert told(both, 1)["summary"] == {}
    assert len(list((both / "whole" / "tensorboard").iterdir())) == 1


def test_both_stop_when_one_is_asked_and_resuming_changes_no_bit(both: Path) -> None:
    assert (told(both, 0)["stopped"], told(both, 1)["stopped"]) == (7, 7)
    assert outcome(both / "pieces") == outcome(both / "whole")


def test_evaluation_by_two_equals_that_by_one(both: Path) -> None:
    summary = told(both, 0)["summary"]
    model = models.create("fashion_cnn")
    model.load_state_dict(load_file(both / "whole" / "model.safetensors"))
    data = synthetic()
    with torch.no_grad():
        output = model.eval()(normalise(data.test_images))
    accuracy = (output.argmax(1) == data.test_labels).double().mean().item()
    loss = torch.nn.functional.cross_entropy(output, data.test_labels).item()
    assert summary["test_accuracy"] == accuracy
    assert summary["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_two_take_the_steps_of_one(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, without_norm)
    run(recipe(schedule={"epochs": 1}), tmp_path)
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path, both / "plain"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    ones, twos = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path, both / "plain"))
    assert twos["test_loss"] == pytest.approx(ones["test_loss"], rel=1e-4)
    losses = [
        [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
        for folder in (tmp_path, both / "plain")
    ]
    assert [loss for loss in losses[1] if loss] == pytest.approx([loss for loss in losses[0] if loss], rel=1e-4)


def test_the_command_line_speaks_in_one_of_them(both: Path) -> None:
    assert json.loads((both / "out0").read_text())["steps"] == 15
    assert (both / "out1").read_text() == ""
    assert (both / "err1").read_text() == ""
    assert "100 %" in (both / "err0").read_text()
    assert (both / "cli" / "report.html").exists()


def test_the_method_was_the_one_meant(both: Path) -> None:
    assert told(both, 0)["summary"]["sparsity"] == pytest.approx(AUTOSPARSE["method"]["target"], abs=1e-3)


def test_they_leave_without_the_end_of_the_interpreter(both: Path) -> None:
    # In which a thread of the process group may abort the process (pytorch/pytorch#190489).
    assert not list(both.glob("ended*"))
