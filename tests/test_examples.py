"""The examples run as they stand, and end with the zeros that they ask for."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = {"plain_loop": "torch", "hf_trainer": "transformers", "lightning_trainer": "lightning"}

# Of Lightning: PyTorch's own trees, one worker for data that lie in memory.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]


def test_all_examples_are_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(NEEDED)


@pytest.mark.parametrize("name", NEEDED)
def test_an_example_ends_with_its_zeros(tmp_path, monkeypatch, capsys, name):
    pytest.importorskip(NEEDED[name], reason="the extra integrations is not installed")
    path = ROOT / "examples" / f"{name}.py"
    code = path.read_text()
    assert 20 <= len(code.splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    target = re.search(r"target=(0\.\d)", code)
    zeros = re.findall(r"^(\d+\.\d) % zeros", capsys.readouterr().out, re.M)
    assert [float(n) for n in zeros] == [100 * float(target[1])]


def test_every_file_that_the_page_names_is_there():
    page = ROOT / "docs" / "trainers.md"
    for path in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / path).exists(), path
