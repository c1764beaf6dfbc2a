"""Seconds by density: how the table is made of what was measured, and what is measured."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from rarefy import engine
from rarefy.engine import by_density
from rarefy.engine.by_density import DENSITIES, table
from rarefy.engine.capture import capture
from rarefy.engine.passes import optimize
from rarefy.engine.plan import Layer


def small() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 36, 5)).eval()


def test_the_sums_of_layers_are_the_calls():
    layers = np.outer([3.0, 5.0], np.array(DENSITIES)) + 0.5
    made = table({"a": 100, "b": 50}, layers, 1.2 * layers.sum(0) + 0.4, "float32", (1, 1), {})
    assert made.fixed == pytest.approx(0.4)
    assert made.seconds() == pytest.approx(1.2 * 9 + 0.4)
    assert made.seconds({"a": 10}) == pytest.approx(1.2 * (3 * 0.1 + 0.5 + 5.5) + 0.4)
    assert made.layers[0].densities == (0.0, *DENSITIES)
    assert made.layers[0].seconds[0] == pytest.approx(1.2 * 0.5), "the line goes on to no weights"


def test_noise_makes_no_layer_faster_by_more_weights():
    seconds = np.array([[3.0, 1.0, 2.0, 4.0, 3.0, 5.0, 5.0, 6.0]])
    made = table({"a": 100}, seconds, seconds[0], "float32", (1, 1), {})
    assert list(made.layers[0].seconds) == sorted(made.layers[0].seconds)
    assert made.layers[0].seconds[-1] == pytest.approx(6.0)
    assert made.layers[0].seconds[0] <= 3.0


def test_no_rest_is_below_nothing():
    seconds = np.array([DENSITIES]) + 1.0
    made = table({"a": 100}, seconds, 0.9 * seconds[0] - 0.01, "float32", (1, 1), {})
    assert made.fixed == 0.0
    assert made.seconds() == pytest.approx(1.79, rel=0.02)


@pytest.mark.parametrize("block", [(1, 1), (1, 4), (8, 4), (5, 2)])
def test_masks_are_as_dense_as_is_said(block):
    plan = optimize(capture(small(), (torch.randn(1, 3, 8, 8),)))
    for density in DENSITIES:
        for step in by_density._masked(plan, density, block).steps:
            if isinstance(step, Layer):
                live = step.weight != 0
                rows, columns = block if live.shape[0] % block[0] == live.shape[1] % block[1] == 0 else (1, 1)
                each = rows * columns
                assert int(live.sum()) == max(1, round(density * live.numel() / each)) * each
                blocks = live.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
                assert torch.equal(blocks.any(3).any(1), blocks.all(3).all(1))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"block": 4}, {"precision": "int8", "calibration": [torch.randn(4, 3, 8, 8)]}])
def test_a_network_is_measured(options):
    model, x = small(), torch.randn(1, 3, 8, 8)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = engine.latency(model, x, tune_seconds=0.1, **options)
    assert {layer.name: layer.weights for layer in found.layers} == {"0": 216, "3": 864, "6": 2160}
    assert all(list(layer.seconds) == sorted(layer.seconds) for layer in found.layers)
    assert 0 < found.seconds({"0": 2, "3": 8, "6": 20}) <= found.seconds()
    assert (found.precision, found.block) == (options.get("precision", "float32"), (1, options.get("block", 1)))
    assert found.about["example"] == [[1, 3, 8, 8]]
    assert engine.Latency.from_dict(found.to_dict()) == found
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert len(torch.nonzero(model[0].weight)) == 216


def test_mistakes():
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"block must be a positive whole number of inputs.*got 0"):
        engine.latency(small(), x, block=0)
    with pytest.raises(ValueError, match="training mode"):
        engine.latency(small().train(), x)
    with pytest.raises(ValueError, match=r"knows no layer of Sequential.*target_flops"):
        engine.latency(nn.Sequential(nn.ReLU()).eval(), x, tune_seconds=0.0)
    compiled = engine.compile(small(), x, choose="native")
    assert compiled.seconds(rounds=1) > 0
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        compiled.seconds(x, rounds=0)
