"""PyTorch's default dtype and device may be any, while an engine is made and while it runs: libraries set them."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import engine
from rarefy.engine.capture import capture
from rarefy.engine.eager import Eager
from tests.engine.networks import UNet, thinned
from tests.engine.test_capture import f

OTHERS = (torch.bfloat16, torch.float64)
SEEN = torch.rand(3, 1, 4, 4) > 0.3


@contextmanager
def by_default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def attention(fc, x, seen):
    q = fc(x)[:, None]
    scores = (q @ q.transpose(-2, -1)).masked_fill(~seen, -1e4)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=seen), scores.softmax(-1) @ q


def whole_numbers(fc, x, seen):
    places, row = seen[:, 0].cumsum(-1), torch.arange(x.shape[0])
    made = places / 4, places.sqrt(), seen * 0.5, row / 3, torch.zeros(x.shape[0], 2), places.softmax(-1, torch.float32)
    made = *made, torch.where(seen, 0.5, -1.0), torch.where(seen, 0, -1e4)
    return fc(x) + places.float().mean(-1, keepdim=True), *made, torch.where(places > 2, places, 0.5), places * 2


def images(conv, up, x):
    x = up(conv(x) * 2 + 1).relu() / 3
    return F.interpolate(F.layer_norm(x, x.shape[-1:]), size=(11, 5), mode="bilinear", align_corners=False)


def case(name):
    torch.manual_seed(0)
    match name:
        case "attention":
            return f(attention, nn.Linear(8, 8)), (torch.randn(3, 4, 8), SEEN)
        case "whole numbers":
            return f(whole_numbers, nn.Linear(8, 8)), (torch.randn(3, 4, 8), SEEN)
        case "images":
            parts = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3, stride=2, bias=False)
            return f(images, *parts), (torch.randn(2, 3, 8, 8),)
    return thinned(UNet()), (torch.randn(2, 3, 16, 16),)


@pytest.mark.parametrize("choose", ["native", "torch"])
@pytest.mark.parametrize("name", ["attention", "whole numbers", "images", "UNet"])
def test_another_default_dtype_changes_nothing(name, choose, tmp_path):
    model, given = case(name)
    model.eval()
    with torch.no_grad():
        expected = model(*given)

    def check(made):
        torch.testing.assert_close(made(*given), expected, rtol=1e-4, atol=1e-5)

    compiled = engine.compile(model, given, choose=choose)
    engine.save(compiled, tmp_path / "a.engine")
    check(compiled)
    for dtype in OTHERS:
        with by_default(dtype):
            check(compiled)
            check(engine.load(tmp_path / "a.engine"))
            if name != "whole numbers":  # where the model itself gives another dtype
                check(engine.compile(model, given, choose=choose))


@pytest.mark.parametrize("dtype", OTHERS)
def test_int8_is_the_same_by_any_default_dtype(dtype):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten()
    model, x = nn.Sequential(*layers, nn.Linear(4 * 12 * 12, 5)).eval(), torch.randn(16, 3, 8, 8)
    made = []
    for each in (torch.float32, dtype):
        with by_default(each):
            made.append(engine.compile(model, x, precision="int8", calibration=[x], choose="native"))
    assert torch.equal(made[0](x), made[1](x))


@pytest.mark.parametrize("choose", ["native", "torch"])
@pytest.mark.parametrize("name", ["attention", "whole numbers", "images"])
def test_another_default_device_changes_nothing(name, choose, tmp_path):
    model, given = case(name)
    compiled = engine.compile(model.eval(), given, choose=choose)
    engine.save(compiled, tmp_path / "a.engine")
    with torch.device("meta"):  # which stands for a GPU
        loaded, again = engine.load(tmp_path / "a.engine"), engine.compile(model, given, choose=choose)
        found = [each(*given) for each in (compiled, copy.deepcopy(compiled), loaded, again)]
        profiled, took = compiled.profile(rounds=1), compiled.seconds(rounds=1)
    for each in found:
        torch.testing.assert_close(each, compiled(*given), rtol=1e-4, atol=1e-5)
    assert {row.name for row in profiled.rows} >= {step.name for step in compiled.steps()}
    assert took > 0


def test_int8_is_the_same_by_another_default_device(tmp_path):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(288, 5)).eval(),
        torch.randn(4, 3, 8, 8),
    )
    compiled = engine.compile(model, x, precision="int8", calibration=[x], choose="native")
    engine.save(compiled, tmp_path / "a.engine")
    with torch.device("meta"):
        again = engine.compile(model, x, precision="int8", calibration=[x], choose="native")
        found = [each(x) for each in (again, copy.deepcopy(compiled), engine.load(tmp_path / "a.engine"))]
    for each in found:
        assert torch.equal(each, compiled(x))


def test_the_model_as_it_is_makes_its_tensors_on_the_cpu():
    class Counts(nn.Module):
        def forward(self, x):
            return x + torch.arange(x.shape[1])

    x = torch.randn(2, 3)
    with torch.device("meta"):
        (made,) = Eager(Counts(), ("x",), ("y",), single=True).run(x)
    assert torch.equal(made, x + torch.tensor([0.0, 1.0, 2.0]))


def test_dtypes_are_written_out():
    model, given = case("whole numbers")
    plan = capture(model.eval(), given)
    kinds = [step.target for step in plan.steps if hasattr(step, "target")]
    assert "aten.where.Scalar" not in kinds
    assert kinds.count("aten.to.dtype") >= 5
