"""Models with PT2E's operators: what the engine makes of them is what PyTorch does, to one step of the last bytes."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operators

from rarefy import engine
from rarefy.engine import pt2e
from rarefy.engine.capture import capture
from rarefy.engine.int8 import Int8
from rarefy.engine.passes import optimize
from tests.engine.test_capture import f

pytestmark = pytest.mark.slow

OPS = torch.ops.quantized_decomposed
DTYPES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def q(x, scale, zero, dtype=torch.uint8):
    return OPS.quantize_per_tensor(x, scale, zero, *DTYPES[dtype], dtype)


def dq(x, scale, zero, dtype=torch.uint8):
    return OPS.dequantize_per_tensor(x, scale, zero, *DTYPES[dtype], dtype)


def qdq(x, scale, zero, dtype=torch.uint8):
    return dq(q(x, scale, zero, dtype), scale, zero, dtype)


class Weight(nn.Module):
    """Weights as PT2E stores them: whole numbers, and a scale for each channel, or one for all."""

    def __init__(self, *shape, one=False, zero=0):
        super().__init__()
        self.one, self.zero = one, zero
        self.register_buffer("whole", torch.randint(-128, 128, shape, dtype=torch.int8))
        self.register_buffer("scale", torch.rand(shape[0]) * 2e-3 + 1e-4)
        self.register_buffer("zeros", torch.full((shape[0],), zero))
        self.bias = nn.Parameter(torch.randn(shape[0]) * 0.1)

    def forward(self):
        if self.one:
            return OPS.dequantize_per_tensor(self.whole, 1e-3, self.zero, -127, 127, torch.int8)
        return OPS.dequantize_per_channel(self.whole, self.scale, self.zeros, 0, -127, 127, torch.int8)


def graph(function, *modules, shape=(4, 8, 8)):
    """The model as PT2E gives it: a graph, and an input."""
    x = torch.randn(4, *shape)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    model = torch.export.export(f(function, *modules), (x,), dynamic_shapes=(dynamic,)).module()
    return model, x


def kinds(compiled):
    return [step.kind for step in compiled.steps()]


def off(compiled, model, x, quantum):
    """How many steps of the bytes the answers are off at most, and on how many of them."""
    with torch.no_grad():
        steps = ((compiled(x) - model(x)) / quantum).abs()
    return float(steps.max()), float((steps > 0.5).float().mean())


A, B, C = (0.03, 130), (0.02, 10), (0.05, 120)


def residual(v, w, x):
    a = F.relu(F.conv2d(qdq(x, *A), v(), v.bias, padding=1))
    q_a = q(a, 0.03, 0)
    b = F.conv2d(dq(q_a, 0.03, 0), w(), w.bias, padding=1) + dq(q_a, 0.03, 0)
    return qdq(F.relu(b), 0.02, 0)


def signed(v, w, x):
    y = F.conv2d(qdq(x, 0.03, 2, torch.int8), v(), v.bias, stride=2, groups=2)
    return qdq(y, 0.04, -7, torch.int8)


def pooled(v, x):
    y = F.max_pool2d(qdq(F.conv2d(qdq(x, *A), v(), v.bias), *C), 2)
    y = F.avg_pool2d(qdq(y, *C), 2)
    return qdq(y, *B)


def joined(v, w, x):
    x = qdq(x, *A)
    a, b = (qdq(F.conv2d(x, each(), each.bias), *C) for each in (v, w))
    return qdq(torch.cat([a, b], 1), *C)


def gated(v, w, x):
    x = qdq(x, *A)
    gate = qdq(torch.sigmoid(qdq(F.conv2d(x, v(), v.bias, padding=1), *C)), 1 / 256, 0)
    other = qdq(F.conv2d(x, w(), w.bias, padding=1), *C)
    return qdq(qdq(gate * other, *B) + other, *C)


CASES = {
    "residual": (residual, [(8, 4, 3, 3), (8, 8, 3, 3)], 0.02, ["quantize", "conv", "conv", "dequantize"]),
    "int8 activations": (signed, [(6, 2, 3, 3), (1, 1)], 0.04, ["quantize", "conv", "dequantize"]),
    "pools": (pooled, [(6, 4, 3, 3)], 0.02, ["quantize", "conv", "pool", "pool", "dequantize"]),
    "a concatenation": (
        joined,
        [(6, 4, 3, 3), (3, 4, 3, 3)],
        0.05,
        ["quantize", *["conv"] * 2, "concat", "dequantize"],
    ),
    "gates": (gated, [(6, 4, 3, 3)] * 2, 0.05, ["quantize", "conv", "table", "conv", "mul", "add", "dequantize"]),
}


def in_torch(model, x):
    """An engine that PyTorch runs step by step; native programs give the same."""
    plain = engine.compile(model, x, precision="int8", choose="torch")
    assert torch.equal(engine.compile(model, x, precision="int8")(x), plain(x))
    return plain


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("one", [False, True])
def test_answers_are_those_of_pytorch(case, one):
    torch.manual_seed(0)
    function, shapes, quantum, expected = CASES[case]
    model, x = graph(function, *(Weight(*shape, one=one) for shape in shapes))
    compiled = in_torch(model, x)
    assert kinds(compiled) == expected
    assert all(isinstance(item, Int8) for item in compiled._items)
    worst, share = off(compiled, model, torch.randn(7, *x.shape[1:]) * 2, quantum)
    assert worst < 1.01
    assert share < 0.02
    assert compiled(x).unique().numel() > 10


def head(v, x):
    y = qdq(x, *A).mean((2, 3))
    return F.linear(qdq(y, *B).flatten(1), v(), v.bias)


def test_the_last_layer_gives_float32(tmp_path):
    model, x = graph(head, Weight(5, 4))
    compiled = in_torch(model, x)
    assert kinds(compiled) == ["quantize", "global average", "linear"]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=2e-3)
    report = compiled.report.quantization
    assert (report.method, report.error, [layer.name for layer in report.layers]) == ("given", None, ["m.0"])
    assert "ranges given by the model; 0 of 1 layers stay float32" in str(report)
    engine.save(compiled, tmp_path / "a.engine")
    assert torch.equal(engine.load(tmp_path / "a.engine")(x), compiled(x))


def unlike(v, w, x):
    y = F.silu(F.conv2d(qdq(x, *A), v(), v.bias))  # no bytes before the activation
    y = F.conv2d(qdq(y, *B), w(), w.bias)  # the zero points of these weights are not 0
    y = OPS.dequantize_per_tensor(
        OPS.quantize_per_tensor(y, 0.05, 60, 0, 127, torch.uint8), 0.05, 60, 0, 127, torch.uint8
    )
    return torch.cat([y, qdq(y, *C)], 1) * 2


def test_what_does_not_fit_is_float32():
    torch.manual_seed(0)
    model, x = graph(unlike, Weight(6, 4, 3, 3), Weight(5, 6, 1, 1, zero=3))
    compiled = in_torch(model, x)
    assert kinds(compiled) == [
        *("quantize", "conv", "quantize", "dequantize", "conv", "quantize_per_tensor", "dequantize_per_tensor"),
        *("quantize", "dequantize", "concat", "affine"),
    ]
    kept = {layer.name: layer.kept for layer in compiled.report.quantization.layers}
    assert [why is None for why in kept.values()] == [True, False]
    assert off(compiled, model, x, 0.1)[0] < 1.01


def test_bytes_that_move_to_another_quantisation():
    model, x = graph(lambda v, x: qdq(qdq(F.conv2d(qdq(x, *A), v(), v.bias), *B), *C), Weight(6, 4, 3, 3))
    compiled = in_torch(model, x)
    assert kinds(compiled) == ["quantize", "conv", "table", "dequantize"]
    assert off(compiled, model, x, 0.05)[0] < 1.01


def test_in_float32_it_is_the_model_itself():
    model, x = graph(residual, Weight(8, 4, 3, 3), Weight(8, 8, 3, 3))
    plan = optimize(capture(model, (x,)))
    assert [step.weight_scale is not None for step in plan.steps if step.kind == "conv"] == [True, True]
    compiled = engine.compile(model, x, choose="torch")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_a_normalisation_changes_the_grid():
    norm = nn.BatchNorm2d(6).eval()
    nn.init.uniform_(norm.weight, 0.5, 2)
    model, x = graph(lambda v, n, x: qdq(n(F.conv2d(qdq(x, *A), v(), v.bias)), *C), Weight(6, 4, 3, 3), norm)
    compiled = in_torch(model, x)
    assert kinds(compiled) == ["quantize", "dequantize", "conv", "quantize", "dequantize"]
    assert off(compiled, model, x, 0.05)[0] < 1.01


def test_calibration_is_for_what_is_not_quantised():
    model, x = graph(head, Weight(5, 4))
    assert pt2e.is_quantized(model)
    assert not pt2e.is_quantized(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the model is quantised, by PT2E: leave calibration out"):
        engine.compile(model, x, precision="int8", calibration=[x])


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_torchao_quantised():
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
            self.c, self.fc = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(16, 5)
            self.first, self.second, self.third = nn.ReLU(), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            x = self.first(self.norm(self.a(x)))
            y = self.second(x + self.b(x))
            z = F.max_pool2d(self.third(self.c(y)), 2)
            return self.fc(torch.cat([z, F.max_pool2d(y, 2)], 1).mean((2, 3)))

    x = torch.randn(4, 4, 16, 16)
    exported = torch.export.export(Net().eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = quantize_pt2e.prepare_pt2e(exported, quantizer)
    prepared(x)
    converted = quantize_pt2e.convert_pt2e(prepared)
    compiled = in_torch(converted, x)
    assert {layer.name: layer.kept for layer in compiled.report.quantization.layers} == dict.fromkeys(
        ("a", "b", "c", "fc")
    )
    assert all(isinstance(item, Int8) for item in compiled._items)
    with torch.no_grad():
        assert (compiled(x) - converted(x)).norm() / converted(x).norm() < 0.01
