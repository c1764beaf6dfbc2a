"""Operators that move numbers and are no views in PyTorch, and zeros around the input of a convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import engine
from rarefy.engine import reference
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from rarefy.engine.plan import Conv

#: On (batch, 4, 6, 8).
OPERATORS = {
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
    "flip": lambda x: x.flip(3),
    "flip twice": lambda x: x.flip((1, -2)),
    "glu": lambda x: F.glu(x, 1),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat channels": lambda x: x.repeat_interleave(3, 1),
    "repeat columns": lambda x: x.repeat_interleave(2, dim=-1),
    "reflect": lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"),
    "replicate": lambda x: F.pad(x, (2, 1, 0, 3), mode="replicate"),
    "circular": lambda x: F.pad(x, (2, 1, 1, 0), mode="circular"),
}


class Between(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function, kernel=1):
        super().__init__()
        self.function, self.before = function, nn.Conv2d(4, 4, 1)
        self.after = nn.Conv2d(function(torch.zeros(1, 4, 6, 8)).shape[1], 3, kernel)

    def forward(self, x):
        return self.after(self.function(self.before(x)))


def programs(model, x):
    """The programs of the steps of an engine, which is right for some batch sizes."""
    compiled = engine.compile(model.eval(), x, choose="native")
    for batch in (1, 2, 5):
        y = torch.randn(batch, *x.shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(compiled(y), model(y), rtol=1e-4, atol=1e-5)
    return {step.program for step in compiled.steps()}


@pytest.mark.parametrize("name", OPERATORS)
def test_they_run_in_the_program_around_them(name):
    assert programs(Between(OPERATORS[name]), torch.randn(2, 4, 6, 8)) == {0}


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "glu"])
def test_they_move_the_bits(name):
    class Net(nn.Module):
        def forward(self, x):
            return OPERATORS[name](x)

    plan = optimize(capture(Net(), (torch.randn(2, 4, 6, 8),)))
    assert {step.kind for step in plan.steps} <= {"view", "join", "concat"}
    for batch in (1, 3):
        x = torch.randn(batch, 4, 6, 8)
        assert torch.equal(reference.run(plan, (x,))[0], OPERATORS[name](x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flip(0),
        lambda x: x.repeat(2, 1, 1, 1),
        lambda x: x.repeat_interleave(2, 0),
        lambda x: x[:, :1].repeat(1, 2, 2, 1, 1).flatten(1, 2),
        lambda x: x[:1].repeat(x.shape[0], 1, 1, 1),
        lambda x: F.pixel_shuffle(x.unflatten(1, (1, 4)), 2).flatten(1, 2),
        lambda x: F.pad(x, (1, 1), value=2.0),
    ],
)
def test_others_stay_right(function):
    class Net(nn.Module):
        def forward(self, x):
            return function(x * 2)

    for batch in (1, 3):
        x = torch.randn(batch, 4, 6, 8)
        compiled = engine.compile(Net().eval(), x, choose="native")
        assert torch.equal(compiled(x), function(x * 2))


@pytest.mark.parametrize(
    ("pads", "padding"),
    [
        ((1, 2, 3, 0), ((4, 1), (2, 3))),
        ((2, 0), ((1, 1), (3, 1))),
        ((0, 0, 0, 1), ((1, 2), (1, 1))),
    ],
)
def test_zeros_before_a_convolution_are_its_own(pads, padding):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 5, 3, 2, padding=1)

        def forward(self, x):
            return self.conv(F.pad(x, pads))

    model, x = Net().eval(), torch.randn(2, 4, 6, 8)
    (step,) = optimize(capture(model, (x,))).steps
    assert isinstance(step, Conv)
    assert step.padding == padding
    assert programs(model, x) == {0}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.pad(x, (1, 1), value=1.0),
        lambda x: F.pad(x, (-1, 1)),
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)),
    ],
)
def test_other_paddings_are_no_zeros_of_a_convolution(function):
    assert programs(Between(function, 3), torch.randn(2, 4, 6, 8)) != {0}
