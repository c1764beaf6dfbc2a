"""A failed save leaves the old checkpoint, and a cut line of the metrics harms nothing."""

from pathlib import Path

import pytest
import torch

from rarefy.train.run_folder import RunFolder


def test_an_error_while_saving_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = ("total_steps", "processes", "seconds", "best", "losses", "recipe", "model", "optimizer", "sparsifier")
    tensors = dict.fromkeys((*names, "scaler", "average"))
    folder.save("last", {"step": 1, **tensors})

    class Unsaveable:
        def __reduce__(self) -> str:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        folder.save("last", {"step": 2, "big": torch.zeros(1000), **tensors, "model": Unsaveable()})
    state = folder.load("last")
    assert state is not None
    assert state["step"] == 1
    assert folder.load("best") is None


def test_records_without_a_cut_last_line_and_rewinding(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.records() == []
    for step in range(4):
        folder.append({"step": step})
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in folder.records()] == [0, 1, 2, 3]
    folder.rewind(2)
    folder.append({"step": 3})
    assert folder.metrics.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    folder.rewind(0)
    assert folder.records() == []
