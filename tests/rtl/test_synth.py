"""Synthesis: known areas, depth by hand, registers, and what is said when a program is missing."""

import json
import stat

import numpy as np
import pytest

from rarefy import act, rtl
from rarefy.act.spec.formats import E4M3
from rarefy.bench import rtl as peers
from rarefy.rtl.design import About, Design, Port
from rarefy.rtl.eda import flow, fpga, tools


def gates(body, clock=None):
    """A design of 8 bits with a body of your own."""
    ports = (Port("x", "input", 8), Port("y", "output", 8))
    head = "input wire clk, " if clock else ""
    text = f"module toy ({head}input wire [7:0] x, output wire [7:0] y);\n{body}\nendmodule\n"
    ports = (Port("clk", "input", 1), *ports) if clock else ports
    return Design("toy", text, E4M3, 1 if clock else 0, ports, np.asarray, About("toy", "none"), clock=clock)


# Gate equivalents by the area script and OSU 0.18 um, as they were first measured with another generator.
@pytest.mark.parametrize(
    ("design", "golden"),
    [
        (lambda: rtl.emit(act.load("tanh_bf16_ktanh"), nan="quiet"), 172),
        (peers.hard_tanh, 35),
        (lambda: peers.constants(64), 165),
    ],
)
def test_areas_are_the_known_ones(design, golden):
    found = rtl.synth(design(), timing=False)
    assert found.gate_equivalents == pytest.approx(golden, rel=0.03)
    assert found.delay_ns is None
    assert found.flip_flops == 0
    assert 0.5 < found.abc_delay_ns < 4.0


def test_the_speed_script_is_faster_and_larger():
    area, speed = (rtl.synth(peers.constants(64), script=script, timing=False) for script in ("area", "speed"))
    assert speed.abc_delay_ns < area.abc_delay_ns
    assert speed.area > area.area


def test_gates_by_hand():
    # eight inverters, one deep; then a chain of exclusive ors, of which the last bit needs seven
    inverted = rtl.synth(gates("assign y = ~x;"), timing=False)
    assert (inverted.cells, inverted.depth) == (8, 1)
    assert inverted.gate_equivalents == pytest.approx(8 * 16 / 24)
    nand = rtl.synth(gates("assign y = {7'd0, ~(x[0] & x[1])};"), timing=False)
    assert nand.gate_equivalents == pytest.approx(1.0)
    wires = rtl.synth(gates("assign y = x;"), timing=False)
    assert (wires.cells, wires.area, wires.depth) == (0, 0.0, 0)


def test_registers_are_mapped_and_cut_the_depth():
    both = rtl.synth(gates("reg [7:0] r;\nalways @(posedge clk) r <= ~x;\nassign y = ~r;", clock="clk"), timing=False)
    assert both.flip_flops == 8
    assert both.depth == 1


def test_a_liberty_of_your_own_and_what_is_not_one(tmp_path):
    own = tmp_path / "own.lib"
    own.write_bytes(flow.osu018().read_bytes())
    cells = flow.library(own)
    assert (cells.name, cells.nand2, cells.driver) == ("own", 24.0, "INVX2")
    assert cells.flip_flops == {"DFFNEGX1", "DFFPOSX1", "DFFSR"}
    found = rtl.synth(peers.hard_tanh(), liberty=own, timing=False)
    assert found.library == "own"
    assert found.area == rtl.synth(peers.hard_tanh(), timing=False).area
    with pytest.raises(FileNotFoundError, match="no liberty file"):
        rtl.synth(peers.hard_tanh(), liberty=tmp_path / "none.lib")
    (tmp_path / "empty.lib").write_text("library (empty) { }\n")
    with pytest.raises(ValueError, match="no cell named like a two-input NAND"):
        rtl.synth(peers.hard_tanh(), liberty=tmp_path / "empty.lib")


def test_wrong_arguments_and_broken_designs():
    with pytest.raises(ValueError, match="script must be one of area, speed, got 'fast'"):
        rtl.synth(peers.hard_tanh(), script="fast")
    with pytest.raises(RuntimeError, match="failed"):
        rtl.synth(gates("assign y = nothing_of_this_name(x);"), timing=False)
    with pytest.raises(ValueError, match="timing must be True or False, got the text 'no'"):
        rtl.synth(peers.hard_tanh(), timing="no")
    for seeds in ((), 3):
        with pytest.raises(ValueError, match="seeds must hold at least one number"):
            fpga.place(peers.hard_tanh(), seeds=seeds)
    with pytest.raises(ValueError, match="a seed must be a whole number from 0 to 2147483647, got 1.5"):
        fpga.place(peers.hard_tanh(), seeds=(1.5,))
    for function in (rtl.synth, rtl.place):
        with pytest.raises(TypeError, match=f"{function.__name__} takes a Design, got str"):
            function("hardtanh")


def test_missing_programs_name_their_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(rtl.MissingToolError, match="apt-get install opensta"):
        rtl.synth(peers.hard_tanh(), timing=True)
    with pytest.raises(rtl.MissingToolError, match="apt-get install nextpnr-ice40"):
        fpga.place(peers.hard_tanh())
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: None)
    tools.yosys_version.cache_clear()
    with pytest.raises(rtl.MissingToolError, match=r"pyosys \(pip install 'rarefy\[rtl\]'\)"):
        rtl.synth(peers.hard_tanh())
    with pytest.raises(rtl.MissingToolError, match="the search needs yosys-abc"):
        flow.abc("", flow.library(), "", tmp_path)
    monkeypatch.setattr(flow, "_OSU018", "no/such/file")
    with pytest.raises(rtl.MissingToolError, match="apt-get install qflow-tech-osu018"):
        flow.osu018()


def program(folder, name, text):
    path = folder / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_opensta_is_asked_and_read(monkeypatch, tmp_path):
    script = tmp_path / "asked.tcl"
    program(
        tmp_path,
        "sta",
        f"""if [ "$1" = -version ]; then echo 9.8.7; exit; fi
cp "$2" {script}
echo "           8.1800   slack (MET)"
echo "Total                  1.0e-03   2.0e-03   5.0e-09   3.0e-03 100.0%"
""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = rtl.synth(peers.hard_tanh(), timing=True)
    assert found.delay_ns == pytest.approx(10 - 8.18)
    assert found.energy_pj == pytest.approx(30.0)
    assert found.versions["sta"] == "9.8.7"
    assert json.loads(found.to_json())["delay_ns"] == found.delay_ns
    asked = script.read_text().splitlines()
    # the sign of the stimulus is up half of the time; the top exponent bit only from 2 on
    duty = {line.split("{")[1].split("}")[0]: float(line.split()[-1]) for line in asked if "-input_ports" in line}
    assert set(duty) == {f"x[{i}]" for i in range(16)}
    assert duty["x[15]"] == pytest.approx(0.5, abs=0.05)
    assert duty["x[14]"] == pytest.approx(0.0455, abs=0.01)
    program(tmp_path, "sta", 'if [ "$1" = -version ]; then echo 9.8.7; exit; fi\necho nothing\n')
    with pytest.raises(RuntimeError, match="OpenSTA reported no timing of hardtanh: nothing"):
        rtl.synth(peers.hard_tanh(), timing=True)


def test_placement_is_the_median_of_the_seeds(monkeypatch, tmp_path):
    program(
        tmp_path,
        "nextpnr-ice40",
        """if [ "$1" = --version ]; then echo 'nextpnr-ice40 -- (Version 0.9)' >&2; exit; fi
while [ "$1" != --seed ]; do shift; done
echo "{\\"fmax\\": {\\"clk\\": {\\"achieved\\": $((100 + $2 * $2)).5}}}" > report.json
""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = fpga.place(peers.hard_tanh())
    assert found.all_mhz == (101.5, 104.5, 109.5, 116.5, 125.5)
    assert found.fmax_mhz == 109.5
    assert found.versions["nextpnr"] == "0.9"
    assert found.flip_flops == 32
    assert 0 < found.luts < 60
    assert json.loads(found.to_json())["luts"] == found.luts


def test_registers_stand_around_a_design_but_not_twice():
    combinational = fpga.registered(peers.hard_tanh())
    assert combinational.count("<=") == 2
    pipelined = fpga.registered(rtl.emit(act.load("tanh_bf16_ktanh"), stages=2))
    assert pipelined.count("<=") == 1
