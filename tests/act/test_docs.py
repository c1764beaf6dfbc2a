"""What docs/results/activations.md says is in results/act.csv, and the commands of docs/guides/tables.md run."""

import re
from pathlib import Path

import pytest

import act as figures
from rarefy.act.fit import shipped
from rarefy.bench import act as bench
from rarefy.cli import main

ROOT = Path(__file__).parents[2]
DOCS = " ".join((ROOT / "docs" / "results" / "activations.md").read_text().split())
TIMES = figures.read()


def flat(text: str) -> str:
    return " ".join(text.split())


def test_tables_are_those_of_the_results():
    assert flat(figures.bfloat16(TIMES)) in DOCS
    assert flat(figures.float32(TIMES)) in DOCS
    assert flat(figures.slower()) in DOCS
    assert flat(figures.two_threads()) in DOCS
    without = figures.read(figures.AVX2)
    for dtype in ("float32", "bfloat16", "float16"):
        assert flat(figures.without_avx512(without, dtype)) in DOCS


@pytest.mark.parametrize("name", figures.sentences(TIMES))
def test_figures_in_words_are_those_of_the_results(name):
    phrase = figures.sentences(TIMES)[name]
    assert phrase in DOCS


def test_every_target_but_the_stretch_is_met_by_the_results():
    found = [bench.Measured(*key, ns, ns) for key, ns in TIMES.items()]
    missed = [target.claim for target in bench.targets(found) if not target.met]
    assert len(bench.targets(found)) == 14
    assert set(missed) <= {"silu exact, stretch: times torch, L2"}


def test_float32_without_avx512_misses_what_the_docs_say():
    found = [bench.Measured(*key, ns, ns) for key, ns in figures.read(figures.AVX2).items()]
    judged = {target.claim: target.met for target in bench.targets(found) if " L2" in target.claim}
    claims = {claim: met for claim, met in judged.items() if "exact: of torch's" in claim or " fast: " in claim}
    assert len(claims) == 9
    assert [claim for claim, met in claims.items() if not met] == ["float32 gelu exact: of torch's, L2"]


def test_the_commands_in_the_docs_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ("tanh_bf16_ktanh", "gelu_fp16")  # tests/act/test_table.py makes all of them
    monkeypatch.setattr(shipped, "BUILDERS", {name: shipped.BUILDERS[name] for name in few})
    Path("softsign.py").write_text("def softsign(x):\n    return x / (1 + abs(x))\n")
    commands = re.findall(r"^    rarefy (table [^#\n]*)", (ROOT / "docs/guides/tables.md").read_text(), re.M)
    assert len(commands) == 6
    for command in commands:
        assert main(command.split()) == 0, command
        assert capsys.readouterr().out
