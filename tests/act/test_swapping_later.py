"""Activations that a swapped model calls later: in generators and coroutines, after the first run, when compiled."""

import asyncio
from collections import OrderedDict
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


class Unseen(nn.Module):
    """Calls an activation by a name that nobody reads."""

    def forward(self, x: Tensor) -> Tensor:
        return getattr(x, "".join(("tan", "h")))()


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


ACTS = {"tanh": torch.tanh, "relu": torch.relu}


class Choosing(nn.Module):
    """Calls relu in its first run and tanh afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.space, self.held = "relu", torch, {"deep": [OrderedDict(ACTS)]}

    def forward(self, x: Tensor) -> Tensor:
        return x


def by_dictionary(self, x):
    return ACTS[self.name](x)


def by_attribute(self, x):
    return self.held["deep"][0][self.name](x)


def by_space(self, x):
    return getattr(self.space, self.name)(x)


def by_name(self, x):
    return getattr(x, self.name)()


def by_written_name(self, x):
    return getattr(x, f"{self.name}")()


def by_vars(self, x):
    return vars(torch)[self.name](x)


def by_dict(self, x):
    return torch.__dict__[self.name](x)


def by_text(self, x):
    return eval("torch." + self.name)(x)


def by_question(self, x):
    if isinstance(self.name, str) and self.name == "relu":
        return x
    return nn.Tanh()(x)


class Own(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


def by_own_question(self, x):
    if isinstance(x, (nn.Linear, Own)) or self.name == "relu":
        return x
    return Own()(x)


def by_distribution(self, x):
    return x if self.name == "relu" else torch.distributions.transforms.TanhTransform()(x)


CHOICES = (
    *(
        by_dictionary,
        by_attribute,
        by_space,
        by_name,
        by_written_name,
        by_vars,
        by_dict,
        by_text,
        by_question,
        by_own_question,
        by_distribution,
    ),
)


@pytest.mark.parametrize("forward", CHOICES)
def test_what_is_chosen_after_the_first_run_is_replaced(forward):
    model = type("Chosen", (Choosing,), {"forward": forward})()
    report = act.swap(model, "hard")
    model(X)
    model.name = "tanh"
    for _ in range(2):
        assert torch.equal(model(X), OURS)
    assert report.replaced == [("", "tanh called")]


def test_asking_for_a_class_is_not_calling_it():
    class Asking(nn.Module):
        def forward(self, x):
            return x if isinstance(self, nn.Tanh) or isinstance(abs(1), (Own, nn.LSTM)) else x + 1

    assert not act.swap(Asking()).watched


def test_lists_of_tensors_are_told_and_every_operator_is_caught():
    class Lists(nn.Module):
        def forward(self, x):
            return torch._foreach_tanh([x])[0] + torch._C._nn.gelu_(x * 1) + torch.ops.prims.tanh(x)

    model = Lists()
    report = act.swap(model, "hard")
    assert torch.equal(model(X), torch.tanh(X) + act.gelu(X, "hard") + OURS)
    assert report.kept == [("", "_foreach_tanh computes those of a list inside PyTorch")]
    assert set(report.replaced) == {("", "gelu called"), ("", "tanh called")}


KINDS = {nn.GRU: 1}


@pytest.mark.parametrize(
    "same",
    [
        lambda layer: type(layer) is nn.GRU,
        lambda layer: type(layer) in (nn.LSTM, nn.GRU),
        lambda layer: layer.__class__ == nn.GRU,
        lambda layer: type(layer) in KINDS,
    ],
)
def test_a_layer_whose_type_the_model_compares_is_kept(same):
    class Comparing(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.other = nn.GRU(4, 4), nn.Tanh()

        def forward(self, x):
            return self.other(x) if same(self.rnn) else x

    Comparing.same = staticmethod(same)
    model = Comparing()
    report = act.swap(model, "hard")
    assert torch.equal(model(X), OURS)
    assert report.kept == [("rnn", "code of the model compares types with GRU, which a swap would change")]
    assert type(model.rnn) is nn.GRU


def test_the_report_names_the_classes_that_changed():
    model = nn.Sequential(nn.LSTM(4, 4), nn.Identity())
    report = act.swap(model, "hard")
    assert "derives from theirs: LSTM; isinstance()" in str(report)
    report.restore()
    assert "derives" not in str(report)
