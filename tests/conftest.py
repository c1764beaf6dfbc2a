"""What every test runs under: one thread, since two collapse when the machine is busy, and Ctrl-C as in a terminal."""

import signal

import pytest
import torch


def pytest_configure():
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so shells begin what they run in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
