"""The table of latencies: its file, and what it refuses."""

import json

import pytest

from rarefy.latency import Latency
from tests.sparse.methods import latency


def test_it_is_saved_and_loaded_whole(tmp_path):
    latency().save(tmp_path / "a.json")
    assert Latency.load(tmp_path / "a.json") == latency()


def test_seconds_of_densities():
    assert latency().seconds() == pytest.approx(0.003)
    assert latency().seconds({"3": 0, "6": 0}) == pytest.approx(0.003 - 0.0014 - 0.00065)


@pytest.mark.parametrize("live", [{"nope": 1}, {"0": 289}, {"0": -1}])
def test_what_is_not_there_is_told(live):
    with pytest.raises(ValueError, match="live weights in '(nope|0)': there is (0, 3, 6, 8|with 288 weights)"):
        latency().seconds(live)


def test_what_is_no_mapping_is_told():
    with pytest.raises(TypeError, match=r"live must be a mapping of layers' names to numbers of weights.* got \[1\]"):
        latency().seconds([1])


def change(path, value):
    given = json.loads(json.dumps(latency().to_dict()))
    inner = given
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return given


WRONG = {
    "no layers": change(["layers"], None),
    "falling": change(["layers", 0, "seconds"], [0.1, 0.2, 0.1, 0.3]),
    "not finite": change(["layers", 0, "seconds"], [0.1, 0.2, 0.3, float("inf")]),
    "negative": change(["layers", 0, "seconds"], [-0.1, 0.2, 0.3, 0.3]),
    "short": change(["layers", 0, "seconds"], [0.1, 0.2]),
    "empty": change(["layers", 0, "densities"], []),
    "no end": change(["layers", 0, "densities"], [0.0, 0.1, 0.6, 0.9]),
    "text": change(["layers", 0, "weights"], "many"),
    "no weights": change(["layers", 0, "weights"], 0),
    "fixed": change(["fixed"], float("nan")),
    "block": change(["block"], [8, 0]),
    "half a block": change(["block"], [4]),
    "an empty list": change(["layers"], []),
    "precision": change(["precision"], "int4"),
    "a huge number": change(["fixed"], 10**400),
    "infinitely many weights": change(["layers", 0, "weights"], float("inf")),
    "half a weight": change(["layers", 0, "weights"], 1.5),
    "a true weight": change(["layers", 0, "weights"], True),
    "too many weights": change(["layers", 0, "weights"], 1 << 53),
    "no name": change(["layers", 0, "name"], None),
    "text for densities": change(["layers", 0, "densities"], "01"),
    "a true density": change(["layers", 0, "densities"], [0, 0.1, 0.6, True]),
    "text for a number": change(["fixed"], "0.1"),
    "an infinite block": change(["block"], [float("inf"), 1]),
    "a huge block": change(["block"], [10**400, 1]),
    "text for a block": change(["block"], "11"),
    "a side and a half": change(["block"], [1.5, 1]),
    "three sides of a block": change(["block"], [1, 1, 1]),
    "pairs about it": change(["about"], [["cpu", "none"]]),
    "layers by name": change(["layers"], {"0": {}}),
}


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_another_file_is_refused(given, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=r"a.json: .*; rarefy.engine.latency measures"):
        Latency.load(tmp_path / "a.json")


def test_whole_numbers_are_seconds_and_densities_too():
    given = change(["layers", 0, "densities"], [0, 0.1, 0.6, 1])
    assert Latency.from_dict({**given, "fixed": 1}).seconds() == pytest.approx(1.0027)


@pytest.mark.parametrize("text", [b"\xff{", b"[" * 100_000, b'{"fixed": 1' + b"0" * 5000 + b"}"])
def test_what_is_no_json_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"a.json: .*; rarefy.engine.latency measures"):
        Latency.load(tmp_path / "a.json")
