"""A training keeps the memory that it frees."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource
import torch
from rarefy.train.memory import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed()
print(*(faults() for _ in range(5)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt's settings are glibc's")
def test_a_large_block_that_was_freed_is_there_for_the_next_one():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    first, *_, last = map(int, done.stdout.split())
    assert first > 50 * max(last, 1)
