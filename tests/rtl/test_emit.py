"""What ``emit`` writes, and what it refuses; whether it is right is test_verify's business."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rarefy import act, rtl
from rarefy.act.spec import error, formats, oracle

PUBLISHED = act.load("tanh_bf16_ktanh")


def test_the_published_table_has_rows_of_eleven_bits():
    design = rtl.emit(PUBLISHED)
    assert "function automatic logic [10:0] rows(input logic [4:0] t);" in design.text
    assert "5'd0: rows = 11'h577;  // E=126 r=2 b=119" in design.text  # E: 1 of 125, 126; r: 2 of 0, 1, 2, 4, 6
    assert len(re.findall(r"5'd\d+: rows", design.text)) == 32
    assert [(p.name, p.direction, p.width) for p in design.ports] == [("x", "input", 16), ("y", "output", 16)]
    assert (design.top, design.latency, design.clock, design.lanes) == ("tanh_bf16_ktanh", 0, None, 1)


def test_the_header_names_table_error_and_command():
    head = rtl.emit(PUBLISHED, stages=2, nan="quiet").text.splitlines()[:4]
    assert head == [
        "// table tanh_bf16_ktanh: tanh in bf16, 32 rows of the form shift",
        "// maximum absolute error: 0.00892035 over all inputs",
        "// latency: 2 clock cycles",
        "// made by: rarefy.rtl.emit(table, stages=2, nan='quiet')",
    ]
    unknown = replace(PUBLISHED, function="mine")
    assert "maximum absolute error: not known" in rtl.emit(unknown).text


def test_ports_of_a_stalling_vector_with_a_programmable_table():
    design = rtl.emit(PUBLISHED, "programmable", stages=2, handshake=True, lanes=4)
    assert [(p.name, p.direction, p.width) for p in design.ports] == [
        ("clk", "input", 1),
        ("rst_n", "input", 1),
        ("we", "input", 1),
        ("wa", "input", 6),
        ("wd", "input", 18),
        ("in_valid", "input", 1),
        ("in_ready", "output", 1),
        ("x", "input", 64),
        ("out_valid", "output", 1),
        ("out_ready", "input", 1),
        ("y", "output", 64),
    ]
    # row 1 is (126, 4, 122): r, E, b; T1 and T2 follow the 32 rows
    assert design.setup[1] == (1, 4 << 15 | 126 << 7 | 122)
    assert design.setup[32:] == ((32, 0x3E80), (33, 0x4070))
    assert design.top == "tanh_bf16_ktanh_prog"
    assert rtl.emit(PUBLISHED, "programmable").clock == "clk"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"style": "small"}, "style must be one of shift_add, flat, programmable, got 'small'"),
        ({"stages": 3}, "stages must be a whole number from 0 to 2, got"),
        ({"handshake": True}, "stages must be 1 or 2, got 0"),
        ({"stages": True}, "stages must be a whole number from 0 to 2, got True"),
        ({"stages": 1.0}, "stages must be a whole number from 0 to 2, got 1.0"),
        ({"handshake": "no", "stages": 1}, "handshake must be True or False, got the text 'no'"),
        ({"lanes": 0}, "lanes must be a whole number from 1 to 1024, got 0"),
        ({"lanes": 2.0}, "lanes must be a whole number from 1 to 1024, got 2.0"),
        ({"lanes": "2"}, "lanes must be a whole number from 1 to 1024, got the text '2'"),
        ({"nan": ["keep"]}, "nan must be one of keep, quiet, none, got .'keep'."),
        ({"command": None}, "command must be a string, got None"),
        ({"top": ""}, "top must be a name of letters, digits and underscores, got ''"),
        ({"nan": "zero"}, "nan must be one of keep, quiet, none, got 'zero'"),
        ({"top": "8bit"}, "top must be a name"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rtl.emit(PUBLISHED, **arguments)


def test_what_is_no_table_is_refused():
    with pytest.raises(TypeError, match=r"emit takes a table, got str: rarefy\.act\.load gives one by its name"):
        rtl.emit("tanh_bf16_ktanh")


def test_whole_numbers_of_numpy_are_numbers():
    design = rtl.emit(PUBLISHED, stages=np.int64(1), lanes=np.int32(2))
    assert design.text == rtl.emit(PUBLISHED, stages=1, lanes=2).text
    assert "rarefy.rtl.emit(table, stages=1, lanes=2)" in design.text


@pytest.mark.parametrize("nan", ["keep", "quiet", "none"])
def test_software_models_take_patterns_alone(nan):
    design = rtl.emit(PUBLISHED, nan=nan)
    for wrong in (np.array([0.5, 1.5]), np.array([True, False])):
        with pytest.raises(TypeError, match="compute takes bit patterns as integers"):
            design.compute(wrong)
    with pytest.raises(ValueError, match="bit patterns of bf16 lie in 0 to 0xffff"):
        design.compute(np.array([1 << 16]))


def test_styles_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="style flat lists every input"):
        rtl.emit(PUBLISHED.to_format("fp32"), "flat")
    with pytest.raises(ValueError, match="form shift or carry, tanh_bf16 is linear"):
        rtl.emit(act.load("tanh_bf16"), "programmable")


def test_software_models_differ_in_nan_alone():
    x = formats.BF16.all_bits()
    nan = formats.BF16.is_nan(x)
    results = {policy: rtl.emit(PUBLISHED, nan=policy).compute(x) for policy in ("keep", "quiet", "none")}
    assert (results["keep"][nan] == x[nan]).all()
    assert (results["quiet"][nan] == (x[nan] | 0x40)).all()
    assert set(results["none"][nan].tolist()) == {0x3F80, 0xBF80}
    for given in results.values():
        assert (given[~nan] == PUBLISHED.compute(x)[~nan]).all()


def test_designs_are_the_same_every_time_and_saved_whole(tmp_path):
    design = rtl.emit(PUBLISHED, stages=1)
    assert design.text == rtl.emit(PUBLISHED, stages=1).text
    design.save(tmp_path / "unit.sv")
    assert [path.name for path in tmp_path.iterdir()] == ["unit.sv"]
    assert (tmp_path / "unit.sv").read_text() == design.text


@pytest.mark.parametrize("function", ["tanh", "silu"])
def test_largest_error_of_float32_is_found_without_trying_every_input(function):
    """Against one octave tried whole, the one of the largest error, and samples of the others."""
    table = act.load(f"{function}_bf16_shifts").to_format("fp32")
    found = error.largest(table)
    assert rtl.emit(table).about.max_abs == found
    x = np.concatenate([np.arange(0x3A000000, 0x42000000, 997), np.arange(0xBA000000, 0xC2000000, 997)])
    errors = np.abs(formats.FP32.decode(table.compute(x)) - oracle.evaluate(function, formats.FP32.decode(x)))
    near = int(x[np.argmax(errors)])
    around = np.arange(near - (1 << 20), near + (1 << 20))
    whole = np.abs(formats.FP32.decode(table.compute(around)) - oracle.evaluate(function, formats.FP32.decode(around)))
    assert errors.max() <= found == whole.max()


def test_the_documented_errors_are_the_emitted_ones():
    lines = (Path(__file__).parents[2] / "docs" / "guides" / "hardware.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    formats_named = next(line[1:] for line in cells if line[0] == "function")
    found = {line[0]: line[1:] for line in cells if line[0] in oracle.FUNCTIONS}
    assert set(found) == {"tanh", "sigmoid", "silu", "gelu"}
    for function, written in found.items():
        for fmt, text in zip(formats_named, written, strict=True):
            if fmt == "fp32":
                table = act.load(f"{function}_bf16_shifts").to_format("fp32")
            else:
                table = act.load(f"{function}_{fmt}_shifts" if fmt in ("bf16", "fp16") else f"{function}_{fmt}")
            assert text == f"{rtl.emit(table).about.max_abs:.4g} ({len(table.rows)} rows)"
