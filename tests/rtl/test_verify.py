"""Every unit on every input, by simulation and by proof; and that a changed row or register is found."""

from dataclasses import replace

import pytest

from rarefy import act, rtl
from rarefy.act import Table
from rarefy.act.spec import formats
from rarefy.rtl.eda import tools

pytestmark = pytest.mark.slow

PUBLISHED = act.load("tanh_bf16_ktanh")
CARRY = act.load("tanh_bf16_carry64")


def units() -> list[tuple[str, Table]]:
    """The four functions in the formats of at most 16 bits."""
    shifts = [
        f"{function}_{fmt}_shifts" for fmt in ("bf16", "fp16") for function in ("tanh", "sigmoid", "silu", "gelu")
    ]
    exact = [f"{function}_{fmt}" for fmt in ("e4m3fn", "e5m2") for function in ("tanh", "sigmoid", "silu", "gelu")]
    return [(name, act.load(name)) for name in [*shifts, *exact]]


def mutant(table: Table) -> Table:
    """One row of the middle, one step off."""
    t = len(table.rows) // 2 + 4
    *row, last = table.rows[t]
    return replace(table, rows=(*table.rows[:t], (*row, last + (1 << table.fraction_bits)), *table.rows[t + 1 :]))


def altered(table: Table, **arguments: object) -> rtl.Design:
    """The hardware of a mutant that is said to be the table's."""
    right = rtl.emit(table, **arguments)
    return replace(rtl.emit(mutant(table), **arguments), compute=right.compute, table=table, setup=right.setup)


SIMULATED = {
    "K-TanH": (PUBLISHED, {}),
    "carry, two stages, three lanes": (CARRY, {"stages": 2, "lanes": 3, "nan": "quiet"}),
    "programmable, stalled": (CARRY, {"style": "programmable", "stages": 2, "handshake": True, "lanes": 8}),
    "programmable, combinational": (PUBLISHED, {"style": "programmable", "nan": "none"}),
    "linear, one stage, stalled": (act.load("tanh_bf16"), {"stages": 1, "handshake": True, "lanes": 8}),
    "products": (act.load("gelu_e4m3fn"), {"stages": 2}),
    "flat": (act.load("silu_e5m2"), {"style": "flat", "stages": 1, "handshake": True}),
    "silu": (act.load("silu_fp16_shifts"), {"lanes": 8}),
    "gelu": (act.load("gelu_fp16_shifts"), {"lanes": 8, "stages": 1}),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_simulation_equals_the_model_on_all_inputs(name):
    table, arguments = SIMULATED[name]
    found = rtl.verify(rtl.emit(table, **arguments))
    assert found.passed, found
    assert found.inputs == 1 << formats.get(table.format).bits
    assert set(found.versions) == {"cocotb", "icarus"}


@pytest.mark.parametrize(("name", "table"), units(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_function_in_every_narrow_format_is_proven(name, table):
    found = rtl.verify(rtl.emit(table), "formal")
    assert found.passed, found
    assert found.inputs == 1 << formats.get(table.format).bits


@pytest.mark.parametrize("function", ["tanh", "sigmoid", "silu", "gelu"])
def test_every_function_in_float32_is_proven(function):
    narrow = act.load(f"{function}_bf16_shifts")
    wide = rtl.emit(narrow.to_format("fp32"))
    found = rtl.verify(wide, "formal")
    assert found.passed, found
    assert found.statement == "equal to its table's definition for all 2^32 inputs"
    high = rtl.verify(wide, "formal", against=rtl.emit(narrow))
    assert high.passed, high
    assert high.exceptions[0] == "NaN"
    assert all("steep row" in each for each in high.exceptions[1:])
    assert (len(high.exceptions) == 1) == (function == "tanh")


@pytest.mark.parametrize("table", [PUBLISHED, CARRY], ids=lambda table: table.form)
def test_float32_ktanh_has_the_high_bits_of_bfloat16(table):
    wide = rtl.emit(table.to_format("fp32"))
    found = rtl.verify(wide, "formal", against=rtl.emit(table))
    assert found.passed, found
    assert "which the narrow format cannot tell from T2" in found.exceptions[1]
    assert rtl.verify(rtl.emit(table.to_format("fp32"), stages=2, nan="quiet"), "formal").passed


@pytest.mark.parametrize("style", ["shift_add", "flat"])
@pytest.mark.parametrize("stages", [0, 1, 2])
def test_styles_and_stages_are_proven_equal(style, stages):
    reference = rtl.emit(PUBLISHED, "flat" if style == "shift_add" else "shift_add", top="other")
    found = rtl.verify(rtl.emit(PUBLISHED, style, stages=stages, handshake=stages > 0), "formal", against=reference)
    assert found.passed, found


@pytest.mark.parametrize("nan", ["quiet", "none"])
@pytest.mark.parametrize("name", ["tanh_bf16_ktanh", "tanh_bf16_carry64", "tanh_bf16", "silu_bf16_shifts"])
def test_nan_policies_are_proven(name, nan):
    assert rtl.verify(rtl.emit(act.load(name), nan=nan), "formal").passed


def test_simulation_finds_a_changed_row():
    design = altered(PUBLISHED, lanes=8)
    found = rtl.verify(design)
    assert not found.passed
    # the 16 inputs of the row, of both signs
    assert found.mismatches == 32
    first = found.first
    assert first is not None
    assert (first.expected, first.y) == (int(PUBLISHED.compute([first.x])[0]), first.expected + 1)


def test_simulation_finds_a_changed_word_of_a_programmable_table():
    design = rtl.emit(PUBLISHED, "programmable", lanes=8)
    address, word = design.setup[20]
    written = (*design.setup[:20], (address, word ^ 1), *design.setup[21:])
    assert rtl.verify(replace(design, setup=written)).mismatches == 32


@pytest.mark.parametrize("name", ["tanh_bf16_ktanh", "tanh_bf16_carry64", "silu_bf16_shifts", "gelu_fp16_shifts"])
def test_a_proof_finds_a_changed_row(name):
    table = act.load(name)
    found = rtl.verify(altered(table), "formal")
    assert found.mismatches == 1
    first = found.first
    assert first is not None
    assert first.expected == int(table.compute([first.x])[0]) != first.y


def test_proofs_of_float32_find_a_changed_row():
    wide = PUBLISHED.to_format("fp32")
    design = altered(wide)
    found = rtl.verify(design, "formal")
    assert found.first is not None
    assert found.first.expected == int(wide.compute([found.first.x])[0])
    steps = replace(mutant(PUBLISHED).to_format("fp32"), name="changed")
    high = rtl.verify(replace(rtl.emit(steps), table=wide), "formal", against=rtl.emit(PUBLISHED))
    assert high.first is not None
    assert high.first.expected == int(PUBLISHED.compute([high.first.x >> 16])[0]) != high.first.y


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("if (go_2) y_q <= result;", "y_q <= result;"),  # what waits is overwritten
        ("valid_1 <= in_valid;", "valid_1 <= in_valid && !valid_2;"),  # numbers are lost
        ("valid_2 <= valid_1;", "valid_2 <= valid_1 || valid_2;"),  # numbers are made up
        ("assign in_ready = rst_n && go_1;", "assign in_ready = 1'b0;"),  # nothing is taken
    ],
)
def test_stalls_find_a_wrong_pipeline(right, wrong):
    design = rtl.emit(act.load("tanh_e4m3fn"), stages=2, handshake=True)
    assert design.text.count(right) == 1
    found = rtl.verify(replace(design, text=design.text.replace(right, wrong)))
    assert not found.passed


def test_unknown_bits_are_mismatches():
    design = rtl.emit(act.load("tanh_e5m2"))
    broken = replace(design, text=design.text.replace("wire [7:0] result = {", "wire [7:0] result = {1'bx ^ "))
    assert broken.text != design.text
    found = rtl.verify(broken)
    assert found.mismatches == 256
    assert found.first is not None
    assert found.first.y is None


def test_a_design_that_no_simulator_accepts_is_an_error_in_words():
    design = rtl.emit(act.load("tanh_e5m2"))
    with pytest.raises(RuntimeError, match="icarus did not run tanh_e5m2"):
        rtl.verify(replace(design, text=design.text.replace("endmodule", "")))
    with pytest.raises(RuntimeError, match="Yosys 0.70 failed"):
        rtl.verify(replace(design, text=design.text.replace("endmodule", "")), "formal")


def test_missing_tools_are_named_with_what_to_install(monkeypatch, tmp_path):
    design = rtl.emit(PUBLISHED)
    monkeypatch.setattr(tools, "search_path", lambda: str(tmp_path))
    with pytest.raises(rtl.MissingToolError, match="simulation needs iverilog.*apt-get install iverilog"):
        rtl.verify(design)
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(rtl.MissingToolError, match=r"cocotb.*pip install 'rarefy\[rtl\]'"):
        rtl.verify(design)
    with pytest.raises(rtl.MissingToolError, match=r"yosys.*pip install 'rarefy\[rtl\]'"):
        rtl.verify(design, "formal")


def test_what_is_no_design_or_seed_is_refused():
    design = rtl.emit(PUBLISHED)
    with pytest.raises(
        TypeError, match=r"verify takes a Design, got ShiftTable: rarefy\.rtl\.emit makes one of a table"
    ):
        rtl.verify(PUBLISHED)
    with pytest.raises(TypeError, match="against must be a Design, got ShiftTable"):
        rtl.verify(design, "formal", against=PUBLISHED)
    for seed in (1.5, True, "1", 1 << 32):
        with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 4294967295"):
            rtl.verify(design, seed=seed)


def test_arguments_that_do_not_go_together_are_refused():
    design = rtl.emit(PUBLISHED)
    wide = rtl.emit(PUBLISHED.to_format("fp32"))
    for arguments, message in (
        ({"tool": "vcs"}, "tool must be one of icarus, verilator, formal, got 'vcs'"),
        ({"against": design}, 'against goes with tool="formal"'),
        ({"tool": "formal", "against": design}, "both designs are named tanh_bf16_ktanh"),
        ({"tool": "formal", "against": wide}, "tanh_bf16_ktanh_fp32 is of fp32"),
        ({"tool": "formal", "against": rtl.emit(PUBLISHED, stages=1, top="late")}, "must be combinational"),
        ({"seed": -1}, "seed must be"),
    ):
        with pytest.raises(ValueError, match=message):
            rtl.verify(design, **arguments)
    with pytest.raises(ValueError, match="programmable table.*simulate it"):
        rtl.verify(rtl.emit(PUBLISHED, "programmable"), "formal")
    with pytest.raises(ValueError, match="too irregular"):
        rtl.verify(replace(rtl.emit(act.load("silu_fp16_shifts")), table=None), "formal")
    with pytest.raises(ValueError, match="is not the table of"):
        rtl.verify(wide, "formal", against=rtl.emit(CARRY))
