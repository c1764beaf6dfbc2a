"""The examples run as they stand, and end with what they are about."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Those that train, with what they need, and the last words of the others.
NEEDED = {
    "plain_loop": "torch",
    "sparse_engine": "torch",
    "hf_trainer": "transformers",
    "lightning_trainer": "lightning",
}
SAID = {
    "swap_activations": r"replaced 3, kept 0(?s:.*)ktanh: largest error 0\.00892",
    "tanh_unit": r"K-TanH: largest error 0\.00892, 2 clocks\nsearched: largest error 0\.00890, 0 clocks",
}

# Of Lightning: PyTorch's own trees, one worker for data that lie in memory.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]


def test_all_examples_are_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*NEEDED, *SAID}


def run(name, folder, monkeypatch):
    """Its text, having run it."""
    path = ROOT / "examples" / f"{name}.py"
    code = path.read_text()
    assert 20 <= len(code.splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(path), str(folder)])
    runpy.run_path(str(path), run_name="__main__")
    return code


@pytest.mark.parametrize("name", NEEDED)
def test_an_example_ends_with_its_zeros(tmp_path, monkeypatch, capsys, name):
    pytest.importorskip(NEEDED[name], reason="the extra integrations is not installed")
    code = run(name, tmp_path, monkeypatch)
    target = re.search(r"target=(0\.\d)", code)
    zeros = re.findall(r"^(\d+\.\d) % zeros", capsys.readouterr().out, re.M)
    assert [float(n) for n in zeros] == [100 * float(target[1])]


@pytest.mark.parametrize("name", SAID)
def test_an_example_says_what_it_found(tmp_path, monkeypatch, capsys, name):
    run(name, tmp_path, monkeypatch)
    assert re.search(SAID[name], capsys.readouterr().out)
