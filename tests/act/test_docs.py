"""What README and docs/activations.md say is in results/act.csv, and their examples run."""

import re
from pathlib import Path

import pytest
import torch
from benchmarks import act as figures

from rarefy import act
from rarefy.bench import act as bench
from rarefy.cli import main

ROOT = Path(__file__).parents[2]
README, DOCS = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/activations.md"))
TIMES = figures.read()


def flat(text: str) -> str:
    return " ".join(text.split())


def test_tables_are_those_of_the_results():
    assert flat(figures.bfloat16(TIMES)) in README
    assert flat(figures.bfloat16(TIMES)) in DOCS
    assert flat(figures.float32(TIMES)) in DOCS


@pytest.mark.parametrize("name", figures.sentences(TIMES))
def test_figures_in_words_are_those_of_the_results(name):
    phrase = figures.sentences(TIMES)[name]
    assert phrase in DOCS or name == "range"
    if name in ("range", "memory", "hard", "exact", "gelu", "float32", "onednn"):
        assert phrase in README


def test_every_target_but_the_stretch_is_met_by_the_results():
    found = [bench.Measured(*key, ns, ns) for key, ns in TIMES.items()]
    missed = [target.claim for target in bench.targets(found) if not target.met]
    assert len(bench.targets(found)) == 14
    assert set(missed) <= {"silu exact, stretch: times torch, L2"}


def test_the_example_in_the_readme_runs_as_it_stands():
    (example,) = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(example.splitlines()) <= 6
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert "replaced 2, kept 0" in str(names["report"])
    y = names["y"]
    assert isinstance(y, torch.Tensor)
    assert (y.dtype, tuple(y.shape)) == (torch.bfloat16, (32, 8))
    assert isinstance(names["model"], torch.nn.Sequential)
    assert isinstance(names["model"][2], act.Tanh)


def test_the_example_in_the_docs_runs_as_it_stands(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/activations.md").read_text(), re.S)
    exec(compile(example, "activations.md", "exec"), {})
    assert "replaced 1, kept 0" in capsys.readouterr().out


def test_the_commands_in_the_docs_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("softsign.py").write_text("def softsign(x):\n    return x / (1 + abs(x))\n")
    commands = re.findall(r"^    rarefy (table [^#\n]*)", (ROOT / "docs/activations.md").read_text(), re.M)
    assert len(commands) == 6
    for command in commands:
        assert main(command.split()) == 0, command
        assert capsys.readouterr().out


def test_paths_named_are_there():
    for path in re.findall(r"`((?:native|results|benchmarks|docs)/[^` ]*)`", DOCS):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([^)#:]+)\)", DOCS):
        assert (ROOT / "docs" / path).exists(), path
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"`make ([a-z0-9-]+)`", DOCS)) <= set(targets)
