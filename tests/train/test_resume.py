"""An interrupted run goes on to the very bits that it would have come to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.train import Classification, TrainingInterruptedError
from rarefy.train import run as run_module
from rarefy.train.run import Progress
from tests.train.runs import AUTOSPARSE, STEPS, outcome, recipe, records, run, stop_at, use_model, with_dropout

pytestmark = pytest.mark.slow

COST = {"method": {"name": "autosparse", "target": 0.8, "policy": "cost"}}
ADAMW = {"optimizer": {"name": "adamw", "lr": 0.003, "weight_decay": 0.01}}

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense adamw": ADAMW,
    "autosparse": AUTOSPARSE,
    "autosparse cost": COST,
    "autosparse flops": {"method": {"name": "autosparse", "target_flops": 0.3, "granularity": "channel"}},
    "autosparse adamw": {"method": {"name": "autosparse", "target": 0.8, "threshold_lr": 50}, **ADAMW},
    "autosparse sparse backward": {"method": {"name": "autosparse", "backward_density": 0.5}},
    "str": {"method": {"name": "str", "target": 0.8}},
    "augmented, accumulated": {**AUTOSPARSE, "data": {"augment": "crop-flip"}, "schedule": {"accumulate": 4}},
    "bf16": {**AUTOSPARSE, "precision": "bf16"},
    "dropout": AUTOSPARSE,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resuming_changes_no_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "dropout":
        use_model(monkeypatch, with_dropout)
    made = recipe(**KINDS[kind])
    run(made, tmp_path / "whole")
    run(made, tmp_path / "pieces", [4, 10, 14])  # within an epoch and between records, at an epoch's end, in the last
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stops", [[1], [5], [7], [2, 3], [14]])
def test_wherever_it_stops(stops: list[int], tmp_path: Path) -> None:
    made = recipe(**AUTOSPARSE, seed=3)
    run(made, tmp_path / "whole")
    run(made, tmp_path / "pieces", stops)
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")


def test_a_stop_after_the_last_step_finishes(tmp_path: Path) -> None:
    summary = Classification(recipe(), tmp_path).train(stop_at(STEPS))
    assert summary["steps"] == STEPS


def test_a_crash_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    made = recipe(**AUTOSPARSE)
    run(made, tmp_path / "whole")

    def crash(seen: Progress) -> bool:
        if seen.step == 8:
            raise OSError("no space left")
        return False

    with pytest.raises(OSError, match="no space left"):
        Classification(made, tmp_path / "pieces").train(crash)
    # What a crash in the middle of a line leaves.
    with (tmp_path / "pieces" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"event": "train", "step": 9, "epo')
    assert records_after(tmp_path / "pieces", 5)
    resumed = Classification(made, tmp_path / "pieces", resume=True)
    assert resumed.step == 5
    resumed.train()
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")


def records_after(folder: Path, step: int) -> bool:
    whole = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return any(json.loads(line)["step"] > step for line in whole)


def test_a_run_cut_off_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    made = recipe(**AUTOSPARSE)
    run(made, tmp_path / "whole")
    with pytest.raises(TrainingInterruptedError):
        Classification(made, tmp_path / "pieces").train(stop_at(4))
    (tmp_path / "pieces" / "checkpoints" / "last.pt").unlink()
    Classification(made, tmp_path / "pieces", resume=True).train()
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")


def test_a_run_cut_off_while_finishing_finishes(tmp_path: Path) -> None:
    made = recipe(**AUTOSPARSE)
    run(made, tmp_path)
    before = outcome(tmp_path)
    for name in ("summary.json", "model.safetensors", "histograms.json"):
        (tmp_path / name).unlink()
    Classification(made, tmp_path, resume=True).train()
    assert outcome(tmp_path) == before


def test_a_finished_run_gives_its_summary_and_nothing_changes(tmp_path: Path) -> None:
    made = recipe(**AUTOSPARSE)
    summary = run(made, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = Classification(made, tmp_path, resume=True).train()
    assert again == summary
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no run in .*runs/none to resume"):
        Classification(recipe(), tmp_path / "runs" / "none", resume=True)
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    with pytest.raises(TrainingInterruptedError):
        Classification(recipe(**AUTOSPARSE), tmp_path).train(stop_at(7))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schedule": {"epochs": 4}}, r"schedule.epochs \(3 there, 4 here\)"),
        ({"optimizer": {"lr": 0.06}}, r"optimizer.lr \(0.05 there, 0.06 here\)"),
        ({"method": {"name": "autosparse", "target": 0.9}}, r"method.target \(0.8 there, 0.9 here\)"),
        ({"method": {"name": "autosparse", "target": 0.8, "alpha": 0.5}}, r"method.alpha \(None there, 0.5 here\)"),
        ({"model": {"name": "resnet20"}}, r"model.name \('fashion_cnn' there, 'resnet20' here\)"),
        ({"seed": 1, "precision": "bf16"}, r"seed \(0 there, 1 here\), precision \('fp32' there, 'bf16' here\)"),
    ],
)
@pytest.mark.parametrize("checkpoint", [True, False])
def test_another_recipe_is_refused_and_named(
    changes: dict[str, Any], named: str, checkpoint: bool, stopped: Path
) -> None:
    if not checkpoint:
        (stopped / "checkpoints" / "last.pt").unlink()
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"another recipe, which differs in {named}"):
        Classification(recipe(**{**AUTOSPARSE, **changes}), stopped, resume=True)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_the_data_may_have_moved(stopped: Path) -> None:
    assert Classification(recipe(**AUTOSPARSE, data={"folder": "elsewhere"}), stopped, resume=True).step == 7


def damaged(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    return {
        "cut": content[:middle],
        "empty": b"",
        "a bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "text": b"not a checkpoint at all",
    }[how]


@pytest.mark.parametrize("how", ["cut", "empty", "a bit", "text"])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(how: str, stopped: Path) -> None:
    path = stopped / "checkpoints" / "last.pt"
    path.write_bytes(damaged(path.read_bytes(), how))
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"last.pt is cut off, altered or not a checkpoint of a run; delete it"):
        Classification(recipe(**AUTOSPARSE), stopped, resume=True)
    assert {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()} == before


def test_something_else_saved_by_torch_is_no_checkpoint(stopped: Path) -> None:
    torch.save({"model": {}}, stopped / "checkpoints" / "last.pt")
    with pytest.raises(ValueError, match="not a checkpoint of a run"):
        Classification(recipe(**AUTOSPARSE), stopped, resume=True)


WRONG = [
    ("step", None),
    ("step", -1),
    ("step", STEPS + 1),
    ("processes", 0),
    ("seconds", None),
    ("seconds", float("nan")),
    ("seconds_saved", "x"),
    ("best", "x"),
    ("losses", None),
    ("losses", torch.tensor(1.0)),
    ("recipe", {}),
    ("model", None),
    ("model", {}),
    ("optimizer", {}),
    ("sparsifier", None),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda part: str(part)[:20])
def test_a_checkpoint_with_something_else_in_it_is_refused(key: str, value: Any, stopped: Path) -> None:
    path = stopped / "checkpoints" / "last.pt"
    torch.save({**torch.load(path, weights_only=True), key: value}, path)
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"last.pt is cut off, altered or not a checkpoint of a run.*; delete it"):
        Classification(recipe(**AUTOSPARSE), stopped, resume=True)
    assert {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()} == before


def test_an_optimizer_that_forgot_or_has_another_shape_is_refused(stopped: Path) -> None:
    path = stopped / "checkpoints" / "last.pt"
    saved = torch.load(path, weights_only=True)
    whole = saved["optimizer"]["state"]
    saved["optimizer"]["state"] = {}
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"not a checkpoint of a run \(the optimizer remembers nothing\); delete it"):
        Classification(recipe(**AUTOSPARSE), stopped, resume=True)
    momentum = whole[0]["momentum_buffer"]
    saved["optimizer"]["state"] = {**whole, 0: {"momentum_buffer": momentum[:1]}}
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"momentum_buffer has the shape \[1, .*, and its parameter \["):
        Classification(recipe(**AUTOSPARSE), stopped, resume=True)


def test_without_momentum_there_is_nothing_to_remember(tmp_path: Path) -> None:
    made = recipe(optimizer={"momentum": 0.0})
    with pytest.raises(TrainingInterruptedError):
        Classification(made, tmp_path).train(stop_at(7))
    assert not torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)["optimizer"]["state"]
    assert Classification(made, tmp_path, resume=True).step == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("5", "line 2: expected a JSON object, got 5"),
        ("{}", "line 2: step is missing"),
        ('{"step": null}', "line 2: step is missing"),
        ('{"step": "1"}', "line 2: step must be a number, got '1'"),
        (
            '{"step": 3, "layers": [{"name": "a", "density": 1}]}',
            r"line 2: layers\[0\]: weight_grad_density is missing",
        ),
    ],
    ids=lambda part: part[:20],
)
def test_damaged_metrics_are_named_before_anything_is_done(line: str, message: str, stopped: Path) -> None:
    path = stopped / "metrics.jsonl"
    first, rest = path.read_text().split("\n", 1)
    path.write_text(f"{first}\n{line}\n{rest}")
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=rf"metrics.jsonl, {message}.*; delete that line to go on without it"):
        Classification(recipe(**AUTOSPARSE), stopped, resume=True)
    assert {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()} == before
    path.write_text(f"{first}\n{rest}")
    assert Classification(recipe(**AUTOSPARSE), stopped, resume=True).train()["steps"] == STEPS


def test_the_best_checkpoint_stands_in_for_a_damaged_last(tmp_path: Path) -> None:
    run(recipe(), tmp_path / "whole")
    with pytest.raises(TrainingInterruptedError):
        Classification(recipe(), tmp_path / "pieces").train(stop_at(8))
    checkpoints = tmp_path / "pieces" / "checkpoints"
    (checkpoints / "last.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"put best.pt in its place"):
        Classification(recipe(), tmp_path / "pieces", resume=True)
    (checkpoints / "best.pt").rename(checkpoints / "last.pt")
    Classification(recipe(), tmp_path / "pieces", resume=True).train()
    # The epoch's evaluation, already recorded, is not repeated.
    assert [r["step"] for r in records(tmp_path / "pieces")] == [r["step"] for r in records(tmp_path / "whole")]


def test_a_long_epoch_is_checkpointed_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "CHECKPOINT_SECONDS", 0.0)

    def crash(seen: Progress) -> bool:
        if seen.step == 4:
            raise OSError("crash")
        return False

    with pytest.raises(OSError, match="crash"):
        Classification(recipe(), tmp_path).train(crash)
    assert Classification(recipe(), tmp_path, resume=True).step == 3
