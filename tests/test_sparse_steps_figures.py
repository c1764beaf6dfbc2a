"""What docs/results/sparse-steps.md says was measured is in results/sparse-steps.csv."""

from pathlib import Path

import pytest

import results
import sparse_steps

PAGE = Path(__file__).parents[1] / "docs" / "results" / "sparse-steps.md"


def test_the_tables_are_those_of_the_results() -> None:
    page = PAGE.read_text()
    for table in sparse_steps.tables(results.read(sparse_steps.NAME)):
        assert table in page


def rows(*speedups: tuple[float, float]) -> list[dict[str, str]]:
    return [{"density": str(density), "speedup": str(speedup)} for density, speedup in speedups]


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ([(0.1, 3.0), (0.5, 1.5), (0.7, 0.5)], "0.60"),
        ([(0.1, 3.0), (0.5, 1.5)], "above 0.5"),
        ([(0.1, 0.9), (0.5, 0.5)], "below 0.1"),
    ],
)
def test_the_break_even_lies_between_what_was_measured(measured: list[tuple[float, float]], said: str) -> None:
    assert sparse_steps.break_even(rows(*measured)) == said
