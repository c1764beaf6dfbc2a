"""``rarefy rtl``: one result on standard output, and an error in words."""

import shlex
from pathlib import Path

import pytest

from rarefy import act, rtl
from rarefy.cli import main
from rarefy.rtl.eda import tools
from tests.cli import printed, refused


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_emit_writes_what_its_header_says(capsys):
    words = ("emit", "tanh_bf16_ktanh", "--format", "fp32", "--stages", "2", "--nan", "quiet", "--top", "unit")
    result = printed(capsys, "rtl", *words, "--output", "unit.sv")
    text = Path("unit.sv").read_text()
    command = "rarefy rtl emit tanh_bf16_ktanh --format fp32 --stages 2 --nan quiet --top unit"
    assert f"// made by: {command}\n" in text
    assert result["about"]["command"] == command
    assert (result["top"], result["latency"], result["file"]) == ("unit", 2, "unit.sv")
    wide = act.load("tanh_bf16_ktanh").to_format("fp32")
    assert text == rtl.emit(wide, stages=2, nan="quiet", top="unit", command=command).text
    assert main(["rtl", "emit", "tanh_bf16_ktanh"]) == 0
    assert (
        capsys.readouterr().out == rtl.emit(act.load("tanh_bf16_ktanh"), command="rarefy rtl emit tanh_bf16_ktanh").text
    )


def test_emit_takes_a_table_from_a_file(capsys):
    act.load("silu_e5m2").save("mine.json")
    result = printed(
        capsys, "rtl", "emit", "mine.json", "--style", "flat", "--stages", "1", "--handshake", "--lanes", "2"
    )
    assert (
        result["text"]
        == rtl.emit(
            act.load("silu_e5m2"),
            "flat",
            stages=1,
            handshake=True,
            lanes=2,
            command="rarefy rtl emit mine.json --style flat --stages 1 --handshake --lanes 2",
        ).text
    )
    assert [port["name"] for port in result["ports"]][:2] == ["clk", "rst_n"]


def test_the_command_of_a_header_makes_the_unit_again(capsys):
    act.load("tanh_e4m3fn").save("my table's.json")
    text = printed(capsys, "rtl", "emit", "my table's.json", "--top", "unit")["text"]
    command = next(line for line in text.splitlines() if "made by" in line).partition("made by: ")[2]
    words = shlex.split(command)
    assert words == ["rarefy", "rtl", "emit", "my table's.json", "--top", "unit"]
    assert printed(capsys, *words[1:])["text"] == text
    assert "top must be a name of letters" in refused(capsys, "rtl", "emit", "tanh_e4m3fn", "--top", "")


def test_verify_says_what_was_compared(capsys):
    result = printed(capsys, "rtl", "verify", "tanh_e5m2", "--stages", "1", "--handshake", "--seed", "7")
    assert (result["passed"], result["inputs"], result["mismatches"], result["first"]) == (True, 256, 0, None)
    stalled = "all inputs of e5m2, with random stalls on both sides and resets in between (seed 7)"
    assert result["statement"].endswith(stalled)
    high = printed(
        capsys, "rtl", "verify", "tanh_bf16_shifts", "--format", "fp32", "--tool", "formal", "--against-narrow"
    )
    assert (high["passed"], high["inputs"], high["exceptions"]) == (True, 1 << 32, ["NaN"])
    assert main(["rtl", "verify", "tanh_e5m2", "--tool", "formal"]) == 0
    assert "tanh_e5m2: equal to the truth table of its model for all 2^8 inputs" in capsys.readouterr().out


def test_verify_exits_with_one_where_something_differs(capsys, monkeypatch):
    right = rtl.emit
    monkeypatch.setattr(rtl, "emit", lambda *a, **k: _changed(right(*a, **k)))
    result = printed(capsys, "rtl", "verify", "tanh_e5m2", "--tool", "formal", status=1)
    assert not result["passed"]
    assert main(["rtl", "verify", "tanh_e5m2", "--tool", "formal"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert f"x = {result['first']['x']:#04x} gives {result['first']['y']:#04x}" in out


def _changed(design: rtl.Design) -> rtl.Design:
    from dataclasses import replace

    return replace(design, compute=lambda x: design.compute(x) ^ (x == 0x3C))


def test_errors_are_words(capsys, monkeypatch, tmp_path):
    assert "table must be a .json file or one of" in refused(capsys, "rtl", "emit", "nothing")
    assert "--output must be a .sv file" in refused(capsys, "rtl", "emit", "tanh_e5m2", "--output", "unit.v")
    assert "style must be one of" in refused(capsys, "rtl", "emit", "tanh_e5m2", "--style", "small")
    assert "needs --format" in refused(capsys, "rtl", "verify", "tanh_bf16", "--tool", "formal", "--against-narrow")
    monkeypatch.setattr(tools, "search_path", lambda: str(tmp_path))
    assert "apt-get install iverilog" in refused(capsys, "rtl", "verify", "tanh_e5m2")
