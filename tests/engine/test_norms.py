"""Normalisations of native programs against PyTorch in float64."""

import pytest
import torch
from torch import Tensor, nn

from rarefy import engine, kernels
from rarefy.engine import reference
from rarefy.engine.building import Building, Options
from rarefy.engine.plan import GroupNorm, Norm, Step
from tests.engine.layers import paths, plan_of, wide

ISAS = [isa for isa in paths() if isa != "pytorch"]


def native(step: Step, inputs: dict[str, Tensor], isa: str, threads: int = 1, batch: int | None = None) -> Tensor:
    """What a native program of the step alone, made for inputs of this batch, makes of them or of other batches."""
    plan = plan_of(step, {name: x[:batch] for name, x in inputs.items()})
    shapes = {name: tuple(x[:batch].shape) for name, x in inputs.items()}
    with kernels.forced(isa):
        building = Building(plan, Options("measure", "float32", threads, 0.0, shapes, batch or 1))
        assert building.add(step) is None
        (result,) = building.finish().run(threads, *inputs.values())
    return result


def norm(channels: int, **more) -> Norm:
    weight, bias = 1 + torch.rand(channels), torch.randn(channels)
    return Norm(**{"name": "n", "output": "y", "input": "x", "weight": weight, "bias": bias, "eps": 1e-5, **more})


def group_norm(channels: int, groups: int, **more) -> GroupNorm:
    weight, bias = 1 + torch.rand(channels), torch.randn(channels)
    given = {"name": "n", "output": "y", "input": "x", "groups": groups, "weight": weight, "bias": bias, "eps": 1e-5}
    return GroupNorm(**{**given, **more})


CASES = [
    (lambda: norm(24), (5, 24)),
    (lambda: norm(768), (1, 768)),
    (lambda: norm(37), (9, 37)),
    (lambda: norm(3), (7, 5, 3)),
    (lambda: norm(130), (130,)),
    (lambda: norm(1), (4, 1)),
    (lambda: norm(96, weight=None, bias=None), (50, 96)),
    (lambda: norm(40, bias=None, centred=False), (33, 40)),
    (lambda: norm(77, bias=None, centred=False), (77,)),
    (lambda: norm(12, axis=1), (12, 6, 7)),
    (lambda: norm(19, axis=1, centred=False), (19, 31)),
    (lambda: group_norm(12, 3), (12, 6, 7)),
    (lambda: group_norm(12, 12), (12, 40, 17)),
    (lambda: group_norm(12, 1), (12, 300)),
    (lambda: group_norm(8, 2, weight=None, bias=None), (8,)),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("make", "shape"), CASES)
def test_norms_are_those_of_float64(make, shape: tuple[int, ...], isa: str) -> None:
    torch.manual_seed(0)
    step, x = make(), 3 * torch.randn(3, *shape) + 1
    expected = wide(step, {"x": x})
    results = [native(step, {"x": x}, isa, threads, batch) for threads in (1, 2, 5) for batch in (1, 3)]
    torch.testing.assert_close(results[0].double(), expected, rtol=2e-5, atol=2e-5)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2e-6, atol=2e-6)
    assert torch.equal(*(native(step, {"x": x[:1]}, isa, threads) for threads in (1, 2)))


@pytest.mark.parametrize("isa", ISAS)
def test_long_sums_stay_exact(isa: str) -> None:
    torch.manual_seed(0)
    x = 100 + torch.rand(1, 3, 30_000)
    for step, shape in ((norm(30_000), x.shape), (group_norm(3, 1), x.shape), (norm(90_000), (1, 90_000))):
        given = {"x": x.reshape(shape)}
        error = (native(step, given, isa).double() - wide(step, given)).abs().max()
        assert error < 1e-4, step


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_spoils_its_own_pixel_or_group_alone(isa: str, number: float) -> None:
    for step, spoiled in ((norm(12), (0, 2)), (group_norm(6, 3), (0, slice(2, 4)))):
        x = torch.randn(2, 6, 12)
        x[0, 2, 3] = number
        for threads in (1, 2):
            result, expected = native(step, {"x": x}, isa, threads), reference.run_step(step, {"x": x})
            assert not result[spoiled].isfinite().any()
            assert torch.equal(result.isfinite(), expected.isfinite())


class _RMS(nn.Module):
    def __init__(self, width: int, weight_first: bool) -> None:
        super().__init__()
        self.weight, self.weight_first = nn.Parameter(1 + torch.rand(width)), weight_first
        self.before, self.after = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.after(self.weight * x if self.weight_first else x * self.weight)


@pytest.mark.parametrize("weight_first", [True, False])
def test_written_out_rms_norms_are_one_step(weight_first: bool) -> None:
    model = _RMS(24, weight_first).eval()
    example = torch.randn(2, 7, 24)
    made = engine.compile(model, example, choose="native", tune_seconds=0.0)
    assert [s.kind for s in made.steps() if s.kind not in ("input", "output")] == ["conv", "rms norm", "conv"]
    with torch.no_grad():
        torch.testing.assert_close(made(example), model(example), rtol=1e-5, atol=1e-5)
        other = torch.randn(5, 7, 24)
        torch.testing.assert_close(made(other), model(other), rtol=1e-5, atol=1e-5)


def test_what_is_almost_an_rms_norm_is_left_alone() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            return x * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)

    example = torch.randn(2, 7, 24)
    made = engine.compile(Other().eval(), example, choose="native", tune_seconds=0.0)
    assert "rms norm" not in [step.kind for step in made.steps()]
    torch.testing.assert_close(made(example), Other()(example), rtol=1e-5, atol=1e-5)


def test_norms_of_images_are_native_and_saved(tmp_path) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.InstanceNorm2d(8),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    ).eval()
    example = torch.randn(1, 3, 12, 12)
    made = engine.compile(model, example, choose="native", tune_seconds=0.0)
    assert [step.note for step in made.steps() if step.kernel == "PyTorch"] == []
    engine.save(made, tmp_path / "norms")
    expected = model(example).detach()
    for each in (made, engine.load(tmp_path / "norms")):
        torch.testing.assert_close(each(example), expected, rtol=1e-5, atol=1e-5)
    assert {"group norm"} <= {step.kind for step in made.steps()}


def test_a_layer_norm_alone_stays_in_pytorch() -> None:
    x = torch.randn(1, 3, 8)
    made = engine.compile(nn.LayerNorm(8).eval(), x, choose="native", tune_seconds=0.0)
    assert [each.kernel for each in made.steps()] == ["PyTorch"]
