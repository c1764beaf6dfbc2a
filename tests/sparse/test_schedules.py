"""Schedules against the reference values at T = 100."""

import pytest

from rarefy.sparse import schedules

#: epoch of 100 -> cosine, sigmoid, the larger of both
REFERENCE = {
    0: (1.0, 0.99753, 1.0),
    10: (0.97553, 0.99184, 0.99184),
    25: (0.85355, 0.95257, 0.95257),
    40: (0.65451, 0.76852, 0.76852),
    50: (0.5, 0.5, 0.5),
    60: (0.34549, 0.23148, 0.34549),
    75: (0.14645, 0.04743, 0.14645),
    90: (0.02447, 0.00816, 0.02447),
    100: (0.0, 0.00247, 0.00247),
}


@pytest.mark.parametrize(("epoch", "values"), REFERENCE.items())
def test_reference_values(epoch, values):
    got = [schedules.SCHEDULES[name](epoch / 100) for name in ("cosine", "sigmoid", "sigmoid-cosine")]
    assert got == pytest.approx(values, abs=5.1e-6)


def test_linear_and_constant():
    assert [schedules.linear(p) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    assert [schedules.constant(p) for p in (0, 0.25, 1)] == [1, 1, 1]


def test_cubic_ramp():
    assert schedules.cubic_ramp(0.0, 0.05, 0.6) == 0
    assert schedules.cubic_ramp(0.05, 0.05, 0.6) == 0
    assert schedules.cubic_ramp(0.325, 0.05, 0.6) == pytest.approx(1 - 0.5**3)
    assert schedules.cubic_ramp(0.6, 0.05, 0.6) == schedules.cubic_ramp(1.0, 0.05, 0.6) == 1


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_schedules_fall_within_0_and_1(name):
    values = [schedules.SCHEDULES[name](i / 200) for i in range(201)]
    assert all(0 <= value <= 1 for value in values)
    assert values == sorted(values, reverse=True)
