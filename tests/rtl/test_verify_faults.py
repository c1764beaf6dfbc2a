"""What verify must not pass: undefined results, lanes, tables, clocks and handshakes that are not as a Design says."""

from dataclasses import replace

import numpy as np
import pytest

from rarefy import act, rtl
from rarefy.rtl.check import formal
from rarefy.rtl.check.simulate import simulate

pytestmark = pytest.mark.slow

PUBLISHED = act.load("tanh_bf16_ktanh")
SMALL = act.load("tanh_e4m3fn")


def changed(design, *changes):
    """The design with parts of its text replaced."""
    text = design.text
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return replace(design, text=text)


@pytest.mark.parametrize(
    "result",
    [
        "assign y = x == 16'h9234 ? 16'hxxxx : result;",
        "assign y = x[15] ? 16'hxxxx : result;",
        "wire [15:0] nothing;\n  assign y = x == 16'h9234 ? nothing : result;",
    ],
)
def test_a_proof_does_not_take_undefined_results(result):
    found = rtl.verify(changed(rtl.emit(PUBLISHED), ("assign y = result;", result)), "formal")
    assert not found.passed
    assert found.first is not None
    assert found.first.expected == int(PUBLISHED.compute([found.first.x])[0])


def test_counterexamples_are_read_whatever_their_width_and_sign():
    wide = PUBLISHED.to_format("fp32")
    one = changed(rtl.emit(wide), ("assign y = result;", "assign y = x == 32'hbf001234 ? 32'h0 : result;"))
    found = rtl.verify(one, "formal").first
    assert found is not None
    assert (found.x, found.y) == (0xBF001234, 0)
    assert found.expected == int(wide.compute([0xBF001234])[0])
    lanes = changed(
        rtl.emit(PUBLISHED, lanes=4),
        ("assign y[16*i +: 16] = result;", "assign y[16*i +: 16] = (i == 3 && a == 16'h9234) ? 16'h0 : result;"),
    )
    found = rtl.verify(lanes, "formal").first
    assert found is not None
    assert (found.x, found.y) == (0x9234, 0)


def test_a_proof_that_fails_counts_without_a_counterexample(monkeypatch):
    design = changed(rtl.emit(SMALL), ("assign y = result;", "assign y = ~result;"))
    monkeypatch.setattr("rarefy.rtl.check.formal._counterexample", lambda *given: None)
    found = rtl.verify(design, "formal")
    assert (found.passed, found.mismatches, found.first) == (False, 1, None)


REGISTER = "always_ff @(posedge clk) y_q <= result;"
CLOCKS = {
    "falling edge": ("always_ff @(negedge clk) y_q <= result;", "falling edge"),
    "latch": ("always_latch if (clk) y_q = result;", "latch"),
    "latch of the other phase": ("always_latch if (!clk) y_q = result;", "latch"),
    "another clock": ("wire other = clk & x[0];\n  always_ff @(posedge other) y_q <= result;", "not clk"),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_clocks_that_are_no_rising_edge_are_faults(name):
    register, fault = CLOCKS[name]
    design = changed(rtl.emit(SMALL, stages=1), (REGISTER, register))
    assert not rtl.verify(design).passed
    proof = rtl.verify(design, "formal")
    assert not proof.passed
    assert any(fault in each for each in proof.faults)


def test_a_latch_between_two_stages_is_found():
    design = rtl.emit(PUBLISHED, stages=2)
    begin = design.text.index("always_ff @(posedge clk) begin")
    latched = design.text[begin:].splitlines()[0]
    other = latched.replace("always_ff @(posedge clk)", "always_latch if (clk)").replace("<=", "=")
    assert not rtl.verify(changed(design, (latched, other))).passed


@pytest.mark.parametrize(
    ("result", "fault"),
    [("assign y = result & {8{&x}}; assign y = result;", "more than one driver"), ("assign y = y ^ result;", "a loop")],
)
def test_a_proof_does_not_take_what_is_no_logic(result, fault):
    found = rtl.verify(changed(rtl.emit(SMALL), ("assign y = result;", result)), "formal")
    assert any(fault in each for each in found.faults)


@pytest.mark.parametrize("stages", [0, 1])
def test_every_lane_sees_every_input(stages):
    design = rtl.emit(SMALL, lanes=4, stages=stages)
    found = rtl.verify(design)
    assert found.passed, found
    assert "in each of 4 lanes" in found.statement
    for wrong in ("{x[8*i+1 +: 7], i == 1}", "(i == 3 && x[8*i +: 8] == 8'h21) ? 8'h00 : x[8*i +: 8]"):
        found = rtl.verify(changed(design, ("wire [7:0] a = x[8*i +: 8];", f"wire [7:0] a = {wrong};")))
        assert not found.passed
    assert found.mismatches == 1
    assert found.first is not None
    assert (found.first.x, found.first.y) == (0x21, 0)


def test_words_of_many_lanes_are_read():
    x = np.random.default_rng(0).integers(0, 1 << 16, (3, 1024))
    assert (simulate(rtl.emit(PUBLISHED, lanes=1024), x).outputs == PUBLISHED.compute(x)).all()


ENABLED = {
    "the write enable is ignored": ("if (we)", ""),
    "the falling edge writes": ("always_ff @(posedge clk)\n    if (we)", "always_ff @(negedge clk)\n    if (we)"),
    "addresses that there are not write": ("if (wa < 6'h20)", "if (wa < 6'h20 || wa > 6'h21)"),
}


@pytest.mark.parametrize("name", ENABLED)
def test_tables_that_are_written_when_they_should_not_be_are_found(name):
    design = rtl.emit(PUBLISHED, "programmable")
    assert not rtl.verify(changed(design, ENABLED[name])).passed


def test_a_programmable_table_with_a_handshake_is_not_written_by_what_passes():
    design = rtl.emit(PUBLISHED, "programmable", stages=1, handshake=True)
    assert not rtl.verify(changed(design, ("if (we)", "if (we || in_valid)"))).passed


HANDSHAKES = {
    "out_valid waits for out_ready": [("assign out_valid = valid_1;", "assign out_valid = valid_1 && out_ready;")],
    "half the throughput": [
        ("wire go_1 = !valid_1 || out_ready;", "wire go_1 = !valid_1 || out_ready; wire in_go = !valid_1;"),
        ("valid_1 <= in_valid;", "valid_1 <= in_valid && in_go;"),
        ("assign in_ready = rst_n && go_1;", "assign in_ready = rst_n && in_go;"),
    ],
    "the falling edge": [("posedge", "negedge")],
}


@pytest.mark.parametrize("name", HANDSHAKES)
def test_handshakes_that_keep_no_promise_are_faults(name):
    design = rtl.emit(SMALL, stages=1, handshake=True)
    assert rtl.verify(changed(design, *HANDSHAKES[name])).faults


def test_a_latency_that_is_not_the_designs_is_a_fault():
    slow = rtl.emit(SMALL, stages=2, handshake=True)
    assert rtl.verify(slow).passed
    assert any("not 1" in fault for fault in rtl.verify(replace(slow, latency=1)).faults)


READY, VALID = "assign in_ready = rst_n && go_1;", "assign out_valid = valid_2;"
UNPROVEN = {
    "nothing comes out": ((VALID, "assign out_valid = 1'b0;"), "out_valid is 0 where a number was taken 2 clocks"),
    "nothing is taken in": ((READY, "assign in_ready = 1'b0;"), "in_ready is 0 where rst_n is 1 and nothing waits"),
    "the reset is inverted": (("(!rst_n)", "(rst_n)"), "out_valid is"),
    "the reset is not heard": (("if (!rst_n) valid_2 <= 1'b0;\n    else", ""), "out_valid is 1 where nothing"),
    "taken during reset": ((READY, "assign in_ready = go_1;"), "in_ready is 1 where rst_n is 0"),
    "a clock late": (
        (VALID, "logic late;\n  always_ff @(posedge clk) late <= valid_2;\n  assign out_valid = late;"),
        "out_valid is",
    ),
    "a clock early": ((VALID, "assign out_valid = valid_1;"), "out_valid is"),
    "never known": ((VALID, "assign out_valid = 1'bx;"), "out_valid is"),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_a_proof_looks_at_the_handshake(name):
    change, fault = UNPROVEN[name]
    found = rtl.verify(changed(rtl.emit(SMALL, stages=2, handshake=True), change), "formal")
    assert (found.passed, found.mismatches, found.first) == (False, 0, None)
    assert any(fault in each for each in found.faults), found.faults


def test_a_proof_of_a_handshake_finds_a_wrong_result():
    wrong = ("y_q <= result;", "y_q <= result == 8'h30 ? 8'h31 : result;")
    found = rtl.verify(changed(rtl.emit(SMALL, stages=1, handshake=True), wrong), "formal")
    assert (found.mismatches, found.faults) == (1, ())
    assert found.first is not None
    assert (found.first.y, found.first.expected) == (0x31, 0x30)


@pytest.mark.parametrize(
    "result",
    [
        "assign y = x == 8'h33 ? 8'bz : result;",
        "assign y = 8'bz;",
        "",
        "logic [7:0] z;\n  always_comb if (x == 8'h33) z = 8'bzzzz0000; else z = result;\n  assign y = z;",
    ],
)
def test_a_proof_does_not_take_a_result_that_floats(result):
    design = changed(rtl.emit(SMALL), ("assign y = result;", result))
    for tool in ("icarus", "formal"):
        found = rtl.verify(design, tool)
        assert found.first is not None
        assert found.first.x == 0x33 or "x" not in result
        assert found.first.expected == int(SMALL.compute([found.first.x])[0]) != found.first.y


def test_a_latch_without_a_clock_is_a_fault():
    latch = "logic [7:0] q;\n  always_latch if (x != 8'h55) q = result;\n  assign y = q;"
    found = rtl.verify(changed(rtl.emit(SMALL), ("assign y = result;", latch)), "formal")
    assert (found.mismatches, found.faults) == (
        0,
        ("a latch, where a register at the rising edge of clk was expected",),
    )


@pytest.mark.parametrize("tool", ["icarus", "formal"])
def test_a_reset_that_does_not_wait_for_the_clock_is_a_fault(tool):
    edges = ("(posedge clk)\n    if (!rst_n)", "(posedge clk or negedge rst_n)\n    if (!rst_n)")
    found = rtl.verify(changed(rtl.emit(SMALL, stages=2, handshake=True), edges), tool)
    wanted = {"icarus": "out_valid or y changed with the inputs", "formal": "set or reset without the clock"}[tool]
    assert any(wanted in each for each in found.faults), found.faults


@pytest.mark.parametrize("tool", ["icarus", "formal"])
@pytest.mark.parametrize(
    ("port", "other", "icarus", "formal"),
    [
        ("output logic [7:0] y", "output logic [8:0] y", "y is of 9 bits", "y is an output of 9 bits"),
        ("output logic [7:0] y", "output logic y", "y is of 1 bits", "y is an output of 1 bits"),
        ("input  logic [7:0] x", "input  logic [15:0] x", "x is of 16 bits", "x is an input of 16 bits"),
        ("output logic [7:0] y", "output logic [7:0] z", "y is missing", "y is none"),
    ],
)
def test_ports_that_are_not_the_designs_are_faults(port, other, icarus, formal, tool):
    design = changed(rtl.emit(SMALL), (port, other), *[("assign y =", "assign z =")] * other.endswith("z"))
    found = rtl.verify(design, tool)
    assert not found.passed
    kind = {"y": "an output", "x": "an input"}[port[-1]]
    wanted = {
        "icarus": f"port {icarus}, the design's is of 8 bits",
        "formal": f"port {formal}, the design's is {kind} of 8 bits",
    }[tool]
    assert wanted in found.faults


@pytest.mark.parametrize("seed", range(3))
def test_small_formats_are_driven_again_and_again(seed):
    held = ("y_q <= result;", "if (y_q != 8'h30 || x[0]) y_q <= result;")
    assert rtl.verify(changed(rtl.emit(SMALL, stages=1), held), seed=seed).mismatches > 1


def test_what_no_tool_accepts_is_told_in_its_own_words():
    design = rtl.emit(SMALL)
    typed = changed(design, ("assign y = result;", "assign y = resul;"))
    with pytest.raises(RuntimeError, match=r"icarus did not run tanh_e4m3fn:\n.*design.sv:\d+: error.*resul'"):
        rtl.verify(typed)
    renamed = changed(design, ("module tanh_e4m3fn", "module other"))
    with pytest.raises(RuntimeError, match='Unable to find the root module "tanh_e4m3fn"'):
        rtl.verify(renamed)
    with pytest.raises(RuntimeError, match="Module `tanh_e4m3fn' not found"):
        rtl.verify(renamed, "formal")


def test_a_proof_without_an_end_says_what_ended_it(monkeypatch):
    slow = changed(rtl.emit(SMALL, stages=1), ("y_q <= result;", "q <= result;"), ("logic [7:0] y_q;", "FILL"))
    count = "logic [7:0] count = 0;\n  always_ff @(posedge clk) count <= count == 99 ? 0 : count + 1;\n"
    wait = changed(slow, ("FILL", f"logic [7:0] q, y_q;\n  {count}  assign y_q = count == 200 ? 8'h00 : q;"))
    with pytest.raises(RuntimeError, match="induction over 4 clocks does not decide tanh_e4m3fn: simulate it"):
        rtl.verify(wait, "formal")
    monkeypatch.setattr("rarefy.rtl.check.formal.tools.yosys", unended(formal.tools.yosys))
    with pytest.raises(RuntimeError, match="no end with tanh_e4m3fn within 300 s"):
        rtl.verify(rtl.emit(SMALL), "formal")


def unended(yosys):
    """Yosys whose proofs take too long."""
    return lambda script, folder: "Interrupted SAT solver: TIMEOUT!" if "sat " in script else yosys(script, folder)
