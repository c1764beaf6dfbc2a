"""Recurrent layers on the engine: against PyTorch's in float64, one step and sequences, in files and out of them."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rarefy import act, engine, kernels
from rarefy.engine import recurrent
from rarefy.engine.assembling import build
from rarefy.engine.attention import additive_scores
from rarefy.engine.binding import CHANNELS_FIRST, NativeError, available
from rarefy.engine.builder import Builder
from rarefy.engine.capture import capture
from rarefy.engine.eager import Eager
from rarefy.engine.execute import Runner
from rarefy.engine.onnx_int8 import serialized
from rarefy.engine.passes import optimize
from rarefy.engine.plan import GRUGates, Linear, LSTMCell, LSTMHidden, Operator, Recurrence
from tests.engine.layers import PATTERNS, paths, sparse
from tests.engine.test_file import forged, refused

INPUTS, HIDDEN = 5, 9
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "act lstm": act.LSTM, "act gru": act.GRU}
native = pytest.mark.skipif(not available(), reason="there is no native engine")


class Layer(nn.Module):
    """A layer whose result is flat: y, and the states as (batch, ...), from such states where it takes them."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        given = tuple(state.transpose(0, 1) for state in states)
        hx = None if not given else given if isinstance(self.layer, nn.LSTM) else given[0]
        y, after = self.layer(x, hx)
        after = after if isinstance(after, tuple) else (after,)
        return y, *(state.transpose(0, 1) for state in after)


class Cell(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        after = self.cell(x, states if len(states) == 2 else states[0])
        return after if isinstance(after, tuple) else (after,)


def made(kind: str, pattern: str = "random", **options) -> Layer:
    """A layer in float32, its matrices by a pattern of :mod:`tests.engine.layers`."""
    torch.manual_seed(0)
    layer = Layer(KINDS[kind](INPUTS, HIDDEN, batch_first=True, **options)).eval()
    for weight in layer.parameters():
        weight.data *= 2
        if weight.dim() == 2:
            weight.data = PATTERNS[pattern](weight.data)
    return layer


def inputs(layer: nn.Module, batch: int, steps: int, given: bool) -> tuple[Tensor, ...]:
    inner = layer.layer
    count = (1 + isinstance(inner, nn.LSTM)) * given
    axes = inner.num_layers * (1 + inner.bidirectional)
    return (torch.randn(batch, steps, INPUTS), *(torch.randn(batch, axes, HIDDEN) for _ in range(count)))


def wide(model: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What PyTorch makes of it in float64, also of a layer of ours in mode "exact"."""
    doubled = copy.deepcopy(model).double()
    if isinstance(model, Layer) and isinstance(model.layer, (act.LSTM, act.GRU)):
        old = model.layer
        kind = nn.LSTM if isinstance(old, nn.LSTM) else nn.GRU
        options = {name: getattr(old, name) for name in ("num_layers", "bias", "batch_first", "bidirectional")}
        doubled = Layer(kind(old.input_size, old.hidden_size, **options)).double()
        doubled.layer.load_state_dict(old.state_dict())
    with torch.no_grad():
        return doubled(*(x.double() for x in given))


def close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Sums of some ten products of about 1, in float32, through some steps."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype is torch.float32
        torch.testing.assert_close(a.double(), b, atol=4e-6, rtol=1e-5)


def kinds(compiled: engine.Engine) -> list[str]:
    return [step.kind for step in compiled.steps()]


@pytest.mark.parametrize("pattern", ["dense", "random", "nothing"])
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_way(kind, steps, pattern):
    model = made(kind, pattern)
    given = inputs(model, 3, steps, True)
    plan = optimize(capture(model, given))
    for isa in paths():
        for choose in ("native", "sparse", "dense"):
            with kernels.forced(isa):
                compiled = build(plan, given, 1, "float32", choose, 0.0)
                for batch in (1, 3, 8, 21):
                    some = inputs(model, batch, steps, True)
                    close(compiled(*some), wide(model, some))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{"bias": False}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_directions_and_states(kind, steps, options, given):
    model = made(kind, **options)
    compiled = engine.compile(model, inputs(model, 2, steps, given), 1, choose="sparse")
    assert compiled.batch is None
    for batch in (1, 5):
        some = inputs(model, batch, steps, given)
        close(compiled(*some), wide(model, some))


@pytest.mark.parametrize("batch", [1, 3])
def test_time_may_come_first_and_the_batch_be_missing(batch):
    torch.manual_seed(0)
    for kind in (nn.LSTM, act.LSTM):
        model = kind(INPUTS, HIDDEN).eval()
        for x in (torch.randn(4, batch, INPUTS), torch.randn(4, INPUTS)):

            class First(nn.Module):
                def __init__(self, layer: nn.Module) -> None:
                    super().__init__()
                    self.layer = layer

                def forward(self, x: Tensor) -> Tensor:
                    return self.layer(x)[0]

            compiled = engine.compile(First(model).eval(), x, 1, choose="sparse")
            close((compiled(x),), (nn.LSTM.forward(_plain(model), x.double())[0],))


def _plain(model: nn.LSTM) -> nn.LSTM:
    found = nn.LSTM(model.input_size, model.hidden_size).double().eval()
    found.load_state_dict(model.state_dict())
    return found.requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_cells(kind, bias):
    torch.manual_seed(0)
    model = Cell(kind(INPUTS, HIDDEN, bias=bias)).eval()
    states = 1 + (kind is nn.LSTMCell)
    example = (torch.randn(2, INPUTS), *(torch.randn(2, HIDDEN) for _ in range(states)))
    compiled = engine.compile(model, example, 1, choose="native")
    if available():
        assert all(step.kernel != "PyTorch" for step in compiled.steps())
    for batch in (1, 4, 33):
        given = (torch.randn(batch, INPUTS), *(torch.randn(batch, HIDDEN) for _ in range(states)))
        close(compiled(*given), wide(model, given))


def test_what_a_step_becomes():
    model = Cell(act.LSTMCell(INPUTS, HIDDEN)).eval()
    plan = capture(model, (torch.randn(2, INPUTS), torch.randn(2, HIDDEN), torch.randn(2, HIDDEN)))
    assert [type(step) for step in plan.steps] == [Linear, Linear, LSTMCell, LSTMHidden]
    assert [step.name for step in plan.steps] == ["cell.weight_ih", *["cell.weight_hh"] * 3]
    gru = Cell(nn.GRUCell(INPUTS, HIDDEN)).eval()
    plan = capture(gru, (torch.randn(2, INPUTS), torch.randn(2, HIDDEN)))
    assert [type(step) for step in plan.steps] == [Linear, Linear, GRUGates]
    sequence = capture(made("lstm"), inputs(made("lstm"), 2, 4, True))
    assert sum(isinstance(step, Recurrence) for step in sequence.steps) == 1


def test_reshapes_that_come_back_vanish():
    class There(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = x.unsqueeze(1)
            return y.transpose(0, 1)[0].relu(), y.squeeze(1).relu(), y.transpose(1, 2).reshape(x.shape).relu()

    x = torch.randn(3, 4)
    plan = optimize(capture(There().eval(), (x,)))
    assert [step.kind for step in plan.steps] == ["activation"] * 3
    moved = nn.Sequential(nn.Flatten(1), nn.Unflatten(1, (4, 5)), nn.ReLU()).eval()
    assert [step.kind for step in optimize(capture(moved, (torch.randn(2, 4, 5),))).steps] == ["activation"]

    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2).reshape(x.shape[0], 4, 5)

    x = torch.randn(2, 4, 5)
    assert torch.equal(engine.compile(Turned().eval(), x, choose="torch")(x), Turned()(x))


@native
@pytest.mark.parametrize("pattern", ["dense", "random"])
@pytest.mark.parametrize("given", [False, True])
def test_a_layer_is_one_step_of_one_program(pattern, given):
    model = made("lstm", pattern, num_layers=2, bidirectional=True)
    some = inputs(model, 2, 4, given)
    compiled = engine.compile(model, some, 1, choose="native")
    steps = [step for step in compiled.steps() if step.kind == "lstm"]
    assert [step.name.partition("weight_hh")[2] for step in steps] == ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert {step.program for step in steps} == {0}
    weight = model.layer.weight_hh_l0
    rows = [row for row in compiled.profile(*some, rounds=3).rows if row.name == "layer.weight_hh_l0"]
    assert [row.density for row in rows] == [weight.count_nonzero().item() / weight.numel()]
    assert steps[0].facts.dense_macs == 4 * 4 * HIDDEN * HIDDEN


class Tags(nn.Module):
    """Words through layers in both directions to tags: one program where all of it is native."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.tags = nn.Embedding(20, INPUTS), nn.Linear(2 * HIDDEN, 3)
        self.layer = nn.GRU(INPUTS, HIDDEN, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.tags(self.layer(self.words(x))[0])


@native
def test_a_whole_network_is_one_program(tmp_path):
    torch.manual_seed(0)
    model, x = Tags().eval().requires_grad_(False), torch.randint(20, (2, 6))
    compiled = engine.compile(model, x, 1, choose="native")
    assert {step.program for step in compiled.steps()} == {0}
    engine.save(compiled, tmp_path / "a.engine")
    again = engine.load(tmp_path / "a.engine")
    for batch in (1, 2, 9):
        x = torch.randint(20, (batch, 6))
        torch.testing.assert_close(compiled(x), model(x), atol=4e-6, rtol=1e-5)
        assert torch.equal(compiled(x), again(x))


@native
def test_cells_are_kept_where_they_are_read():
    model = made("lstm")
    for x, cells in ((Layer(model.layer), True), (Only(model.layer), False)):
        plan = optimize(capture(x.eval(), inputs(model, 2, 4, False)))
        assert [step.cells for step in plan.steps if isinstance(step, Recurrence)] == [cells]
        assert [step.states for step in plan.steps if isinstance(step, Recurrence)] == [()]


class Only(nn.Module):
    """A layer's y."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@native
@pytest.mark.parametrize("kind", ["lstm", "act gru"])
def test_the_sequence_may_come_first_in_the_model_alone(kind):
    """Then the batch is still the first dimension of what is given, and of any size."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = KINDS[kind](INPUTS, HIDDEN).eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1))[0].transpose(0, 1)

    model = Turned().eval().requires_grad_(False)
    compiled = engine.compile(model, torch.randn(2, 5, INPUTS), 1, choose="native")
    assert compiled.batch is None
    assert "PyTorch" not in {step.kernel for step in compiled.steps() if step.kind != "view"}  # which copies nothing
    for batch in (1, 2, 5):
        x = torch.randn(batch, 5, INPUTS)
        torch.testing.assert_close(compiled(x), model(x), atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("mode", ["ktanh", "hard"])
def test_other_modes_are_those_of_the_layer(mode, steps):
    """Weights and inputs of a few bits, whose sums do not round: then both sides give the same bits."""
    torch.manual_seed(0)
    model = Layer(act.LSTM(INPUTS, HIDDEN, batch_first=True, mode=mode)).eval()
    for weight in model.parameters():
        weight.data = sparse((weight.data * 64).round() / 64, 0.3)
    given = inputs(model, 3, steps, True)
    given = tuple((x * 16).round() / 16 for x in given)
    compiled = engine.compile(model, given, 1, choose="sparse")
    with torch.no_grad():
        expected = model(*given)
    first = [y[:, :1] for y in (compiled(*given)[0], expected[0])]  # the states after it round
    torch.testing.assert_close(*first, atol=1e-6, rtol=0)
    for a, b in zip(compiled(*given), expected, strict=True):
        torch.testing.assert_close(a, b, atol=0.02 if mode == "ktanh" else 1e-5, rtol=0)
    if available():
        found = [step.kernel for step in compiled.steps() if step.kind == ("lstm hidden" if steps == 1 else "lstm")]
        assert len(found) == 1
        assert found[0] != "PyTorch"


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_is_not_covered_runs_in_torch():
    torch.manual_seed(0)
    for model, x in (
        (nn.LSTM(INPUTS, HIDDEN, proj_size=4, batch_first=True), torch.randn(2, 3, INPUTS)),
        (nn.LSTM(INPUTS, HIDDEN, batch_first=True).double(), torch.randn(2, 3, INPUTS).double()),
        (act.LSTM(INPUTS, HIDDEN, proj_size=4, batch_first=True), torch.randn(2, 3, INPUTS)),
    ):
        layer = Layer(model).eval()
        compiled = engine.compile(layer, x, 1, choose="native")
        with torch.no_grad():
            for a, b in zip(compiled(x), layer(x), strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        assert all(step.kernel == "PyTorch" for step in compiled.steps() if step.kind in ("lstm", "gru"))


def test_several_threads_give_the_same():
    model = made("lstm", "random", bidirectional=True)
    for steps in (1, 4):
        given = inputs(model, 70, steps, True)
        shared, alone = (engine.compile(model, given, threads, choose="sparse") for threads in (3, 1))
        for some in (given, tuple(x[:1] for x in given)):  # of one sample the rows of each step are shared out
            for a, b in zip(shared(*some), alone(*some), strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_what_measuring_chooses(steps):
    model = made("lstm", "random")
    given = inputs(model, 2, steps, True)
    close(engine.compile(model, given, 1, tune_seconds=0.05)(*given), wide(model, given))


def test_onnx_in_int8_is_refused():
    pytest.importorskip("onnx")
    model = Cell(nn.LSTMCell(INPUTS, HIDDEN)).eval()
    given = tuple(torch.randn(2, size) for size in (INPUTS, HIDDEN, HIDDEN))
    with pytest.raises(ValueError, match="is of a recurrent layer, which has no form in ONNX in int8"):
        serialized(optimize(capture(model, given)))


@pytest.mark.parametrize("steps", [1, 4])
def test_fewer_bits(steps):
    model = made("lstm", "random", num_layers=2)
    given = inputs(model, 4, steps, False)
    exact = wide(model, given)
    half = engine.compile(model, given, 1, precision="bfloat16", choose="sparse")
    whole = engine.compile(model, given, 1, precision="int8", calibration=[given], error_budget=10.0, choose="native")
    for compiled in (half, whole):
        for a, b in zip(compiled(*given), exact, strict=True):
            assert (a - b).abs().max() < 0.1
            assert not torch.equal(a.double(), b)


def saved(model: Layer, steps: int, path, choose: str = "sparse"):
    given = inputs(model, 3, steps, False)
    compiled = engine.compile(model, given, 1, choose=choose)
    engine.save(compiled, path)
    return compiled, given


@pytest.mark.parametrize("choose", ["sparse", "torch"])
@pytest.mark.parametrize("kind", ["lstm", "act gru"])
@pytest.mark.parametrize("steps", [1, 4])
def test_files(tmp_path, kind, steps, choose):
    model = made(kind, bidirectional=True)
    compiled, given = saved(model, steps, tmp_path / "a.engine", choose)
    again = engine.load(tmp_path / "a.engine")
    for other in (again, copy.deepcopy(compiled), engine.load(tmp_path / "a.engine", mmap=True)):
        for a, b in zip(compiled(*given), other(*given), strict=True):
            assert torch.equal(a, b)
    assert kinds(again) == kinds(compiled)


def test_forged_recurrences_of_torch_are_refused(tmp_path):
    path = tmp_path / "a.engine"
    for kind in ("lstm", "gru"):
        saved(made(kind), 4, path, "torch")
        data = path.read_bytes()

        def fields(header):
            return next(each for each in header["items"] if each.get("step") == "Recurrence")["fields"]

        def states(header, names, fields=fields):
            fields(header)["states"] = {"tuple": names}

        changes = [
            lambda header, fields=fields, states=states: states(header, [fields(header)["products"]]),
            lambda header, fields=fields, states=states: states(header, [fields(header)["products"]] * 2),
            lambda header, fields=fields: fields(header).update(cells="yes"),
            lambda header, fields=fields: fields(header)["weight"]["tensor"].update(shape=[HIDDEN, 1]),
            lambda header, fields=fields: fields(header)["weight"]["tensor"].update(dtype="int32"),
            lambda header, fields=fields: fields(header).update(reverse=2),
            lambda header, fields=fields: fields(header).update(mode="soft"),
            lambda header, fields=fields: fields(header).update(mode="ktanh", table="{}"),
            lambda header, fields=fields: fields(header).update(bias=fields(header)["weight"]),
            lambda header, fields=fields: fields(header).update(products="x"),
        ]
        for change in changes:
            refused(tmp_path / "b.engine", forged(data, change))


@native
def test_the_builder_refuses_gates_that_do_not_fit():
    builder = Builder()
    gates = builder.input((4 * HIDDEN, 1, 1), CHANNELS_FIRST, "gates")
    state = builder.input((HIDDEN, 1, 1), CHANNELS_FIRST, "state")
    plane = builder.input((HIDDEN, 2, 2), CHANNELS_FIRST, "plane")
    for function in (builder.lstm_cell, builder.lstm_hidden):
        assert builder.shape(function(gates, state, name="")) == (HIDDEN, 1, 1)
        for x, c in ((state, state), (gates, gates), (gates, plane), (gates, 99), (99, state)):
            with pytest.raises(NativeError, match=r"gates must be a vector of 4 channels|there is no value 99"):
                function(x, c, name="")
    for given in ((gates, gates, state), (gates, state, state), (state, gates, 99)):
        with pytest.raises(NativeError, match=r"gates must be a vector of 3 channels|there is no value 99"):
            builder.gru(*given, name="")


@native
def test_the_builder_refuses_a_recurrence_that_does_not_fit():
    builder = Builder()
    x, h = (builder.input(shape, CHANNELS_FIRST, "") for shape in ((12, 1, 5), (3, 1, 1)))
    plane = builder.input((3, 1, 5), CHANNELS_FIRST, "")
    how = {"reverse": False, "cells": False, "storage": "float32", "choice": "measure", "name": ""}
    lstm, gru = torch.ones(12, 3), torch.ones(12, 4)
    assert builder.shape(builder.recurrence(x, [h, h], lstm, None, **{**how, "cells": True})) == (6, 1, 5)
    assert builder.shape(builder.recurrence(x, [], gru, torch.ones(12), **how)) == (4, 1, 5)
    for given, more, why in (
        ((x, [], torch.ones(12, 5), None), {}, "3 or 4 gates for each channel of its state"),
        ((h, [], lstm, None), {}, "3 or 4 gates"),
        ((x, [h], lstm, None), {}, "from all of its states, or from zeros"),
        ((x, [h, h], gru, None), {}, "from all of its states, or from zeros"),
        ((x, [h, plane], lstm, None), {}, "a state must be a vector of 3 channels"),
        ((x, [h, 99], lstm, None), {}, "there is no value 99"),
        ((99, [], lstm, None), {}, "there is no value 99"),
        ((x, [], gru, None), {"cells": True}, "cells of an LSTM"),
        ((x, [], torch.ones(11, 3), None), {}, "there must be 36 weights"),
        ((x, [], lstm, torch.ones(3)), {}, "12 biases or none, got 3"),
    ):
        with pytest.raises(NativeError, match=why):
            builder.recurrence(*given, **{**how, **more})


def test_a_model_that_gives_a_value_twice_may_run_itself():
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = x + 1
            return y, x * 2, y, x * 3

    x = torch.randn(2, 3)
    plan = capture(Twice(), (x,))
    run = Runner([Eager(Twice(), plan.inputs, plan.outputs, plan.single)], plan.inputs, plan.outputs, {})
    for a, b in zip(run((x,), 1), Twice()(x), strict=True):
        assert torch.equal(a, b)


def test_training_mode_is_refused_as_ever():
    with pytest.raises(ValueError, match="training mode"):
        engine.compile(nn.LSTM(3, 4), torch.randn(2, 3, 3))


def test_a_layer_gives_its_states_as_it_does_by_itself():
    layer, x = nn.LSTM(3, 4, batch_first=True).eval(), torch.randn(2, 3, 3)
    y, (h, c) = engine.compile(layer, x, choose="native")(x)
    for got, expected in zip((y, h, c), (layer(x)[0], *layer(x)[1]), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 13), (2, 5, 32), (0, 3, 4), (2, 9, 40)])
def test_scores_of_additive_attention(shape):
    batch, _, width = shape
    torch.manual_seed(0)
    keys, queries, vector = torch.randn(shape) * 3, torch.randn(batch, width), torch.randn(width)
    exact = torch.tanh(keys.double() + queries.double().unsqueeze(1)) @ vector.double()
    for isa in paths():
        with kernels.forced(isa):
            for some in (keys, keys.transpose(1, 2).contiguous().transpose(1, 2)):
                scores = additive_scores(some, queries, vector)
                assert scores.dtype is torch.float32
                torch.testing.assert_close(scores.double(), exact, atol=1e-6 * width, rtol=1e-5)
    for wrong in (keys[..., :-1], keys.double(), keys[0] if batch else keys.flatten()):
        with pytest.raises(ValueError, match="keys, queries and vector must be"):
            additive_scores(wrong, queries, vector)


def test_a_plan_holds_no_operator_of_pytorchs_layers():
    plan = capture(made("lstm", num_layers=2), inputs(made("lstm", num_layers=2), 2, 3, True))
    assert not any(isinstance(step, Operator) and "lstm" in step.target for step in plan.steps)


def test_what_is_meant_is_said():
    with pytest.raises(TypeError, match=r"threads got a tensor: the inputs .* go in one tuple"):
        engine.compile(nn.GRU(3, 4).eval(), torch.zeros(5, 2, 3), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_pytorchs_layers_are_its_own_again_after_a_capture(kind):
    model = made(kind, num_layers=2, bidirectional=True)
    layer = model.layer
    capture(model, inputs(model, 2, 3, True))
    own = torch.ops.aten.lstm.input if kind == "lstm" else torch.ops.aten.gru.input
    with FakeTensorMode() as mode, torch.no_grad():
        fake = [
            mode.from_tensor(x) for x in (torch.zeros(5, 2, layer.input_size), torch.zeros(4, 2, layer.hidden_size))
        ]
        weights = [mode.from_tensor(each) for each in layer.parameters()]
        states = [fake[1], fake[1]] if kind == "lstm" else fake[1]
        found = list[list[tuple[int, ...]]]()
        for block in (contextlib.nullcontext(), recurrent.by_layers()):
            with block:
                found.append([tuple(y.shape) for y in own(fake[0], states, weights, True, 2, 0.0, False, True, False)])
    assert found[0] == found[1] == [(5, 2, 2 * layer.hidden_size), *[(4, 2, layer.hidden_size)] * (len(found[0]) - 1)]
