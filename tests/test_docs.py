"""The pages of docs/: their code runs, what they name is there, and the reference has every public name."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rarefy import engine

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
#: Pages whose code other tests run: rooms that know what to look at.
ELSEWHERE = {"guides/your-own-method.md", "guides/hardware.md"}
ROOMS = ("sparse", "act", "engine", "rtl", "cost", "train", "report", "compare", "models", "data", "kernels")


def blocks(page: str, fence: str) -> list[str]:
    return re.findall(rf"^```{fence}\n(.*?)^```", (DOCS / page).read_text(), re.S | re.M)


# Of Lightning, as in test_examples.py.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in ELSEWHERE])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    code = "\n".join(blocks(page, "python"))
    for package in {"lightning", "transformers"} & set(re.findall(r"^(?:import|from) (\w+)", code, re.M)):
        pytest.importorskip(package, reason="the extra integrations is not installed")
    monkeypatch.chdir(tmp_path)
    compile_ = engine.compile
    monkeypatch.setattr(engine, "compile", lambda *given: compile_(*given, choose="native"))
    exec(compile(code, page, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES)
def test_code_that_needs_what_is_not_here_is_python(page):
    for block in blocks(page, "py"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    text = (DOCS / page).read_text()
    for path in re.findall(r"`((?:src|native|results|benchmarks|recipes|examples|tests|docs)/[\w./*-]+)`", text):
        assert list(ROOT.glob(path)), path
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).exists(), script
    for path in re.findall(r"\]\(([^)#:]+)", text) + re.findall(r'src(?:set)?="([^":]+)"', text):
        assert ((DOCS / page).parent / path).exists(), path
    targets = re.findall(r"^([a-z0-9-]+):|^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)
    known = {name for one, more in targets for name in (one, *more.split())}
    assert set(re.findall(r"`make ([a-z0-9-]+)`", text)) <= known


@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("translation.py --print", "guides/translation.md"),
        ("translation_training.py --print", "guides/translation.md"),
        ("gnmt.py --print", "results/translation.md"),
        ("gnmt.py --print --name gnmt-made-up", "results/translation.md"),
        ("act_gpu.py --print", "results/activations.md"),
        ("act_lstm.py --print", "results/activations.md"),
        ("decode.py --print", "results/engine.md"),
    ],
)
def test_a_table_is_that_of_the_results(script, page):
    command = [sys.executable, *f"benchmarks/{script}".split()]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    text = (DOCS / page).read_text()
    for table in printed.split("\n\n"):
        assert table.count("\n") >= 4
        assert table.strip() in text


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    assert sorted(re.findall(r"[\w/-]+\.md", nav)) == PAGES


def test_the_reference_has_every_room():
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    named = re.findall(r"^::: (rarefy\S*)$", text, re.M)
    assert {f"rarefy.{room}" for room in ROOMS} <= set(named)
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name), name
