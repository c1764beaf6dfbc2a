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
from tests.train.runs import STEPS, outcome, recipe, records, run, stop_at, use_model, without_norm


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
    run_two("tests.train.two_robust", folder, timeout=600)
    return folder


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in records(folder) if record.get("loss") is not None]


KINDS = ("ddp", "fsdp2")


@pytest.mark.slow
def test_shards_are_shards(both: Path) -> None:
    for rank in (0, 1):
        told = json.loads((both / f"rank{rank}.json").read_text())
        assert told == {"ddp": [False, False], "fsdp2": [True, True]}  # of all parameters, of any


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_that_were_stopped_come_to_the_same_bits(kind: str, both: Path) -> None:
    assert outcome(both / f"pieces {kind}") == outcome(both / f"whole {kind}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_two_began_one_goes_on_with(
    kind: str, both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_model(monkeypatch, two_robust.network)
    made = recipe(**two_robust.FULL)
    run(made, tmp_path)
    resumed = Classification(made, both / f"begun {kind}", resume=True)
    assert resumed.step == 8  # within an epoch, and between two records of the loss
    resumed.train()
    assert losses(both / f"begun {kind}") == pytest.approx(losses(tmp_path), rel=1e-5)
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path, both / f"begun {kind}"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_checkpoint_of_shards_is_one_of_whole_tensors(both: Path) -> None:
    def shapes(state: Any) -> Any:
        if isinstance(state, dict):
            return {key: shapes(value) for key, value in state.items() if key != "recipe"}
        if isinstance(state, list):
            return [shapes(value) for value in state]
        return (state.dtype, state.shape) if isinstance(state, torch.Tensor) else type(state)

    paths = [both / f"whole {kind}" / "checkpoints" / "last.pt" for kind in KINDS]
    replicas, shards = (shapes(torch.load(path, weights_only=True)) for path in paths)
    assert shards == replicas


@pytest.mark.slow
@pytest.mark.parametrize("name", two_robust.METHODS)
def test_two_processes_are_one_on_the_same_batches(
    name: str, both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 52 steps: the losses, and which weights live at the end."""
    use_model(monkeypatch, without_norm)
    run(two_robust.long(name, shard=True), tmp_path)  # one process holds all of it
    alone = load_file(tmp_path / "model.safetensors")
    for kind in KINDS:
        folder = both / f"{name} {kind}"
        assert records(folder)[-1]["step"] == 52
        assert losses(folder) == pytest.approx(losses(tmp_path), abs=1e-5)
        together = load_file(folder / "model.safetensors")
        for key, value in alone.items():
            assert torch.equal(value != 0, together[key] != 0), (kind, key)
        found, expected = (json.loads((place / "summary.json").read_text()) for place in (folder, tmp_path))
        assert found["sparsity"] == expected["sparsity"] > 0.5
        counts = [
            [layer["counts"] for layer in json.loads((place / "histograms.json").read_text())["layers"]]
            for place in (folder, tmp_path)
        ]
        assert [sum(layer) for layer in counts[0]] == [sum(layer) for layer in counts[1]]
