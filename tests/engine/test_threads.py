"""Threads that share an image: whatever their number, an engine gives the same bits, in float32, bfloat16 and int8."""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from rarefy import engine, kernels
from rarefy.engine import Engine
from tests.engine.layers import paths
from tests.engine.networks import thinned

ISAS = [isa for isa in paths() if isa != "pytorch"]
THREADS = (2, 3, 5)


class Odd(nn.Module):
    """Convolutions of all kinds, joins and vectors, of sizes that no number of threads divides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 13, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.narrow = nn.Conv2d(13, 7, 1)
        self.middle = nn.Conv2d(7, 7, 3, padding=1)
        self.widen = nn.Conv2d(7, 13, 1)
        self.each = nn.Conv2d(13, 13, 3, padding=1, groups=13)
        self.down = nn.Conv2d(13, 71, (3, 5), (2, 1), (1, 2))
        self.late = nn.Conv2d(71, 150, 3, padding=1)
        self.last = nn.Linear(150, 37)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.widen(torch.relu(self.middle(torch.relu(self.narrow(x))))))
        x = torch.cat([x, nn.functional.avg_pool2d(self.each(x), 3, 1, 1)], 1)[:, :13]
        x = nn.functional.max_pool2d(torch.relu(self.late(torch.relu(self.down(x)))), 3, 2, 1)
        return self.last(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return thinned(Odd())


def made(model, x, precision: str) -> Engine:
    examples = {"calibration": [x.clone()], "error_budget": 1.0} if precision == "int8" else {}
    return engine.compile(model, x, threads=1, precision=precision, choose="native", **examples)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("size", [(61, 87), (15, 23)])
def test_any_number_of_threads_gives_the_same_bits(model, isa, precision, size):
    with kernels.forced(isa):
        x = torch.randn(4, 3, *size)
        for together in (1, 4):
            compiled = made(model, x[:together], precision)
            for batch in (1, 4):
                alone = compiled(x[:batch])
                for threads in THREADS:
                    compiled.threads = threads
                    assert torch.equal(compiled(x[:batch]), alone), (threads, together, batch)
                compiled.threads = 1


def test_a_child_of_a_process_has_threads_of_its_own(model):
    x = torch.randn(1, 3, 61, 87)
    compiled = made(model, x, "float32")
    compiled.threads = 3
    expected = compiled(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(compiled(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(compiled(x), expected)


class Mixed(nn.Module):
    """A native layer, and work that PyTorch has threads for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 256)

    def forward(self, x):
        return (self.layer(x) @ x.transpose(1, 2)).cumsum(1).softmax(-1)


def child_exit(work) -> int:
    """What a forked child that does this exits with; one that hangs is ended by a signal."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if work() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_runs_pytorchs_steps_and_compiles():
    x = torch.randn(2, 300, 256)
    torch.set_num_threads(3)
    for choose, threads in (("torch", None), ("torch", 2), ("native", None)):
        compiled = engine.compile(Mixed().eval(), x, threads, choose=choose)
        expected = compiled(x)

        def works(compiled=compiled, expected=expected):
            close = np.allclose(compiled(x).numpy(), expected.numpy(), atol=1e-5)  # PyTorch itself would hang
            return close and torch.get_num_threads() == 3

        assert child_exit(works) == 0
        assert torch.get_num_threads() == 3
    model = Mixed().eval()
    assert child_exit(lambda: engine.compile(model, x, choose="native")(x).shape == (2, 300, 300)) == 0


def test_a_spawned_worker_runs_an_engine():
    x = torch.randn(1, 30, 256)
    compiled = engine.compile(Mixed().eval(), x, threads=2, choose="native")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert torch.equal(pool.submit(compiled, x).result(), compiled(x))


def test_threads_are_those_of_pytorchs_steps_too():
    seen = []

    class Look(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(torch.get_num_threads())
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 30, 256)
    for threads, expected in ((2, 2), (1, 1), (None, 3)):
        compiled = engine.compile(Mixed().eval(), x, threads, choose="torch")
        torch.set_num_threads(3)
        seen.clear()
        with Look():
            compiled(x)
        assert {*seen} == {expected}
        assert torch.get_num_threads() == 3
