"""Threads that share an image: whatever their number, an engine gives the same bits, in float32, bfloat16 and int8."""

import os

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
