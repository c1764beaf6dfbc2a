"""Post-training quantisation: ranges, what runs in int8, what it costs, and what goes back to float32."""

import copy
import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import engine, models
from rarefy.engine import EngineError, int8, reference, verify
from rarefy.engine.binding import available
from rarefy.engine.calibrate import METHODS, Histogram, weight_scales
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from rarefy.engine.plan import Affine, Binary, Concat, Conv, GlobalAverage, Layer, Pool, Quantize, Quantized, Table
from rarefy.engine.quantization import Quantization
from rarefy.engine.quantize import quantize
from tests.engine.networks import Signal, UNet, Vision, thinned
from tests.engine.test_capture import f

NETWORKS = {
    "resnet20": (lambda: models.resnet20(width=8, in_channels=3), (3, 16, 16)),
    "mobilenet": (lambda: models.mobilenet_v1(10, width=0.25), (3, 32, 32)),
    "unet": (UNet, (3, 16, 16)),
    "vision": (Vision, (3, 16, 16)),
    "signal": (Signal, (3, 20)),
}


def plan_of(model, *shape):
    return optimize(capture(model.eval(), (torch.randn(2, *shape),)))


def batches_of(*shape, count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, *shape, generator=generator) for _ in range(count)]


def kinds(plan):
    return [type(step).__name__ for step in plan.steps]


def error_of(plan, exact, batches):
    pairs = [
        (a, b) for x in batches for a, b in zip(reference.run(plan, (x,)), reference.run(exact, (x,)), strict=True)
    ]
    noise, signal = sum((a - b).double().square().sum() for a, b in pairs), sum(b.square().sum() for _, b in pairs)
    return float((noise / signal).sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, method):
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    plan, batches = plan_of(thinned(build(), 0.5), *shape), batches_of(*shape)
    made, report = quantize(plan, batches, method=method)
    assert (made.inputs, made.outputs, made.batch) == (plan.inputs, plan.outputs, None)
    assert all(made.values[name].dtype is torch.float32 for name in (*made.inputs, *made.outputs))
    assert report.error == pytest.approx(error_of(made, plan, batches), rel=1e-6)
    assert report.error < 0.1
    layers = [step for step in made.steps if isinstance(step, Layer)]
    assert [layer.name for layer in report.layers] == [s.name for s in plan.steps if isinstance(s, Layer)]
    assert all(layer.kept is None and layer.sqnr_db > 25 for layer in report.layers)
    assert all(made.values[step.input].quantized for step in layers)
    assert report.samples == 24
    for step, before in zip(layers, (s for s in plan.steps if isinstance(s, Layer)), strict=True):
        whole = int8.levels(step)
        assert torch.equal(int8.weights(whole, step.weight_scale), step.weight)
        assert whole.abs().max() <= 127
        assert not whole[before.weight == 0].any()
    # What PyTorch's operators compute is float32, and nothing else in a network of convolutions is.
    if name != "vision":
        known = [s for s in made.steps if isinstance(s, (Layer, Affine, Binary, Pool, GlobalAverage, Concat))]
        assert all(made.values[name].quantized for s in known for name in s.inputs)
    assert kinds(made).count("Quantize") == (5 if name == "vision" else 1)


def test_what_is_beside_operators_is_float32():
    made, _ = quantize(plan_of(thinned(Vision()), 3, 16, 16), batches_of(3, 16, 16))
    for step in made.steps:
        if isinstance(step, Layer):
            assert step.residual is None  # the sums of a transformer stay float32
        if type(step).__name__ == "Binary":
            assert not any(made.values[name].quantized for name in (*step.inputs, step.output))


def test_the_bytes_of_copies_mean_the_same():
    made, _ = quantize(plan_of(thinned(UNet()), 3, 16, 16), batches_of(3, 16, 16))
    copied = [step for step in made.steps if int8.copies(step)]
    assert {type(step).__name__ for step in copied} == {"Pool", "Upsample", "Concat"}
    for step in copied:
        assert len({made.values[name].quantized for name in (*step.inputs, step.output)}) == 1
    # relu6's result is read by a pool and a concatenation: each has the range that its own numbers need
    tables = [step for step in made.steps if type(step).__name__ == "Table" and "relu" in step.input]
    assert len(tables) == 2


def test_factors_for_channels_are_depthwise_convolutions():
    norm = nn.BatchNorm2d(6).eval()
    nn.init.uniform_(norm.weight, -1, 1)
    model = f(lambda c, n, d, x: d(F.relu(n(F.relu(c(x))))), nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 2, 1))
    plan, batches = plan_of(model, 3, 8, 8), batches_of(3, 8, 8)
    made, report = quantize(plan, batches)
    assert kinds(made) == ["Quantize", "Conv", "Conv", "Conv"]
    depthwise = made.steps[2]
    assert (depthwise.groups, depthwise.kind, depthwise.activation) == (6, "depthwise", "relu")
    assert set(int8.levels(depthwise).abs().flatten().tolist()) == {127.0}
    assert len(report.layers) == 2
    assert report.error < 0.03


def test_the_ends_of_a_network_are_float32():
    model = f(lambda a, b, x: (torch.sigmoid(a(x)), a(x) + b(x)), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3))
    made, _ = quantize(plan_of(model, 3, 8, 8), batches_of(3, 8, 8))
    assert sorted(kinds(made)) == ["Binary", "Conv", "Conv", "Conv", "Quantize"]
    assert [made.values[step.output].quantized is None for step in made.steps] == [False, *[True] * 4]


def test_a_value_that_is_read_as_both():
    def forward(a, b, x):
        y = F.relu(a(x))
        return b(y), y, y.argmax(1)

    model = f(forward, nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    made, report = quantize(plan_of(model, 3, 8, 8), batches_of(3, 8, 8))
    assert sorted(kinds(made)) == ["Conv", "Conv", "Dequantize", "Operator", "Quantize"]
    assert report.error < 0.2


def test_the_mean_error_of_a_channel_is_taken_from_its_bias():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 6, 3)
    plan, batches = plan_of(nn.Sequential(layer), 8, 8, 8), [x.abs() + 1 for x in batches_of(8, 8, 8, count=8)]
    made, _ = quantize(plan, batches)
    conv = made.steps[1]
    with torch.no_grad():
        shifts = []
        for each in (made, replace(made, steps=(made.steps[0], replace(conv, bias=layer.bias)))):
            errors = torch.cat([reference.run(each, (x,))[0] - layer(x) for x in batches])
            shifts.append(errors.mean((0, 2, 3)).abs().max())
    assert shifts[0] < 1e-5
    assert shifts[1] > 1e-3


def test_a_budget_of_nothing_is_the_network_itself():
    plan, batches = plan_of(thinned(UNet()), 3, 16, 16), batches_of(3, 16, 16)
    made, report = quantize(plan, batches, budget=0.0)
    assert report.error == 0.0
    assert report.sqnr_db is None
    assert kinds(made) == kinds(plan)
    assert all("falls from" in layer.kept for layer in report.layers)
    assert torch.equal(*(reference.run(each, (batches[0],))[0] for each in (made, plan)))


def test_the_layer_that_costs_most_goes_back_first():
    """One channel of the second layer is so large that the others of its result have no bytes left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[2].weight[0] *= 3e3
        model[3].weight[:, 0] = 0
    plan, batches = plan_of(model, 3, 8, 8), batches_of(3, 8, 8)
    _, all_of_it = quantize(plan, batches, budget=1e9)
    assert all(layer.kept is None for layer in all_of_it.layers)
    assert all_of_it.error > 0.1
    made, report = quantize(plan, batches, budget=0.05)
    assert report.error == pytest.approx(error_of(made, plan, batches), rel=1e-6)
    assert report.error <= 0.05
    kept = [layer.name for layer in report.layers if layer.kept]
    assert "3" in kept
    assert len(kept) < 4
    floats = [s.name for s in made.steps if isinstance(s, Conv) and s.weight_scale is None]
    assert floats == kept


def test_a_layer_that_cannot_be_quantised_stays():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[1].bias[0] = float("inf")
    plan = plan_of(f(lambda m, x: m(x).clamp(max=3.0), model), 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"of what 'm0\.1'|of what .*1' makes of the calibration batches a number is NaN"
    ):
        quantize(plan, batches_of(3, 4, 4))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (torch.zeros(8, 3, 4, 4), TypeError, r"got Tensor: \[x\] is one batch"),
        (3, TypeError, "calibration must be an iterable of batches, got int"),
        ([], ValueError, "calibration has no batches"),
        ([1], TypeError, "calibration batch 0 must be a tensor or a tuple of tensors, got int"),
        ([(torch.zeros(1, 3, 4, 4), torch.zeros(1))], ValueError, "has 2 tensors, .* takes 1 inputs: leave labels"),
        ([torch.zeros(1, 3, 4, 5)], ValueError, r"must have the shape \(batch, 3, 4, 4\), got \(1, 3, 4, 5\)"),
        ([torch.zeros(3, 4, 4)], ValueError, r"must have the shape \(batch, 3, 4, 4\), got \(3, 4, 4\)"),
        ([torch.zeros(0, 3, 4, 4)], ValueError, "must not be empty"),
        ([torch.full((1, 3, 4, 4), 1e37)], ValueError, r"has 1e\+37 as its largest magnitude.* so large apart"),
        ([torch.full((1, 3, 4, 4), 1e-42)], ValueError, r"has 1e-42 as its largest magnitude.* so small apart"),
        ([torch.zeros(1, 3, 4, 4).double()], ValueError, "must be torch.float32, got torch.float64"),
        ([torch.zeros(1, 3, 4, 4)] * 2 + [torch.full((1, 3, 4, 4), torch.nan)], ValueError, "batch 2, .* is NaN"),
        ([torch.zeros(1, 3, 4, 4, device="meta")], ValueError, "must be on the CPU, got meta"),
    ],
)
def test_batches_that_are_none(batches, error, message):
    with pytest.raises(error, match=message):
        quantize(plan_of(nn.Conv2d(3, 2, 1), 3, 4, 4), batches)


def test_an_input_of_zeros_has_no_range_and_a_dead_value_may_have_none():
    zeros = [torch.zeros(4, 3, 4, 4)] * 2
    with pytest.raises(ValueError, match="calibration input .*: every number in its batches is 0, .* some hundred"):
        quantize(plan_of(nn.Conv2d(3, 2, 1), 3, 4, 4), zeros)
    dead = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        dead[0].bias.fill_(-1e3)
    x = torch.randn(4, 3, 4, 4)
    made = engine.compile(dead, x, precision="int8", calibration=[x], choose="torch")
    with torch.no_grad():
        assert torch.allclose(made(x), dead(x), atol=1e-6)


def test_options_out_of_their_range():
    plan = plan_of(nn.Conv2d(3, 2, 1), 3, 4, 4)
    with pytest.raises(ValueError, match="method must be one of mse, percentile, minmax, got 'max'"):
        quantize(plan, batches_of(3, 4, 4), method="max")
    for budget in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="budget must be at least 0"):
            quantize(plan, batches_of(3, 4, 4), budget=budget)


def test_a_generator_of_batches_is_read_once():
    plan = plan_of(nn.Conv2d(3, 2, 1), 3, 4, 4)
    _, report = quantize(plan, (x for x in batches_of(3, 4, 4)))
    assert report.samples == 24


def filled(*parts):
    found = Histogram()
    for part in parts:
        found.add(part)
    return found


def test_histograms_do_not_depend_on_the_order():
    parts = [torch.zeros(5), torch.randn(100) * 1e-3, torch.randn(50).abs() * 30, torch.tensor([-7.0]), torch.zeros(3)]
    one, other = filled(*parts), filled(*reversed(parts))
    merged = filled(*parts[:2])
    merged.merge(filled(*parts[2:]))
    merged.merge(filled(torch.zeros(0)))
    for each in (other, merged, filled(torch.cat(parts))):
        assert torch.equal(one.counts, each.counts)
        assert (one.exponent, one.least, one.largest) == (each.exponent, each.least, each.largest)
    assert int(one.counts.sum()) == 159
    largest = torch.cat(parts).abs().max()
    assert 2048 * 2.0**one.exponent > largest >= 1024 * 2.0**one.exponent


@pytest.mark.parametrize("scale", [1e-42, 1e-6, 1.0, 1e30])
def test_histograms_of_any_size(scale):
    x = torch.randn(1000) * scale
    found = filled(x)
    middles, counts = found._middles()
    assert counts.sum() == 1000
    assert abs(float((middles * counts).sum() - x.double().sum())) <= 1000 * 2.0**found.exponent
    for method in METHODS:
        assert found.quantized(method).scale > 0


def test_ranges():
    x = torch.cat([torch.rand(2_000_000) * 6, torch.tensor([60.0])])
    assert filled(x).quantized("minmax") == Quantized(float(torch.tensor(60 / 255)), 0)
    for method in ("percentile", "mse"):
        chosen = filled(x).quantized(method)
        assert chosen.zero_point == 0
        assert chosen.scale < 60 / 255 * 0.5
    both = filled(torch.tensor([-1.0, 3.0])).quantized("minmax")
    assert both == Quantized(float(torch.tensor(4 / 255)), 64)
    assert filled(torch.tensor([-2.0, -1.0])).quantized("minmax").zero_point == 255
    assert filled(torch.zeros(4)).quantized("mse") == Quantized(1.0, 0)


@pytest.mark.parametrize("draw", [torch.randn, lambda n: torch.randn(n).exp(), lambda n: torch.randn(n).pow(3)])
def test_mse_loses_least(draw):
    x = draw(20_000)
    losses = {}
    for method in METHODS:
        to = filled(x).quantized(method)
        losses[method] = float((int8.dequantize(int8.quantize(x, to), to) - x).square().mean())
    assert losses["mse"] <= 1.01 * min(losses.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_not_counted(bad):
    with pytest.raises(ValueError, match="a number is NaN or infinite"):
        filled(torch.tensor([1.0, bad]))


def test_scales_of_weights():
    weight = torch.randn(4, 4, 3, 3)
    weight[1], weight[2] = 0.0, weight[2] * 1e-43
    scale = weight_scales(weight)
    torch.testing.assert_close(scale[[0, 3]] * 127, weight[[0, 3]].abs().amax((1, 2, 3)))
    assert scale[1] == 1
    assert scale[2] == torch.finfo(torch.float32).tiny


def test_reports_are_tables_and_json():
    plan = plan_of(thinned(UNet()), 3, 16, 16)
    _, report = quantize(plan, batches_of(3, 16, 16), budget=1e-4)
    text = str(report)
    assert text.splitlines()[0].split() == ["layer", "kind", "SQNR", "dB", "saturated", "weights", "in"]
    assert "mse of 24 examples" in text
    assert "at most 0.0001 asked for" in text
    told = json.loads(json.dumps(report.to_dict()))
    assert told["layers"][0]["name"] == "stem"
    assert Quantization.from_dict(told) == report
    for change in ({"error": "x"}, {"samples": float("inf")}, {"method": 3}, {"layers": [{}]}):
        with pytest.raises((TypeError, ValueError, KeyError)):
            Quantization.from_dict({**told, **change})


def test_no_layer_nothing_to_do():
    plan = plan_of(f(lambda x: F.relu(x) * 2), 3, 4, 4)
    made, report = quantize(plan, batches_of(3, 4, 4))
    assert made.steps == plan.steps
    assert not any(isinstance(step, Quantize) for step in made.steps)
    assert (report.layers, report.error) == ((), 0.0)


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    model = thinned(UNet())
    return engine.compile(model, torch.randn(1, 3, 16, 16), precision="int8", calibration=batches_of(3, 16, 16)), model


def test_an_engine_in_int8_is_the_quantised_plan(compiled):
    made, model = compiled
    report = made.report
    assert report.precision == "int8"
    assert report.chosen in (("native", "native by rule") if available() else ("PyTorch",))
    assert report.quantization.error < 0.01
    assert [layer.name for layer in report.quantization.layers] == ["stem", "down", "deep.1", "up", "out"]
    plan, _ = quantize(optimize(capture(model, (torch.randn(2, 3, 16, 16),))), batches_of(3, 16, 16))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 16)
        assert torch.equal(made(x), reference.run(plan, (x,))[0])
        assert (made(x) - model(x)).norm() / model(x).norm() < 0.01
    assert [row.kind for row in made.profile(rounds=1).rows if row.kind != "input"][:2] == ["conv", "conv"]
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(again(x), made(x))
    in_torch = engine.compile(model, x, precision="int8", calibration=batches_of(3, 16, 16), choose="torch")
    assert {step.kernel for step in in_torch.steps()} == {"PyTorch"}
    assert torch.equal(in_torch(x), made(x))


def test_an_engine_in_int8_is_a_file(compiled, tmp_path):
    made, _ = compiled
    engine.save(made, tmp_path / "a.engine")
    x = torch.randn(2, 3, 16, 16)
    for mmap in (False, True):
        again = engine.load(tmp_path / "a.engine", mmap=mmap)
        assert torch.equal(again(x), made(x))
        assert again.report == made.report
    whole = engine.compile(thinned(UNet()), x, choose="torch")
    engine.save(whole, tmp_path / "b.engine")
    weights = sum(step.facts.weights for step in made.steps() if step.facts is not None)
    saved = [(tmp_path / name).stat().st_size for name in ("a.engine", "b.engine")]
    assert saved[1] - saved[0] > 2.5 * weights - 8000  # three of four bytes a weight, less what else is written


def test_an_engine_that_is_off_by_a_byte_is_found(compiled):
    made, model = compiled
    plan, _ = quantize(optimize(capture(model, (torch.randn(2, 3, 16, 16),))), batches_of(3, 16, 16))
    tried = verify.plan_trial(plan, (torch.randn(1, 3, 16, 16),))
    verify.check(made, plan, None, tried)
    x, batches = torch.randn(1, 3, 16, 16), batches_of(3, 16, 16)
    wrong = engine.compile(model, x, precision="int8", calibration=batches, choose="torch")
    verify.check(wrong, plan, None, tried)
    table = next(item for item in wrong._items if isinstance(item.step, Table))
    table.step.table.copy_(table.step.table ^ 1)
    with pytest.raises(EngineError, match=r"The first step that differs is 'deep.1' \(run by PyTorch\)"):
        verify.check(wrong, plan, None, tried)


def test_a_model_that_int8_never_suits_is_in_float32(tmp_path):
    model, x = thinned(UNet()), torch.randn(1, 3, 16, 16)
    options = {"calibration": batches_of(3, 16, 16), "error_budget": 0.0, "choose": "native"}
    made = engine.compile(model, x, precision="int8", **options)
    assert made.report.quantization.error == 0
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)


def test_two_inputs_have_as_many_examples():
    model = f(lambda a, b, x, y: a(x) + b(y), nn.Linear(3, 2), nn.Linear(4, 2))
    plan = optimize(capture(model.eval(), (torch.randn(2, 3), torch.randn(2, 4))))
    made, report = quantize(plan, [(torch.randn(8, 3), torch.randn(8, 4))])
    assert kinds(made).count("Quantize") == 2
    assert report.samples == 8
    with pytest.raises(ValueError, match="calibration batch 1 has inputs of 5, 8 examples"):
        quantize(plan, [(torch.randn(8, 3), torch.randn(8, 4)), (torch.randn(8, 3), torch.randn(5, 4))])


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x):
        return self.linear(x.transpose(0, 1)).transpose(0, 1)


def test_an_engine_behind_a_transpose_is_a_file_and_copies(tmp_path):
    """The program's batch is not the network's first axis: what it was made for must be known when it is made again."""
    torch.manual_seed(0)
    made = engine.compile(
        Transposed().eval(), torch.randn(1, 6, 16), precision="int8", calibration=[torch.randn(8, 6, 16)]
    )
    engine.save(made, tmp_path / "a.engine")
    x = torch.randn(3, 6, 16)
    for again in (engine.load(tmp_path / "a.engine"), copy.deepcopy(made)):
        assert torch.equal(again(x), made(x))


def test_what_int8_does_not_take_is_refused():
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"'0\.weight' is torch\.bfloat16: call model\.float\(\) first"):
        engine.compile(copy.deepcopy(model).bfloat16(), x.bfloat16(), precision="int8", calibration=[x.bfloat16()])
    with pytest.raises(TypeError, match="error_budget must be a number, got str"):
        engine.compile(model, x, precision="int8", calibration=[x], error_budget="x")
    with pytest.raises(ValueError, match="error_budget is for precision=\"int8\", and precision is 'float32'"):
        engine.compile(model, x, error_budget=0.5)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_another_default_dtype_changes_nothing(precision):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 6, 6)
    options = {"calibration": [x]} if precision == "int8" else {}
    expected = engine.compile(model, x, precision=precision, choose="native", **options)(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(engine.compile(model, x, precision=precision, choose="native", **options)(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, mask):
        q, k, v = self.q(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)) / 3 + mask[:, :, :5]
        bounded = (self.k(x) + mask).clamp(min=-3.0).relu()  # what a layer's sum may become part of
        logs = self.k(x).relu().log().sigmoid()
        return self.o(scores.softmax(-1) @ v) + self.o(bounded) + self.o(logs)


@pytest.mark.parametrize("least", [-math.inf, torch.finfo(torch.float32).min, 0.0])
def test_what_has_no_range_stays_float32(least):
    torch.manual_seed(0)
    model, mask = Masked().eval(), torch.where(torch.rand(1, 5, 8) < 0.5, torch.tensor(least), torch.tensor(0.0))
    mask[:, :, 0] = 0.0

    def give(count):
        return torch.randn(count, 5, 8), mask.repeat(count, 1, 1)

    compiled = engine.compile(model, give(2), precision="int8", calibration=[give(64)], choose="native")
    assert [each.name for each in compiled.report.quantization.layers if each.kept is None]
    given = give(3)
    with torch.no_grad():
        exact, made = model(*given), compiled(*given)
    assert ((made - exact).norm() / exact.norm()) < 0.1
