import math
import random

import pytest
import torch
from torch import nn

from rarefy import engine
from rarefy.engine import plan as steps
from rarefy.engine import reference, views
from rarefy.engine.binding import CHANNELS_FIRST, NativeError
from rarefy.engine.builder import Builder
from rarefy.engine.building import NativeSegment
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from rarefy.engine.plan import Join, Places, View


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


#: Operators that are views, on (batch, 4, 6, 8).
OPERATORS = {
    "view": lambda x: x.view(x.shape[0], 24, 8),
    "reshape": lambda x: x.reshape(-1, 2, 96),
    "flatten": lambda x: x.flatten(2),
    "unflatten": lambda x: x.unflatten(3, (2, 4)),
    "unsqueeze": lambda x: x.unsqueeze(2),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, -1),
    "movedim": lambda x: x.movedim(1, 3),
    "slice": lambda x: x[:, 1:, ::2, 2:7],
    "select": lambda x: x[:, :, 3],
    "narrow": lambda x: x.narrow(3, 2, 5),
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 5, -1),
    "diagonal": lambda x: x[:, :, :, :6].diagonal(0, 2, 3),
    "unfold": lambda x: x.unfold(3, 4, 2),
    "split": lambda x: torch.cat(x.split(3, 2)[::-1], 1),
    "split_with_sizes": lambda x: x.split([2, 4], 2)[1],
    "chunk": lambda x: x.chunk(2, 3)[0] + x.chunk(2, 3)[1],
    "unbind": lambda x: x.unbind(1)[2] + x.unbind(1)[0],
    "windows": lambda x: x.view(-1, 4, 3, 2, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 8, 4),
    "heads": lambda x: x.reshape(x.shape[0], 8, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)[1],
    "shuffle": lambda x: x.view(x.shape[0], 2, 2, 6, 8).transpose(1, 2).reshape(x.shape[0], 4, 6, 8),
}


def views_of(plan):
    return [step for step in plan.steps if isinstance(step, View)]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_that_move_numbers_are_views_with_the_same_bits(name):
    model = Function(OPERATORS[name])
    plan = optimize(capture(model, (torch.randn(2, 4, 6, 8),)))
    assert {step.kind for step in plan.steps} <= {"view", "concat", "add", "cat", "sym_size"}
    assert views_of(plan)
    for batch in (1, 3, 4):
        x = torch.randn(batch, 4, 6, 8)
        assert torch.equal(reference.run(plan, (x,))[0], model(x))


class Between(nn.Module):
    """A view between two layers, so that it is one of a native program."""

    def __init__(self, function, channels):
        super().__init__()
        self.function = function
        self.before = nn.Conv2d(4, 4, 1)
        self.after = nn.Linear(channels, 3)

    def forward(self, x):
        return self.after(self.function(self.before(x)))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in ("chunk", "unbind")])
def test_views_between_layers_run_in_their_program(name):
    function = OPERATORS[name]
    x = torch.randn(2, 4, 6, 8)
    model = Between(function, function(x).shape[-1]).eval()
    compiled = engine.compile(model, x, choose="native")
    assert [type(item) for item in compiled._items if not isinstance(item, steps.Operator)] == [NativeSegment]
    for batch in (1, 2, 3, 5):
        x = torch.randn(batch, 4, 6, 8)
        for threads in (1, 2):
            compiled.threads = threads
            torch.testing.assert_close(compiled(x), model(x).detach())


def random_move(rng, x):
    """A random operator on what is behind the batch: what it does, which gives the same for any batch."""
    sizes = list(x.shape[1:])
    axes = len(sizes)
    axis = rng.randrange(axes)
    match rng.choice(["permute", "slice", "split", "merge", "expand", "select", "flat"]):
        case "permute":
            order = [0, *rng.sample(range(1, axes + 1), axes)]
            return lambda y: y.permute(order)
        case "slice" if sizes[axis] > 2:
            low, step = rng.randrange(2), rng.randint(1, 2)
            return lambda y: y[(slice(None),) * (axis + 1) + (slice(low, None, step),)]
        case "split" if sizes[axis] % 2 == 0 and axes < 6:
            return lambda y: y.unflatten(axis + 1, (2, -1))
        case "merge" if axis + 1 < axes:
            return lambda y: y.flatten(axis + 1, axis + 2)
        case "expand":
            return lambda y: y.unsqueeze(axis + 1).expand(*[-1] * (axis + 1), 2, *[-1] * (axes - axis))
        case "select" if axes > 1:
            index = rng.randrange(sizes[axis])
            return lambda y: y.select(axis + 1, index)
        case _:
            return lambda y: y.reshape(y.shape[0], *reversed(y.shape[1:]))


@pytest.mark.parametrize("seed", range(8))
def test_random_chains(seed):
    rng, x, moves = random.Random(seed), torch.randn(2, 4, 6, 2), []
    y = x
    while len(moves) < 5:
        move = random_move(rng, y)
        if move(y).numel() <= 4096:
            moves.append(move)
            y = move(y)

    def chain(z):
        for move in moves:
            z = move(z)
        return z

    model = Between(chain, y.shape[-1]).eval()
    plan = optimize(capture(model, (x,)))
    compiled = engine.compile(model, x, choose="native")
    for batch in (1, 2, 3):
        given = torch.randn(batch, 4, 6, 2)
        torch.testing.assert_close(reference.run(plan, (given,))[0], model(given).detach())
        torch.testing.assert_close(compiled(given), model(given).detach())


def strided(numbers, view):
    """The entries of a view of these numbers, one by one."""
    at = [view.offset]
    for size, stride in zip(view.sizes, view.strides, strict=True):
        at = [first + i * stride for first in at for i in range(size)]
    return [numbers[each] for each in at]


def random_view(rng, numbers):
    """A view of so many numbers with random strides."""
    while True:
        axes = rng.randint(1, 4)
        sizes = tuple(rng.randint(1, 4) for _ in range(axes))
        strides = tuple(rng.choice([0, 1, 1, 2, 3, 4, 6, 8, 12, -1, -4]) for _ in range(axes))
        try:
            return View(
                name="v", output="v", input="x", numbers=numbers, sizes=sizes, strides=strides, offset=rng.randrange(5)
            )
        except ValueError:
            continue


def test_a_composed_view_is_the_view_of_the_view():
    rng, composed = random.Random(1), 0
    for _ in range(3000):
        inner = random_view(rng, 48)
        outer = random_view(rng, math.prod(inner.sizes))
        both = views.composed(outer, inner)
        if both is not None:
            composed += 1
            assert strided(range(48), both) == strided(strided(range(48), inner), outer)
    assert composed > 300


def test_a_view_taken_apart_has_its_entries():
    rng, found = random.Random(2), 0
    for _ in range(3000):
        shape = rng.choice([(4, 12), (48,), (2, 3, 8), (6, 1, 8)])
        view = random_view(rng, 48)
        apart = views.apart(view, shape)
        if apart is None:
            continue
        found += 1
        at = [apart.start]
        for atoms in apart.atoms:
            for size, axis, step in atoms:
                at = [
                    tuple(each + i * step * (a == axis) for a, each in enumerate(first))
                    for first in at
                    for i in range(size)
                ]
        assert all(0 <= each < size for entry in at for each, size in zip(entry, shape, strict=True))
        lengths = views.row_major(shape)
        assert [sum(map(math.prod, zip(entry, lengths, strict=True))) for entry in at] == strided(range(48), view)
    assert found > 300


@pytest.mark.parametrize(
    ("sizes", "strides", "offset", "folded", "why"),
    [
        ((4, 3), (3, 1), 1, False, "lie within"),
        ((4, 3), (-3, 1), 0, False, "lie within"),
        ((1 << 40, 1 << 40), (1, 1), 0, False, "lie within"),
        ((0, 3), (3, 1), 0, False, "lie within"),
        ((12,), (1,), 0, True, "two sizes"),
    ],
)
def test_views_that_leave_their_numbers_are_refused(sizes, strides, offset, folded, why):
    with pytest.raises(ValueError, match=why):
        View(
            name="v",
            output="v",
            input="x",
            numbers=12,
            sizes=sizes,
            strides=strides,
            offset=offset,
            folded=folded,
        )


def test_a_view_of_what_is_laid_out_otherwise_copies_nothing():
    view = View(name="v", output="v", input="x", numbers=24, sizes=(3, 2, 4), strides=(4, 12, 1))
    x = torch.randn(5, 3, 2, 4).transpose(1, 2)
    y = reference.run_step(view, {"x": x})
    assert torch.equal(y, x.transpose(1, 2))
    assert y.data_ptr() == x.data_ptr()


def test_layers_on_windows_are_one_program():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            y = self.norm(x).view(-1, 2, 3, 2, 3, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, 8)
            y = self.b(nn.functional.gelu(self.a(y))) + y
            return y.view(-1, 2, 2, 3, 3, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, 6, 8) + x

    model, x = Windows().eval(), torch.randn(2, 6, 6, 8)
    compiled = engine.compile(model, x, choose="native")
    assert [type(item) for item in compiled._items] == [NativeSegment]
    for batch in (1, 2, 5):
        x = torch.randn(batch, 6, 6, 8)
        torch.testing.assert_close(compiled(x), model(x).detach())


def test_folded_values_go_in_and_out_of_programs(tmp_path):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x).view(-1, 6, 2, 4).transpose(1, 2).reshape(-1, 6, 4)
            y = torch.softmax(self.b(y), -1)
            return self.b(y), torch.cumsum(y, 1)

    model, x = Heads().eval(), torch.randn(2, 6, 8)
    compiled = engine.compile(model, x, choose="native")
    folds = {port.fold for item in compiled._items if isinstance(item, NativeSegment) for port in item.outputs}
    assert 2 in folds
    engine.save(compiled, tmp_path / "heads.rarefy")
    loaded = engine.load(tmp_path / "heads.rarefy")
    for batch in (1, 2, 3):
        x = torch.randn(batch, 6, 8)
        for got, again, expected in zip(compiled(x), loaded(x), model(x), strict=True):
            torch.testing.assert_close(got, expected.detach())
            assert torch.equal(got, again)


#: Of a native view of 4 channels of 6 pixels as (6, 1, 4): its shape, the parts, then sizes and steps; one is wrong.
NATIVE = [6, 1, 4, 1, 2, 0, 0, 0, 0, 4, 1, 0, 0, 1, 6, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("at", "number"),
    [
        *((0, 0), (1, 1 << 31), (3, 2), (4, 1), (4, 3), (4, 17), (4, -1), (5, 1), (5, -1), (6, 1), (7, 1), (8, 1)),
        *((9, 0), (9, 5), (9, 1 << 62), (10, 2), (10, -1), (10, 1 << 40), (11, 1), (13, 2), (14, 7), (16, 1 << 62)),
    ],
)
def test_native_views_that_leave_their_values_are_refused(at, number):
    builder = Builder()
    x = builder.input((4, 2, 3), CHANNELS_FIRST, "x")
    assert builder.shape(builder.tensor("view", [x], NATIVE, name="whole")) == (6, 1, 4)
    forged = [*NATIVE[:at], number, *NATIVE[at + 1 :]]
    with pytest.raises(NativeError, match="view"):
        builder.tensor("view", [x], forged, name="forged")
    with pytest.raises(NativeError, match="view"):
        builder.tensor("view", [x], NATIVE[:-1], name="cut")


#: What puts values beside each other, of a layer's values (batch, 4, 6, 8), and whether all of it runs in one program.
JOINS = {
    "half turned": lambda x: torch.cat((-x[..., 4:], x[..., :4]), -1),
    "pairs turned": lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape),
    "along rows": lambda x: torch.cat((x[:, :, 3:], x.sigmoid(), x[:, :, :1]), 2),
    "of one value": lambda x: torch.cat((x, x, x), 2),
    "new axis": lambda x: torch.stack((x, x + 1.0), 1),
    "rolled": lambda x: x.roll((-1, 2), (1, 2)),
    "rolled around": lambda x: x.roll((7, 4), (3, 1)),
    "rolled twice along an axis": lambda x: x.roll((1, 2), (2, 2)),
    "windows put back, and rolled": lambda x: (
        x.reshape(-1, 2, 3, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6, 8).roll((1, 1), (1, 2))
    ),
    "permuted": lambda x: torch.cat((x.permute(0, 2, 1, 3), x.permute(0, 2, 1, 3)[:, :2]), 1).roll(1, 1),
}


class Joined(nn.Module):
    """Values joined between two layers."""

    def __init__(self, join):
        super().__init__()
        self.join, self.first, self.last = join, nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.last(self.join(torch.tanh(self.first(x))))


@pytest.mark.parametrize("name", JOINS)
def test_joins_between_layers_run_in_their_program(name, tmp_path):
    torch.manual_seed(0)
    model = Joined(JOINS[name]).eval()
    made = engine.compile(model, torch.randn(2, 4, 6, 8), tune_seconds=0.0, choose="native")
    assert [type(item) for item in made._items] == [NativeSegment]
    engine.save(made, tmp_path / "joined.rarefy")
    again = engine.load(tmp_path / "joined.rarefy")
    for batch in (1, 2, 5):
        x = torch.randn(batch, 4, 6, 8)
        torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-6)
        assert torch.equal(again(x), made(x))


@pytest.mark.parametrize("name", JOINS)
def test_joins_in_pytorch_have_the_same_bits(name, tmp_path):
    model = Function(JOINS[name]).eval()
    example = torch.randn(2, 4, 6, 8)
    assert any(isinstance(step, Join) for step in optimize(capture(model, (example,))).steps)
    made = engine.compile(model, example, choose="torch")
    engine.save(made, tmp_path / "joined.rarefy")
    for batch in (1, 3):
        x = torch.randn(batch, 4, 6, 8)
        assert torch.equal(made(x), model(x))
        assert torch.equal(engine.load(tmp_path / "joined.rarefy")(x), model(x))


def test_folded_values_are_joined():
    def windows(x):
        x = x.flatten(0, 1)
        return torch.cat((x[:, 3:], x.roll(1, 2)), 1).unflatten(0, (-1, 4))

    model = Function(windows)
    plan = optimize(capture(model, (torch.randn(2, 4, 6, 8),)))
    assert not [step.kind for step in plan.steps if isinstance(step, steps.Operator)]
    x = torch.randn(3, 4, 6, 8)
    assert torch.equal(reference.run(plan, (x,))[0], model(x))


def test_what_changes_nothing_is_no_step():
    def nothing(x):
        x = nn.functional.pad(x, (0, 0, 0, 0)) * 2.0
        return x.type_as(x + 1.0).to(torch.float32) + x

    plan = optimize(capture(Function(nothing), (torch.randn(2, 4, 6, 8),)))
    assert not [step.kind for step in plan.steps if isinstance(step, steps.Operator)]


@pytest.mark.parametrize(
    ("begins", "shapes", "why"),
    [
        (((0, 0), (0, 2)), ((3, 4), (3, 4)), "leaves the sizes"),
        (((0, 0), (0, 2)), ((3, 3), (3, 3)), "lies in the one"),
        (((0, 0), (0, 4)), ((3, 3), (3, 1)), "do not fill"),
        (((-1, 0), (0, 3)), ((3, 3), (3, 2)), "leaves the sizes"),
    ],
)
def test_joins_whose_parts_do_not_fill_them_are_refused(begins, shapes, why):
    parts = tuple(Places("x", 100, (4, 1)) for _ in shapes)
    with pytest.raises(ValueError, match=why):
        Join(name="y", output="y", sizes=(3, 5), parts=parts, shapes=shapes, begins=begins)
