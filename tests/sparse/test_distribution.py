"""How a budget is spread: ERK's published densities, exact totals, maps by layer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rarefy import models, sparse
from rarefy._prices import Prices
from rarefy.sparse import distribution as spread


def erk(shapes, sparsity):
    sizes = [math.prod(shape) for shape in shapes.values()]
    relative = spread.relative_densities("erk", shapes)
    nothing = [0.0] * len(sizes)
    available = (1 - sparsity) * sum(sizes)
    found = spread.densities(relative, [None] * len(sizes), [Prices.one(1.0, n) for n in sizes], nothing, available)
    return dict(zip(shapes, found, strict=True))


def resnet50():
    with torch.device("meta"):
        layers = models.resnet50().named_modules()
    return {name: tuple(module.weight.shape) for name, module in layers if isinstance(module, nn.Conv2d | nn.Linear)}


def test_erk_of_resnet50_is_the_published_one():
    found = erk(resnet50(), 0.8)
    sparsity = {name: 1 - density for name, density in found.items()}
    first, fc = next(iter(sparsity)), list(sparsity)[-1]
    assert sparsity[first] == pytest.approx(0.1428, abs=5e-5)
    assert sparsity[fc] == pytest.approx(0.8518, abs=5e-5)
    values = [round(value, 4) for value in sparsity.values()]
    for published in (0.6381, 0.8231, 0.9126, 0.9565, 0.8541, 0.0):
        assert published in values


def test_erk_by_hand():
    # r = 6/8, 20/100, so eps = 27 / (6 + 20); both below 1
    found = erk({"a": (4, 2), "b": (10, 10)}, 0.75)
    assert found["a"] == pytest.approx(27 / 26 * 6 / 8)
    assert found["b"] == pytest.approx(27 / 26 * 20 / 100)
    # the small layer is full, the other has what is left
    assert erk({"a": (4, 2), "b": (10, 10)}, 0.5) == pytest.approx({"a": 1.0, "b": 0.46})


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8),
    st.floats(0.02, 0.98),
    st.sampled_from(["uniform", "erk"]),
)
def test_counts_are_exactly_the_budget(shapes, density, kind):
    shapes = {str(index): shape for index, shape in enumerate(shapes)}
    sizes = [math.prod(shape) for shape in shapes.values()]
    least = [1] * len(sizes)
    available = max(density * sum(sizes), len(sizes))
    prices, lows = [Prices.one(1.0, n) for n in sizes], [1 / n for n in sizes]
    relative = spread.relative_densities(kind, shapes)
    found = spread.densities(relative, [None] * len(sizes), prices, lows, available)
    live = spread.counts(found, prices, least, available)
    assert sum(live) == math.floor(available + 1e-9 * sum(sizes))
    assert all(1 <= count <= size for count, size in zip(live, sizes, strict=True))


def densities(model, **options):
    sparsifier = sparse.create("static", model, total_steps=100, **options)
    return {layer.name: layer.density for layer in sparsifier.layers()}


def three_layers():
    return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 40), nn.Linear(40, 10))


def test_a_map_fixes_some_layers_and_shares_the_rest():
    found = densities(three_layers(), target=0.6, distribution={"0": 0.0})
    assert found["0"] == 1.0
    assert found["1"] == pytest.approx(found["2"], abs=2e-3)
    assert 600 + 1200 * found["1"] + 400 * found["2"] == pytest.approx(880)


def test_uniform_gives_each_layer_the_target():
    assert densities(three_layers(), target=0.9, distribution="uniform") == pytest.approx(dict.fromkeys("012", 0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": {"7": 0.5}}, "unknown layer in distribution: '7'"),
        ({"distribution": {"0": 1.0}}, r"sparsity of '0' must be in \[0, 1\), got 1"),
        ({"distribution": {"*": 0.5}}, "distribution: with these sparsities.*target asks for 0.1"),
        ({"distribution": "erdos"}, "distribution must be one of 'uniform', 'erk', 'global' or a mapping"),
        ({"distribution": "global"}, "distribution='global'.*pass masks='magnitude'"),
        ({"block": 3}, r"layer '0' has 20 inputs.*blocks of 1x3 do not divide; pass exclude=\['0', '2'\]"),
        ({"block": 0}, "block must be a positive whole number"),
        ({"target": None}, "Static needs a target"),
        ({"total_steps": 9}, "total_steps=9 is too few for the schedule of Static, which needs at least 10"),
    ],
    ids=str,
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        sparse.create("static", three_layers(), **{"total_steps": 100, "target": 0.9, **options})
