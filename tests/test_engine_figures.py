"""What docs/results/engine.md says was measured is in results/engine.csv, and what was missed is called missed."""

import subprocess
import sys
from pathlib import Path

import pytest

import engine_tables
import results

ROOT = Path(__file__).parents[1]
ROWS = results.read("engine")


def row(cell: str, runtime: str, ms: float, speedup: float, **changes: str) -> dict[str, str]:
    network, batch = cell.split()[:2]
    plain = {
        "cell": cell,
        "network": network,
        "batch": batch.removeprefix("b"),
        "runtime": runtime,
        "precision": "float32",
        "threads": "1",
        "zeros": "0.8997",
        "macs": "0.126",
        "ms": str(ms),
        "speedup": str(speedup),
        "load": "0.5",
        "cpu": "a processor",
        "native_isa": "avx2",
        **dict.fromkeys(("compile_seconds", "compile_cpu_seconds", "measuring_seconds"), "10"),
        **dict.fromkeys(("weight_mb", "scratch_mb"), "10"),
        "bound_mb": "20",
    }
    return {**plain, **changes}


CELL = "resnet50-90 b1"
EXAMPLE = [
    row(CELL, "rarefy", 12.0, 1.0),
    row(CELL, "onnxruntime", 37.0, 3.1),
    row(CELL, "openvino", 36.0, 2.99),
    row(CELL, "torch.compile", 45.0, 3.7),
    row(CELL, "deepsparse", 36.0, 2.4),
    row(CELL, "rarefy", 12.5, 1.04, precision="bfloat16", weight_mb="5", scratch_mb="15.1"),
    row(CELL, "openvino", 9.0, 0.75, precision="int8", zeros="0.0"),
    row("resnet50-90 b16 threads", "rarefy", 160, 1.0),
    row("resnet50-90 b16 threads", "rarefy", 80, 0.5, threads="2"),
]


def test_every_target_is_judged() -> None:
    found = {target.what: target for target in engine_tables.targets(EXAMPLE)}
    name = "ResNet-50, 90 % of each layer, batch 1"
    assert len(found) == 8
    assert (found[f"{name}: best dense peer"].measured, found[f"{name}: best dense peer"].met) == ("2.99x", False)
    assert (found[f"{name}: deepsparse"].asked, found[f"{name}: deepsparse"].met) == (">= 2.4x", True)
    assert not found[f"{name}: bfloat16 weights"].met
    assert found[f"{name}, float32: memory"].met
    assert not found[f"{name}, bfloat16: memory"].met
    assert found[f"{name}, float32: compiling"].met
    (threads,) = (target for what, target in found.items() if "two threads" in what)
    assert (threads.measured, threads.met) == ("2.00x", True)


def test_the_tables_of_an_example() -> None:
    other = [{**line, "native_isa": "avx512_vbmi2"} for line in EXAMPLE]
    text = engine_tables.tables([*EXAMPLE, *other])
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "### a processor, AVX-512",
        "### a processor, AVX2",
    ]
    assert "| ResNet-50, 90 % of each layer | 1 | 12.6 % | 12.0 | 37.0 | 36.0 | 45.0 | 36.0 | 2.99 | 2.40 |" in text
    assert "| 1 | OpenVINO, int8, dense | 9.00 | 0.75 |" in text
    assert text.count("| missed |") == 2 * 3


@pytest.mark.parametrize(
    "part", [engine_tables.speeds, engine_tables.precisions, engine_tables.judged, engine_tables.others]
)
def test_the_tables_in_the_docs_are_those_of_the_results(part: object) -> None:
    assert callable(part)
    for rows in engine_tables.machines(ROWS).values():
        assert part(rows) in (ROOT / "docs" / "results" / "engine.md").read_text()


def test_no_answer_was_wrong() -> None:
    """Random networks at 16 and 8 bits are far from PyTorch in any runtime; at 32 bits no answer may be."""
    assert ROWS
    for each in ROWS:
        assert float(each["error"]) < (1e-3 if each["precision"] == "float32" else 1), each


def test_accuracy_in_int8_is_what_was_measured() -> None:
    rows = results.read("int8-accuracy")
    assert printed("benchmarks/int8_accuracy.py") in (ROOT / "docs" / "results" / "engine.md").read_text()
    assert all((row["layers_in_float32"], row["calibration"], row["epochs"]) == ("0", "256", "2") for row in rows)


def test_the_int8_tables_are_those_of_the_results() -> None:
    assert printed("benchmarks/int8.py") in (ROOT / "docs" / "results" / "engine.md").read_text()


def test_the_table_of_milliseconds_is_that_of_the_results() -> None:
    assert printed("benchmarks/latency.py") in (ROOT / "docs" / "results" / "engine.md").read_text()


def printed(script: str) -> str:
    command = [sys.executable, script, "--print"]
    table = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert table.count("\n") >= 4
    return table
