"""Tables of constants, of one row or whose rows change sign; resets that do nothing; text that must stay text."""

import re
from dataclasses import replace

import numpy as np
import pytest

from rarefy import act, rtl
from rarefy.act import LinearTable, MultiplyIndex, fit
from rarefy.rtl import logic
from rarefy.rtl.identifiers import RESERVED

pytestmark = pytest.mark.slow

FUNCTIONS = {
    "relu": lambda x: np.maximum(x, 0.0),
    "identity": lambda x: x + 0.0,
    "relu6": lambda x: np.clip(x, 0, 6),
    "zero": lambda x: x * 0.0,
    "one": np.ones_like,
    "step": lambda x: (x > 0).astype(float),
    "negative": lambda x: -x,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_simple_functions_become_right_units(name):
    with np.errstate(invalid="ignore"):
        table = fit.fit_segments(FUNCTIONS[name], "e5m2", name=name)
    pipeline = {"stages": 2, "handshake": True}
    for arguments, tool in (({}, "formal"), (pipeline, "formal"), ({"style": "flat"}, "icarus")):
        found = rtl.verify(rtl.emit(table, **arguments), tool)
        assert found.passed, found
    if name == "relu6":  # constants, slopes and a change of sign: what is proven of each is simulated, too
        for arguments in ({}, {**pipeline, "lanes": 2}):
            found = rtl.verify(rtl.emit(table, **arguments))
            assert found.passed, found


def test_a_row_that_changes_its_sign_passes_nan_through_the_sum():
    assert rtl.verify(rtl.emit(act.load("gelu_e4m3fn"), nan="none")).passed


def test_linear_tables_of_one_row():
    index = MultiplyIndex(0x3D00, 100, 100)
    for symmetry, rows in (("odd", ((64, 0),)), ("none", ((64, 0), (3, 7)))):
        rest = {"identity_below": 0x3D00, "fraction_bits": 6, "offset": 0x3D00}
        table = LinearTable("one", "mine", "bf16", index, rows, symmetry, **rest)
        assert rtl.verify(rtl.emit(table, lanes=8)).passed


# The reset


@pytest.mark.parametrize("which", [r"\d", "1", "2"])
def test_a_reset_that_does_nothing_is_found(which):
    design = rtl.emit(act.load("tanh_e4m3fn"), stages=2, handshake=True)
    text = re.sub(rf"if \(!rst_n\) valid_{which} <= 1'b0;\s*else if", "if", design.text)
    assert text != design.text
    text = re.sub(r"logic (valid_\d);", r"logic \1 = 1'b0;", text)
    found = rtl.verify(replace(design, text=text))
    assert not found.passed
    assert re.search("since the last reset|after the first clock of a reset", found.faults[0])


def test_numbers_taken_during_a_reset_are_found():
    design = rtl.emit(act.load("tanh_e4m3fn"), stages=1, handshake=True)
    found = rtl.verify(replace(design, text=design.text.replace("in_ready = rst_n && ", "in_ready = ")))
    assert "in_ready is not 0 during reset" in found.faults[0]


# Names and text


SIGNALS = ("x", "y", "clk", "rows", "result")


@pytest.mark.parametrize("top", [*sorted(RESERVED)[::17], *SIGNALS, "a b", "é", "t\n", "m" * 129])
def test_names_that_no_module_can_have(top):
    with pytest.raises(ValueError, match=r"^top must"):
        rtl.emit(act.load("tanh_e5m2"), stages=1, top=top)


@pytest.mark.parametrize("text", ["a\nmodule evil; endmodule //", 'a\r`include "x"', "*/ é \\", "a\u2028b"])
def test_text_of_a_table_stays_a_comment(text):
    table = replace(act.load("tanh_e5m2"), name=text, function=text)
    plain = rtl.emit(replace(table, name="plain", function="mine"), top="unit").text
    found = rtl.emit(table, top="unit", command=text).text
    assert found.isascii()
    code = [[line for line in each.split("\n") if not line.startswith("// ")] for each in (plain, found)]
    assert code[0] == code[1]
    assert "`" not in found
    assert "\r" not in found


def test_a_unit_of_logic_is_named_like_a_module():
    unit = logic.load(logic.names()[0])
    with pytest.raises(ValueError, match="a unit's name must be"):
        replace(unit, name="u(); endmodule module v")
    assert "\nevil" not in replace(unit, command="a\nevil").design().text
