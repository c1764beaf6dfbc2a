"""A failed save leaves the old checkpoint, a cut line harms nothing, and one process at a time trains in a folder."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rarefy.train.run_folder import RunFolder


def test_an_error_while_saving_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    known = {"total_steps": 9, "processes": 1, "seconds": 0.5, "losses": torch.zeros(0), "recipe": {"data": {}}}
    unknown = dict.fromkeys(("seconds_saved", "best", "sparsifier", "scaler", "average"))
    rest = {**known, **unknown, "model": {}, "optimizer": {}}
    folder.save("last", {"step": 1, **rest})

    class Unsaveable:
        def __reduce__(self) -> str:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        folder.save("last", {"step": 2, "big": torch.zeros(1000), **rest, "model": Unsaveable()})
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


def test_a_line_takes_the_place_of_one_that_was_cut(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_line("some", "one")
    with (tmp_path / "some").open("a") as file:
        file.write("tw")
    folder.append_line("some", "three")
    assert (tmp_path / "some").read_text() == "one\nthree\n"


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    other = (
        "import sys; from pathlib import Path; from rarefy.train.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).held(new=True): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", other, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(BlockingIOError, match="another process trains in this folder"),
            RunFolder(tmp_path).held(new=False),
        ):
            pass
        process.stdin.close()
    with RunFolder(tmp_path).held(new=True):
        pass
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_bytes(b"")
    with RunFolder(tmp_path).held(new=False):
        pass
    with pytest.raises(FileExistsError, match="it holds a run already"), RunFolder(tmp_path).held(new=True):
        pass


@pytest.mark.parametrize("text", [None, "", "{}", "[1]", '{"steps": 3'])
def test_what_has_not_finished_or_lost_a_file_has_no_summary(tmp_path: Path, text: str | None) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    assert folder.summary() is None
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    assert folder.summary() == {"steps": 3}
    (tmp_path / "model.safetensors").unlink()
    assert folder.summary() is None
