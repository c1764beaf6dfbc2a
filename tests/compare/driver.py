"""rarefy.compare.worker on synthetic data, as a process of its own."""

import sys

import pytest

from rarefy.compare import worker
from tests.train.runs import prepare

if __name__ == "__main__":
    prepare(pytest.MonkeyPatch())
    sys.exit(worker.main())
