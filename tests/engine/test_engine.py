"""What an engine takes, what it refuses, how it chooses, and what it tells of itself."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rarefy import engine, kernels
from rarefy.engine import assembling, measure, profile
from rarefy.engine.building import NativeSegment, Options
from rarefy.engine.capture import capture
from rarefy.engine.execute import Runner, Timed
from rarefy.engine.lowering import lower
from rarefy.engine.measure import LayerFacts
from rarefy.engine.passes import optimize
from rarefy.engine.plan import Layer
from rarefy.sparse import GMP
from tests.engine.layers import lowered, paths
from tests.engine.networks import UNet, thinned

IMAGE = torch.randn(2, 3, 16, 16)


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    return engine.compile(thinned(UNet()), IMAGE, threads=1, choose="native")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            torch.zeros(2, 4, 16, 16),
            ValueError,
            r"\(batch, 3, 16, 16\), got \(2, 4, 16, 16\): the model takes 3 channels",
        ),
        (
            torch.zeros(1, 3, 32, 16),
            ValueError,
            r"make another, with engine.compile\(model, torch.zeros\(\(1, 3, 32, 16\)\)\)",
        ),
        (torch.zeros(3, 16, 16), ValueError, r"must have the shape \(batch, 3, 16, 16\), got \(3, 16, 16\)"),
        (torch.zeros(0, 3, 16, 16), ValueError, "the batch must not be empty"),
        (torch.zeros(2, 3, 16, 16).double(), TypeError, "must be torch.float32, got torch.float64: convert it first"),
        (torch.zeros(2, 3, 16, 16, device="meta"), ValueError, r"must be on the CPU, got meta: call it with x.cpu\(\)"),
        ([[1.0]], TypeError, "must be a tensor, got list"),
    ],
)
def test_inputs_that_do_not_fit(compiled, given, error, message):
    with pytest.raises(error, match=message):
        compiled(given)


@pytest.mark.parametrize(
    ("precision", "options"),
    [("bfloat16", ', precision="bfloat16")'), ("int8", ', precision="int8", calibration=batches) and batches of this')],
)
def test_another_size_needs_the_same_options(precision, options):
    calibration = [torch.randn(2, 3, 8, 8)] if precision == "int8" else None
    model = nn.Conv2d(3, 4, 3).eval()
    made = engine.compile(
        model,
        calibration[0] if calibration else torch.randn(2, 3, 8, 8),
        precision=precision,
        calibration=calibration,
        choose="torch",
    )
    with pytest.raises(ValueError, match=re.escape(f"engine.compile(model, torch.zeros((1, 3, 9, 9)){options}")):
        made(torch.zeros(1, 3, 9, 9))


def test_the_wrong_number_of_inputs(compiled):
    with pytest.raises(TypeError, match="takes 1 inputs, got 2"):
        compiled(IMAGE, IMAGE)
    two = engine.compile(nn.Bilinear(2, 3, 4).eval(), (torch.zeros(2, 2), torch.zeros(2, 3)), choose="torch")
    assert two(torch.zeros(5, 2), torch.zeros(5, 3)).shape == (5, 4)
    with pytest.raises(ValueError, match="the same batch size, got 4, 5"):
        two(torch.zeros(5, 2), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "resnet50"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"model": UNet()}, ValueError, r"the model is in training mode: call model.eval\(\) first"),
        ({"example_input": [1, 2]}, TypeError, "a tensor among them, got list"),
        ({"example_input": ()}, TypeError, "a tensor among them, got tuple"),
        ({"example_input": torch.zeros(0, 3, 16, 16)}, ValueError, "example_input must not be empty"),
        ({"threads": 0}, ValueError, "threads must be a whole number from 1 to 1024, or None for PyTorch's, got 0"),
        ({"threads": 100000}, ValueError, "from 1 to 1024, or None for PyTorch's, got 100000"),
        ({"precision": "int4"}, ValueError, "precision must be one of float32, bfloat16, int8, got 'int4'"),
        ({"precision": "int8"}, ValueError, "needs calibration=, some hundred examples"),
        ({"calibration": [IMAGE]}, ValueError, "calibration is for precision=\"int8\", and precision is 'float32'"),
        ({"error_budget": -1}, ValueError, "error_budget must be at least 0, got -1"),
        ({"choose": "best"}, ValueError, "choose must be one of measure, native, sparse, dense, torch, got 'best'"),
        ({"tune_seconds": -1}, ValueError, "tune_seconds must be at least 0, got -1"),
        ({"tune_seconds": "8"}, TypeError, "tune_seconds must be a number of seconds, got '8'"),
        (
            {"model": nn.Linear(4, 4, device="meta").eval()},
            ValueError,
            "the model must be on the CPU, 'weight' is on meta",
        ),
    ],
)
def test_arguments_that_do_not_fit(change, error, message):
    arguments = {"model": UNet().eval(), "example_input": IMAGE, **change}
    with pytest.raises(error, match=message):
        engine.compile(**arguments)


def test_one_part_in_training_mode_is_named():
    model = UNet().eval()
    model.deep[2].train()
    with pytest.raises(ValueError, match=r"the module 'deep.2' of the model is in training mode"):
        engine.compile(model, IMAGE)


def test_an_exported_program_has_one_mode():
    net, x = nn.Sequential(nn.Linear(5, 6), nn.Dropout(), nn.ReLU()).eval(), torch.randn(3, 5)
    program = torch.export.export(net, (x,))
    with pytest.raises(TypeError, match=r"an ExportedProgram of torch.export: compile its module, program.module\(\)"):
        engine.compile(program, x)
    model = program.module()
    assert model.training
    torch.testing.assert_close(engine.compile(model, x, choose="native")(x), net(x))
    head = nn.Sequential(model, nn.BatchNorm1d(6))
    head.training = False  # a program inside raises when it is told so
    with pytest.raises(ValueError, match="the module '1' of the model is in training mode"):
        engine.compile(head, x)
    with pytest.raises(ValueError, match="the model is in training mode"):
        engine.compile(torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm1d(5))), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("script", [lambda net: torch.jit.trace(net, torch.ones(1, 5)), torch.jit.script])
def test_torchscript_is_refused_by_its_name(script, inside):
    made = script(nn.Linear(5, 5).eval())
    message = "the model" if not inside else "the module '0' of the model"
    with pytest.raises(TypeError, match=f"^{message} is TorchScript, .*: compile the nn.Module that it was traced"):
        engine.compile(nn.Sequential(made).eval() if inside else made, torch.ones(3, 5))


def test_an_engine_within_compiled_code_is_left_alone():
    model, x = nn.Linear(5, 5).eval().requires_grad_(False), torch.randn(3, 5)
    compiled = engine.compile(model, x, choose="native")
    around = torch.compile(lambda x: compiled(x * 2) + 1, backend="eager")
    torch.testing.assert_close(around(x), model(x * 2) + 1)


def test_a_model_of_inference_mode_is_copied():
    with torch.inference_mode():
        model, x = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).eval(), torch.randn(3, 5)
    for inference in (False, True):
        with torch.inference_mode(inference), torch.no_grad():
            compiled = engine.compile(model, x, choose="native")
            torch.testing.assert_close(compiled(x), model(x))
    assert all(weight.is_inference() for weight in model.parameters())


def test_a_model_that_is_being_sparsified_compiles_as_it_is():
    model = UNet()
    sparsifier = GMP(model, target=0.9, total_steps=10)
    sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    expected = model.eval()(IMAGE)
    torch.testing.assert_close(engine.compile(model, IMAGE, choose="torch")(IMAGE), expected, rtol=1e-4, atol=1e-5)


def test_threads_are_the_callers_unless_given(monkeypatch, compiled):
    seen = []
    other = engine.compile(thinned(UNet()), IMAGE, choose="torch")
    monkeypatch.setattr(Runner, "__call__", lambda self, inputs, threads: seen.append(threads) or inputs)
    monkeypatch.setattr("torch.get_num_threads", lambda: 5)
    for each in (compiled, other):
        each(IMAGE)
    assert seen == [1, 5]


def test_a_forced_instruction_set_is_what_runs():
    plan = optimize(capture(thinned(UNet()), (IMAGE,)))
    for isa in paths():
        with kernels.forced(isa):
            compiled = assembling.build(plan, (IMAGE,), 1, "float32", "native", 0.0)
        assert compiled.report.chosen == ("PyTorch" if isa == "pytorch" else "native")
        assert {step.isa for step in compiled.steps()} <= {isa, None}


def test_a_layer_is_measured_once():
    plan = optimize(capture(thinned(UNet()), (IMAGE,)))
    shapes, _ = measure.walk(plan, (IMAGE,), timed=False)
    options = Options("measure", "float32", 1, 0.05, shapes, len(IMAGE))
    (whole,) = lower(plan, options).items
    left = plan.steps[4].output
    parts = lower(plan, options, {left}, dict.fromkeys(whole.steps, whole.program)).items
    known = {step.name: step for step in whole.program.steps()}
    again = [step for part in parts if isinstance(part, NativeSegment) for step in part.program.steps()]
    assert any(step.tuned_seconds for step in again)
    for step in again:
        if step.name in known and step.name != left and step.tuned_seconds:
            assert (step.kernel, step.tuned_seconds) == (known[step.name].kernel, known[step.name].tuned_seconds)


class _Scan(nn.Module):
    """Steps over the rows of one input, each followed by one of PyTorch's on another, and at last on the result."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rows, state = self.layer(x), torch.zeros(x.shape[0], 6)
        for step in range(4):
            state = torch.tanh(state * 0.5 + rows[:, step]) + torch.cumsum(y[:, step], -1)
        return torch.cumsum(self.layer(state), -1)


def test_what_pytorch_runs_does_not_cut_a_program_that_it_does_not_read():
    x, y = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    model = _Scan().eval()
    compiled = engine.compile(model, (x, y), 1, choose="native", tune_seconds=0.0)
    steps = compiled.steps()
    assert {step.program for step in steps} == {None, 0}
    of_pytorch = [index for index, step in enumerate(steps) if step.kind == "cumsum"]
    inside = [index for index, step in enumerate(steps) if step.program == 0]
    assert [index < inside[0] for index in of_pytorch] == [True] * 4 + [False]
    for batch in (1, 2, 5):
        inputs = torch.randn(batch, 4, 6), torch.randn(batch, 4, 6)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


def test_nothing_that_loses_is_chosen(monkeypatch):
    plan = optimize(capture(thinned(UNet()), (IMAGE,)))
    names = ("native", "native by rule", "PyTorch", "PyTorch, oneDNN", "native and PyTorch")
    for fastest in names:

        def race(ways, plan, inputs, threads, least, fastest=fastest):
            assert set(ways) == set(names)
            return {name: 1.0 if name == fastest else 2.0 for name in ways}

        monkeypatch.setattr(measure, "race", race)
        monkeypatch.setattr(measure, "slower_than_torch", lambda *a: {plan.steps[1].output})
        found = assembling.build(plan, (IMAGE,), 1, "float32", "measure", 0.01)
        assert found.report.chosen == fastest
        assert found.report.candidates[fastest] == 1.0
        torch.testing.assert_close(found(IMAGE), assembling.build(plan, (IMAGE,), 1, "float32", "torch", 0.0)(IMAGE))
    steps = found.steps()
    # before and after the layer that PyTorch was told to be faster at
    assert {step.program for step in steps} == {0, None, 1}
    assert {step.name: step.note for step in steps if step.note} == {plan.steps[1].name: "PyTorch is faster"}
    rows = [row for row in found.profile(rounds=1).rows if row.density is not None]
    layers = [step.name for step in plan.steps if isinstance(step, Layer)]
    assert [row.name for row in rows] == layers  # one each, and no input
    assert [step.name for step in steps if step.facts is not None] == layers


def test_a_layer_goes_to_pytorch_where_that_is_clearly_faster_and_matters(monkeypatch):
    plan = optimize(capture(thinned(UNet()), (IMAGE,)))
    _, layers = measure.walk(plan, (IMAGE,), timed=False)
    native = lowered(plan, IMAGE)
    # every step takes a second for both samples
    seconds = Timed([np.ones((2, item.program.facts.steps)) for item in native.items], np.ones(2))
    monkeypatch.setattr(Runner, "timed", lambda *_: seconds)
    first, second = (step.output for step in plan.steps[:2])
    for torch_seconds, expected in (
        ({first: 0.1, second: 0.46}, {first}),  # per sample
        ({first: 0.1, second: 0.44}, {first, second}),
        ({first: 0.44}, set()),  # a tenth of a second of a dozen: not worth the way
        ({}, set()),
    ):
        known = {name: replace(facts, torch_seconds=torch_seconds.get(name, 2.0)) for name, facts in layers.items()}
        assert measure.slower_than_torch(native, plan, (IMAGE,), known) == expected


def test_without_measuring_the_result_is_the_same_every_time():
    plan = optimize(capture(thinned(UNet()), (IMAGE,)))
    first, second = (assembling.build(plan, (IMAGE,), 1, "float32", "native", 0.0) for _ in range(2))
    assert torch.equal(first(IMAGE), second(IMAGE))
    assert first.report.candidates == {}
    assert first.measuring_seconds == 0


@pytest.mark.parametrize("choices", [{"choose": "sparse"}, {"choose": "native", "precision": "int8"}], ids=["", "int8"])
def test_fewer_images_than_a_program_takes_at_once(choices):
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(16, 16, size, padding=size // 2) for size in (3, 1, 3, 1, 3)]
    layers = [nn.Conv2d(3, 16, 3, 2, 1), *convolutions, nn.Flatten(), nn.Linear(400, 50), nn.Linear(50, 10)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(16, 3, 10, 10)
    if "precision" in choices:
        choices = choices | {"calibration": [x]}
    alone = engine.compile(model, x[:1], threads=1, **choices)
    wanted = torch.cat([alone(one) for one in x.split(1)])
    for together in (4, 16):
        made = engine.compile(model, x[:together], threads=1, **choices)
        for batch in range(1, together + 1):
            assert torch.allclose(made(x[:batch]), wanted[:batch], atol=1e-5), (together, batch)


def test_facts_of_layers_are_counted():
    conv, linear = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.Linear(8, 5)
    conv.weight.data[:4] = 0
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear).eval()
    compiled = engine.compile(model, torch.randn(4, 3, 9, 9), choose="torch")
    first, last = (step.facts for step in compiled.steps() if step.facts is not None)
    assert (first.weights, first.nonzeros) == (216, 108)
    assert (first.macs, first.dense_macs) == (108 * 16, 216 * 16)  # 4 x 4 places
    assert (last.weights, last.macs) == (40, 40)


def test_the_profile_adds_up(compiled):
    found = compiled.profile(rounds=3)
    assert found.batch == 2
    assert sum(row.seconds for row in found.rows) == pytest.approx(found.seconds)
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    rows = {row.name: row for row in found.rows}
    for name in ("stem", "down", "deep.1", "up", "out"):
        row = rows[name]
        facts = next(step.facts for step in compiled.steps() if step.name == name)
        assert row.density == facts.nonzeros / facts.weights
        assert row.gflops == pytest.approx(2e-9 * facts.macs * 2 / row.seconds)
        assert (row.peak_share is None) == (found.peak_gflops is None)
    json.dumps(found.to_dict(), allow_nan=False)
    text = str(found)
    assert "batch of 2, one thread" in text
    assert len(text.splitlines()) == len(found.rows) + 2
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        compiled.profile(rounds=0)


def test_timing_leaves_random_numbers_alone(compiled):
    before = torch.get_rng_state()
    compiled.profile(rounds=1)
    compiled.seconds(rounds=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(x.std() > 0.5 for x in compiled.example())


def test_the_break_even_of_a_profile():
    facts = LayerFacts(weights=1000, nonzeros=100, macs=10_000, dense_macs=100_000, torch_seconds=4e-3)
    step = engine.StepInfo("a", "conv", "sparse 4x4", facts=facts, dense_seconds=4e-3)
    row = profile.row(step, 2e-3, 8e-3, 2, 100.0)
    assert (row.share, row.density, row.dense_seconds, row.gain) == (0.25, 0.1, 8e-3, 4.0)  # of both samples
    assert row.gflops == pytest.approx(2 * 10_000 * 2 / 2e-3 / 1e9)
    assert row.peak_share == pytest.approx(row.gflops / 100)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_autocast_changes_nothing(precision):
    model = thinned(UNet())
    options = {"calibration": [IMAGE]} if precision == "int8" else {}
    made = engine.compile(model, IMAGE, precision=precision, choose="native", **options)
    with torch.autocast("cpu"):
        again = engine.compile(model, IMAGE, precision=precision, choose="native", **options)
        under = again(IMAGE), made(IMAGE)
    assert {step.kernel for step in again.steps()} == {step.kernel for step in made.steps()}
    torch.testing.assert_close(under, (made(IMAGE), made(IMAGE)), rtol=0, atol=0)
