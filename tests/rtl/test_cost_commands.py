"""``rarefy rtl synth`` and ``rarefy rtl search`` as a user calls them."""

import pytest

from rarefy.cli import main
from rarefy.rtl import logic
from rarefy.rtl.eda import flow, tools
from tests.cli import printed, refused


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch):
    monkeypatch.setattr(flow, "has", lambda name: False)


def test_synth_prints_both_scripts(capsys):
    assert main(["rtl", "synth", "peer:HardTanh"]) == 0
    out = capsys.readouterr().out
    assert "hardtanh: tanh in bf16, latency 0" in out
    assert "largest error  0.238406" in out
    assert "area  34.5 GE, 829 um2" in out
    assert "speed  45.0 GE" in out
    assert "ns by ABC" in out


def test_synth_of_a_table_with_registers_as_json(capsys):
    result = printed(capsys, "rtl", "synth", "tanh_bf16_ktanh", "--stages", "1", "--script", "area")
    assert result["fpga"] is None
    (only,) = result["synthesis"]
    assert (only["script"], only["flip_flops"], only["delay_ns"]) == ("area", 16, None)
    assert set(only["versions"]) == {"yosys", "library"}


def test_search_writes_a_design_and_a_unit(capsys, tmp_path):
    text, unit = tmp_path / "tanh.sv", tmp_path / "tanh.json"
    options = ["--error", "0.2385", "--kinds", "logic", "--steps", "0", "--output", str(text), "--unit", str(unit)]
    assert main(["rtl", "search", *options]) == 0
    out = capsys.readouterr().out
    assert f"written to  {text}" in out
    assert text.read_text() == logic.load(unit).design().text
    cost = printed(capsys, "rtl", "synth", str(unit), "--script", "area")["synthesis"][0]["gate_equivalents"]
    assert f"{cost:.1f} GE" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synth", "peer:nothing"], "a peer must be one of HardTanh; PLAN"),
        (["synth", "peer:PLAN", "--stages", "1"], "--style, --stages and --lanes are for tables; peer:PLAN is none"),
        (["synth", "nothing"], "table must be a .json file or one of"),
        (["synth", "peer:PLAN", "--script", "small"], "script must be one of area, speed, got 'small'"),
        (["synth", "peer:PLAN", "--liberty", "nothing.lib"], "no liberty file"),
        (["search", "--error", "0.001"], "no tanh in bf16 was found with an error of at most 0.001"),
        (["search", "gelu", "--error", "0.1"], "for odd functions like tanh, gelu is none"),
        (["search", "--error", "0.2", "--output", "a.v"], "--output must be a .sv file, got a.v"),
    ],
)
def test_mistakes_are_told_in_words(capsys, arguments, message):
    assert message in refused(capsys, "rtl", *arguments)


def test_a_missing_program_is_named_with_its_package(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tools, "search_path", lambda: str(tmp_path))
    message = refused(capsys, "rtl", "synth", "peer:HardTanh", "--script", "area", "--fpga")
    assert "apt-get install nextpnr-ice40" in message
