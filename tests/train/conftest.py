"""Every test here trains on the CPU, on synthetic data."""

import pytest

from tests.train.runs import prepare


@pytest.fixture(autouse=True)
def _small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)
