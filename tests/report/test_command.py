"""``rarefy report``: what it prints of a summary, and that a damaged file is named before the page is replaced."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rarefy.cli import main
from tests.cli import refused


@pytest.fixture
def folder(small_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be spoiled, with a page of before."""
    (copied := Path(shutil.copytree(small_run, tmp_path / "run"))).joinpath("report.html").write_text("before")
    return copied


def say(folder: Path, **values: Any) -> None:
    """Let the summary say this, too."""
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def printed_rows(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert main(["report", str(folder), *words]) == 0
    return {line[:16].strip(): line[18:] for line in capsys.readouterr().out.splitlines()}


def test_what_the_summary_does_not_know_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"test_accuracy": 0.5, "sparsity": 0.9, "nonzeros": 1100, "parameters": 11000, "seconds": 7.6}
    say(folder, **said, inference_flops_ratio=0.123, training_flops_ratio=0.456, test_top5=0.75)
    known = {
        "test accuracy": "50.00 %",
        "top-5 accuracy": "75.00 %",
        "sparsity": "90.00 %",
        "nonzero weights": "1,100 of 11,000",
        "inference FLOPs": "12.3 % of dense (counted, MACs)",
        "training FLOPs": "45.6 % of dense (counted)",
        "training time": "8 s",
        "model": str(folder / "model.safetensors"),
        "report": str(folder / "report.html"),
    }
    assert printed_rows(folder, capsys) == known
    assert printed_rows(folder, capsys, "--baseline", str(folder)) == {**known, "of the baseline": "50.00 %"}
    say(folder, test_accuracy=None, test_top5=None, seconds=None, nonzeros=None, training_flops_ratio=None)
    for lost in ("test accuracy", "top-5 accuracy", "training time", "nonzero weights", "training FLOPs"):
        known.pop(lost)
    assert printed_rows(folder, capsys, "--baseline", str(folder)) == known
    (folder / "summary.json").write_text("{}")
    assert list(printed_rows(folder, capsys)) == ["model", "report"]


def test_a_translator_without_its_signature(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(folder, test_bleu=31.416, bleu_signature="nrefs:1", valid_perplexity=5.0)
    rows = printed_rows(folder, capsys)
    assert (rows["test BLEU"], rows["perplexity"]) == ("31.42 (nrefs:1)", "5.00 on the validation set")
    say(folder, bleu_signature=None, valid_perplexity=None)
    rows = printed_rows(folder, capsys)
    assert rows["test BLEU"] == "31.42"
    assert "perplexity" not in rows


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("summary.json", '{"sparsity": 1' + "0" * 400 + "}", "sparsity must be a number, got 1000"),
        ("summary.json", '{"sparsity": 1' + "0" * 5000 + "}", "not JSON"),
        ("summary.json", '{"seconds": Infinity}', "seconds must be a number, got inf; mend the file"),
        ("summary.json", '{"seconds": 1e999}', "seconds must be a number, got inf"),
        ("summary.json", '{"test_accuracy": NaN}', "test_accuracy must be a number, got nan"),
        ("summary.json", '{"layers": [{"name": "a", "shape": [NaN]}]}', "layers[0]: shape must be a list of numbers"),
        ("summary.json", '{"layers": [{"name": "a", "shape": [1e999]}]}', "layers[0]: shape must be a list of numbers"),
        ("summary.json", "5", "expected a JSON object, got 5"),
        ("summary.json", DEEP, "not JSON (maximum recursion depth exceeded"),
        ("summary.json", "\udcff", "not JSON ('utf-8' codec can't decode byte 0xff"),
        ("histograms.json", DEEP, "not JSON (maximum recursion depth exceeded"),
        ("environment.json", DEEP, "not JSON (maximum recursion depth exceeded"),
        ("attention.json", '{"sentences": [5]}', "sentences[0]: expected a JSON object, got 5"),
        ("metrics.jsonl", '{"event": "train", "step": 1, "epoch": 1, "loss": 1' + "0" * 400 + "}\n", "loss must be"),
        ("metrics.jsonl", '{"event": "train", "step": Infinity, "epoch": 1}\n', "step must be a whole number, got inf"),
        ("metrics.jsonl", DEEP + "\n", "line 1: not JSON (maximum recursion depth exceeded"),
    ],
)
def test_a_damaged_file_is_named_and_the_page_stays(
    file: str, text: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / file).write_bytes(text.encode(errors="surrogateescape"))
    said = refused(capsys, "report", str(folder))
    assert said.startswith(f"rarefy: {folder / file}")
    assert message in said
    assert "mend the file" in said or "delete that line" in said
    assert (folder / "report.html").read_text() == "before"
