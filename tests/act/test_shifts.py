"""Segments whose slopes are powers of two: their fit, their move to float32, and float32 segments in PyTorch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rarefy import act
from rarefy.act import fit
from rarefy.act.fit.shipped import SHIFTS
from rarefy.act.spec import error, formats, oracle, reference
from tests.cli import printed, refused

RANDOM = np.random.default_rng(5).integers(0, 1 << 32, 100_000, dtype=np.uint32)


def wide_inputs() -> np.ndarray:
    """Random patterns of float32, and the ends of all rows of bf16."""
    ends = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array([0, 0xFFFF], dtype=np.uint32)
    return np.concatenate([RANDOM, ends.ravel()])


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
@pytest.mark.parametrize("function", SHIFTS)
def test_shipped_tables_are_within_their_errors_by_shifts_alone(function, fmt):
    table = act.load(f"{function}_{fmt}_shifts")
    f = formats.get(fmt)
    max_abs, max_rel, grid = SHIFTS[function]
    assert all(s == 0 or abs(s) in (1, 2, 4, 8) for _, s, _ in table.rows)
    assert all(first % (1 << (grid + f.mantissa_bits - 7)) == 0 for first, _, _ in table.rows)
    x = f.all_bits()
    x = x[~f.is_nan(x) & (np.abs(f.decode(x)) < 1e4)]
    true, y = oracle.evaluate(function, f.decode(x)), f.decode(table.compute(x))
    right = f.decode(oracle.rounded(function, f, x)[0])
    near = np.abs(y - true) <= np.maximum(max_abs, max_rel * np.abs(true))
    assert (near | (y == right)).all()
    if max_rel:  # far out x stays x, and 0 stays 0
        assert (y[right == f.decode(x)] == right[right == f.decode(x)]).all()


def test_eleven_rows_of_shifts_do_what_thirty_two_of_ktanh_do():
    table = act.load("tanh_bf16_shifts")
    assert len(table.rows) == 11
    assert error.of(table).max_abs < error.of(act.load("tanh_bf16_ktanh")).max_abs


def test_fewer_rows_than_the_fit_has_are_impossible():
    """The next row begins no earlier: no slope of the form holds one step of the grid farther."""
    table = act.load("tanh_bf16_shifts")
    f, grid = formats.BF16, 1 << 4
    for (first, _, _), (following, _, _) in zip(table.rows, table.rows[1:], strict=False):
        u = np.arange(first, following + grid)
        low, high = fit_bounds(u)
        slopes = [0, *(sign << k for k in range(4) for sign in (1, -1))]
        d = (u - first)[None, :]
        s = np.array(slopes)[:, None]
        assert (((low << 2) - s * d).max(axis=1) > (((high + 1 << 2) - 1) - s * d).min(axis=1)).all(), f.decode(first)


def fit_bounds(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest pattern within 0.0089 of tanh, or the rounded one."""
    f = formats.BF16
    values = f.decode(np.arange(f.last + 1))
    true, right = np.tanh(f.decode(u)), oracle.rounded("tanh", f, u)[0]
    low = np.searchsorted(values, true - 0.0089)
    high = np.searchsorted(values, true + 0.0089, side="right") - 1
    return np.minimum(low, right), np.maximum(high, right)


def test_the_fit_refuses_what_does_not_go_together():
    with pytest.raises(ValueError, match="grid must be 0 to 7"):
        fit.fit_segments("tanh", "bf16", max_abs=0.01, grid=8)
    with pytest.raises(ValueError, match="max_rel go with max_abs"):
        fit.fit_segments("silu", "bf16", max_rel=0.01)
    with pytest.raises(ValueError, match="no line holds for the 32 inputs from"):
        fit.fit_segments("tanh", "bf16", max_abs=0.002, shifts=True, fraction_bits=2, grid=5)


@pytest.mark.parametrize("function", SHIFTS)
def test_float32_has_the_high_bits_of_bfloat16_but_in_steep_rows(function):
    narrow = act.load(f"{function}_bf16_shifts")
    wide = narrow.to_format("fp32")
    x = wide_inputs()
    x = x[~formats.FP32.is_nan(x)]
    u = (x & 0x7FFFFFFF if narrow.symmetry == "odd" else x) >> 16
    firsts, slopes, _ = np.array(narrow.rows).T
    gentle = np.abs(slopes[np.searchsorted(firsts, u, side="right") - 1]) <= 1 << narrow.fraction_bits
    assert np.array_equal(wide.compute(x)[gentle] >> 16, narrow.compute(x >> 16)[gentle])
    assert gentle.mean() > 0.98
    assert error.largest(wide) < error.of(narrow).max_abs + 0.003


def test_segments_move_only_where_patterns_do():
    with pytest.raises(ValueError, match="does not move to fp16: fit it anew"):
        act.load("tanh_bf16_shifts").to_format("fp16")


@pytest.mark.parametrize("function", ["tanh", "silu"])
def test_pytorch_runs_float32_segments(function):
    table = act.load(f"{function}_bf16_shifts").to_format("fp32")
    bits = wide_inputs()
    x = torch.from_numpy(bits.view(np.float32).copy())
    y = getattr(act, function)(x, "ktanh", table=table)
    assert np.array_equal(y.numpy().view(np.uint32), table.compute(bits))


def test_pytorch_derives_from_float32_segments_of_tanh():
    table = act.load("tanh_bf16_shifts").to_format("fp32")
    bits = RANDOM[~formats.FP32.is_nan(RANDOM)]
    x = torch.from_numpy(bits.view(np.float32).copy())
    y = act.sigmoid(x, "ktanh", table=table).numpy().view(np.uint32)
    assert np.array_equal(y, reference.compute("sigmoid", "ktanh", formats.FP32, bits, table))


def test_rows_of_float32_are_checked_at_their_ends():
    table = act.load("silu_bf16_shifts").to_format("fp32")
    assert act.Table.from_json(table.to_json()) == table
    first, _, base = table.rows[3]
    with pytest.raises(ValueError, match="row 3 .* leaves the range of fp32"):
        replace(table, rows=(*table.rows[:3], (first, -1 << 12, base), *table.rows[4:]))
    with pytest.raises(ValueError, match="sums of more than 63 bits"):
        replace(table, rows=((0, 0, 0), (table.rows[-1][0], 1 << 31, 1 - (1 << 62))))


def test_table_fit_on_the_command_line(capsys):
    arguments = ["--within", "0.0089", "--shifts", "--grid", "4", "--fraction-bits", "2"]
    result = printed(capsys, "table", "fit", "--form", "segments", *arguments)
    assert result["table"]["rows"] == [list(row) for row in act.load("tanh_bf16_shifts").rows]
    assert "--shifts is not for tables of the form shift" in refused(capsys, "table", "fit", "--shifts")
