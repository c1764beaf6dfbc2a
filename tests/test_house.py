"""The rooms of the house depend on each other as CONTRIBUTING.md says."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "src" / "rarefy"


@pytest.fixture
def rooms():
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "scripts" / "rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_arrow_runs_up_and_none_in_a_circle(rooms, capsys):
    assert rooms.main(HOUSE) == 0
    out = capsys.readouterr().out
    assert re.search(r"^floor 0  kernels", out, re.M)
    assert re.search(r" 0 circles, 0 against the order\n$", out)


@pytest.mark.parametrize("room", sorted(path.parent.name for path in HOUSE.glob("*/__init__.py")))
def test_no_circle_inside_a_room(room, rooms):
    assert rooms.main(HOUSE / room) == 0


def test_a_circle_and_an_arrow_up_are_told(rooms, tmp_path, capsys):
    house = tmp_path / "rarefy"
    for room, code in {
        "act": "from rarefy import engine",
        "engine": "def f():\n    import rarefy.act.tables",
        "train": "from rarefy.sparse.base import Sparsifier",
        "sparse": "",
        "attic": "",
    }.items():
        (house / room).mkdir(parents=True)
        (house / room / "__init__.py").write_text(code)
    assert rooms.main(house) == 1
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "5 rooms, 3 arrows, 2 floors, 1 circles, 2 against the order",
        "a circle: act engine",
        "attic has no place in the order",
        "act -> engine runs up",
    ]


def test_the_order_is_the_one_that_contributors_read(rooms):
    line = next(x for x in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if x.startswith("    kernels"))
    read = [group.strip().split(", ") for group in line.split("<-")]
    order = [[room for room in group if not room.startswith("_")] for group in rooms.ORDER]
    assert read == [group for group in order if group]
