"""``rarefy bench engine``, and the documentation."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rarefy import engine, models
from rarefy.cli import main
from tests.cli import printed, refused

pytestmark = pytest.mark.slow

DOCS = (Path(__file__).parents[2] / "docs" / "guides" / "engine.md").read_text()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Compile without measuring."""
    real = engine.compile
    monkeypatch.setattr(engine, "compile", lambda *a, **k: real(*a, **{**k, "choose": "native"}))


def test_a_network_by_name(capsys, tmp_path):
    path = tmp_path / "a.engine"
    assert main(["bench", "engine", "resnet20", "--density", "0.2", "--rounds", "1", "--save", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"layer3\.2\.conv2 .* 20\.0 %", out)
    assert re.search(r"conv1 .* 100\.0 %", out)
    assert "batch of 1, one thread" in out
    assert "runs by: native" in out
    assert f"written to {path}" in out
    found = printed(capsys, "bench", "engine", str(path), "--batch", "3", "--rounds", "1")
    assert found["profile"]["batch"] == 3
    rows = {row["name"]: row for row in found["profile"]["rows"]}
    assert rows["layer3.2.conv2"]["density"] == pytest.approx(0.2, abs=1e-3)
    assert found["report"]["precision"] == "float32"
    assert found["environment"]["rarefy"]


@pytest.mark.slow
def test_beside_other_runtimes(capsys):
    assert main(["bench", "engine", "fashion_cnn", "--rounds", "1", "--peers"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"rarefy  [\d.]+ ms, 1\.00 times", out)
    assert re.search(r"onnxruntime  [\d.]+ ms, [\d.]+ times rarefy's", out)


def test_without_other_runtimes_that_is_told_first(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--peers needs another runtime" in refused(capsys, "bench", "engine", "fashion_cnn", "--peers")


def test_a_file_of_weights(capsys, tmp_path):
    save_file(models.resnet20(width=8).state_dict(), tmp_path / "w.safetensors")
    given = ["bench", "engine", str(tmp_path / "w.safetensors"), "--rounds", "1", "--precision", "bfloat16"]
    result = printed(capsys, *given, "--model", "resnet20", "--set", "width=8", "--input", "3,16,16")
    assert result["report"]["precision"] == "bfloat16"
    assert "does not say what network it is of: add --model NAME" in refused(capsys, *given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet51"], "unknown model 'resnet51'; did you mean 'resnet50'?"),
        (["nowhere.safetensors", "--model", "resnet20"], "there is no nowhere.safetensors"),
        (["resnet20", "--density", "90"], "--density must be in (0, 1], got 90.0; 0.1 keeps a tenth of the weights"),
        (["resnet20", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["a.engine", "--density", "0.5"], "an engine's file is what it is"),
        (["resnet20", "--precision", "int4"], "precision must be one of float32, bfloat16, int8, got 'int4'"),
        (["resnet20", "--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit(capsys, arguments, message):
    assert message in refused(capsys, "bench", "engine", *arguments)


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    names = {}
    exec(compile(example, "engine.md", "exec"), names)
    with torch.no_grad():
        torch.testing.assert_close(names["y"], names["model"](names["x"]), rtol=1e-4, atol=1e-4)
    assert "layer1.0.conv1" in capsys.readouterr().out
    assert (tmp_path / "resnet20.engine").exists()


def test_the_documentation_names_what_there_is():
    for name in re.findall(r"`engine\.(\w+)", DOCS):
        assert hasattr(engine, name), name
    for way in ("native by rule", "oneDNN with packed weights"):
        assert way in DOCS


def test_in_int8(capsys):
    result = printed(
        capsys, "bench", "engine", "fashion_cnn", "--density", "0.1", "--rounds", "1", "--precision", "int8"
    )
    assert result["report"]["precision"] == "int8"
