"""Reading a run's folder: what is tolerated, what is refused, and what the refusal says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rarefy.report import RunError, load


@pytest.fixture
def folder(sparse_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be spoiled."""
    return Path(shutil.copytree(sparse_run, tmp_path / "run"))


def change(path: Path, edit: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def test_a_finished_run_is_read_as_it_was_written(sparse_run: Path) -> None:
    run = load(sparse_run)
    said = json.loads((sparse_run / "summary.json").read_text())
    assert (run.name, run.method, run.model, run.data) == ("autosparse-90", "autosparse", "resnet20", "fashion_mnist")
    assert (run.target, run.target_kind) == (0.9, "sparsity")
    assert run.summary is not None
    assert run.sparsity == run.summary.sparsity == said["sparsity"]
    assert run.test_accuracy == said["test_accuracy"]
    assert run.inference_flops_ratio == said["inference_flops_ratio"]
    assert [layer.name for layer in run.layers] == [layer["name"] for layer in said["layers"]]
    assert run.layers[0].shape == (16, 3, 3, 3)
    assert (len(run.train), len(run.evals), len(run.histograms)) == (120, 30, 20)
    assert run.epoch == run.epochs == 30
    assert not run.is_dense


def test_a_dense_run_is_known_as_one(dense_run: Path) -> None:
    run = load(dense_run)
    assert run.is_dense
    assert run.target is None
    assert run.histograms == ()


def test_an_unfinished_run_has_what_was_logged(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = load(make_run(tmp_path / "run", finished=False))
    assert run.summary is None
    assert (run.epoch, run.epochs) == (15, 30)
    assert (run.target, run.target_kind) == (0.9, "sparsity")
    assert run.sparsity == run.train[-1].sparsity
    assert run.test_accuracy == run.evals[-1].test_accuracy
    assert len(run.layers) == 20
    assert run.layers[3].initial_density == run.train[0].layers[3].density
    assert run.layers[3].density == run.train[-1].layers[3].density


def test_an_unfinished_run_towards_flops_knows_its_target(folder: Path) -> None:
    (folder / "summary.json").unlink()
    (folder / "recipe.yaml").write_text("name: x\nmethod: {name: autosparse, target_flops: 0.08}\n")
    assert (load(folder).target, load(folder).target_kind) == (0.08, "flops")


@pytest.mark.parametrize("cut", ['{"event": "train", "st', '{"event": "eval"', "{"])
def test_a_cut_last_line_is_left_out(folder: Path, cut: str) -> None:
    before = load(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(cut)
    assert load(folder) == before


def test_a_resumed_run_counts_each_step_once(folder: Path) -> None:
    before = load(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    again = [line for line in lines if json.loads(line)["step"] > 1000]
    (folder / "metrics.jsonl").write_text("".join(lines + again))
    assert load(folder) == before


def test_other_events_are_left_alone(folder: Path) -> None:
    before = load(folder)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text('{"event": "checkpoint", "path": "x"}\n\n' + text)
    assert load(folder) == before


def test_a_diverged_run_can_be_read(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 5000, "epoch": 31, "loss": NaN}\n')
    loss = load(folder).train[-1].loss
    assert loss is not None
    assert loss != loss


def test_what_is_no_run_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"missing is not a folder; expected the folder that `rarefy train` wrote"):
        load(tmp_path / "missing")
    with pytest.raises(RunError, match=r"recipe.yaml is not a folder"):
        load(folder / "recipe.yaml")
    (folder / "recipe.yaml").unlink()
    with pytest.raises(RunError, match=r"not a run's folder: it has no recipe.yaml"):
        load(folder)


def test_missing_metrics_are_refused(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"has no metrics.jsonl: the run has logged nothing yet"):
        load(folder)


@pytest.mark.parametrize("text", ["", "\n", '{"event": "tr', '{"event": "start"}\n'])
def test_a_run_without_records_is_refused_until_it_has_one(folder: Path, text: str) -> None:
    (folder / "metrics.jsonl").write_text(text)
    load(folder)  # its summary says enough
    (folder / "summary.json").unlink()
    with pytest.raises(RunError, match=r"has no records yet: report again once"):
        load(folder)


def test_a_broken_file_is_named_with_its_place(folder: Path) -> None:
    metrics = (folder / "metrics.jsonl").read_text()
    lines = metrics.splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:4], lines[4][:30], *lines[5:]]) + "\n")
    with pytest.raises(RunError, match=r"metrics.jsonl, line 5: not JSON"):
        load(folder)
    (folder / "metrics.jsonl").write_text('{"event": "train", "epoch": 1}\n')
    with pytest.raises(RunError, match=r"line 1: step is missing"):
        load(folder)
    (folder / "metrics.jsonl").write_text('{"event": "train", "step": 1, "epoch": 1, "loss": "high"}\n')
    with pytest.raises(RunError, match=r"line 1: loss must be a number, got 'high'"):
        load(folder)
    (folder / "metrics.jsonl").write_text("3\n")
    with pytest.raises(RunError, match=r"line 1: expected a JSON object, got 3"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("summary.json", lambda s: s.update(sparsity="0.9"), r"summary.json: sparsity must be a number, got '0.9'"),
        ("summary.json", lambda s: s.update(steps=1.5), r"steps must be a whole number, got 1.5"),
        ("summary.json", lambda s: s.update(name=3), r"name must be text, got 3"),
        ("summary.json", lambda s: s["layers"][2].pop("name"), r"layers\[2\]: name is missing"),
        ("summary.json", lambda s: s.update(layers={}), r"layers must be a list"),
        ("summary.json", lambda s: s["layers"][0].update(shape=["a"]), r"shape must be a list of numbers"),
        (
            "histograms.json",
            lambda h: h["layers"][1]["counts"].pop(),
            r"layers\[1\]: n counts need n \+ 1 rising edges",
        ),
        ("histograms.json", lambda h: h["layers"][1]["edges"].reverse(), r"rising edges"),
        ("attention.json", lambda a: a["sentences"][0]["weights"].pop(), r"weights must be a list of 2 rows"),
        ("attention.json", lambda a: a["sentences"][0]["weights"][1].pop(), r"weights must have 3 numbers in each row"),
        ("attention.json", lambda a: a["sentences"][0].update(source=[1]), r"source must be a list of texts"),
        ("attention.json", lambda a: a["sentences"][0].update(target=[], weights=[]), r"must have a piece at least"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(
    folder: Path, file: str, edit: Callable[[Any], object], message: str
) -> None:
    sentence = {"source": ["a", "b", "</s>"], "target": ["c", "</s>"], "weights": [[0.5, 0.5, 0], [0, 0, 1]]}
    (folder / "attention.json").write_text(json.dumps({"sentences": [sentence]}))
    assert load(folder).attentions[0].weights == ((0.5, 0.5, 0), (0, 0, 1))
    change(folder / file, edit)
    with pytest.raises(RunError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("summary.json", '{"name"', r"summary.json: not JSON .* delete it to report without it"),
        ("recipe.yaml", "a: [", r"recipe.yaml is not valid YAML"),
        ("recipe.yaml", "&a [*a, *a]", r"recipe.yaml is not valid YAML: its aliases"),
        ("recipe.yaml", "- a", r"recipe.yaml: expected a mapping"),
    ],
)
def test_a_file_of_another_form_is_refused(folder: Path, file: str, text: str, message: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(RunError, match=message):
        load(folder)
