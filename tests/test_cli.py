"""The command line: one result on standard output, everything else on standard error, and no traceback."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rarefy import environment, kernels
from rarefy.cli import main
from rarefy.kernels import _library
from rarefy.train.batches import Batches
from tests.cli import printed, refused
from tests.train.runs import AUTOSPARSE, outcome, plain, prepare

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a recipe in it."""
    prepare(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write_recipe(**AUTOSPARSE)
    return tmp_path


def write_recipe(**changes: Any) -> None:
    Path("small.yaml").write_text(yaml.safe_dump(plain(**changes)))


def test_train_prints_a_summary_and_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.yaml"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("training fashion_cnn with autosparse into runs/test\n")
    assert "100 %  epoch  3.00" in err
    summary = json.loads(Path("runs/test/summary.json").read_text())
    lines = {line[:16].strip(): line[18:] for line in out.splitlines()}
    assert lines["test accuracy"] == f"{100 * summary['test_accuracy']:.2f} %"
    assert lines["sparsity"] == "80.00 %"
    assert lines["nonzero weights"] == f"{summary['nonzeros']:,} of {summary['parameters']:,}"
    assert lines["report"] == "runs/test/report.html"
    assert Path(lines["report"]).exists()
    assert Path(lines["model"]).exists()


def test_json_is_one_object_and_progress_goes_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.yaml", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    summary = json.loads(out)
    assert summary.pop("report") == "runs/test/report.html"
    assert summary == json.loads(Path("runs/test/summary.json").read_text())
    assert "left" in err


@pytest.mark.slow
def test_a_run_is_never_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["train", "small.yaml", "--set", "schedule.epochs=1"]
    for _ in range(2):
        assert main(short) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["test", "test-2"]
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")}
    message = refused(capsys, *short, "--run", "runs/test-2")
    assert message == "rarefy: runs/test-2 holds a run already: add --resume to go on with it, or name another --run\n"
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*")} == before
    Path("empty").mkdir()
    assert main([*short, "--run", "empty"]) == 0
    assert Path("empty/summary.json").exists()


def test_set_data_and_baseline_are_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rarefy.data import fashion_mnist

    asked: list[str | None] = []
    usual = fashion_mnist.load
    monkeypatch.setattr(fashion_mnist, "load", lambda folder=None: asked.append(folder) or usual())  # type: ignore[func-returns-value]
    short = ["--set", "schedule.epochs=1"]
    assert main(["train", "small.yaml", *short, "--set", "method={name: dense}", "--run", "dense"]) == 0
    name = "däta = [1]: 😀"
    arguments = ["--data", name, "--set", "seed=4", "--baseline", "dense", "--run", "sparse"]
    assert main(["train", "small.yaml", *short, *arguments]) == 0
    assert asked == [None, name]
    made = yaml.safe_load(Path("sparse/recipe.yaml").read_text())
    assert (made["seed"], made["data"]["folder"], made["schedule"]["epochs"]) == (4, name, 1)
    assert "dense" in Path("sparse/report.html").read_text()


# Stopping


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[signal.Signals]]]:
    """Signals that this process gets before the step of that number of an epoch, once."""
    planned: dict[int, list[signal.Signals]] = {}
    usual = Batches.epoch

    def epoch(self: Batches, epoch: int, first: int = 0) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
        for step, micro_batches in enumerate(usual(self, epoch, first), start=first):
            for number in planned.pop(epoch * len(self) + step, []):
                os.kill(os.getpid(), number)
            yield micro_batches

    monkeypatch.setattr(Batches, "epoch", epoch)
    yield planned
    assert not planned


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_resuming_changes_no_bit(
    number: signal.Signals,
    status: int,
    at_step: dict[int, list[signal.Signals]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "small.yaml", "--run", "whole"]) == 0
    capsys.readouterr()
    at_step[6] = [number]
    assert main(["train", "small.yaml", "--json"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert "stopping: writing a checkpoint\n" in err
    assert err.endswith("rarefy: stopped after step 7 of 15; the same with --run runs/test --resume goes on\n")
    assert not list(Path("runs").rglob("*.partial"))
    assert torch.load("runs/test/checkpoints/last.pt", weights_only=True)["step"] == 7
    assert main(["train", "small.yaml", "--resume"]) == 0
    assert "into runs/test, from step 7 of 15\n" in capsys.readouterr().err
    assert outcome(Path("runs/test")) == outcome(Path("whole"))


def test_a_second_signal_ends_at_once(
    at_step: dict[int, list[signal.Signals]], capsys: pytest.CaptureFixture[str]
) -> None:
    at_step[6] = [signal.SIGINT, signal.SIGINT]
    assert refused_last(capsys, 130) == "rarefy: interrupted"
    assert torch.load("runs/test/checkpoints/last.pt", weights_only=True)["step"] == 5
    assert not list(Path("runs").rglob("*.partial"))


def refused_last(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The last line that training says when it fails."""
    assert main(["train", "small.yaml"]) == status
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


def test_ctrl_c_before_the_first_step_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rarefy.data import fashion_mnist

    monkeypatch.setattr(fashion_mnist, "load", lambda folder=None: os.kill(os.getpid(), signal.SIGINT))
    assert refused(capsys, "train", "small.yaml", status=130) == "rarefy: interrupted\n"
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_a_process_told_to_end(twice: bool, here: Path) -> None:
    write_recipe(**AUTOSPARSE, schedule={"epochs": 100_000})
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.train.driver", "train", "small.yaml"],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr is not None
        assert process.stdout is not None
        try:
            while "left" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            if twice:
                process.send_signal(signal.SIGTERM)
            err = process.stderr.read()
            assert process.stdout.read() == ""
            assert process.wait(20) in ({143, -signal.SIGTERM} if twice else {143})
        finally:
            process.kill()
    assert "Traceback" not in err
    state = torch.load("runs/test/checkpoints/last.pt", weights_only=True)
    if not twice:
        assert f"stopped after step {state['step']} of 500000" in err
        assert not list(Path("runs").rglob("*.partial"))


def driven(*words: str, **options: Any) -> "subprocess.Popen[str]":
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.train.driver", "train", *words]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(root)}, text=True, **options)


def test_training_goes_on_when_nobody_looks_any_more() -> None:
    process = driven("small.yaml", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("training fashion_cnn")
    process.stdout.close()
    assert process.wait(100) == 1  # the summary could not be printed
    assert Path("runs/test/summary.json").is_file()
    assert Path("runs/test/report.html").is_file()


def test_two_runs_into_one_folder() -> None:
    both = [driven("small.yaml", "--run", "one", "--set", f"seed={seed}", stderr=subprocess.PIPE) for seed in (0, 1)]
    said = [process.communicate(timeout=200)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1]
    lost = said[codes.index(1)].splitlines()[-1]
    assert "another process trains in this folder" in lost or "holds a run already" in lost
    seed = codes.index(0)
    assert yaml.safe_load(Path("one/recipe.yaml").read_text())["seed"] == seed
    steps = [json.loads(line)["step"] for line in Path("one/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


@pytest.mark.parametrize("lost", ["model.safetensors", "summary.json"])
def test_resuming_a_run_that_lost_what_it_came_to(lost: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.yaml", "--run", "run"]) == 0
    before = outcome(Path("run"))
    Path("run", lost).unlink()
    assert main(["train", "small.yaml", "--run", "run", "--resume"]) == 0
    assert outcome(Path("run")) == before


# Errors


def test_a_diverged_run(capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(optimizer={"lr": 1e30})
    assert re.match(r"rarefy: .* is (nan|inf) at step \d+ \(epoch .*a lower optimizer.lr", refused_last(capsys, 1))
    assert not Path("runs/test/summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "there is no recipe 'nothing.yaml'; recipes are YAML files such as recipes/demo.yaml"),
        (["small.yaml", "--set", "method.tagret=0.9"], "did you mean 'target'?"),
        (["small.yaml", "--set", "method.target=90"], "for 90 % write 0.9"),
        (["small.yaml", "--set", "method.target=much"], "method.target must be a number or null, got 'much'"),
        (["small.yaml", "--set", "model.width=8"], "unknown option of model 'fashion_cnn': 'width' (there is in"),
        (["small.yaml", "--set", "model={name: resnet20, width: 0}"], "model.width must be above 0, and finite, got 0"),
        (["small.yaml", "--set", "seed"], "--set takes KEY=VALUE"),
        (["small.yaml", "--set", "schedule.batch_size=1000"], "more than the 160 training images"),
        (["small.yaml", "--resume"], "there is no run in runs/test to resume"),
        (["small.yaml", "--resume", "--run", "elsewhere"], "there is no run in elsewhere to resume"),
        (["small.yaml", "--baseline", "elsewhere"], "elsewhere is not a folder"),
        (["small.yaml", "--baseline", "."], "is not a run's folder: it has no recipe.yaml"),
        (["small.yaml", "--run", "small.yaml"], "small.yaml"),
        (["small.yaml", "--run", "small.yaml/below"], "small.yaml/below"),
        (["small.yaml", "--run", "/proc/nothing"], "/proc/nothing"),
    ],
)
def test_what_cannot_be_trained(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("rarefy: ")
    assert [path.name for path in here.iterdir()] == ["small.yaml"]


def test_no_data(monkeypatch: pytest.MonkeyPatch, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert "nowhere does not hold Fashion-MNIST" in refused(capsys, "train", "small.yaml", "--data", "nowhere")
    assert [path.name for path in here.iterdir()] == ["small.yaml"]


def test_the_report_of_nonsense(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere is not a folder" in refused(capsys, "report", "nowhere")
    assert "is not a run's folder" in refused(capsys, "report", ".")
    Path("recipe.yaml").write_text("[")
    Path("metrics.jsonl").write_text("nonsense\n")
    assert "recipe.yaml is not valid YAML" in refused(capsys, "report", ".")


def test_the_report_of_a_run_and_of_a_stopped_one(
    at_step: dict[int, list[signal.Signals]], capsys: pytest.CaptureFixture[str]
) -> None:
    at_step[6] = [signal.SIGTERM]
    assert main(["train", "small.yaml"]) == 143
    capsys.readouterr()
    assert main(["report", "runs/test"]) == 0
    assert capsys.readouterr().out.split() == ["report", "runs/test/report.html"]
    assert printed(capsys, "report", "runs/test", "--output", "page.html") == {"report": "page.html"}
    assert "<html" in Path("page.html").read_text()
    assert "nowhere is not a folder" in refused(capsys, "report", "runs/test", "--baseline", "nowhere")
    assert "small.yaml" in refused(capsys, "report", "runs/test", "--output", "small.yaml/page.html")
    metrics = Path("runs/test/metrics.jsonl").read_bytes()
    assert "must be a .html file" in refused(capsys, "report", "runs/test", "--output", "runs/test/metrics.jsonl")
    assert Path("runs/test/metrics.jsonl").read_bytes() == metrics


def test_resuming_another_recipe(at_step: dict[int, list[signal.Signals]], capsys: pytest.CaptureFixture[str]) -> None:
    at_step[3] = [signal.SIGTERM]
    assert main(["train", "small.yaml"]) == 143
    capsys.readouterr()
    message = refused(capsys, "train", "small.yaml", "--set", "optimizer.lr=0.2", "--resume")
    assert "runs/test was started with another recipe, which differs in optimizer.lr (0.05 there, 0.2 here)" in message


# The rest


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"rarefy \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["train", "report", "info", "--version"]),
        (["train", "--help"], ["RECIPE", "--set KEY=VALUE", "--data", "--run", "--resume", "--baseline", "--json"]),
        (["report", "--help"], ["RUN", "--baseline", "--output", "--json"]),
        (["info", "--help"], ["--json"]),
    ],
)
def test_help(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in words)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "small.yaml", "--sett", "a=b"]])
def test_a_call_that_cannot_be_understood(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: rarefy" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"torch  {torch.__version__}" in text
    assert "threads  1\n" in text
    about = printed(capsys, "info")
    assert about["threads"] == 1
    assert about["native_isa"] == environment.native_isa()
    assert {kernel["name"] for kernel in about["kernels"]} == {kernel.name for kernel in kernels.table()}
    assert about["cpu_features"] == environment.cpu_features()


def test_info_without_native_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "library_path", lambda: None)
    for module in (kernels, _library):
        monkeypatch.setattr(module, "table", tuple)
    assert main(["info"]) == 0
    assert "none: built without a C++ compiler, everything runs in PyTorch" in capsys.readouterr().out
    about = printed(capsys, "info")
    assert (about["native_library"], about["kernels"], about["native_isa"]) == (None, [], "pytorch")


def test_the_instruction_set_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tuple(kernels.Kernel("k", isa, isa != "best", 0) for isa in ("best", "good", "portable"))
    for module in (kernels, _library):
        monkeypatch.setattr(module, "table", lambda: table)
    assert environment.native_isa() == "good"
    assert environment.native_kernels() == {"k": "good"}
    for asked, found in (("portable", "portable"), ("pytorch", "pytorch"), ("best", "pytorch")):
        with kernels.forced(asked):
            assert environment.native_isa() == found
    monkeypatch.setattr(kernels, "library_path", lambda: Path("librarefy.so"))
    with kernels.forced("best"):
        assert main(["info"]) == 0
    assert "none in use: RAREFY_ISA asks for no kernel that runs here" in capsys.readouterr().out


def test_missing_extras_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("rarefy.train")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("rarefy.train")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    message = refused(capsys, "train", "small.yaml")
    assert message == "rarefy: rarefy.train needs accelerate: pip install 'rarefy[train]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("bench", "engine", "nosuch.engine"),
            "there is no engine nosuch.engine: engine.save(engine, path) writes one",
        ),
        (("table", "show", "nosuch.json"), "nosuch.json: No such file or directory"),
    ],
)
def test_what_is_missing_is_named(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(list(arguments)) == 1
    told = capsys.readouterr().err
    assert message in told
    assert "Errno" not in told
