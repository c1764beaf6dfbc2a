"""``rarefy table`` and ``rarefy bench act``: one result on standard output, and an error in words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rarefy import act
from rarefy.act.fit import shipped
from rarefy.act.spec import error
from rarefy.cli import main
from tests.cli import printed, refused

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", act.list_tables())
def test_show_every_shipped_table(name, capsys):
    result = printed(capsys, "table", "show", name)
    assert act.Table.from_json(json.dumps(result["table"])) == act.load(name)
    assert result["errors"]["max_abs"] == error.of(act.load(name)).max_abs


def test_show_for_people(capsys):
    assert main(["table", "show", "tanh_bf16_ktanh"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " largest error  0.00892035 at x = -0.621094" in lines
    assert "            T2  3.75: magnitudes above are 1" in lines
    assert lines[-1].split() == ["31", "126", "4", "110"]
    assert main(["table", "show"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "tanh_fp16_shifts       tanh in fp16: 11 rows, segments"
    assert printed(capsys, "table", "show") == act.list_tables()


def test_show_a_file_and_a_function_of_ones_own(capsys):
    Path("softsign.py").write_text("def softsign(x):\n    return x / (1 + abs(x))\n")
    fitted = printed(capsys, "table", "fit", "softsign.py:softsign", "--form", "segments", "--output", "mine.json")
    assert fitted["errors"]["misrounded"] == 0
    assert fitted["proven"]["statement"] == "correctly rounded on every input"
    assert fitted["file"] == "mine.json"
    shown = printed(capsys, "table", "show", "mine.json")
    assert shown == {"table": fitted["table"], "errors": None}
    assert (shown["table"]["name"], shown["table"]["function"]) == ("mine", "softsign")
    assert main(["table", "show", "mine.json"]) == 0
    assert "softsign in bf16, symmetry odd" in capsys.readouterr().out
    wide = act.load("tanh_bf16_ktanh").to_format("fp32")
    wide.save("wide.json")
    assert printed(capsys, "table", "show", "wide.json")["errors"] is None


def test_fit_gives_what_the_library_gives(capsys):
    fitted = printed(capsys, "table", "fit", "--monotone", "--output", "a.json")
    assert act.load("a.json").rows == act.load("tanh_bf16_monotone").rows
    assert fitted["proven"]["least"] == fitted["errors"]["max_abs"]
    assert fitted["errors"]["falls"] == 0
    few = printed(capsys, "table", "fit", "--monotone", "--few-shifts")
    assert few["table"]["rows"] == [list(row) for row in act.load("tanh_bf16_few_shifts").rows]
    assert few["file"] is None
    assert printed(capsys, "table", "fit", "--form", "linear")["table"]["rows"] == [
        list(row) for row in act.load("tanh_bf16").rows
    ]
    published = printed(capsys, "table", "fit", "tanh", "--t2", "3.75", "--rows", "32", "--format", "bf16")
    assert published["proven"]["least"] == pytest.approx(0.008920, abs=5e-7)


@pytest.mark.slow
def test_fit_by_other_objectives_and_formats(capsys):
    ulp = printed(capsys, "table", "fit", "--objective", "max_ulp")
    assert ulp["errors"]["max_ulp"] == ulp["proven"]["least"] == 5
    rmse = printed(capsys, "table", "fit", "--objective", "rmse")
    assert rmse["errors"]["rmse"] < ulp["errors"]["rmse"]
    assert "least mean square" in rmse["proven"]["statement"]
    assert printed(capsys, "table", "fit", "--objective", "rmse", "--monotone")["proven"] is None
    eight = printed(capsys, "table", "fit", "--format", "e4m3fn", "--form", "carry")
    assert eight["errors"]["misrounded"] == 0
    wide = printed(capsys, "table", "fit", "--t1", "0.125", "--t2", "8", "--rows", "64")
    assert wide["table"]["index"] == {"exponent_bits": 3, "mantissa_bits": 3}
    near = printed(capsys, "table", "fit", "gelu", "--within", "0.01", "--fraction-bits", "9")
    assert near["table"]["form"] == "segments"
    assert near["proven"] is None
    arctan = printed(capsys, "table", "fit", "numpy:arctan", "--form", "linear", "--rows", "64", "--within", "0.01")
    assert arctan["errors"]["max_abs"] <= 0.01


def test_fit_for_people(capsys):
    assert main(["table", "fit", "--form", "carry", "--rows", "64", "--monotone", "--output", "c.json"]) == 0
    out = capsys.readouterr().out
    assert (
        "proven  by trying every (E, r, b): no such table has a largest error below 0.005373 between T1 and T2" in out
    )
    assert "written to  c.json" in out


def test_shipped_tables_are_made_again_and_proven(capsys, monkeypatch):
    few = ("tanh_bf16_ktanh", "tanh_bf16_monotone", "gelu_fp16")  # tests/act/test_table.py makes all of them
    monkeypatch.setattr(shipped, "BUILDERS", {name: shipped.BUILDERS[name] for name in few})
    assert main(["table", "fit", "--shipped", "tables"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(few) + 1} tables in tables"
    assert all(line.startswith("proven ") for line in lines[:-1])
    assert "largest error 0.008920" in lines[0]
    assert act.load("tables/gelu_fp16.json") == act.load("gelu_fp16")
    # a table that is not the shipped one is told
    monkeypatch.setattr(shipped, "BUILDERS", {"tanh_bf16_ktanh": shipped.BUILDERS["tanh_bf16_monotone"]})
    monkeypatch.setattr(shipped, "load", lambda name: act.load("tanh_bf16_ktanh"))
    assert main(["table", "fit", "--shipped", "tables", "--json"]) == 1
    assert [t["holds"] for t in json.loads(capsys.readouterr().out)["tables"]] == [False, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "ktanh"], "table must be a .json file or one of"),
        (["show", "none.json"], "No such file"),
        (["fit", "sigmoid", "--form", "shift"], "for odd functions, sigmoid is none"),
        (["fit", "--form", "cubic"], "--form must be one of shift, carry, linear, segments"),
        (["fit", "--format", "bf17"], "format must be one of"),
        (["fit", "--format", "fp32"], "fp32 is too wide"),
        (["fit", "--rows", "33"], "--rows must be a power of two"),
        (["fit", "--rows", "2"], "which need at least 4 rows"),
        (["fit", "--t1", "0"], "needs 0 < --t1 <= --t2"),
        (["fit", "--objective", "mse"], "objective must be one of"),
        (["fit", "gelu", "--rows", "8"], "--rows is not for tables of the form segments"),
        (["fit", "gelu", "--few-shifts"], "--few-shifts is not for"),
        (["fit", "--within", "0.1"], "--within is not for tables of the form shift"),
        (["fit", "relu"], "FUNCTION must be one of tanh,"),
        (["fit", "nothing.py:f"], "No such file"),
        (["fit", "nothing_at_all:f"], "No module named"),
        (["fit", "numpy:nothing"], "numpy has no function 'nothing'"),
        (["fit", "--output", "table.txt"], "--output must be a .json file"),
        (["fit", "--shipped", "tables", "--monotone"], "leave monotone out"),
        (["fit", "tanh", "--shipped", "tables"], "leave function out"),
    ],
    ids=" ".join,
)
def test_errors_in_words(words, message, capsys):
    assert message in refused(capsys, "table", *words)
    assert not list(Path.cwd().iterdir())


def test_help_names_every_option(capsys):
    for words in (["bench", "act"], ["table", "show"], ["table", "fit"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, "--help"])
        assert stop.value.code == 0
        assert "--json" in capsys.readouterr().out


def test_the_command_line_starts_without_the_activations():
    program = (
        "import sys; from rarefy.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: print(any(name.startswith('rarefy.act') for name in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"
