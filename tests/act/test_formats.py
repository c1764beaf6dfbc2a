import math
from fractions import Fraction

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch

from rarefy.act.spec import formats, oracle

SMALL = [formats.BF16, formats.FP16, formats.E4M3, formats.E5M2]
TORCH = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3fn": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
def test_decode_is_torchs_value_and_encode_its_inverse(fmt):
    bits = fmt.all_bits()
    value = fmt.decode(bits)
    same = torch.from_numpy(bits.astype(fmt.dtype)).view(TORCH[fmt.name]).double().numpy()
    assert np.array_equal(value, same, equal_nan=True)
    assert np.array_equal(np.signbit(value), np.signbit(same))
    keep = ~fmt.is_nan(bits)
    assert np.array_equal(fmt.is_nan(bits), np.isnan(same))
    assert np.array_equal(fmt.encode(value)[keep], bits[keep])


@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
def test_encode_rounds_to_nearest_even(fmt):
    value = fmt.decode(np.arange(fmt.last + 1))
    value = value[np.isfinite(value)]
    middle = (value[:-1] + value[1:]) / 2
    even = np.arange(len(middle)) + (np.arange(len(middle)) & 1)
    assert np.array_equal(fmt.encode(middle), even)
    assert np.array_equal(fmt.encode(-middle), even | fmt.sign)
    assert np.array_equal(fmt.encode(middle, 1.0), np.arange(len(middle)) + 1)
    assert np.array_equal(fmt.encode(middle, -1.0), np.arange(len(middle)))
    assert np.array_equal(fmt.encode(-middle, 1.0), np.arange(len(middle)) | fmt.sign)
    assert np.allclose(fmt.tie_distance(middle), 0.0)
    assert np.allclose(fmt.tie_distance(value), 0.5)


def test_encode_of_what_does_not_fit():
    assert formats.BF16.encode(1e39) == 0x7F80
    assert formats.BF16.encode(-np.inf) == 0xFF80
    assert formats.E4M3.encode(1e4) == 0x7F
    assert formats.FP16.is_nan(formats.FP16.encode(np.nan))


def test_unknown_format_is_named():
    with pytest.raises(ValueError, match="format must be one of bf16, fp16"):
        formats.get("bfloat")
    with pytest.raises(ValueError, match="2\\^32"):
        formats.FP32.all_bits()


def _precise(function: str, x: float) -> mpmath.mpf:
    v = mpmath.mpf(x)
    if function == "tanh":
        return mpmath.tanh(v)
    if function == "sigmoid":
        return 1 / (1 + mpmath.exp(-v))
    if function == "silu":
        return v / (1 + mpmath.exp(-v))
    if function == "gelu":
        return v / 2 * mpmath.erfc(-v / mpmath.sqrt(2))
    if function == "quick_gelu":
        return v / (1 + mpmath.exp(-mpmath.mpf("1.702") * v))
    if function == "mish":
        return v * mpmath.tanh(mpmath.log1p(mpmath.exp(v)))
    if function == "softplus":
        return mpmath.log1p(mpmath.exp(v))
    if function == "hardswish":
        return v * min(max(v + 3, mpmath.mpf(0)), mpmath.mpf(6)) / 6
    if function == "elu":
        return v if v > 0 else mpmath.expm1(v)
    if function == "exp":
        return mpmath.exp(v)
    return v / (1 + mpmath.exp(-2 * mpmath.sqrt(2 / mpmath.pi) * (v + mpmath.mpf("0.044715") * v**3)))


# Only there can a function be within float64's error of its neighbours: beyond, it is 0, 1, x/2 or x to 100 bits.
@pytest.mark.slow
@pytest.mark.parametrize("function", oracle.FUNCTIONS)
def test_oracle_error_stays_below_its_bound(function):
    """Every 16-bit input with 2^-30 <= |x| <= 130, against 200-bit arithmetic."""
    values = np.unique(np.concatenate([f.decode(f.all_bits()) for f in (formats.BF16, formats.E5M2)]))
    sample = formats.FP16.decode(formats.FP16.all_bits())[::13]
    values = np.unique(np.concatenate([values, sample]))
    values = values[(np.abs(values) >= 2.0**-30) & (np.abs(values) <= 130)]
    got = oracle.evaluate(function, values)
    with mpmath.workprec(200):
        worst = 0.0
        for x, y in zip(values, got, strict=True):
            true = _precise(function, float(x))
            if abs(true) > mpmath.mpf(2) ** -150:
                worst = max(worst, float(abs(mpmath.mpf(float(y)) / true - 1)))
    assert worst < oracle.RELATIVE_ERROR


@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_tanh", "quick_gelu", "hardswish"])
def test_ties_of_halved_subnormals_are_broken_by_the_second_term(function):
    bits = np.arange(1, 256, dtype=np.int64)
    both = np.concatenate([bits, bits | 0x8000])
    got, _ = oracle.rounded(function, formats.BF16, both)
    with mpmath.workprec(600):
        for b, y in zip(both, got, strict=True):
            units = _precise(function, float(formats.BF16.decode(b))) * mpmath.mpf(2) ** 133
            assert int(mpmath.nint(abs(units))) == y & 0x7FFF
            assert bool(y & 0x8000) == bool(b & 0x8000)


@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
@pytest.mark.parametrize("function", oracle.FUNCTIONS)
def test_special_values(function, fmt):
    inf = fmt.last if fmt.infinities else None
    bits = fmt.all_bits()
    got, margin = oracle.rounded(function, fmt, bits)
    assert margin > 0 or function == "hardswish"
    assert np.array_equal(got[fmt.is_nan(bits)], bits[fmt.is_nan(bits)])
    zero = {"sigmoid": 0.5, "softplus": math.log(2.0), "exp": 1.0}.get(function)
    assert got[0] == (0 if zero is None else int(fmt.encode(zero)))
    assert got[fmt.sign] == (fmt.sign if zero is None else int(fmt.encode(zero)))
    if inf is not None:
        assert got[inf] == (fmt.one if function in ("tanh", "sigmoid") else inf)
        low = dict.fromkeys(("tanh", "elu"), fmt.one | fmt.sign) | dict.fromkeys(("sigmoid", "softplus", "exp"), 0)
        assert got[inf | fmt.sign] == low.get(function, fmt.sign)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
def test_hardswish_is_rounded_as_the_quotient_of_whole_numbers(fmt):
    """Its ties are true ones, which float64 shows: here every result is compared in rational arithmetic."""
    bits = fmt.all_bits()
    bits = bits[np.isfinite(fmt.decode(bits))]
    got = fmt.decode(oracle.rounded("hardswish", fmt, bits)[0])
    assert np.isfinite(got).all()
    last = fmt.last - 1 if fmt.infinities else fmt.last
    values = [
        Fraction(float(v))
        for v in np.unique(fmt.decode(np.concatenate([np.arange(last + 1), fmt.sign + np.arange(last + 1)])))
    ]
    where = {value: i for i, value in enumerate(values)}
    for x, y in zip(fmt.decode(bits), got, strict=True):
        v = Fraction(float(x))
        true, i = v * min(max(v + 3, Fraction(0)), Fraction(6)) / 6, where[Fraction(float(y))]
        error = abs(values[i] - true)
        for j in (i - 1, i + 1):
            if 0 <= j < len(values):
                other = abs(values[j] - true)
                even = int(fmt.encode(float(values[i]))) % 2 == 0
                assert error < other or (error == other and even)


def test_rounding_agrees_with_torch_for_tanh():
    for fmt in (formats.BF16, formats.FP16):
        bits = fmt.all_bits()
        x = torch.from_numpy(bits.astype(fmt.dtype)).view(TORCH[fmt.name])
        same = torch.tanh(x).view(torch.uint16).numpy()
        keep = ~fmt.is_nan(bits)
        assert np.array_equal(oracle.rounded("tanh", fmt, bits)[0][keep], same[keep])


def test_a_value_too_near_a_tie_is_refused(monkeypatch):
    monkeypatch.setitem(oracle._ORACLES, "tanh", lambda x: x * 1.00390625)
    with pytest.raises(ArithmeticError, match=r"within 0\.0 ulp of a tie"):
        oracle.rounded("tanh", formats.BF16, formats.BF16.all_bits())
