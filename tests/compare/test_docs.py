"""What docs/results/methods.md and autosparse.md say is in results/compare-*.csv and autosparse-variants.csv."""

import csv
import json
import statistics
from pathlib import Path

import pytest

import comparison
import results
from rarefy import sparse

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "results" / "methods.md").read_text()
AUTOSPARSE = (ROOT / "docs" / "results" / "autosparse.md").read_text()
ROWS = comparison.read("fashion-mnist")


@pytest.mark.parametrize("targets", [[None], [0.9, 0.95], [0.8, 0.98]])
def test_tables_are_those_of_the_results(targets):
    assert comparison.table(ROWS, targets) in DOCS


def test_orderings_are_those_of_the_results():
    assert comparison.differences(ROWS) in DOCS


def test_equal_flops_and_resnet20_are_those_of_the_results():
    rows = comparison.read("equal-flops")
    assert comparison.table(rows, [0.12, 0.07, 0.034]) in DOCS
    assert comparison.against(rows, "AutoSparse, accuracy") in DOCS
    assert {row["budget"] for row in rows} == {"flops"}
    assert all(abs(float(row["inference_flops"]) - float(row["target"])) < 1e-3 for row in rows)
    assert comparison.table(comparison.read("resnet20"), [0.9]) in DOCS


def test_blocks_are_those_of_the_results_and_hold():
    rows = comparison.read("blocks")
    assert comparison.table(rows, [0.9]) in DOCS
    assert comparison.table(rows, [None]) in DOCS
    assert comparison.against(rows, "AutoSparse") in DOCS
    # What the page says: no run of blocks fell away, and no layer was masked.
    single = [float(row["test_accuracy"]) for row in rows if row["label"] == "AutoSparse"]
    blocks = [row for row in rows if row["label"] == "AutoSparse, 1x4 blocks"]
    accuracies = [float(row["test_accuracy"]) for row in blocks]
    assert abs(statistics.mean(accuracies) - statistics.mean(single)) < 0.5
    assert statistics.stdev(accuracies) < 0.6
    assert all(min(json.loads(row["layer_densities"]).values()) > 0.03 for row in blocks)


def test_printed_characters_are_those_of_the_results():
    rows = comparison.read("glyphs", comparison.GLYPH_EPOCHS)
    assert comparison.table(rows, [None]) in AUTOSPARSE
    assert comparison.table(rows, [0.1]) in AUTOSPARSE
    assert comparison.against(rows, "AutoSparse, accuracy") in AUTOSPARSE
    assert comparison.by_training(comparison.read("glyphs")) in AUTOSPARSE


def test_the_ablation_is_that_of_the_results():
    assert comparison.table(comparison.read("autosparse"), [0.07]) in AUTOSPARSE
    with (ROOT / "results" / "autosparse-variants.csv").open() as file:
        for row in csv.DictReader(file):
            accuracies = [f"{float(row[key]):.2f}" for key in ("test_accuracy", "test_accuracy_new_norms")]
            assert f"| {row['variant']} | {' | '.join(accuracies)} |" in AUTOSPARSE


def test_the_small_cnn_is_that_of_the_results():
    rows = results.read("fashion-mnist")
    assert {"dense", "AutoSparse, accuracy", "AutoSparse, cost", "STR"} <= {row["method"] for row in rows}
    for method, target in {(row["method"], row["target"]) for row in rows}:
        accuracies = [float(r["test_accuracy"]) for r in rows if (r["method"], r["target"]) == (method, target)]
        assert len(accuracies) >= 3
        start = f"| {method} | {target} | {sum(accuracies) / len(accuracies):.2f} "
        assert start in AUTOSPARSE, start


def test_only_runs_of_one_seed_and_device_are_paired():
    row = {"target": "0.1", "test_accuracy": "90"}
    rows = [{**row, "label": "a", "seed": seed, "device": device} for seed in "01" for device in ("cpu", "gpu")]
    rows += [{**row, "label": "b", "seed": "0", "device": "cpu", "test_accuracy": "88.5"}]
    rows += [{**row, "label": "b", "seed": "2", "device": "gpu", "test_accuracy": "80"}]
    assert comparison.paired(rows, "a", "b", ["0.1"]) == [1.5]
    assert comparison.against(rows, "a").splitlines()[2:] == ["| b | -1.50 |"]


def test_an_ordering_holds_when_its_interval_leaves_out_zero():
    rows = [
        {"label": label, "target": "0.9", "seed": str(seed), "test_accuracy": str(accuracy), "device": "cpu"}
        for label, accuracies in {"RigL": (90, 91, 92), "SET": (89.0, 90.1, 90.9), "static": (90, 92, 91)}.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    found = comparison.differences(rows)
    assert "| RigL over SET | 0.9 | +1.00 ± 0.25 | yes |" in found
    assert "| RigL over static | 0.9 | +0.00 ± 2.48 | not to be told |" in found


def test_the_guides_table_is_what_the_methods_say_of_themselves():
    guide = (ROOT / "docs" / "guides" / "methods.md").read_text()
    for name, info in sparse.list_methods(details=True).items():
        about = f"{info.title} ({info.paper})"
        assert f"| `{name}` | {about} | {info.start} | {info.targeted} | {info.training_flops} |" in guide, name
