"""What the README shows runs, and what it claims is in results/."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from rarefy import engine
from rarefy.data import FashionMNIST, fashion_mnist

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_it_stands(monkeypatch, capsys):
    """From a dense network to the engine; here on few images, in few steps, and without measuring kernels."""
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(example.splitlines()) <= 40
    images, labels = torch.randint(0, 256, (256, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (256,))
    monkeypatch.setattr(fashion_mnist, "load", lambda: FashionMNIST(images, labels, images, labels))
    compile_ = engine.compile
    monkeypatch.setattr(engine, "compile", lambda *given: compile_(*given, choose="native"))
    names = {"__name__": "__main__"}
    assert example.count("steps = 1000") == 1
    exec(compile(example.replace("steps = 1000", "steps = 20"), "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert re.search(r"^90\.0 % zeros, \d+\.\d % of the FLOPs$", out, re.M)
    assert "replaced 1, kept 0" in out
    assert type(names["model"][0]) is torch.nn.Conv2d
    assert type(names["model"][8]) is not torch.nn.Tanh
    assert isinstance(names["model"][8], torch.nn.Tanh)
    assert isinstance(names["compiled"], engine.Engine)


def test_it_is_short():
    assert 600 <= len(README.split()) <= 800


def test_every_file_and_command_named_is_there():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z]+)", README)) <= targets
    for script in re.findall(r"python (benchmarks/\S+\.py)", README):
        assert (ROOT / script).exists(), script


def test_it_installs_what_its_commands_need_as_the_page_on_installing_does():
    install = "    pip install '.[train,export]'\n"  # rarefy train and rarefy export, to ONNX
    assert install in README
    assert install in (ROOT / "docs" / "start" / "install.md").read_text()


def test_the_table_is_the_one_in_results():
    command = [sys.executable, "benchmarks/readme.py"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert printed.count("\n") >= 9
    assert printed in README
