import copy
import json
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy import act
from rarefy.act import fit
from rarefy.act.fit import shipped
from rarefy.act.spec import error, formats, oracle, quartic

TABLES = act.list_tables()
BF16 = formats.BF16.all_bits()


def algorithm_1(x: int, rows: tuple[tuple[int, ...], ...]) -> int:
    """The paper's algorithm for one bf16 number, written from its text."""
    sign, u = x & 0x8000, x & 0x7FFF
    if u > 0x7F80:
        return x
    if u < 0x3E80:
        return x
    if u > 0x4070:
        return sign | 0x3F80
    t = ((u >> 7 & 0b11) << 3) | (u >> 4 & 0b111)
    e, r, b = rows[t]
    return sign | e << 7 | ((u & 0x7F) >> r) + b


def test_published_table_is_algorithm_1_of_the_paper_on_every_input():
    table = act.load("tanh_bf16_ktanh")
    assert table.compute(BF16).tolist() == [algorithm_1(int(x), table.rows) for x in BF16]


def test_errors_of_the_published_table():
    e = error.of(act.load("tanh_bf16_ktanh"))
    assert e.max_abs == pytest.approx(0.008920, abs=5e-7)
    assert abs(e.worst) == pytest.approx(0.6211, abs=5e-5)
    assert (e.max_ulp, e.misrounded, e.falls) == (6, 894, 12)
    assert e.rmse == pytest.approx(2.37e-3, rel=0.01)


@pytest.mark.parametrize("name", ["tanh_bf16_monotone", "tanh_bf16_few_shifts"])
def test_monotone_tables_have_the_same_maximum_error_and_never_fall(name):
    e = error.of(act.load(name))
    assert e.max_abs == error.of(act.load("tanh_bf16_ktanh")).max_abs
    assert e.falls == 0


def test_few_shifts_uses_fewer_shifts():
    used = [{r for _, r, _ in act.load(n).rows} for n in ("tanh_bf16_few_shifts", "tanh_bf16_monotone")]
    assert len(used[0]) < len(used[1])


def test_carry_table():
    e = error.of(act.load("tanh_bf16_carry64"))
    assert e.max_abs < 0.0060
    assert e.falls == 0


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "e4m3fn", "e5m2"])
@pytest.mark.parametrize("function", oracle.TABLED)
def test_exact_tables_are_correctly_rounded_on_every_input(function, fmt):
    f = formats.get(fmt)
    bits = f.all_bits()
    right, margin = oracle.rounded(function, f, bits)
    table = act.load(f"{function}_{fmt}")
    assert margin > oracle.RELATIVE_ERROR * 2.0 ** (f.mantissa_bits + 1)
    assert np.array_equal(table.compute(bits), right)


@pytest.mark.slow
def test_shipped_files_are_what_the_fit_makes(tmp_path):
    made = shipped.write(tmp_path)
    assert sorted(t.name for t in made) == TABLES
    for proof in [*map(shipped.prove, made), shipped.prove_quartic()]:
        assert proof.holds, proof
    assert (tmp_path / "quartic" / "tanh_fp32.json").read_text() == quartic.tanh().to_json()
    for table in made:
        assert (tmp_path / f"{table.name}.json").read_text() == table.to_json()
        assert act.load(table.name) == table
        assert act.load(tmp_path / f"{table.name}.json") == table
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", TABLES)
def test_symmetry_nan_and_shape(name):
    table = act.load(name)
    f = table.fmt
    bits = f.all_bits()
    y = table.compute(bits.reshape(2, -1)).reshape(-1)
    assert y.dtype == f.dtype
    assert np.array_equal(y[f.is_nan(bits)], bits[f.is_nan(bits)])
    if table.symmetry == "odd":
        assert np.array_equal(y[: f.sign] | f.sign, y[f.sign :])
    assert table.compute(np.zeros((0, 3), np.int16)).shape == (0, 3)
    assert table.compute(np.int64(0)).shape == ()


@pytest.mark.parametrize("name", TABLES)
def test_a_changed_row_is_caught(name):
    """Every parameter of a table matters: one step off in a row that inputs reach changes some output."""
    table = act.load(name)
    bits = table.fmt.all_bits()
    right = table.compute(bits)
    rng = np.random.default_rng(0)
    caught = 0
    for t in rng.choice(len(table.rows), size=min(8, len(table.rows)), replace=False):
        row = list(table.rows[t])
        row[-1] += 1 << table.fraction_bits
        try:
            changed = replace(table, rows=(*table.rows[:t], tuple(row), *table.rows[t + 1 :]))
        except ValueError:
            caught += 1
            continue
        caught += not np.array_equal(changed.compute(bits), right)
    assert caught == min(8, len(table.rows))


def test_certificate_no_table_of_the_published_form_is_better():
    certificate = fit.certify()
    assert certificate.least == error.of(act.load("tanh_bf16_ktanh")).max_abs
    assert round(certificate.least, 6) == 0.008920
    assert fit.certify(objective="max_ulp").least == 5


@pytest.mark.slow
def test_certificate_agrees_with_brute_force():
    """One row of the search again, with nothing shared: all E, all r, all b."""
    u = np.arange(0x3F10, 0x3F20)
    value = np.tanh(formats.BF16.decode(u))
    grid = formats.BF16.decode(np.arange(0x8000))
    best = np.inf
    for e in range(256):
        for r in range(8):
            m = (u & 127) >> r
            for b in range(-127, 128):
                if m[0] + b >= 0 and m[-1] + b < 128:
                    best = min(best, np.abs(grid[(e << 7) + m + b] - value).max())
    t = (0x3F10 >> 4) - (0x3E80 >> 4)
    assert fit.certify().rows[t] == best


@pytest.mark.slow
def test_fit_by_ulp_and_rmse():
    least = error.of(fit.fit_shift(objective="max_ulp"))
    assert least.max_ulp == 5
    rmse = error.of(fit.fit_shift(objective="rmse"))
    assert rmse.rmse <= min(least.rmse, error.of(fit.fit_shift(monotone=True)).rmse)
    monotone = error.of(fit.fit_shift(objective="rmse", monotone=True))
    assert monotone.falls == 0


@pytest.mark.slow
def test_fit_other_formats_functions_and_sizes():
    half = fit.fit_shift(fmt="fp16", monotone=True)
    assert error.of(half).max_abs < 0.0098
    assert error.of(fit.fit_shift(fmt="fp16", form="carry")).max_abs < 0.0081
    assert error.of(fit.fit_shift(index=act.BitIndex(2, 2))).max_abs == pytest.approx(0.037883, abs=5e-7)

    table = fit.fit_shift(softsign, index=act.BitIndex(3, 3), identity_below=2.0**-5, saturate_above=7.96875)
    x = formats.BF16.decode(np.arange(0x3D00, 0x40FF))
    y = formats.BF16.decode(table.compute(np.arange(0x3D00, 0x40FF)))
    assert np.abs(y - softsign(x)).max() < 0.02
    near = fit.fit_segments("gelu", "bf16", max_abs=0.01)
    assert len(near.rows) < len(act.load("gelu_bf16").rows)
    inside = BF16[np.abs(formats.BF16.decode(BF16)) < 4]
    y = formats.BF16.decode(near.compute(inside))
    assert np.abs(y - oracle.gelu(formats.BF16.decode(inside))).max() <= 0.0100001


def test_fit_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="spans 48 rows"):
        fit.fit_shift(identity_below=2.0**-4)
    with pytest.raises(ValueError, match="objective must be one of"):
        fit.fit_shift(objective="mse")
    with pytest.raises(ValueError, match='form must be "shift" or "carry"'):
        fit.fit_shift(form="linear")
    with pytest.raises(ValueError, match="no linear table of 16 rows"):
        fit.fit_linear(rows=16)
    for attempt in (fit.fit_shift, fit.fit_linear):
        with pytest.raises(ValueError, match="for odd functions"):
            attempt("silu")
    with pytest.raises(ValueError, match="constant far out; cube is not"):
        fit.fit_linear(cube)
    with pytest.raises(ValueError, match="fp32 is too wide"):
        fit.fit_shift(fmt="fp32")
    with pytest.raises(ValueError, match="fp32 is too wide"):
        fit.fit_segments("tanh", "fp32")
    for t1, t2 in ((-1.0, 1.0), (0.5, 0.25), (0.25, np.inf)):
        with pytest.raises(ValueError, match="0 < T1 <= T2"):
            fit.fit_shift(identity_below=t1, saturate_above=t2)
    with pytest.raises(ValueError, match="does not fit bf16"):
        fit.fit_shift(index=act.BitIndex(2, 9))
    with pytest.raises(ValueError, match="must give one number for each input"):
        fit.fit_segments(lambda x: np.float64(0), "bf16")


def cube(x: np.ndarray) -> np.ndarray:
    return np.asarray(x**3)


def softsign(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / (1 + np.abs(x)))


def test_fit_linear_keeps_its_bound_on_every_input():
    """The last row holds up to infinity, and sums do not leave their 16 bits."""
    for fmt, rows, bits, bound in (("bf16", 32, 6, 0.005), ("bf16", 16, 6, 0.02), ("fp16", 64, 3, 0.003)):
        table = fit.fit_linear(fmt=fmt, rows=rows, fraction_bits=bits, max_abs=bound)
        assert len(table.rows) <= rows
        assert error.of(table).max_abs <= bound
    arctan = fit.fit_linear(np.arctan, max_abs=0.01)
    assert error.of(arctan, np.arctan).max_abs <= 0.01
    with pytest.raises(ValueError, match="span more than 1024 numbers"):
        fit.fit_linear(fmt="fp16", max_abs=0.003)


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "e4m3fn", "e5m2"])
def test_fit_segments_of_a_function_without_a_value_at_infinity(fmt):
    table = fit.fit_segments(softsign, fmt)
    assert table.symmetry == "odd"
    assert error.of(table, softsign).misrounded == 0
    near = fit.fit_segments(softsign, fmt, max_abs=0.05)
    assert len(near.rows) < len(table.rows) or len(table.rows) < 4
    assert error.of(near, softsign).max_abs <= max(0.05, error.of(table, softsign).max_abs)


@pytest.mark.parametrize("function", [f for f in oracle.FUNCTIONS if f not in oracle.TABLED])
def test_fit_segments_of_functions_without_a_shipped_table(function):
    for fmt in ("e4m3fn", "e5m2"):
        table = fit.fit_segments(function, fmt)
        assert error.of(table).misrounded == 0


def test_the_largest_error_of_exp_in_float32_is_not_searched_for():
    with pytest.raises(ValueError, match="exp in fp32 has no largest slope"):
        error.largest(act.load("tanh_bf16_ktanh").to_format("fp32"), "exp")


@pytest.mark.parametrize("fmt", ["e4m3fn", "e5m2"])
def test_a_shift_table_with_a_row_an_input_is_correctly_rounded(fmt):
    table = fit.fit_shift(fmt=fmt, index=act.BitIndex(2, formats.get(fmt).mantissa_bits))
    assert error.of(table).misrounded == 0


def test_the_bound_of_the_published_form_holds_for_all_thresholds():
    """The worst row alone has that error, and thresholds that spare the table this row are worse."""
    rows = fit.certify().rows
    worst = int(np.argmax(rows))
    first = (0x3E80 >> 4) + worst
    x = formats.BF16.decode(np.array([first << 4, (first << 4) + 15]))
    assert (x[0] - np.tanh(x[0]), 1 - np.tanh(x[1])) > (rows[worst], rows[worst])


@pytest.mark.parametrize("fmt", ["fp16", "fp32"])
def test_published_table_in_wider_formats(fmt):
    table = act.load("tanh_bf16_ktanh").to_format(fmt)
    f = formats.get(fmt)
    value = np.linspace(-5, 5, 100_001).astype({"fp16": np.float16, "fp32": np.float32}[fmt])
    y = f.decode(table.compute(value.view(f.dtype)))
    assert np.abs(y - np.tanh(value.astype(np.float64))).max() < 0.0099
    if fmt == "fp32":
        # the high half of a float32 result is the bf16 result of the high half of the input
        rng = np.random.default_rng(1)
        x = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
        u = x & 0x7FFFFFFF
        x = x[(u <= 0x40700000) | ((u >= 0x40710000) & (u <= 0x7F800000))]
        narrow = act.load("tanh_bf16_ktanh").compute(x >> 16)
        assert np.array_equal(table.compute(x) >> 16, narrow)


@given(st.lists(st.integers(0, 0xFFFF), max_size=50))
def test_compute_takes_any_integers(bits):
    table = act.load("tanh_bf16_ktanh")
    y = table.compute(np.array(bits, dtype=np.uint16))
    assert y.tolist() == [algorithm_1(x, table.rows) for x in bits]


def test_compute_refuses_floats_and_wide_patterns():
    table = act.load("tanh_bf16")
    with pytest.raises(TypeError, match="float64"):
        table.compute(np.zeros(3))
    with pytest.raises(ValueError, match="lie in 0 to 0xffff"):
        table.compute(np.array([70000]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": act.CutIndex()}, "needs a BitIndex"),
        ({"index": act.BitIndex(2, 9)}, "does not fit bf16"),
        ({"index": act.BitIndex(2, 2)}, "addresses 16 rows"),
        ({"rows": ()}, "needs rows"),
        ({"format": "bf17"}, "format must be one of"),
        ({"identity_below": 0x4080}, "T1 <= T2"),
    ],
)
def test_an_invalid_shift_table_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(shipped.published(), **change)


def test_invalid_rows_are_named():
    table = shipped.published()
    rows: list[tuple[Any, str]] = [
        ((126, 8, 0), "0 <= r <= 7"),
        ((256, 0, 0), "row 31 must have E"),
        ((126, 0, 120), "row 31 .* leaves the mantissa field"),
        ((126, 0), "3 integers"),
        (("126", 0, 1), "3 integers"),
    ]
    for row, message in rows:
        with pytest.raises(ValueError, match=message):
            replace(table, rows=(*table.rows[:31], row))
    linear = act.load("tanh_bf16")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"rows": linear.rows[:-1]}, "needs 64 rows"),
        ({"rows": (*linear.rows[:-1], (0, 70000))}, "two 16-bit numbers"),
        ({"offset": 0x7F00}, "lets values leave"),
        ({"format": "e5m2"}, "16 bits"),
        ({"fraction_bits": 16}, "0 to 15"),
        ({"index": act.MultiplyIndex(0x7000, 0x1000, 1)}, "does not fit"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            replace(linear, **change)
    segments = act.load("gelu_bf16")
    changes = [
        ({"symmetry": "even"}, "symmetry must be"),
        ({"rows": segments.rows[1:]}, "begin at 0"),
        ({"fraction_bits": 40}, "0 to 31"),
        ({"rows": (*segments.rows[:-1], (segments.rows[-1][0], -(1 << 20), 0))}, "leaves the range"),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            replace(segments, **change)
    with pytest.raises(ValueError, match="only shift, carry and segments tables"):
        linear.to_format("fp16")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tanh_bf16_ktanh", act.ShiftTable),
        ("tanh_bf16_carry64", act.CarryTable),
        ("tanh_bf16", act.LinearTable),
        ("gelu_bf16", act.SegmentsTable),
    ],
)
def test_a_file_becomes_a_table_of_its_form(name, kind):
    table = act.load(name)
    assert type(table) is kind
    assert type(kind.from_json(table.to_json())) is kind
    assert table.fmt is formats.BF16
    assert pickle.loads(pickle.dumps(table)) == copy.deepcopy(table) == table
    assert len({table, act.load(name), replace(table, name="other")}) == 2


def test_a_table_is_made_by_the_name_of_its_form():
    index, rows = act.CutIndex(), ((0, 0, 0),)
    table = act.Table("zero", "mine", "bf16", "segments", index, rows)
    assert table == act.SegmentsTable("zero", "mine", "bf16", index, rows)
    assert act.Table(name="zero", function="mine", format="bf16", form="segments", index=index, rows=rows) == table
    with pytest.raises(ValueError, match="form must be one of shift, carry, linear, segments, got 'other'"):
        act.Table("zero", "mine", "bf16", "other", index, rows)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("tanh_bf16_ktanh", "form", "cubic", "form must be one of shift, carry, linear, segments, got 'cubic'"),
        ("tanh_bf16_ktanh", "symmetry", "none", "form shift needs symmetry 'odd', got 'none'"),
        ("tanh_bf16_carry64", "fraction_bits", 3, "form carry needs fraction_bits 0, got 3"),
        ("tanh_bf16_ktanh", "offset", 1, "tanh_bf16_ktanh: form shift needs offset 0, got 1"),
        ("tanh_bf16", "saturate_above", 1, "form linear needs saturate_above 0, got 1"),
        ("gelu_bf16", "identity_below", 1, "form segments needs identity_below 0, got 1"),
    ],
)
def test_a_file_with_what_its_form_has_not_is_refused(name, key, value, message):
    data = json.loads(act.load(name).to_json())
    assert key in data
    with pytest.raises(ValueError, match=message):
        act.Table.from_json(json.dumps({**data, key: value}))


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(ValueError, match="not a table"):
        act.Table.from_json("{")
    with pytest.raises(ValueError, match="version 1"):
        act.Table.from_json('{"rarefy_table": 2}')
    with pytest.raises(ValueError, match="not a table: 'form'"):
        act.Table.from_json('{"rarefy_table": 1}')
    text = shipped.published().to_json().replace('"function"', '"fonction"')
    with pytest.raises(ValueError, match="fonction"):
        act.Table.from_json(text)
    with pytest.raises(ValueError, match="tanh_bf16_ktanh"):
        act.load("ktanh")
