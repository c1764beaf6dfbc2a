"""How an engine's items run: the functions that they are bound to, and what is timed."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy import engine
from rarefy.engine import measure, named, profile
from rarefy.engine.capture import capture
from rarefy.engine.execute import Runner, Timed
from rarefy.engine.passes import optimize
from rarefy.engine.plan import Operator, Ref
from tests.engine.layers import lowered

X, Y, Z = torch.rand(2, 3, 4) + 0.5, torch.rand(2, 3, 4) + 0.5, torch.rand(2, 4, 3)
INDEX, MASK = torch.tensor([[1, 0], [2, 1]]), torch.rand(2, 3, 4) > 0.5
#: Arguments of each operator with a binding of its own, in the order of its schema; (X,) where there is nothing here.
ARGUMENTS = {
    **dict.fromkeys(
        ["add.Tensor", "div.Tensor", "eq.Tensor", "le.Tensor", "lt.Tensor", "mul.Tensor", "sub.Tensor"], (X, Y)
    ),
    **dict.fromkeys(["eq.Scalar", "ge.Scalar", "gt.Scalar", "lt.Scalar", "ne.Scalar", "pow.Tensor_Scalar"], (X, 2)),
    "argmax.default": (X, 1, True),
    **dict.fromkeys(["bitwise_and.Tensor", "logical_and.default"], (MASK, ~MASK)),
    **dict.fromkeys(["bitwise_not.default", "logical_not.default"], (MASK,)),
    **dict.fromkeys(["bmm.default", "matmul.default"], (X, Z)),
    **dict.fromkeys(["chunk.default", "split.Tensor"], (X, 2, -1)),
    **dict.fromkeys(["cumsum.default", "squeeze.dim", "unbind.int", "unsqueeze.default"], (X, 1)),
    **dict.fromkeys(["select.int", "transpose.int"], (X, 1, 2)),
    "addcmul.default": (X, Y, X),
    "addmm.default": (torch.rand(3), X[0], Z[0]),
    "amax.default": (X, [1], True),
    "baddbmm.default": (torch.rand(2, 3, 3), X, Z),
    "cat.default": ([X, Y], -1),
    "clamp.default": (X, 0.6, None),
    "clamp_min.default": (X, 0.6),
    "embedding.default": (X[0], INDEX),
    "expand.default": (X[:1], [5, -1, 4]),
    "flatten.using_ints": (X, 1),
    "flip.default": (X, [1]),
    "gather.default": (X[0], 1, INDEX),
    "gelu.default": (X,),
    "index_select.default": (X, 1, INDEX[1]),
    "layer_norm.default": (X, [4], Y[0, 0], None, 1e-3),
    "linear.default": (X, Y[0], None),
    "masked_fill.Scalar": (X, MASK, -1.0),
    "mean.dim": (X, [1], True),
    "mm.default": (X[0], Z[0]),
    "pad.default": (X, [1, 2], "constant", 3.0),
    "permute.default": (X, [2, 0, 1]),
    "reshape.default": (X, [4, -1]),
    "roll.default": (X, [1], [2]),
    "rsub.Scalar": (X, 2),
    "scaled_dot_product_attention.default": (X[None], Y[None], Y[None]),
    "softmax.int": (X, 1),
    "split_with_sizes.default": (X, [1, 3], 2),
    "stack.default": ([X, Y], 1),
    "sum.dim_IntList": (X, [0, 2], True),
    "where.self": (MASK, X, Y),
}


class Seen(TorchDispatchMode):
    """Which operators ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", sorted(named._BINDINGS))
def test_a_binding_is_the_operator_that_it_stands_for(target):
    args = ARGUMENTS.get(target.removeprefix("aten."), (X,))
    results, names = [], []
    for function in (named.resolve(target), named.binding(target)):
        with Seen() as seen, torch.no_grad():
            results.append(function(*args))
        names.append(seen.names)
    assert names[0] == names[1]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("bounds", [(1, 3), (None, None), (-2, None), (0, 9223372036854775807), (0, 4, 2), (5, 9)])
def test_slices_are_those_of_the_operator(bounds):
    for axis in range(3):
        step = Operator(name="s", output="s", target="aten.slice.Tensor", args=(Ref("x"), axis, *bounds))
        expected = torch.ops.aten.slice.Tensor(X, axis, *bounds)
        (result,) = Runner([step], ["x"], ["s"], {})([X], 1)
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()


def test_lists_keywords_constants_and_outputs_given_twice():
    steps = [
        Operator(name="a", output="a", target="aten.stack.default", args=([Ref("x"), Ref("c"), Ref("x")], -1)),
        Operator(name="b", output="b", target="aten.sub.Tensor", args=(Ref("a"), 2.0), kwargs={"alpha": 3}),
        Operator(name="c2", output="n", target="aten.size.int", args=(Ref("b"), 0)),
        Operator(name="d", output="d", target="aten.reshape.default", args=(Ref("b"), [Ref("n"), -1])),
    ]
    runner = Runner(steps, ["x"], ["d", "x", "d"], {"c": Y})
    expected = (torch.stack([X, Y, X], -1) - 6).reshape(2, -1)
    for _ in range(2):
        first, x, again = runner([X], 1)
        assert torch.equal(first, expected)
        assert x is X
        assert again is first


def test_a_keyword_that_is_no_name_is_refused():
    for name in ("alpha=print(1)", "class", ""):
        step = Operator(name="a", output="a", target="aten.sub.Tensor", args=(Ref("x"), Ref("x")), kwargs={name: 1})
        with pytest.raises(ValueError, match="argument of the name"):
            Runner([step], ["x"], ["a"], {})


def test_a_profile_times_items_inside_the_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LogSoftmax(-1), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 8)
    compiled = engine.compile(model, x, choose="native")
    assert [step.program for step in compiled.steps()] == [0, 0, 0, None, 1, 1, 1]
    plan = optimize(capture(model, (x,)))
    took = measure.runner(lowered(plan, x).items, plan).timed([x], 3)
    assert [steps.shape for steps in took.steps] == [(3, 3), (3, 1), (3, 3)]
    assert all(np.all(steps >= 0) for steps in took.steps)
    assert took.calls.shape == (3,)
    found = compiled.profile(rounds=3)
    assert [row.kind for row in found.rows if row.kind != "call"] == [step.kind for step in compiled.steps()]
    assert sum(row.share for row in found.rows) == pytest.approx(1)


def test_a_profile_adds_up_to_the_call():
    steps = [engine.StepInfo("a", "conv", "sparse"), engine.StepInfo("b", "softmax", "PyTorch")]
    calls, times = np.array([3.0, 4.0, 9.0]), [np.array([[1.0], [1.0], [5.0]]), np.array([[2.0], [2.0], [1.0]])]
    found = profile.profile(steps, Timed(times, calls), 1)
    assert [(row.kind, row.seconds, row.share) for row in found.rows] == [
        *(("conv", 1.0, 0.25), ("softmax", 2.0, 0.5), ("call", 1.0, 0.25))
    ]
    found = profile.profile(steps, Timed([4 * each for each in times], calls), 1)
    assert [row.kind for row in found.rows] == ["conv", "softmax"]
    assert [row.seconds for row in found.rows] == pytest.approx([4 / 3, 8 / 3])
    assert found.seconds == 4.0


class Written(nn.Module):
    """Writes its result piece by piece, which a graph without writes in place copies each time."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 8)

    def forward(self, x):
        state, result = x.new_zeros(x.shape[0], 8), x.new_zeros(*x.shape[:2], 8)
        for t in range(x.shape[1]):
            result[:, t] = state = self.cell(x[:, t], state)
        return result, state


@pytest.mark.slow
def test_the_model_itself_runs_where_nothing_made_of_it_is_as_fast(monkeypatch, tmp_path):
    torch.manual_seed(0)
    model, x = Written().eval(), torch.randn(2, 5, 4)
    race = measure.race
    for share, chosen in ((0.9, "eager"), (0.98, "PyTorch")):  # what can be saved is worth a little

        def times(ways, *rest, share=share):
            assert {*race(ways, *rest)} == {*ways}
            return {**dict.fromkeys(ways, 2.0), "PyTorch": 1.0, "eager": share}

        monkeypatch.setattr(measure, "race", times)
        compiled = engine.compile(model, x)
        assert compiled.report.chosen == chosen
        for batch in (1, 2, 3):
            x = torch.randn(batch, 5, 4)
            torch.testing.assert_close(compiled(x), model(x))
        kinds = [row.kind for row in compiled.profile(rounds=1).rows if row.kind != "call"]
        assert (kinds == ["model"]) == (chosen == "eager")
    monkeypatch.setattr(measure, "race", lambda ways, *rest: {**dict.fromkeys(ways, 2.0), "eager": 1.0})
    compiled = engine.compile(model, x)
    before = compiled(x)
    with torch.no_grad():
        model.cell.weight_ih.zero_()  # the engine has a copy
    torch.testing.assert_close(compiled(x), before)
    with pytest.raises(ValueError, match="runs the model itself"):
        engine.save(compiled, tmp_path / "e.engine")
    assert not [*tmp_path.iterdir()]


class Held(nn.Module):
    """Gives back what it holds."""

    def __init__(self):
        super().__init__()
        self.layer, self.parts = nn.Linear(4, 4), [torch.randn(5, 4)]
        self.register_buffer("table", torch.randn(5, 4))

    def forward(self, x):
        table = self.table[: x.shape[0]]
        return self.layer(x), self.table, table, table.T, self.parts[0], self.layer.bias, self.layer.weight.T, x


@pytest.mark.parametrize("chosen", ["eager", "PyTorch", "native"])
@pytest.mark.parametrize("made", [lambda each: each, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_what_is_given_away_is_nobody_elses(monkeypatch, chosen, made):
    monkeypatch.setattr(measure, "race", lambda ways, *rest: {**dict.fromkeys(ways, 2.0), chosen: 1.0})
    torch.manual_seed(0)
    model, x = Held().eval(), torch.randn(3, 4)
    compiled = made(engine.compile(model, x, tune_seconds=0.0))
    assert compiled.report.chosen == chosen
    first = [y.clone() for y in compiled(x)]
    for index in range(len(first)):
        outputs, given = compiled(x), x.clone()
        assert not any(y.requires_grad for y in outputs)
        outputs[index].add_(1)
        assert torch.equal(x, given)
        assert all(torch.equal(y, z) for i, (y, z) in enumerate(zip(outputs, first, strict=True)) if i != index)
        assert all(torch.equal(y, z) for y, z in zip(compiled(x), first, strict=True))


@pytest.mark.parametrize("model", [nn.Identity(), nn.Sequential()])
def test_a_profile_of_nothing_to_do(model):
    found = engine.compile(model.eval(), torch.randn(2, 3)).profile(rounds=1)
    assert [row.kind for row in found.rows] in ([], ["call"])
    assert "batch of 2" in str(found)


class Product(nn.Module):
    """A constant product, as people write them."""

    def __init__(self, how, *shape):
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(shape[-1]))

    def forward(self, x):
        return self.how(x, self.weight, self.bias)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "shape", "size", "kernels"),
    [
        (lambda x, w, b: x @ w, (6, 5), (6,), ["linear"]),
        (lambda x, w, b: x @ w + b, (6, 5), (6,), ["linear"]),
        (lambda x, w, b: x @ w.t(), (5, 6), (6,), ["linear"]),
        (lambda x, w, b: x @ w, (6, 5), (4, 6), ["linear"]),
        (lambda x, w, b: w @ x, (5, 6), (6, 7), ["conv"]),
        (lambda x, w, b: torch.mm(x, w), (6, 5), (6,), ["linear"]),
        (lambda x, w, b: torch.addmm(b, x, w), (6, 5), (6,), ["linear"]),
        (lambda x, w, b: torch.addmm(b, x.reshape(-1, 6), w).reshape(-1, 4, 5), (6, 5), (4, 6), ["linear"]),
        (lambda x, w, b: torch.addmm(b, x, w, beta=2), (6, 5), (6,), ["linear"]),
        (lambda x, w, b: torch.einsum("bi,io->bo", x, w), (6, 5), (6,), ["linear"]),
        (lambda x, w, b: torch.einsum("oi,...i->...o", w, x), (5, 6), (4, 6), ["linear"]),
        (lambda x, w, b: torch.einsum("bti,oi->bto", x, w), (5, 6), (4, 6), ["linear"]),
        (lambda x, w, b: torch.einsum("bti,io->bot", x, w), (6, 5), (4, 6), ["linear"]),
        (lambda x, w, b: torch.einsum("bii,io->bio", x, w), (6, 5), (6, 6), []),
        (lambda x, w, b: F.linear(x, *w.chunk(2)[:1]), (10, 6), (6,), ["linear"]),
        (lambda x, w, b: F.linear(x, F.layer_norm(w, (6,))), (5, 6), (6,), ["linear"]),
    ],
)
def test_constant_products_are_layers(how, shape, size, kernels):
    torch.manual_seed(0)
    model = Product(how, *shape).eval()
    compiled = engine.compile(model, torch.randn(2, *size), choose="native")
    rows = compiled.profile(rounds=1).rows
    assert [row.kind for row in rows if row.density is not None] == ["conv"] * len(kernels)
    assert not kernels or all(row.kernel != "PyTorch" or row.kind in ("reshape", "view") for row in rows)
    for batch in (1, 2, 3):
        x = torch.randn(batch, *size)
        torch.testing.assert_close(compiled(x), model(x).detach())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its compiler's of its own parts
def test_torch_compile_takes_part_where_it_is_asked_for(monkeypatch, tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 3)).eval(), torch.randn(2, 4)
    race, seen = measure.race, []

    def times(ways, *rest):
        seen.extend({*ways} - {*race(ways, *rest)})
        return {**dict.fromkeys(ways, 2.0), "torch.compile": 1.0}

    monkeypatch.setattr(measure, "race", times)
    compiled = engine.compile(model, x, torch_compile=True)
    assert compiled.report.chosen == "torch.compile"
    assert "torch.compile" not in seen  # it ran
    assert [step.note for step in compiled.steps()] == [
        "torch.compile's form of the model, which is faster than what the engine makes of its graph"
    ]
    expected = model(x).detach()
    with torch.no_grad():
        model[0].weight.zero_()  # the engine has a copy
    for each in (compiled, copy.deepcopy(compiled)):
        torch.testing.assert_close(each(x), expected)
    with pytest.raises(ValueError, match="runs the model itself"):
        engine.save(compiled, tmp_path / "e.engine")


def test_torch_compile_that_cannot_is_said(monkeypatch):
    def cannot(*_, **__):
        raise RuntimeError("no C++ here")

    model = nn.Linear(4, 3).eval()
    monkeypatch.setattr(torch, "compile", cannot)
    with pytest.raises(ValueError, match=r"torch.compile cannot make Linear here \(RuntimeError: no C\+\+ here\)"):
        engine.compile(model, torch.zeros(2, 4), torch_compile=True)
    with pytest.raises(ValueError, match="torch_compile is measured beside the others"):
        engine.compile(model, torch.zeros(2, 4), torch_compile=True, choose="native")


def test_an_engine_that_nobody_needs_gives_its_memory_back_at_once():
    compiled = engine.compile(nn.Linear(8, 8).eval(), torch.randn(1, 8), 1, choose="native")
    parts = [weakref.ref(each) for each in (compiled, compiled._runner, compiled._items[0])]
    gc.collect()
    gc.disable()
    try:
        del compiled
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()
