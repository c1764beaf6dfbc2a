"""Comparisons: what a file says, what is run and kept, and what is told of it."""

import csv
import json
import math
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rarefy import sparse
from rarefy.cli import main
from rarefy.compare import load, page, rows, run, runner, worker, write
from rarefy.compare.table import means
from tests.cli import refused
from tests.train.runs import plain, prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _synthetic_worker(monkeypatch):
    monkeypatch.setattr(runner, "WORKER", ("-m", "tests.compare.driver"))
    monkeypatch.chdir(ROOT)


def comparison(folder, **changes):
    """A comparison file beside its recipe."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain(schedule={"epochs": 3})))
    content = {
        "name": "small",
        "recipe": "recipe.yaml",
        "seeds": 1,
        "targets": [0.8],
        "methods": {"dense": {"name": "dense"}, "RigL, ERK": {"name": "rigl"}},
        **changes,
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "compare.yaml"


def run_here(made, folder):
    """Do every run in this process, where what matters is what is told of them."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        for job in made.jobs:
            worker.train(job.recipe.to_dict(), folder / job.folder)


def test_what_a_file_says(tmp_path):
    methods = {
        "dense": {"name": "dense"},
        "GMP": {"name": "gmp", "targets": [0.5, 0.9], "seeds": 1},
        "2:4": {"name": "nm", "exclude": ["conv1"]},
        "RigL": {"name": "rigl"},
    }
    found = load(comparison(tmp_path, methods=methods, seeds=2, targets=[0.9], changes={"optimizer.lr": 0.25}))
    assert [job.folder for job in found.jobs] == [
        *("dense_seed0", "2-4_seed0", "dense_seed1", "2-4_seed1"),
        "GMP_0.5_seed0",
        *("GMP_0.9_seed0", "RigL_0.9_seed0", "RigL_0.9_seed1"),
    ]
    assert found.labels() == ["dense", "2:4", "GMP", "RigL"]
    assert {job.recipe.optimizer.lr for job in found.jobs} == {0.25}
    assert [job.recipe.seed for job in found.jobs][:4] == [0, 0, 1, 1]
    assert found.jobs[-1].recipe.method.options == {"target": 0.9}


def test_a_recipe_alone_compares_every_method_that_can(tmp_path):
    comparison(tmp_path)
    found = load(tmp_path / "recipe.yaml")
    assert set(found.labels()) == {"dense", *sparse.list_methods()}
    assert {job.target for job in found.jobs} == {None, 0.9}


def test_the_shipped_comparison_names_every_method():
    for path in (ROOT / "recipes").glob("compare-*.yaml"):
        found = load(path)
        assert found.jobs, path
    found = load(ROOT / "recipes" / "compare-fashion-mnist.yaml")
    assert {job.recipe.method.name for job in found.jobs} >= set(sparse.list_methods())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methds": {}}, "unknown key in .* 'methds'; did you mean 'methods'"),
        ({"methods": {}}, "methods must map labels to methods"),
        ({"methods": {"a": {"name": "rgl"}}}, "unknown method 'rgl'; did you mean 'rigl'"),
        ({"methods": {"a": "rigl"}}, "method 'a' must be a mapping with a name"),
        ({"methods": {"a": {"name": "rigl", "drop": 0.3}}}, "drop"),
        ({"methods": {"a b": {"name": "rigl"}, "a, b": {"name": "set"}}}, "would share the folder 'a-b_0.8_seed0'"),
        ({"seeds": 0}, "must be a whole number from 1 to 10000, got 0"),
        ({"changes": {"optimizer.rate": 1}}, "rate"),
        ({"budget": "flop"}, "unknown budget in .*: 'flop'; did you mean 'flops'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(comparison(tmp_path, **changes))


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no comparison"):
        load(tmp_path / "none.yaml")


@pytest.mark.slow
def test_runs_are_done_once_and_a_failure_stops_no_other(tmp_path):
    methods = {"dense": {"name": "dense"}, "RigL": {"name": "rigl"}, "bad": {"name": "rigl", "drop_fraction": 2.0}}
    made, folder = load(comparison(tmp_path, methods=methods)), tmp_path / "runs"
    told = []
    failed = run(made, folder, jobs=2, tell=lambda *seen: told.append(seen))
    assert list(failed) == ["bad_0.8_seed0"]
    assert failed["bad_0.8_seed0"] == "ValueError: drop_fraction must be in (0, 1), got 2.0"
    assert sorted(seen[2] for seen in told) == [1, 2, 3]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    assert len(before) == 2
    told.clear()
    assert list(run(made, folder, jobs=1, tell=lambda *seen: told.append(seen))) == ["bad_0.8_seed0"]
    assert [seen[0].label for seen in told] == ["bad"]
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")} == before

    content = rows(made, folder)
    assert [row["label"] for row in content] == ["dense", "RigL"]
    assert content[1]["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert content[1]["training_flops_convention"] == sparse.list_methods("rigl", details=True)["rigl"].training_flops
    assert set(json.loads(content[1]["layer_densities"])) == {"conv1", "conv2", "conv3", "conv4", "conv5", "fc"}
    page = write(made, folder)
    text = page.read_text()
    assert "RigL" in text
    assert "Target 80 %" in text
    assert text.count("<svg") == 4  # against both FLOPs, by layer, over the training
    with (folder / "compare.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["dense", "RigL"]


@pytest.mark.slow
def test_runs_of_another_recipe_are_not_taken_for_these(tmp_path):
    made = load(comparison(tmp_path), ["schedule.epochs=2"])
    run_here(made, tmp_path / "runs")
    assert run(made, tmp_path / "runs") == {}
    assert {row["command"] for row in rows(made, tmp_path / "runs")} == {
        f"rarefy compare {tmp_path / 'compare.yaml'} --set schedule.epochs=2"
    }
    other = load(tmp_path / "compare.yaml", ["optimizer.lr=0.001"])
    with pytest.raises(ValueError, match=r"dense_seed0 is a run of another recipe.*schedule.epochs.*optimizer.lr|lr"):
        run(other, tmp_path / "runs")


def test_targets_may_be_of_flops(tmp_path):
    methods = {"GMP": {"name": "gmp"}, "own": {"name": "gmp", "target": 0.5}}
    made, folder = load(comparison(tmp_path, methods=methods, budget="flops", targets=[0.3])), tmp_path / "runs"
    assert [job.recipe.method.options for job in made.jobs] == [{"target_flops": 0.3}, {"target": 0.5}]
    run_here(made, folder)
    content = {row["label"]: row for row in rows(made, folder)}
    assert content["GMP"]["inference_flops"] == pytest.approx(0.3, abs=2e-3)
    assert (content["GMP"]["budget"], content["GMP"]["target"], content["GMP"]["options"]) == ("flops", 0.3, "{}")
    assert (content["own"]["target"], content["own"]["options"]) == ("", '{"target": 0.5}')
    assert {row["device"] for row in content.values()} == {"cpu"}
    text = write(made, folder).read_text()
    assert "Target 30 % of the FLOPs" in text
    assert "Sparsity by layer at 30 % of the FLOPs" in text


def test_targets_may_be_milliseconds(tmp_path):
    methods = {"GMP": {"name": "gmp"}, "own": {"name": "gmp", "target_flops": 0.5}}
    made = load(comparison(tmp_path, methods=methods, budget="ms", targets=[2.5]))
    assert [job.recipe.method.options for job in made.jobs] == [{"target_ms": 2.5}, {"target_flops": 0.5}]
    assert [(job.target, job.budget, job.folder) for job in made.jobs] == [
        (2.5, "ms", "GMP_2.5_seed0"),
        (None, "ms", "own_seed0"),
    ]
    assert [page._named(target, "ms") for target in (2.5, None)] == ["2.5 ms", None]


def test_methods_without_targets_show_how_their_sparsity_grew(tmp_path):
    free = {f"alpha {alpha}": {"name": "autosparse", "alpha": alpha, "anneal": "constant"} for alpha in (0.0, 1.0)}
    methods = {"dense": {"name": "dense"}, **{label: {**method, "targets": [None]} for label, method in free.items()}}
    made, folder = load(comparison(tmp_path, methods=methods)), tmp_path / "runs"
    assert [job.recipe.method.options.get("target") for job in made.jobs] == [None] * 3
    run_here(made, folder)
    text = write(made, folder).read_text()
    assert "How sparsity grew" in text
    assert "Sparsity of alpha 0.0, alpha 1.0." in text or "Sparsity of alpha 1.0, alpha 0.0." in text


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    path = comparison(tmp_path, methods={"dense": {"name": "dense"}})
    assert main(["compare", str(path), "--run", str(tmp_path / "runs"), "--jobs", "1", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["means"][0]["label"] == "dense"
    assert "1/1  dense_seed0  done" in printed.err
    assert main(["compare", str(path), "--run", str(tmp_path / "runs"), "--write-only"]) == 0
    assert "dense" in capsys.readouterr().out
    message = refused(capsys, "compare", str(path), "--run", str(tmp_path / "none"), "--write-only")
    assert "no run of the comparison is finished yet" in message


@pytest.mark.parametrize("html", ["x", "./x", "below/../x", "link"])
def test_table_and_page_are_two_files(html, tmp_path, monkeypatch, capsys):
    path = comparison(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("below").mkdir()
    Path("x").write_text("before")
    Path("link").symlink_to("x")
    message = refused(capsys, "compare", str(path), "--run", "runs", "--csv", "x", "--html", html)
    assert f"--csv and --html must be two files, got x and {Path(html)}" in message
    assert Path("x").read_text() == "before"
    assert not Path("runs").exists()
    message = refused(capsys, "compare", str(path), "--run", "runs", "--csv", "runs/compare.html")
    assert "--csv and --html must be two files, got runs/compare.html and runs/compare.html" in message


SUMMARY = {
    "test_accuracy": 0.875,
    "sparsity": 0.8,
    "inference_flops_ratio": 0.25,
    "training_flops_ratio": 0.5,
    "seconds": 12.34,
    "model": "fashion_cnn",
    "epochs": 3,
    "layers": [{"name": "conv1", "density": 0.2}],
}
ABOUT = dict.fromkeys(("cpu", "native_isa", "torch", "rarefy", "python", "date"), "some")
ABOUT |= {"device": "cuda:0", "gpu": "a GPU"}


@pytest.fixture
def finished(tmp_path):
    """The comparison of one run, and the folder of that run, which has finished."""
    path = comparison(tmp_path, methods={"dense": {"name": "dense"}})
    folder = tmp_path / "runs" / "dense_seed0"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "environment.json").write_text(json.dumps(ABOUT))
    return path, folder


def test_a_row_says_what_the_run_said(finished):
    path, folder = finished
    (row,) = rows(load(path), folder.parent)
    numbers = {"test_accuracy": 87.5, "sparsity": 0.8, "inference_flops": 0.25, "training_flops": 0.5, "seconds": 12.3}
    said = {"model": "fashion_cnn", "epochs": 3, "layer_densities": '{"conv1": 0.2}', "cpu": "some", "device": "a GPU"}
    assert {**row, **numbers, **said} == row


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("summary.json", "", "not JSON"),
        ("summary.json", "[" * 100_000, "not JSON"),
        ("summary.json", "5", "expected a JSON object, got 5"),
        ("summary.json", "{}", "test_accuracy is missing"),
        ("summary.json", json.dumps({**SUMMARY, "sparsity": float("nan")}), "sparsity must be a number, got nan"),
        ("summary.json", json.dumps({**SUMMARY, "layers": [{"name": "a"}]}), "layers[0]: density is missing"),
        ("environment.json", "", "not JSON"),
        ("environment.json", "{}", "cpu is missing"),
        ("environment.json", json.dumps({**ABOUT, "device": 5}), "device must be text, got 5"),
    ],
    ids=lambda part: part[:20],
)
def test_a_damaged_file_of_a_finished_run_is_named_before_others_run(file, text, message, finished, capsys):
    path, folder = finished
    (folder / file).write_text(text)
    for words in (["--write-only"], []):
        said = refused(capsys, "compare", str(path), "--run", str(folder.parent), *words)
        assert said.startswith(f"rarefy: {folder / file}: {message}")
        assert said.endswith(f"; delete {folder / 'summary.json'}, and rarefy compare does that run again\n")


def test_means_and_intervals():
    row = {"label": "a", "target": 0.9, "sparsity": 0.9, "inference_flops": 0.1, "training_flops": 0.5, "seconds": 9}
    content = [{**row, "test_accuracy": accuracy} for accuracy in (88.0, 89.0, 90.0)]
    content.append({**row, "label": "b", "test_accuracy": 91.0})
    first, second = means(content)
    assert (first.label, first.runs, first.accuracy) == ("b", 1, 91.0)
    assert math.isnan(first.interval)
    # t(2, 97.5 %) * 1 / sqrt(3)
    assert second.interval == pytest.approx(4.303 / math.sqrt(3))


def test_no_runs_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run(load(comparison(tmp_path)), tmp_path, jobs=0)


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_share_the_cores_out(tmp_path, monkeypatch, jobs):
    said = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(str(sorted(os.sched_getaffinity(0))))"
    monkeypatch.setattr("rarefy.compare.runner.WORKER", ("-c", said))
    made = load(comparison(tmp_path, methods={"dense": {"name": "dense"}}))
    assert not run(made, tmp_path / "runs", jobs=jobs)
    cores, share = sorted(os.sched_getaffinity(0)), len(os.sched_getaffinity(0)) // jobs
    shares = [cores[index * share : (index + 1) * share] or cores for index in range(jobs)]
    for job in made.jobs:
        assert json.loads((tmp_path / "runs" / job.folder).read_text()) in shares


@pytest.mark.slow
def test_a_terminated_comparison_leaves_no_process_and_goes_on(tmp_path):
    path = comparison(tmp_path, methods={"dense": {"name": "dense"}}, changes={"schedule.epochs": 400})
    code = (
        "import sys; from rarefy.compare import runner; from rarefy.cli import main;"
        "runner.WORKER = ('-m', 'tests.compare.driver'); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "compare", str(path), "--run", str(tmp_path / "runs"), "--jobs", "1"]
    # The run writes into the pipe when its first checkpoint is there, and holds it open for as long as it lives.
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    told = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, start_new_session=True, env={**os.environ, "TOLD": str(fifo)}
    )
    try:
        assert select.select([told], [], [], 120)[0], "no checkpoint"
        assert os.read(told, 1) == b"."
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGINT
        assert select.select([told], [], [], 30)[0], "the run is still there"
        assert os.read(told, 1) == b""
    finally:
        os.close(told)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "runs" / "dense_seed0" / "checkpoints" / "last.pt").exists()


def test_a_method_with_milliseconds_has_its_target(tmp_path):
    made = load(comparison(tmp_path, methods={"A": {"name": "autosparse", "target_ms": 2.0}}))
    assert {job.target for job in made.jobs} == {None}
    assert made.jobs[0].recipe.method.options == {"target_ms": 2.0}
