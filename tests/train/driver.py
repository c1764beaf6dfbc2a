"""The command line on synthetic data: ``python -m tests.train.driver train ...``."""

import sys

import pytest
import torch

from rarefy.cli import main
from tests.train.runs import prepare

if __name__ == "__main__":
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        sys.exit(main())
