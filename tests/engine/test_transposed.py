"""Transposed convolutions as ordinary ones."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import engine
from rarefy.engine import reference
from rarefy.engine.plan import ConvTranspose
from rarefy.engine.transposed import phases
from tests.engine.layers import paths, run


def step_of(kernel, stride, padding, output_padding, dilation, groups):
    weight, pair = torch.randn(6, 4 // groups, *kernel), lambda size: (size,) * len(kernel)
    return ConvTranspose(
        **{"name": "up", "output": "y", "input": "x", "weight": weight, "bias": torch.randn(6), "groups": groups},
        **{"stride": pair(stride), "padding": pair(padding), "dilation": pair(dilation)},
        output_padding=pair(output_padding),
    )


OPTIONS = [
    each
    for each in itertools.product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (0, 1), (1, 2), (1, 2))
    if each[3] < max(each[1], each[4])
]


@pytest.mark.parametrize("groups", [1, 2])
def test_phases_are_the_transposed_convolution(groups):
    torch.manual_seed(groups)
    done = 0
    for (kernel, *options), size in itertools.product(OPTIONS, (1, 4)):
        if options[-1] != groups:
            continue
        step, x = step_of((kernel, kernel), *options), torch.randn(2, 4, size, size + 1)
        if min(x.shape[2:]) * options[0] - 2 * options[1] + options[3] * (kernel - 1) < 3:
            continue  # nothing would be left
        y, made = reference.run_step(step, {"x": x}), phases(step, x.shape[2:])
        padded = F.pad(x, [*made.padding[1], *made.padding[0]])
        z = F.conv2d(padded, made.weight, made.bias, groups=groups)
        assert (z.shape[2:], y.shape[2:]) == (made.made, made.sizes)
        z = F.pixel_shuffle(z, options[0])[:, :, : made.sizes[0], : made.sizes[1]]
        torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-4)
        done += 1
    assert done > 100


@pytest.mark.parametrize("isa", paths())
@pytest.mark.parametrize(
    ("kernel", "options", "size"),
    [
        ((4, 4), (2, 1, 0, 1, 1), (7, 9)),
        ((3, 3), (2, 1, 1, 1, 2), (5, 5)),
        ((2, 3), (3, 0, 0, 1, 1), (4, 6)),
        ((1, 1), (2, 0, 0, 1, 1), (3, 3)),
        ((5, 5), (1, 2, 0, 2, 1), (6, 8)),
        ((4,), (4, 1, 2, 1, 2), (11,)),
        ((2, 2, 2), (2, 0, 0, 1, 1), (3, 4, 5)),
        ((3, 2, 3), (2, 1, 1, 1, 2), (2, 3, 4)),
    ],
)
def test_native_steps(kernel, options, size, isa):
    step, x = step_of(kernel, *options), torch.randn(3, 4, *size)
    for activation in ("none", "relu", "silu"):
        found = run(replace(step, activation=activation), {"x": x}, isa)
        expected = reference.run_step(replace(step, activation=activation), {"x": x})
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_generator_is_one_program():
    up, norm = nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6)
    norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), up, norm, nn.ReLU(), nn.ConvTranspose2d(6, 3, 2, 2))
    x = torch.randn(2, 3, 6, 7)
    compiled = engine.compile(model.eval(), x, choose="native")
    kinds = [step.kind for step in compiled.steps() if step.kind not in ("input", "output")]
    assert kinds == ["conv", "conv", "view", "conv", "view"]  # the normalisation is in the weights
    with torch.no_grad():
        torch.testing.assert_close(compiled(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-4)
