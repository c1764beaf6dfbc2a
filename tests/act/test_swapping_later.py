"""Activations that a swapped model calls later: in generators and coroutines, after the first run, when compiled."""

import asyncio
import importlib
import operator
from types import GeneratorType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

from rarefy import act

X = torch.linspace(-4.0, 4.0, 65).bfloat16()
OURS = act.tanh(X, "hard")


class Called(nn.Module):
    def forward(self, x, function):
        return function(x)


class Generator(nn.Module):
    def forward(self, x, function=None):
        yield x
        yield (function or torch.tanh)(x)
        return "end"


class Expression(nn.Module):
    def forward(self, x):
        return (torch.tanh(each) for each in (x,))


class Mapped(nn.Module):
    def forward(self, x):
        return map(torch.tanh, (x,))


class Coroutine(nn.Module):
    async def forward(self, x):
        await asyncio.sleep(0)
        return torch.tanh(x)


class Stream(nn.Module):
    async def forward(self, x):
        await asyncio.sleep(0)
        yield torch.tanh(x)


async def last(values):
    return [each async for each in values][-1]


LATE = {
    "generator": lambda: (model := Generator(), lambda: list(model(X))[-1]),
    "generator of an argument": lambda: (model := Generator(), lambda: list(model(X, torch.tanh))[-1]),
    "expression": lambda: (model := Expression(), lambda: next(model(X))),
    "map": lambda: (model := Mapped(), lambda: next(model(X))),
    "coroutine": lambda: (model := Coroutine(), lambda: asyncio.run(model(X))),
    "stream": lambda: (model := Stream(), lambda: asyncio.run(last(model(X)))),
}


@pytest.mark.parametrize("kind", LATE)
def test_what_runs_when_it_is_asked_for_values_is_replaced(kind):
    model, run = LATE[kind]()
    report = act.swap(model, "hard")
    for _ in range(3):
        assert torch.equal(run(), OURS)
        assert _get_current_function_mode() is None
    assert report.replaced == [("", "tanh called")]
    report.restore()
    assert torch.equal(run(), torch.tanh(X))


def test_a_generator_is_one_to_its_caller():
    class Echo(nn.Module):
        def forward(self, x):
            try:
                while True:
                    try:
                        x = torch.tanh((yield x))
                    except KeyError:
                        x = torch.zeros(1)
            finally:
                self.closed = torch.tanh(X)

    model = Echo()
    act.swap(model, "hard")
    steps = model(X)
    assert type(steps) is GeneratorType
    assert next(steps) is X
    assert torch.equal(steps.send(X), OURS)
    assert torch.equal(steps.throw(KeyError()), torch.zeros(1))
    steps.close()
    assert torch.equal(model.closed, OURS)
    with pytest.raises(StopIteration):
        next(steps)
    ended = Generator()
    act.swap(ended)

    def outer():
        assert (yield from ended(X)) == "end"

    assert len(list(outer())) == 2


def test_a_function_that_is_given_back_is_told():
    class Gives(nn.Module):
        def forward(self, x):
            return lambda: torch.tanh(x)

    model = Gives()
    report = act.swap(model, "hard")
    model(X)
    assert report.kept == [("", "gives back a function, which computes outside of it: that is left")]


def test_functions_that_come_as_arguments_are_replaced_in_every_call():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.called = Called()

        def forward(self, x, options):
            return self.called(x, options["function"])

    for model, give in ((Called(), lambda f: f), (Outer(), lambda f: {"function": f})):
        report = act.swap(model, "hard")
        assert torch.equal(model(X, give(torch.relu)), torch.relu(X))
        assert not report.watched
        assert torch.equal(model(X, give(torch.tanh)), OURS)
        assert torch.equal(model(X, give(F.silu)), act.silu(X, "hard"))
        assert len(report.watched) == 1


class Spelled:
    def __getitem__(self, name):
        return operator.attrgetter(name)(importlib.import_module("torch"))


SPELLED = Spelled()


class Unseen(nn.Module):
    """Calls an activation by a name that nobody reads."""

    def forward(self, x: Tensor) -> Tensor:
        return Called()(x, SPELLED["tan" + "h"])


def test_a_part_that_runs_first_later_is_seen_then():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.unseen = False, Unseen()

        def forward(self, x):
            return self.unseen(x) if self.late else x

    model = Parts()
    report = act.swap(model, "hard")
    model(X)
    assert not report.replaced
    model.late = True
    for _ in range(2):
        assert torch.equal(model(X), OURS)
    assert report.replaced == [("unseen", "tanh called")]
    alone = nn.ModuleList([Unseen()])
    act.swap(alone, "hard")
    assert torch.equal(alone[0](X), OURS)


class Wide(nn.Module):
    def forward(self, x):
        return torch.tanh(x.double()).to(x.dtype)


@pytest.mark.parametrize(
    ("make", "replaced", "kept"),
    [
        (lambda: nn.Sequential(Unseen(), nn.Identity()), [("0", "tanh called")], []),
        (lambda: nn.Sequential(nn.Tanh()), [("0", "Tanh")], []),
        (lambda: nn.Sequential(nn.Identity(), Wide()), [], [("1", "there is no tanh of float64 here")]),
    ],
)
def test_a_first_run_that_is_compiled_misses_nothing(make, replaced, kept):
    torch._dynamo.reset()
    model = make()
    report = act.swap(model, "hard")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        y = compiled(X)
    assert torch.equal(y, OURS if replaced else torch.tanh(X.double()).bfloat16())
    assert (report.replaced, report.kept) == (replaced, kept)
    assert torch.equal(model(X), y)
    torch._dynamo.reset()
