"""Checkpoints are written while training goes on; what goes wrong there is told, and loses nothing that was there."""

import errno
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy import _files
from rarefy.train import Classification, TrainingInterruptedError, run_folder
from rarefy.train.run_folder import RunFolder
from tests.train.runs import AUTOSPARSE, digest, outcome, prepare, recipe, run, stop_at


def test_training_goes_on_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, save = threading.Event(), RunFolder.save
    seen_by_writer: list[bool] = []

    def slow(self: RunFolder, name: str, state: Mapping[str, Any]) -> None:
        if state["step"] == 5 and name == "best":
            weights = [digest(value) for value in state["model"].values()]
            assert moved.wait(60)
            seen_by_writer.append(weights == [digest(value) for value in state["model"].values()])
        save(self, name, state)

    def observe(seen: Any) -> bool:
        if seen.step == 7:
            assert not (tmp_path / "checkpoints").exists()
            moved.set()
        return bool(seen.step == 9)

    monkeypatch.setattr(RunFolder, "save", slow)
    with pytest.raises(TrainingInterruptedError):
        Classification(recipe(**AUTOSPARSE), tmp_path).train(observe)
    assert seen_by_writer == [True]
    steps = [torch.load(tmp_path / "checkpoints" / f"{n}.pt", weights_only=True)["step"] for n in ("best", "last")]
    assert steps == [5, 9]


@pytest.mark.parametrize(("broken", "told_at"), [(5, 10), (15, 15)])
def test_an_error_is_told_at_the_next_one_or_at_the_end(
    broken: int, told_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, steps = RunFolder.save, []

    def fail(self: RunFolder, name: str, state: Mapping[str, Any]) -> None:
        if state["step"] == broken and name == "last":
            raise OSError(errno.EIO, "Input/output error", name)
        save(self, name, state)

    monkeypatch.setattr(RunFolder, "save", fail)
    with pytest.raises(OSError, match="Input/output error"):
        Classification(recipe(), tmp_path).train(lambda seen: steps.append(seen.step))
    assert steps[-1] == told_at
    assert not (tmp_path / "summary.json").exists()


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a checkpoint's writer find no room when some of it is written."""
    remembering = _files._Remembering

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.written = file, 0

        def write(self, data: bytes) -> int:
            self.written += len(data)
            if self.written > 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.file.write(data))

        def flush(self) -> None:
            self.file.flush()

    monkeypatch.setattr(_files, "_Remembering", lambda file: remembering(Full(file)))  # type: ignore[arg-type]


def test_a_full_disk_loses_nothing_and_says_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(**AUTOSPARSE)
    run(made, tmp_path / "whole")

    def fill(seen: Any) -> bool:
        if seen.step == 7:
            full_disk(monkeypatch)
        return False

    last = tmp_path / "pieces" / "checkpoints" / "last.pt"
    said = r"No space left on device; the checkpoint .*last.pt, from step 5, is whole: make room, and resume the run"
    with pytest.raises(OSError, match=said) as told:
        Classification(made, tmp_path / "pieces").train(fill)
    assert told.value.errno == errno.ENOSPC
    assert torch.load(last, weights_only=True)["step"] == 5
    assert not list(last.parent.glob(".*"))
    monkeypatch.undo()
    prepare(monkeypatch)
    Classification(made, tmp_path / "pieces", resume=True).train()
    assert outcome(tmp_path / "pieces") == outcome(tmp_path / "whole")


def test_a_stop_on_a_full_disk_is_no_clean_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left on device; no checkpoint was written before"):
        Classification(recipe(), tmp_path).train(stop_at(3))


def test_metrics_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = RunFolder.append

    def full(self: RunFolder, record: Mapping[str, Any]) -> None:
        if record["step"] > 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.metrics))
        append(self, record)

    monkeypatch.setattr(run_folder.RunFolder, "append", full)
    with pytest.raises(OSError, match=r"No space left on device; .*from step 5, is whole.*metrics.jsonl"):
        Classification(recipe(), tmp_path).train()
