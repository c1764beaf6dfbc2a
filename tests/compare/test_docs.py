"""What docs/comparison.md says is in results/compare-*.csv."""

from pathlib import Path

import pytest
from benchmarks import comparison

DOCS = (Path(__file__).parents[2] / "docs" / "comparison.md").read_text()
ROWS = comparison.read("fashion-mnist")


@pytest.mark.parametrize("targets", [[None], [0.9, 0.95], [0.8, 0.98]])
def test_tables_are_those_of_the_results(targets):
    assert comparison.table(ROWS, targets) in DOCS


def test_orderings_are_those_of_the_results():
    assert comparison.differences(ROWS) in DOCS


def test_an_ordering_holds_when_its_interval_leaves_out_zero():
    rows = [
        {"label": label, "target": "0.9", "seed": str(seed), "test_accuracy": str(accuracy)}
        for label, accuracies in {"RigL": (90, 91, 92), "SET": (89.0, 90.1, 90.9), "static": (90, 92, 91)}.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    found = comparison.differences(rows)
    assert "| RigL over SET | 0.9 | +1.00 ± 0.25 | yes |" in found
    assert "| RigL over static | 0.9 | +0.00 ± 2.48 | not to be told |" in found
