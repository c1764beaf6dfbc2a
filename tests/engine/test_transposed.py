"""Transposed convolutions as ordinary ones."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from rarefy.engine import reference
from rarefy.engine.plan import ConvTranspose
from rarefy.engine.transposed import phases


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
