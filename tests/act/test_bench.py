import csv
import json

import pytest

from rarefy.bench import act as bench
from rarefy.cli import main
from tests.cli import refused


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench, "_SLICE", 2e4)
    monkeypatch.setattr(bench, "SIZES", {"L1": 1 << 10, "L2": 1 << 11, "DRAM": 1 << 12})


def test_json_and_csv(tmp_path, capsys):
    options = ["--json", "--sizes", "L2", "--rounds", "1", "--no-inductor", "--csv", str(tmp_path / "a.csv")]
    assert main(["bench", "act", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"environment", "measured", "targets"}
    entries = {(m["dtype"], m["entry"]) for m in printed["measured"]}
    assert {("bfloat16", "kernel tanh exact"), ("bfloat16", "torch.tanh"), ("float32", "kernel tanh ktanh")} <= entries
    assert all(m["ns"] >= m["least_ns"] > 0 for m in printed["measured"])
    assert {"claim", "value", "bound", "least", "met"} == set(printed["targets"][0])
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(printed["measured"])
    assert rows[0]["command"] == "rarefy bench act --sizes L2 --rounds 1 --no-inductor"


def test_table_for_people(capsys):
    assert main(["bench", "act", "--sizes", "L1", "--rounds", "1", "--no-inductor"]) == 0
    printed = capsys.readouterr().out
    assert "L1 bfloat16" in printed
    assert "call on 8 elements" in printed


def test_targets_judge_both_ways():
    found = [
        bench.Measured("L2", "bfloat16", "torch.tanh", 1.0, 1.0),
        bench.Measured("L2", "bfloat16", "kernel tanh exact", 0.05, 0.05),
        bench.Measured("L2", "bfloat16", "memcpy", 0.025, 0.025),
    ]
    judged = {t.claim: t for t in bench.targets(found)}
    assert not judged["tanh exact: times torch.tanh, L2"].met
    assert judged["tanh exact: of memcpy, L2"].met


def test_bad_options(capsys):
    assert (
        refused(capsys, "bench", "act", "--sizes", "L3")
        == "rarefy: sizes must be among L1, L2, DRAM and rounds at least 1, got ['L3']\n"
    )
    with pytest.raises(ValueError, match="sizes must be among"):
        bench.run(["L3"])
    with pytest.raises(ValueError, match="rounds at least 1"):
        bench.run(["L1"], 0)
