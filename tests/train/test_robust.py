"""What stops a run loses nothing that was there, and what goes on does so on any number of processes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rarefy.train import Classification, TrainingDivergedError, TrainingInterruptedError
from tests.processes import run_two
from tests.train import two_robust
from tests.train.runs import STEPS, recipe, records, run, stop_at, use_model, without_norm


@pytest.mark.parametrize(
    ("at", "kept"), [(2, "no checkpoint was written before"), (7, "last.pt, from step 5, is whole")]
)
def test_a_loss_that_is_not_finite_names_what_to_go_back_to(at: int, kept: str, tmp_path: Path) -> None:
    made = Classification(recipe(), tmp_path)

    def poison(seen: Any) -> bool:
        if seen.step == at:
            with torch.no_grad():
                made.plain_model.fc.weight[0, 0] = math.nan  # type: ignore[union-attr, index, operator]
        return False

    with pytest.raises(TrainingDivergedError, match=f"the loss is nan at step .*{kept}"):
        made.train(poison)


def test_another_number_of_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterruptedError):
        Classification(recipe(), tmp_path).train(stop_at(7))
    path = tmp_path / "checkpoints" / "last.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "total_steps": STEPS + 3, "processes": 2}, path)
    with pytest.raises(
        ValueError, match="begun by 2 processes, in 18 optimizer steps, and 1 would cut the data into 15"
    ):
        Classification(recipe(), tmp_path, resume=True)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have worked."""
    folder = tmp_path_factory.mktemp("both")
    run_two("tests.train.two_robust", folder)
    return folder


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder) if record.get("loss") is not None]


@pytest.mark.slow
def test_what_two_began_one_goes_on_with(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_model(monkeypatch, without_norm)
    made = recipe(method=two_robust.METHODS["autosparse"])
    run(made, tmp_path)
    resumed = Classification(made, both / "begun", resume=True)
    assert resumed.step == 8  # within an epoch, and between two records of the loss
    resumed.train()
    assert losses(both / "begun") == pytest.approx(losses(tmp_path), rel=1e-5)
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path, both / "begun"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", two_robust.METHODS)
def test_two_processes_are_one_on_the_same_batches(
    name: str, both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 25 steps: the losses, and which weights live at the end."""
    use_model(monkeypatch, without_norm)
    run(two_robust.long(name), tmp_path)
    assert len(losses(tmp_path)) >= 5
    assert losses(both / name) == pytest.approx(losses(tmp_path), abs=1e-5)
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path, both / name))
    for key in one:
        assert torch.equal(one[key] != 0, two[key] != 0), key
    densities = [json.loads((folder / "summary.json").read_text())["sparsity"] for folder in (tmp_path, both / name)]
    assert densities[0] == densities[1] > 0.5
