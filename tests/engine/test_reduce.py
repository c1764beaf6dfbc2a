"""Reductions of native programs against PyTorch in float64, and what of a network becomes one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy import engine
from rarefy.engine import reference
from rarefy.engine.binding import CHANNELS_FIRST, CHANNELS_LAST, NativeError
from rarefy.engine.builder import Builder
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from rarefy.engine.plan import REDUCTIONS, Linear, Operator, Plan, Reduce
from tests.engine.layers import wide
from tests.engine.test_norms import ISAS, native

SHAPES = [
    ((7, 5, 9), [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)]),
    ((40, 300), [(0,), (1,), (0, 1)]),
    ((3, 700, 11), [(0,), (1,), (2,), (0, 1), (0, 2)]),
    ((530,), [(0,)]),
    ((3, 2, 5, 17), [(3,), (0, 1, 2), (1, 2), (1, 2, 3), (0,), (0, 1, 2, 3)]),
    ((1, 6, 1), [(0, 1), (1, 2)]),
]


def reduce(op: str, axes: tuple[int, ...], keepdim: bool = True) -> Reduce:
    return Reduce(name="r", output="y", input="x", op=op, axes=axes, keepdim=keepdim)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize(("shape", "all_axes"), SHAPES)
def test_reductions_are_those_of_float64(op: str, shape: tuple[int, ...], all_axes: list, isa: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *shape) + 0.5
    for axes in all_axes:
        for keepdim in (True, False) if len(axes) < len(shape) else (True,):
            step = reduce(op, axes, keepdim)
            expected = wide(step, {"x": x})
            results = [native(step, {"x": x}, isa, threads, batch) for threads in (1, 3) for batch in (1, 3)]
            torch.testing.assert_close(results[0].double(), expected, rtol=3e-6, atol=1e-4 if op == "sum" else 3e-6)
            for other in results[1:]:
                torch.testing.assert_close(other, results[0], rtol=2e-6, atol=2e-6)
            assert torch.equal(*(native(step, {"x": x[:1]}, isa, threads) for threads in (1, 3)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", REDUCTIONS)
def test_what_is_no_number_is_pytorchs(op: str, isa: str) -> None:
    inf, nan = float("inf"), float("nan")
    for spoilt in ([nan], [inf], [-inf], [inf, -inf], [nan, inf], [-inf, nan]):
        for axes in ((0,), (1,), (0, 1)):
            x = torch.randn(2, 70, 67)
            for at, number in enumerate(spoilt):
                x[0, 3 + 20 * at, 5], x[1, 69, 66 - at] = number, number
                x[0, 40, 30 + at], x[1, 6 + at, 2] = number, number
            step = reduce(op, axes)
            expected = reference.run_step(step, {"x": x})
            torch.testing.assert_close(native(step, {"x": x}, isa), expected, equal_nan=True, rtol=1e-5, atol=1e-4)
    empty = torch.full((1, 3, 65), -inf)
    assert torch.equal(native(reduce("max", (1,)), {"x": empty}, isa), empty[:, :, :1])


@pytest.mark.parametrize("isa", ISAS)
def test_long_sums_stay_exact(isa: str) -> None:
    torch.manual_seed(0)
    for shape in ((2, 60_000), (60_000, 2), (300, 2, 200)):
        x = 100 + torch.rand(1, *shape)
        for op in ("mean", "norm"):
            for axis in range(len(shape)):
                step = reduce(op, (axis,))
                torch.testing.assert_close(
                    native(step, {"x": x}, isa).double(), wide(step, {"x": x}), rtol=1e-6, atol=0
                )


def test_what_no_reduction_is_is_refused() -> None:
    for op, axes in (("median", (0,)), ("sum", ()), ("sum", (-1,)), ("sum", (1, 1))):
        with pytest.raises(ValueError, match="a reduction"):
            reduce(op, axes)
    for numbers in ([], [0], [5, 1], [-1, 1], [0, 0], [0, 8], [0, 1, 2]):
        builder = Builder()
        x = builder.input((4, 3, 2), CHANNELS_FIRST, "x")
        with pytest.raises(NativeError, match="reduction"):
            builder.tensor("reduce", [x], numbers, name="r")
    builder = Builder()
    x = builder.input((4, 3, 2), CHANNELS_LAST, "x")
    with pytest.raises(NativeError, match="reduction"):
        builder.tensor("reduce", [x, x], [0, 1], name="r")
    with pytest.raises(NativeError, match="reduction"):
        builder.tensor("reduce", [x], [0, 1], [torch.ones(4)], name="r")


class _Of(nn.Module):
    """A linear layer over the last axis, and a function of what it makes."""

    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(12, 16), function
        self.weight, self.bias = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.layer(x))


def _response(model: _Of, x: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return x + torch.addcmul(model.bias, model.weight, x * (size / (size.mean(-1, keepdim=True) + 1e-6)))


FUNCTIONS_OF = {
    "mean of tokens": (lambda m, x: x.mean(1), (6, 12)),
    "mean of features": (lambda m, x: x - x.mean(-1, keepdim=True), (6, 12)),
    "sum of tokens": (lambda m, x: x.sum(dim=1), (6, 12)),
    "largest": (lambda m, x: x.amax(1) + x.max(1)[0] - x.min(dim=1).values, (6, 12)),
    "norm": (lambda m, x: F.normalize(x, dim=-1), (6, 12)),
    "norm of tokens": (lambda m, x: F.normalize(x, dim=1), (6, 12)),
    "response": (_response, (4, 5, 12)),
    "image": (lambda m, x: x.mean((1, 2)), (4, 5, 12)),
    "quotient": (lambda m, x: torch.addcdiv(x, x, m.weight.exp(), value=0.5), (6, 12)),
}


@pytest.mark.parametrize("name", FUNCTIONS_OF)
def test_networks_reduce_in_one_program(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    function, shape = FUNCTIONS_OF[name]
    model = _Of(function).eval()
    compiled = engine.compile(model, torch.randn(2, *shape), 1, choose="native", tune_seconds=0.0)
    assert {step.program for step in compiled.steps()} == {0}
    engine.save(compiled, tmp_path / "model")
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            expected = model.double()(x.double()).float()
            model.float()
        for each in (compiled, engine.load(tmp_path / "model")):
            torch.testing.assert_close(each(x), expected, rtol=1e-4, atol=1e-5)


def test_indices_and_the_batch_are_left_to_pytorch() -> None:
    def both(model: nn.Module, x: Tensor) -> Tensor:
        values, indices = x.max(1)
        return values + indices

    for function in (both, lambda m, x: x + x.mean(0), lambda m, x: x.sum()):
        plan = capture(_Of(function).eval(), (torch.randn(3, 6, 12),))
        assert not any(isinstance(step, Reduce) for step in plan.steps)
        assert any(isinstance(step, Operator) for step in plan.steps)


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(12, 16, bias=False), nn.BatchNorm1d(16)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.norm(y.flatten(0, 1)).reshape_as(y).relu()


def test_a_batch_norm_of_all_tokens_folds_into_the_layer() -> None:
    torch.manual_seed(0)
    model, x = _Normed().eval(), torch.randn(2, 7, 12)
    plan: Plan = optimize(capture(model, (x,)))
    assert [type(step) for step in plan.steps] == [Linear]
    compiled = engine.compile(model, x, 1, choose="native", tune_seconds=0.0)
    for batch in (1, 2, 3):
        x = torch.randn(batch, 7, 12)
        torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-5, atol=1e-5)
