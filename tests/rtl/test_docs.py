"""What docs/results/hardware.md says is in results/rtl.csv, and the example of docs/guides/hardware.md runs."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "results" / "hardware.md").read_text()
GUIDE = (ROOT / "docs" / "guides" / "hardware.md").read_text()
with (ROOT / "results" / "rtl.csv").open(newline="") as _file:
    ROWS = list(csv.DictReader(_file))


def test_tables_are_those_of_the_results():
    command = [sys.executable, "benchmarks/rtl.py", "--print"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tables = printed.strip().split("\n\n")
    assert len(tables) == 5
    assert all(table in PAGE for table in tables)


def test_every_design_was_verified_on_all_inputs():
    assert {row["mismatches"] for row in ROWS} == {"0"}
    assert {row["inputs"] for row in ROWS} == {"65536", "256"}


def test_what_was_to_be_shown():
    by = {row["name"]: row for row in ROWS}

    def number(name, column):
        return float(by[name][column])

    published = "K-TanH, shift_add, 0 stages"
    assert abs(number(published, "ge") / 172 - 1) < 0.03
    assert number(published, "max_abs") == 0.00892
    assert number("K-TanH, shift_add, 2 stages", "fmax_mhz") >= 200
    assert number("32 rows with carry, few shifts", "ge") <= 163
    assert number("64 rows with carry, few shifts", "ge") <= 213
    searched = [row for row in ROWS if row["part"] == "logic" or ", within " in row["name"]]
    for row in ROWS:
        if row["part"] == "peers":
            within = [unit for unit in searched if float(unit["max_abs"]) <= float(row["max_abs"])]
            assert min(float(unit["ge"]) for unit in within) < float(row["ge"])
            assert min(float(unit["delay_ns"]) for unit in within) < float(row["delay_ns"])
    functions = {(row["function"], row["format"]) for row in ROWS if row["part"] == "functions"}
    assert len(functions) == 16


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    code = GUIDE.split("```python\n")[1].split("```")[0]
    lines = [line for line in code.splitlines() if "place" not in line and "delay_ns" not in line]
    text = "\n".join(lines).replace("error=0.009)", 'error=0.2385, kinds=("logic",), steps=0)')
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "docs/guides/hardware.md", "exec"), {})
    assert (tmp_path / "tanh.sv").read_text().startswith("// tanh in bf16")
