"""Chains of steps over large planes: run in bands, with windows in place of whole values, they come to the same."""

import pytest
import torch
from torch import nn

from rarefy import kernels
from rarefy.engine.assembling import build
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from tests.engine.layers import paths
from tests.engine.networks import thinned

ISAS = [isa for isa in paths() if isa != "pytorch"]


class Bottlenecks(nn.Module):
    """A stem with a pool and two bottlenecks whose results are the residuals of what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.widen = nn.Conv2d(8, 24, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(24, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 24, 1))
            for _ in range(2)
        )

    def forward(self, x):
        x = self.widen(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return x


def separable():
    """Depthwise and pointwise layers in turn, strides and large kernels among them."""
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()]
    for kernel, stride, padding, dilation in ((3, 1, 1, 1), (5, 2, 2, 1), (7, 1, 3, 1), (3, 1, 3, 3), (3, 2, 0, 1)):
        layers += [nn.Conv2d(8, 8, kernel, stride, padding, dilation, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1)]
    return nn.Sequential(*layers)


def plain():
    """Kernels and strides of every kind, a pool among them, and an activation that is no clamp."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(6, 7, (1, 5), padding=(0, 2)),
        nn.AvgPool2d(2, 1),
        nn.Conv2d(7, 5, 3, padding=2, dilation=2),
        nn.Conv2d(5, 9, 3, stride=(1, 2), padding=1, groups=1),
        nn.MaxPool2d((3, 1), 1),
        nn.Conv2d(9, 4, 3),
    )


NETWORKS = {"bottlenecks": (Bottlenecks, 200), "separable": (separable, 200), "plain": (plain, 90)}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A plan, an example, and what the model makes of that in float64."""
    torch.manual_seed(0)
    make, size = NETWORKS[request.param]
    model = thinned(make())
    x = torch.randn(3, 3, size, size + 5)
    with torch.no_grad():
        return optimize(capture(model, (x[:1],))), x, model.double()(x.double())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("choose", ["native", "dense"])
def test_bands_come_to_what_whole_values_do(network, isa, choose):
    plan, x, expected = network
    with kernels.forced(isa):
        # two threads share an image, step by step; one has it to itself, and runs it in bands
        whole, banded = (build(plan, (x[:1],), threads, "float32", choose, 0.0) for threads in (2, 1))
        assert banded.report.scratch_bytes < whole.report.scratch_bytes
        for batch in (1, 3, 1):
            result = banded(x[:batch])
            assert torch.equal(result, torch.cat([whole(one) for one in x[:batch].split(1)]))
            assert (result - expected[:batch]).abs().max() <= 1e-5 * expected.abs().max()
