"""Units in Verilator, on all inputs, and a mutant: ``make test-verilator``, which compiles C++ for every design."""

from dataclasses import replace

import pytest

from rarefy import act, rtl
from tests.rtl.test_verify import altered


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tanh_bf16_ktanh", {"stages": 1}),
        ("tanh_bf16_carry64", {"style": "programmable", "stages": 2, "handshake": True, "lanes": 8}),
        ("silu_bf16_shifts", {"stages": 2, "lanes": 4}),
        ("gelu_e4m3fn", {}),
    ],
)
def test_verilator_equals_the_model_on_all_inputs(name, arguments):
    found = rtl.verify(rtl.emit(act.load(name), **arguments), "verilator")
    assert found.passed, found
    assert set(found.versions) == {"cocotb", "verilator"}


def test_verilator_finds_a_changed_row():
    assert rtl.verify(altered(act.load("tanh_bf16_ktanh"), lanes=8), "verilator").mismatches == 32


def test_verilator_names_a_design_that_it_does_not_accept():
    design = rtl.emit(act.load("tanh_e5m2"))
    with pytest.raises(RuntimeError, match="verilator did not run tanh_e5m2"):
        rtl.verify(replace(design, text=design.text.replace("endmodule", "")), "verilator")
