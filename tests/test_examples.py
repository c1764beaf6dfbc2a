"""The examples run as they stand, and end with what they are about."""

import re
import runpy
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
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
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*NEEDED, *SAID, "serve"}


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


# Of the client that FastAPI tests with.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*httpx.*")
def test_a_server_answers_by_both_runtimes(tmp_path, monkeypatch):
    for name in ("fastapi", "httpx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra serve or export is not installed")
    from fastapi.testclient import TestClient

    monkeypatch.delenv("NETWORK", raising=False)
    run("serve", tmp_path, monkeypatch)
    x, answers, sent = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32), [], BytesIO()
    np.save(sent, x)
    for kind in ("engine", "onnx"):
        monkeypatch.setenv("NETWORK", str(tmp_path / f"network.{kind}"))
        client = TestClient(runpy.run_path(str(ROOT / "examples" / "serve.py"))["app"])
        reply = client.post("/predict", content=sent.getvalue())
        assert reply.status_code == 200
        answers.append(np.load(BytesIO(reply.content)))
    assert answers[0].shape == (2, 10)
    np.testing.assert_allclose(*answers, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SAID)
def test_an_example_says_what_it_found(tmp_path, monkeypatch, capsys, name):
    run(name, tmp_path, monkeypatch)
    assert re.search(SAID[name], capsys.readouterr().out)
