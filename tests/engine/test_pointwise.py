"""Expressions number by number: native ones against PyTorch in float64, and how chains become one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rarefy import engine
from rarefy.engine import reference
from rarefy.engine.plan import ACTIVATIONS, OF_ONE, OF_TWO, Pointwise
from tests.engine.layers import wide
from tests.engine.test_norms import ISAS, native

NAN, INF = float("nan"), float("inf")


def pointwise(operands: int, code: list[tuple[str, int, int]], *constants: Tensor) -> Pointwise:
    return Pointwise(
        name="p",
        output="y",
        operands=tuple(f"x{index}" for index in range(operands)),
        code=tuple(code),
        constants=torch.cat([each.reshape(-1) for each in constants] or [torch.zeros(0)]),
        sizes=tuple(tuple(each.shape) for each in constants),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("operation", [*OF_TWO, *OF_ONE, *ACTIVATIONS])
def test_operations(operation: str, isa: str) -> None:
    torch.manual_seed(0)
    ends = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-40, 3e38, -3e38, 88.7, 89.0, -88.0, -104.0, 20.0, 1.0, 1e-8])
    x = torch.cat([ends, 4 * torch.randn(700), torch.linspace(-1e-3, 1e-3, 85)]).reshape(1, 4, 200)
    two = operation in OF_TWO
    given = {"x0": x, **({"x1": x.flip(-1)} if two else {})}
    step = pointwise(len(given), [(operation, 0, 1 if two else -1)])
    result, expected = native(step, given, isa), reference.run_step(step, given)
    exact = wide(step, given).float()
    if operation.startswith("gelu"):  # at infinities some of PyTorch's kernels have NaN
        result, exact, expected = (torch.where(x.isinf(), 0.0, each) for each in (result, exact, expected))
    torch.testing.assert_close(result, exact, rtol=4e-6, atol=2e-7, equal_nan=True)
    if not any(operation == each for each in ("mish", "softplus")):
        assert torch.equal(result.isnan(), expected.isnan())


SHAPES = st.sampled_from([(5,), (700,), (3, 40), (6, 5, 7), (2, 9, 130), (3, 1, 12), (4, 30, 1), (1, 1, 1300)])


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(SHAPES, st.data())
def test_broadcasts(shape: tuple[int, ...], data: st.DataObject) -> None:
    def part(name: str) -> tuple[int, ...]:
        return tuple(size if data.draw(st.booleans(), label=name) else 1 for size in shape)

    torch.manual_seed(data.draw(st.integers(0, 1000)))
    values = [torch.randn(3, *shape), torch.randn(3, *part("value"))]
    constants = [torch.randn(part("constant")), torch.randn(part("constant")[-1:])]
    code = [("mul", 0, 1), ("add", 4, 2), ("tanh", 5, -1), ("sub", 6, 3), ("max", 7, 1), ("mul", 8, 4)]
    step, given_ = pointwise(2, code, *constants), {f"x{index}": x for index, x in enumerate(values)}
    expected = wide(step, given_)
    for isa in ISAS:
        results = [native(step, given_, isa, threads, batch) for threads, batch in ((1, 1), (2, 1), (2, 3))]
        torch.testing.assert_close(results[0].double(), expected, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(results[0], other) for other in results)


class _Gates(nn.Module):
    """A GELU written out, a rotary embedding, a written-out softplus gate, layer scale, slopes a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.gamma, self.slopes = nn.Parameter(torch.rand(12)), nn.PReLU(12)
        self.cos = nn.Parameter(torch.rand(7, 12))
        self.conv = nn.Conv1d(7, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = 0.5 * y * (1 + torch.tanh(0.7978845608 * (y + 0.044715 * torch.pow(y, 3))))
        y = self.second(y) * self.gamma + x
        y = y * self.cos + torch.exp(-y.abs()) * self.cos.sin()
        y = self.conv(F.elu(y, 0.5).clamp(-0.3, 0.7))
        return self.slopes(y) * F.softplus(y) / (1 + y.square()).sqrt()


def test_chains_are_one_step(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = _Gates().eval(), torch.randn(1, 7, 12)
    made = engine.compile(model, x, choose="native", tune_seconds=0.0)
    kinds = [step.kind for step in made.steps() if step.kind not in ("input", "output")]
    assert kinds.count("pointwise") == 3
    assert not {"mul", "add", "sub", "div", "affine", "activation"} & {*kinds}
    engine.save(made, tmp_path / "gates")
    for each in (made, engine.load(tmp_path / "gates"), engine.compile(model, x, choose="torch")):
        for batch in (1, 4):
            inputs = torch.randn(batch, 7, 12)
            with torch.no_grad():
                torch.testing.assert_close(each(inputs), model(inputs), rtol=1e-5, atol=1e-5)


def test_a_layer_scale_moves_into_the_layer() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gamma = nn.Linear(8, 8), nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x) * self.gamma

    model, x = Scaled().eval(), torch.randn(2, 5, 8)
    made = engine.compile(model, x, choose="native", tune_seconds=0.0)
    assert [step.kind for step in made.steps() if step.kind not in ("input", "output")] == ["conv"]
    with torch.no_grad():
        torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ([], "0 instructions"),
        ([("add", 0, 0)] * 65, "65 instructions"),
        ([("add", 0, 1)], "terms 0 and 1"),
        ([("neg", 0, 0)], "terms 0 and 0"),
        ([("add", -1, 0)], "terms -1 and 0"),
        ([("neg", 1, -1)], "terms 1 and -1"),
        ([("system", 0, -1)], "no operation 'system'"),
    ],
)
def test_expressions_that_are_none_are_refused(code: list[tuple[str, int, int]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        reference.run_step(pointwise(1, code), {"x0": torch.ones(1, 2)})
