"""Products with sparse weights, on every instruction set of the machine, against PyTorch in float64."""

import pytest
import torch
import torch.nn.functional as F

from rarefy import kernels
from rarefy.kernels import sparse_layers
from rarefy.kernels.sparse_layers import Index, Shape

ISAS = sorted({k.isa for k in kernels.table() if k.supported and k.name == "sparse_forward_f32"})

#: batch, in, height, width, out, kernel, stride, padding, dilation
LAYERS = [
    (2, 8, 6, 6, 8, 3, 1, 1, 1),
    (3, 5, 7, 9, 6, 3, 1, 1, 1),
    (2, 16, 15, 13, 24, 3, 2, 1, 1),
    (2, 16, 14, 16, 24, 3, 2, 1, 1),
    (1, 9, 10, 11, 7, 3, 2, 0, 1),
    (2, 8, 8, 7, 16, 1, 2, 0, 1),
    (2, 8, 9, 5, 16, 1, 1, 0, 1),
    (1, 40, 30, 30, 33, 3, 1, 1, 1),
    (2, 4, 12, 12, 5, 3, 1, 2, 2),
    (1, 4, 12, 12, 5, 5, 3, 2, 1),
    (2, 8, 5, 5, 8, 3, 1, 2, 1),
    (1, 130, 8, 8, 140, 3, 1, 1, 1),
    (1, 1, 1, 1, 1, 3, 1, 1, 1),
    (4, 3, 2, 2, 4, 3, 2, 1, 1),
]


@pytest.fixture(params=ISAS)
def isa(request):
    with kernels.forced(request.param):
        yield


def rows(tensor, last):
    """The form of a 1x1 convolution: all positions are one line, or one an image."""
    if last:
        return tensor.permute(0, 2, 3, 1).view(-1, tensor.shape[1]).t()[None, :, None, :]
    return tensor.view(len(tensor), tensor.shape[1], 1, -1)


def off(found, expected):
    """The largest error, as a share of the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def check(layer, density, memory, with_bias=True):
    batch, inputs, height, width, outputs, kernel, stride, padding, dilation = layer
    x = torch.randn(batch, inputs, height, width).contiguous(memory_format=memory)
    weight = torch.randn(outputs, inputs, kernel, kernel) * (torch.rand(outputs, inputs, kernel, kernel) < density)
    weight = weight.contiguous(memory_format=memory)
    bias = torch.randn(outputs) if with_bias else None
    wide = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.conv2d(*wide, None if bias is None else bias.double(), stride, padding, dilation)
    g = torch.randn(expected.shape).contiguous(memory_format=memory)
    of_x, of_weight = torch.autograd.grad(expected, wide, g.double())
    expected = expected.detach()

    last = memory is torch.channels_last
    for flat in {False, (kernel, stride, padding) == (1, 1, 0)}:
        form = (lambda t: rows(t, last)) if flat else (lambda t: t)
        sizes = ((1, 1), (1, 1)) if flat else ((height, width), (kernel, kernel))
        shape = Shape(outputs, inputs, *sizes[0], sizes[1], (stride,) * 2, (padding,) * 2, (dilation,) * 2, flat)
        places = sparse_layers.live_places(weight)
        values, *counts = sparse_layers.take(weight, places)
        assert counts == [len(places), len(places)]
        index = Index(sparse_layers.grid(shape), places, last)
        y = torch.full_like(g, torch.nan)
        index.forward(form(x), values, bias, form(y))
        assert off(y, expected) < 2e-6
        to_x, to_weight = torch.zeros_like(x), torch.full_like(weight, torch.nan)
        index.backward(form(x), values, form(g), form(to_x), to_weight)
        assert off(to_x, of_x) < 2e-6
        assert off(to_weight, of_weight * (weight != 0)) < 2e-6
        if flat or sparse_layers.grid(shape).all_phases:  # every place is written to
            alone = torch.full_like(x, torch.nan)
            index.backward(form(x), values, form(g), form(alone), None)
            assert torch.equal(alone, to_x)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_equals_pytorch_in_float64(layer, memory, isa):
    for density in (0.0, 0.03, 0.3, 1.0):
        check(layer, density, memory, with_bias=density != 0.3)


def test_one_weight_of_a_last_row(isa):
    shape = Shape(64, 32, 10, 10, (3, 3), (1, 1), (1, 1))
    weight = torch.zeros(64, 32, 3, 3)
    weight[63, 31, 2, 2] = 2.0
    index = Index(sparse_layers.grid(shape), sparse_layers.live_places(weight), False)
    x, y = torch.randn(2, 32, 10, 10), torch.full((2, 64, 10, 10), torch.nan)
    index.forward(x, torch.tensor([2.0]), None, y)
    assert len(index) == 1
    assert torch.equal(y, F.conv2d(x, weight, padding=1))


def test_places_are_those_of_the_mask_too(isa):
    weight = torch.zeros(3, 5)
    weight[0, 2], weight[2, 4] = -1.0, torch.nan
    mask = torch.zeros(5, 3, dtype=torch.bool).t()
    mask[1, 0] = mask[2, 4] = True
    assert sparse_layers.live_places(weight, mask).tolist() == [2, 5, 14]
    values, nonzero, inside = sparse_layers.take(weight, torch.tensor([2, 5], dtype=torch.int32))
    assert (values.tolist(), nonzero, inside) == ([-1.0, 0.0], 2, 1)
    assert sparse_layers.live_places(torch.zeros(2, 2)).tolist() == []


def test_threads_change_no_more_than_the_rounding():
    layer = torch.randn(24, 16, 3, 3) * (torch.rand(24, 16, 3, 3) < 0.2)
    shape = Shape(24, 16, 9, 9, (3, 3), (2, 2), (1, 1))
    index = Index(sparse_layers.grid(shape), sparse_layers.live_places(layer), False)
    values, _, _ = sparse_layers.take(layer, index.places)
    x, g = torch.randn(5, 16, 9, 9), torch.randn(5, 24, 5, 5)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            y, to_x, to_weight = torch.empty_like(g), torch.empty_like(x), torch.full_like(layer, torch.nan)
            index.forward(x, values, None, y)
            index.backward(x, values, g, to_x, to_weight)
            found.append((y, to_x, to_weight))
    finally:
        torch.set_num_threads(before)
    for y, to_x, to_weight in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(to_x, found[0][1])
        torch.testing.assert_close(to_weight, found[0][2], rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_stay_where_they_are():
    shape = Shape(4, 8, flat=True)
    weight = torch.eye(4, 8)
    index = Index(sparse_layers.grid(shape), sparse_layers.live_places(weight), False)
    x = torch.zeros(3, 8)
    x[0, 1], x[2, 3] = torch.nan, torch.inf
    y = torch.empty(3, 4)
    index.forward(x.t()[None, :, None, :], torch.ones(4), None, y.t()[None, :, None, :])
    torch.testing.assert_close(y, x[:, :4], equal_nan=True)


@pytest.mark.parametrize(
    "shape", [Shape(4, 4, 5, 5, (1, 1), (1, 1), (1, 1)), Shape(4, 4, 2, 2, (3, 3))], ids=["padding", "no output"]
)
def test_a_layer_without_a_grid_is_refused(shape):
    with pytest.raises(ValueError, match="no grid for"):
        sparse_layers.grid(shape)


def test_the_matrix_may_be_smaller_than_a_vector_or_a_block():
    for outputs, inputs, batch in [(1, 1, 1), (3, 2, 5), (9, 17, 31), (300, 700, 1)]:
        weight = torch.randn(outputs, inputs) * (torch.rand(outputs, inputs) < 0.5)
        index = Index(sparse_layers.grid(Shape(outputs, inputs, flat=True)), sparse_layers.live_places(weight), False)
        values, _, _ = sparse_layers.take(weight, index.places)
        x, y = torch.randn(batch, inputs), torch.full((batch, outputs), torch.nan)
        index.forward(x.t()[None, :, None, :], values, None, y.t()[None, :, None, :])
        torch.testing.assert_close(y, x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_values_of_another_number_of_weights_are_refused():
    index = Index(sparse_layers.grid(Shape(2, 3, flat=True)), torch.tensor([0, 4], dtype=torch.int32), False)
    with pytest.raises(ValueError, match="2 weights live, got values of 3"):
        index.forward(torch.zeros(1, 3, 1, 5), torch.zeros(3), None, torch.zeros(1, 2, 1, 5))


def test_weights_of_several_parts_are_taken_and_gradients_put_back():
    """A weight is passed over 4,096 numbers at a time; here by parts and a rest, with parts in which none lives."""
    weight = torch.zeros(130, 131)
    places = torch.tensor([0, 4095, 4096, 12287, 17028, 17029], dtype=torch.int32)
    weight.view(-1)[places.long()] = torch.arange(1.0, 7.0)
    values, nonzero, inside = sparse_layers.take(weight, places)
    assert (values.tolist(), nonzero, inside) == ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 6, 6)
    index = Index(sparse_layers.grid(Shape(130, 131, flat=True)), places, False)
    x, g = torch.randn(7, 131), torch.randn(7, 130)
    to_weight = torch.full_like(weight, torch.nan)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            index.backward(x.t()[None, :, None, :], values, g.t()[None, :, None, :], None, to_weight)
            torch.testing.assert_close(to_weight, (g.t() @ x) * (weight != 0), rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)
