"""Whole networks against PyTorch in float64: every path, several batch sizes, from a file, in two threads."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import engine, kernels
from rarefy.engine.assembling import build
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from tests.engine.layers import paths
from tests.engine.networks import NETWORKS, thinned

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A model, its plan, an example, and what the model gives for that in float64."""
    torch.manual_seed(0)
    make, shape = NETWORKS[request.param]
    model = thinned(make())
    x = torch.randn(16, *shape)
    with torch.no_grad():
        result = copy.deepcopy(model).double()(x.double())
    return model, optimize(capture(model, (x[:2],))), x, result if isinstance(result, tuple) else (result,)


def results(compiled, x):
    result = compiled(x)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("isa", paths())
def test_networks(network, isa, tmp_path):
    _, plan, x, expected = network
    for choose, batches in (("native", (1, 2, 7, 16)), ("sparse", (3,)), ("dense", (3,))):
        with kernels.forced(isa):
            compiled = build(plan, (x[:2],), 1, "float32", choose, 0.0)
            for batch in batches:
                for result, right in zip(results(compiled, x[:batch]), expected, strict=True):
                    assert result.shape == right[:batch].shape
                    scale = right.abs().max()
                    assert (result - right[:batch]).abs().max() <= 1e-5 * scale
    with kernels.forced(isa):
        engine.save(compiled, tmp_path / "network.engine")
        again = engine.load(tmp_path / "network.engine")
        for before, after in zip(results(compiled, x), results(again, x), strict=True):
            assert torch.equal(before, after)


def test_native_programs_hold_all_that_they_can(network):
    _, plan, x, _ = network
    if "portable" not in paths():
        pytest.fail("there is no native engine to test")
    compiled = build(plan, (x[:2],), 1, "float32", "native", 0.0)
    assert {step.note for step in compiled.steps()} <= {
        "",
        "PyTorch alone has it",
        "it would take longer to bring its input into a program and its result out",
    }


@pytest.mark.parametrize("name", ["unet", "signal"])
def test_the_public_way_there(name):
    make, shape = NETWORKS[name]
    model, x = thinned(make()), torch.randn(3, *shape)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = engine.compile(model, x[:1], threads=1, tune_seconds=0.05)
    with torch.no_grad():
        expected = model(x)
    for result, right in zip(results(compiled, x), (expected,) if name == "unet" else expected, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-5)
        assert not result.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert 0 < compiled.measuring_seconds < compiled.compile_seconds


def test_two_engines_in_threads_at_once(network):
    _, plan, x, _ = network
    compiled = [build(plan, (x[:2],), threads, "float32", "native", 0.0) for threads in (1, 2)]
    alone = [[results(each, x[:batch]) for batch in (1, 3, 16)] for each in compiled]
    wrong = []

    def work(each, expected):
        for _ in range(3):
            for batch, right in zip((1, 3, 16), expected, strict=True):
                if not all(torch.equal(a, b) for a, b in zip(results(each, x[:batch]), right, strict=True)):
                    wrong.append(batch)

    # each engine in two threads, and both beside each other
    threads = [threading.Thread(target=work, args=pair) for pair in zip(compiled, alone, strict=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Video(nn.Module):
    """Residual layers in space and time, one of them in time alone, with pools of every kind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, 8, (3, 5, 5), (1, 2, 2), (1, 2, 2))
        self.space, self.time = (
            nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv3d(8, 8, (3, 1, 1), padding="same"),
        )
        self.each = nn.Conv3d(8, 8, 3, padding=1, groups=8)
        self.down, self.norm = nn.Conv3d(8, 12, 3, 2, 1), nn.BatchNorm3d(12)
        self.last = nn.Linear(24, 5)

    def forward(self, x):
        x = F.max_pool3d(F.relu(self.stem(x)), (1, 3, 3), 2, (0, 1, 1))
        x = F.silu(self.time(F.relu(self.space(x)))) + self.each(x)
        x = F.relu6(self.norm(self.down(x)))
        y = F.avg_pool3d(F.pad(x, (0, 0)), (1, 2, 2), 1, (0, 1, 1), count_include_pad=False)
        return self.last(torch.cat([F.adaptive_avg_pool3d(x, 1).flatten(1), y.mean((2, 3, 4))], 1))


def test_a_network_of_videos_is_one_program():
    torch.manual_seed(0)
    model = thinned(Video())
    for batch in (1, 3):
        x = torch.randn(batch, 3, 6, 20, 28)
        compiled = engine.compile(model, x, choose="native")
        assert not [step for step in compiled.steps() if step.note]
        assert len({step.program for step in compiled.steps()}) == 1
        for other in (1, 2, 5):
            x = torch.randn(other, 3, 6, 20, 28)
            torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_layers_of_three_axes_stay_float32_in_int8():
    model, x = nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU(), nn.AvgPool3d(2)).eval(), torch.randn(2, 2, 6, 6, 6)
    compiled = engine.compile(model, x, precision="int8", calibration=[x], choose="native", error_budget=1.0)
    assert not [step for step in compiled.steps() if step.note]
    assert [layer.kept for layer in compiled.report.quantization.layers] == ["it has 3 axes"]
    torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-4, atol=1e-4)
