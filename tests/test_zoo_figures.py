"""What docs/results/zoo.md says was measured is in results/zoo.csv, and no answer in it is wrong."""

from pathlib import Path

import results
import zoo_tables

ROOT = Path(__file__).parents[1]
ROWS = results.read("zoo")


def row(
    network: str, error: str = "3.0e-07", exact: str = "3e-07", speedup: str = "2.0", **changes: str
) -> dict[str, str]:
    plain = {"network": network, "input": "3x8x8", "density": "0.1", "macs": "", "chosen": "native", "native": "0.9"}
    plain |= {"compile_cpu_seconds": "2.5", "cpu": "a processor", "native_isa": "avx2", "note": ""}
    for batch in "14":
        plain |= {f"error_{batch}": error, f"engine64_{batch}": error, f"eager64_{batch}": exact}
        plain |= {f"eager_ms_{batch}": "10.0", f"engine_ms_{batch}": "5.0", f"speedup_{batch}": speedup}
    plain |= {
        "ort_ms_1": "7.5",
        "ort_speedup_1": "1.5",
        "source": "timm 1.0",
        "file": "same bits",
        "file_mb": "20",
        "load_ms": "10",
    }
    return {**plain, **changes}


EXAMPLE = [
    row("good"),
    row("slow", speedup="0.5"),
    row("just", speedup="0.98", ort_speedup_1=""),
    row("ill", "3.0e-04", "2.0e-04"),
    row("wrong", "2.0e-04", error_4="5.0e-04"),
    row("broken", **dict.fromkeys(("error_1", "error_4", "speedup_1", "speedup_4"), ""), note="ValueError: no"),
]


def test_the_summary_names_what_fell_short() -> None:
    first, errors, one, four, ort, kinds, compiling, files = zoo_tables.summary(EXAMPLE).splitlines()
    assert first == "- 6 networks, 5 compiled; not compiled: broken (ValueError: no)"
    assert errors.endswith(
        "5.0e-04 (wrong); above 1e-04: ill 3.0e-04 (PyTorch itself is 2.0e-04 from float64), wrong 5.0e-04"
    )
    assert one.endswith("1.31 times as fast as PyTorch in the geometric mean of 5; slower by more than 3 %: slow 0.50")
    assert four.startswith("- batch 4: 1.31 times")
    assert ort.startswith(
        "- batch 1: 1.50 times as fast as onnxruntime in the geometric mean of 4; slower by more than"
    )
    assert ort.endswith("not exported, or with another answer: just")
    assert kinds.endswith("timm (4) 1.41 and 1.50")
    assert compiling == "- compiling: 2.5 s of CPU at the median; above 15: none"
    assert files.startswith(
        "- engine files: load in 5.0 ms each 10 MB at the median, 5.0 at most (10 ms for a whole file)"
    )


def test_not_a_number_is_the_largest_difference() -> None:
    for changes in ({"error_1": "nan"}, {"error_4": "nan"}):
        assert "nan (odd); above 1e-04: odd nan" in zoo_tables.summary([row("good"), row("odd", **changes)])


def test_the_table_has_a_line_for_each_network() -> None:
    lines = zoo_tables.table(EXAMPLE).splitlines()
    assert len(lines) == 2 + len(EXAMPLE)
    assert lines[2] == (
        "| good | 3x8x8 | 10 % |  | native | 90 % | 2.5 | 3.0e-07, 3.0e-07 | 10.0 | 7.50 | 5.00 | 2.00 | 1.50 | 2.00 |"
    )
    assert "not compiled" in lines[-1]


def test_the_page_is_that_of_the_results() -> None:
    assert ROWS
    assert (ROOT / "docs" / "results" / "zoo.md").read_text().endswith(zoo_tables.page(ROWS) + "\n")


def test_no_answer_was_wrong() -> None:
    """Of the networks that compiled; the others say why not."""
    for each in ROWS:
        if zoo_tables.compiled(each):
            assert zoo_tables.worst(each) <= zoo_tables.ERROR or zoo_tables.ill_conditioned(each), each
        else:
            assert each["note"], each
