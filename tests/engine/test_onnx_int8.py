"""Quantised networks as ONNX: onnxruntime gives the bytes that PyTorch gives, but for a few that are one off."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import models
from rarefy.engine import onnx_int8, reference
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from rarefy.engine.plan import Conv, Dequantize, Plan, Quantize, Quantized, Value
from rarefy.engine.quantize import quantize
from tests.engine import test_int8 as steps
from tests.engine.networks import UNet, Vision, thinned
from tests.engine.test_capture import f

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def compared(step, of, to, shape, result):
    """How many steps of the bytes onnxruntime's answers are off, and on how many of them."""
    step, uint8 = replace(step, input="q"), torch.uint8
    into = Quantize(name="i", input="x", output=step.input)
    out = Dequantize(name="o", input=step.output, output="z")
    values = {"x": Value(shape, torch.float32), step.input: Value(shape, uint8, "", of)}
    values |= {step.output: Value(result, uint8, "", to), "z": Value(result, torch.float32)}
    plan = Plan(("x",), ("z",), True, (into, step, out), values, {}, None)
    x = (torch.rand(3, *shape) * 255 - of.zero_point) * of.scale
    (got,), (expected,) = onnx_int8.answers(onnx_int8.serialized(plan), plan, (x,)), reference.run(plan, (x,))
    assert got.shape == (3, *result)
    assert len(expected.unique()) > 10
    off = ((got - expected) / to.scale).abs()
    return float(off.max()), float((off > 0.5).float().mean())


@pytest.mark.parametrize(("weight", "size", "options"), [c for c in steps.CONVOLUTIONS if len(c[1]) < 4])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_a_convolution(weight, size, options, activation):
    step = steps.conv(steps.whole_numbers(*weight, density=0.4), activation=activation, **options)
    of, to = Quantized(0.015625, 13), Quantized(0.125, 101)
    out = reference.run_step(step, {"x": torch.zeros(1, *size)}).shape[1:]
    worst, share = compared(step, of, to, size, tuple(out))
    assert worst < 1.01
    assert share < 0.02


@pytest.mark.parametrize("count_include_pad", [False, True])
def test_an_average(count_include_pad):
    sizes = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    step = steps.Pool(name="p", input="q", output="y", op="average", count_include_pad=count_include_pad, **sizes)
    worst, share = compared(step, Quantized(0.03125, 0), Quantized(0.03125, 6), (5, 9, 9), (5, 5, 5))
    assert worst < 1.01
    assert share < 0.05


NETWORKS = {
    "resnet20": (lambda: models.resnet20(width=8, in_channels=3), (3, 16, 16)),
    "unet": (UNet, (3, 16, 16)),
    "mixed": (
        lambda: f(
            lambda a, b, c, n, x: c(F.max_pool2d(n(torch.tanh(b(F.hardswish(a(x))))), 3, 2, 1).flatten(1)),
            *(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8 * 36, 5), nn.BatchNorm2d(8)),
        ),
        (3, 16, 16),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("budget", [0.1, 0.0])
def test_networks(name, budget, tmp_path):
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model, batches = thinned(build(), 0.5), [torch.randn(8, *shape) for _ in range(3)]
    report, difference = onnx_int8.save_int8_onnx(
        model, torch.randn(2, *shape), batches, tmp_path / "a.onnx", error_budget=budget
    )
    assert difference < (0.005 if budget else 1e-5)
    assert report.samples == 24
    content = (tmp_path / "a.onnx").read_bytes()
    plan, _ = quantize(optimize(capture(model, (torch.randn(2, *shape),))), batches, budget=budget)
    x = torch.randn(5, *shape)
    (got,), (expected,) = onnx_int8.answers(content, plan, (x,)), reference.run(plan, (x,))
    assert (got - expected).norm() / expected.norm() < 0.01
    types = {each.name: each.data_type for each in onnx.load(tmp_path / "a.onnx").graph.initializer}
    levels = [kind for name, kind in types.items() if name.endswith("/levels")]
    assert levels == [onnx.TensorProto.INT8] * sum(
        isinstance(s, Conv) or s.kind == "linear" for s in plan.steps
    ) * bool(budget)


def test_what_has_no_form(tmp_path):
    x = [torch.randn(4, 3, 16, 16)]
    with pytest.raises(ValueError, match="has no form in ONNX in int8: save_onnx"):
        onnx_int8.save_int8_onnx(thinned(Vision()), x[0], x, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_arguments_by_name(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(8, 16), nn.Linear(8, 16)

        def forward(self, x, y):
            return torch.relu(self.left(x)) + self.right(y)

    torch.manual_seed(0)
    model, path = Two().eval(), tmp_path / "a.onnx"
    batches = [{"y": torch.randn(32, 8), "x": torch.randn(32, 8)} for _ in range(2)]
    report, difference = onnx_int8.save_int8_onnx(model, batches[0], batches, path)
    assert report.samples == 64
    assert difference < 0.005
    session = ort.InferenceSession(path)
    assert {each.name for each in session.get_inputs()} == {"x", "y"}
    (got,) = session.run(None, {name: x.numpy() for name, x in batches[0].items()})
    expected = model(**batches[0])
    assert (torch.from_numpy(got) - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "resnet20"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"model": nn.Linear(8, 4)}, ValueError, "the model is in training mode"),
        ({"model": nn.Linear(8, 4, device="meta").eval()}, ValueError, "the model must be on the CPU"),
        ({"example_input": torch.zeros(1, 8).numpy()}, TypeError, "'input' is a numpy.ndarray: tensors"),
        ({"example_input": torch.zeros(0, 8)}, ValueError, "example_input must not be empty"),
        ({"calibration": None}, ValueError, "needs calibration="),
        ({"error_budget": -1}, ValueError, "error_budget must be at least 0, got -1"),
    ],
)
def test_arguments_that_do_not_fit(change, error, message, tmp_path):
    x = torch.ones(4, 8)
    arguments = {"model": nn.Linear(8, 4).eval(), "example_input": x, "calibration": [x], **change}
    with pytest.raises(error, match=message):
        onnx_int8.save_int8_onnx(path=tmp_path / "a.onnx", **arguments)
    assert not list(tmp_path.iterdir())


def test_other_answers_are_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        onnx_int8, "answers", lambda content, plan, inputs: [x + 1 for x in reference.run(plan, inputs)]
    )
    x = [torch.randn(4, 3, 8, 8)]
    with pytest.raises(RuntimeError, match="onnxruntime answers differently from PyTorch in int8"):
        onnx_int8.save_int8_onnx(nn.Conv2d(3, 2, 1).eval(), x[0], x, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
