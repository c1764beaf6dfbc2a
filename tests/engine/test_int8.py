"""Steps on quantised values are the formulas of rarefy.engine.int8, bit for bit."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rarefy.engine import int8, reference
from rarefy.engine.int8 import Int8
from rarefy.engine.plan import (
    Affine,
    Binary,
    Concat,
    Conv,
    Dequantize,
    Flatten,
    GlobalAverage,
    Linear,
    Plan,
    Pool,
    Quantize,
    Quantized,
    Table,
    Upsample,
    Value,
)

F32 = np.float32


def quantized(scale, zero_point=0):
    return Quantized(float(F32(scale)), zero_point)


def bytes_of(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def layer(kind, whole, **fields):
    """A layer of whole numbers, with a scale for each output channel."""
    scale = torch.rand(len(whole)) * 0.02 + 0.001
    given = {"name": "layer", "output": "y", "input": "x", "bias": torch.randn(len(whole))}
    return kind(**given | {"weight": int8.weights(whole, scale), "weight_scale": scale} | fields)


def conv(whole, **fields):
    axes = whole.dim() - 2
    return layer(Conv, whole, **{"stride": (1,) * axes, "padding": ((0, 0),) * axes, "dilation": (1,) * axes} | fields)


def whole_numbers(*shape, density=1.0):
    return torch.where(torch.rand(shape) < density, torch.randint(-127, 128, shape).float(), 0.0)


def sums_of(step, x, zero_point):
    """The exact sums of a convolution in NumPy's int64, weight by weight."""
    whole = int8.levels(step).numpy().astype(np.int64)
    out, each, *kernel = whole.shape
    x = np.pad(x.numpy().astype(np.int64) - zero_point, ((0, 0), (0, 0), *step.padding))
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], kernel, step.stride, step.dilation, strict=True)
    ]
    sums = np.zeros((len(x), out, *size), np.int64)
    for o, i in itertools.product(range(out), range(each)):
        channel = x[:, o // (out // step.groups) * each + i]
        for at in itertools.product(*map(range, kernel)):
            taken = tuple(
                slice(a * d, a * d + s * n, s) for a, d, s, n in zip(at, step.dilation, step.stride, size, strict=True)
            )
            sums[:, o] += whole[(o, i, *at)] * channel[(slice(None), *taken)][(slice(None), *map(slice, size))]
    return sums


def finished(step, sums, of, to, residual=None):
    """The bytes of sums, as the definition has it."""
    column = (-1, *(1,) * (sums.ndim - 2))
    scale, bias = step.weight_scale.numpy().astype(np.float64), step.bias.numpy().astype(np.float64)
    m = (of.scale * scale / to.scale).astype(F32).reshape(column)
    b = bias / to.scale + to.zero_point
    if residual is not None:
        b = b - residual[1].zero_point * (residual[1].scale / to.scale)
    t = sums.astype(np.int32).astype(F32) * m + b.astype(F32).reshape(column)
    if residual is not None:
        t = t + residual[0].numpy().astype(F32) * F32(residual[1].scale / to.scale)
    assert t.dtype == F32
    low = 0 if step.activation == "none" else to.zero_point
    high = 255 if step.activation != "relu6" else min(255, int(np.rint(6 / to.scale + to.zero_point)))
    return np.clip(np.rint(t), low, high).astype(np.uint8)


CONVOLUTIONS = [
    ((8, 6, 3, 3), (6, 9, 7), {"padding": ((1, 1), (1, 1))}),
    ((6, 5, 3, 2), (5, 8, 9), {"padding": ((2, 0), (0, 1)), "stride": (2, 1), "dilation": (1, 2)}),
    ((12, 1, 3, 3), (6, 7, 7), {"padding": ((1, 1), (1, 1)), "groups": 6, "stride": (2, 2)}),
    ((4, 8, 5), (8, 11), {"padding": ((2, 2),)}),
    ((3, 2, 2, 2, 2), (2, 4, 5, 3), {"stride": (2, 1, 1)}),
    ((5, 7, 1, 1), (7, 4, 4), {}),
]


@pytest.mark.parametrize(("weight", "size", "options"), CONVOLUTIONS)
@pytest.mark.parametrize("activation", int8.CLAMPS)
@pytest.mark.parametrize("added", [False, True])
def test_convolutions(weight, size, options, activation, added):
    of, to, other = quantized(0.021, 13), quantized(0.1, 101), quantized(0.03, 200)
    step = conv(whole_numbers(*weight, density=0.4), activation=activation, **options)
    x = bytes_of(2, *size)
    sums = sums_of(step, x, of.zero_point)
    residual = (bytes_of(*sums.shape), other) if added else None
    if added:
        step = replace(step, residual="r")
    made = Int8(step, (of, other) if added else (of,), to).run(x, *([residual[0]] if added else []))
    assert made.dtype is torch.uint8
    assert np.array_equal(made.numpy(), finished(step, sums, of, to, residual))
    assert len(made.unique()) > 10  # it does not saturate throughout


def test_sums_that_float32_cannot_hold():
    """65 x 65 weights of the largest size, and odd sums: float32 would round them, float64 does not."""
    whole = torch.full((2, 33, 3, 3), 127.0)
    whole[1] = -whole[1]
    whole[:, 0, 0, 0] -= 2
    step, of = conv(whole), quantized(0.01, 1)
    wide = conv(whole.repeat(1, 30, 1, 1))
    for each, channels, dtype in ((step, 33, torch.float32), (wide, 990, torch.float64)):
        made = Int8(each, (of,), quantized(1e3, 128))
        assert made._weight.dtype is dtype
        x = torch.full((1, channels, 4, 4), 255, dtype=torch.uint8)
        x[0, 0, 1] = 254
        sums = sums_of(each, x, 1)
        assert np.array_equal(made.run(x).numpy(), finished(each, sums, of, made.result))
        exact = F.conv2d(x.to(made._weight.dtype) - 1, made._weight).numpy()
        assert np.array_equal(exact.astype(np.int64), sums)


@pytest.mark.parametrize("shape", [(3, 40), (2, 5, 40)])
def test_linear_layers_of_rows(shape):
    step, of, to = layer(Linear, whole_numbers(9, 40), activation="relu"), quantized(0.02, 7), quantized(0.9, 30)
    x = bytes_of(*shape)
    sums = (x.numpy().astype(np.int64) - 7) @ int8.levels(step).numpy().astype(np.int64).T
    expected = finished(step, np.moveaxis(sums, -1, 1), of, to)
    assert np.array_equal(np.moveaxis(Int8(step, (of,), to).run(x).numpy(), -1, 1), expected)


@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid"])
def test_a_layer_gives_float32(activation):
    step, of = conv(whole_numbers(8, 6, 3, 3), activation=activation), quantized(0.004, 50)
    x = bytes_of(2, 6, 5, 5)
    made = Int8(step, (of,), None).run(x)
    m = (of.scale * step.weight_scale.double()).float().numpy().reshape(-1, 1, 1)
    y = torch.from_numpy(sums_of(step, x, 50).astype(F32) * m + step.bias.numpy().reshape(-1, 1, 1))
    assert torch.equal(made, {"none": lambda y: y, "relu": F.relu, "sigmoid": torch.sigmoid}[activation](y))
    plain = reference.run_step(replace(step, activation=activation), {"x": int8.dequantize(x, of)})
    torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-4)  # and it is the layer


@pytest.mark.parametrize("activation", int8.CLAMPS)
@pytest.mark.parametrize("vector", [False, True])
def test_sums_and_products_of_values(activation, vector):
    a, b = quantized(0.031, 17), quantized(0.052, 140)
    x, y = bytes_of(2, 6, 5, 7), bytes_of(*((2, 6, 1, 1) if vector else (2, 6, 5, 7)))
    u, v = x.numpy().astype(F32), y.numpy().astype(F32)
    for op, to in (("add", quantized(0.05, 90)), ("mul", quantized(0.08, 120))):
        m_x, m_y = a.scale / to.scale, b.scale / to.scale
        if op == "add":
            t = u * F32(m_x) + F32(to.zero_point - 17 * m_x - 140 * m_y) + v * F32(m_y)
        else:
            t = (u - F32(17)) * (v - F32(140)) * F32(a.scale * b.scale / to.scale) + F32(to.zero_point)
        low = 0 if activation == "none" else to.zero_point
        high = min(255, round(6 / to.scale + to.zero_point)) if activation == "relu6" else 255
        step = Binary(name="b", output="z", op=op, x="x", y="y", activation=activation)
        made = Int8(step, (a, b), to).run(x, y)
        assert np.array_equal(made.numpy(), np.clip(np.rint(t), low, high).astype(np.uint8))
        assert len(made.unique()) > 20


POOLS = [
    ((6, 7), {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}),
    ((6, 7), {"kernel": (3, 2), "stride": (2, 2), "padding": (1, 0), "ceil_mode": True}),
    ((9,), {"kernel": (4,), "stride": (3,), "padding": (2,), "ceil_mode": True}),
    ((5, 5), {"kernel": (5, 5), "stride": (1, 1), "padding": (0, 0)}),
]


def windows(size, kernel, stride, padding, out):
    """For each window of an axis: the pixels in it, and how many it has with padding, which ends behind the axis."""
    for i in range(out):
        begin = i * stride - padding
        end = min(begin + kernel, size + padding)
        yield range(max(begin, 0), min(begin + kernel, size)), end - begin


@pytest.mark.parametrize(("size", "options"), POOLS)
@pytest.mark.parametrize("count_include_pad", [False, True])
def test_averages(size, options, count_include_pad):
    of, to = quantized(0.03, 40), quantized(0.02, 99)
    options = {"dilation": (1,) * len(size), "ceil_mode": False, "count_include_pad": count_include_pad} | options
    step = Pool(name="p", output="y", input="x", op="average", **options)
    x = bytes_of(2, 3, *size)
    made = Int8(step, (of,), to).run(x).numpy()
    axes = [
        list(windows(*each)) for each in zip(size, step.kernel, step.stride, step.padding, made.shape[2:], strict=True)
    ]
    for at in itertools.product(*(range(n) for n in made.shape[2:])):
        inside = [axes[axis][i][0] for axis, i in enumerate(at)]
        there = math.prod(map(len, inside))
        count = math.prod(axes[axis][i][1] for axis, i in enumerate(at)) if count_include_pad else there
        taken = x.numpy().astype(np.int64)[(slice(None), slice(None), *(slice(r.start, r.stop) for r in inside))]
        sums = taken.reshape(2, 3, -1).sum(-1).astype(F32)
        b = to.zero_point - of.zero_point * of.scale / to.scale * (there / count)
        t = sums * F32(of.scale / to.scale / count) + F32(b)
        assert np.array_equal(made[(slice(None), slice(None), *at)], np.clip(np.rint(t), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("keepdim", [False, True])
def test_the_average_of_everything(keepdim):
    of, to = quantized(0.03, 40), quantized(0.0029, 99)
    x = bytes_of(2, 300, 5, 7)
    made = Int8(GlobalAverage(name="g", output="y", input="x", keepdim=keepdim), (of,), to).run(x)
    assert made.shape == ((2, 300, 1, 1) if keepdim else (2, 300))
    sums = x.numpy().astype(np.int64).sum((2, 3)).astype(F32)
    t = sums * F32(of.scale / to.scale / 35) + F32(to.zero_point - 40 * of.scale / to.scale)
    assert np.array_equal(made.reshape(2, 300).numpy(), np.clip(np.rint(t), 0, 255).astype(np.uint8))


@pytest.mark.parametrize(("size", "options"), POOLS)
def test_copies_of_bytes(size, options):
    of = quantized(0.1, 3)
    x, y = bytes_of(2, 3, *size), bytes_of(2, 4, *size)
    pool = Pool(name="p", output="y", input="x", op="max", dilation=(1,) * len(size), **options)
    plain = Upsample(name="u", output="y", input="x", factor=(2, 3)[: len(size)])
    for step in (pool, plain, Flatten(name="f", output="y", input="x")):
        expected = reference.run_step(step, {"x": x.float()})
        assert torch.equal(Int8(step, (of,), of).run(x), expected.to(torch.uint8))
    both = Int8(Concat(name="c", output="z", operands=("x", "y", "x")), (of, of, of), of)
    assert torch.equal(both.run(x, y, x), torch.cat([x, y, x], 1))


def test_padding_never_wins_a_maximum():
    step = Pool(name="p", output="y", input="x", op="max", kernel=(3,), stride=(1,), padding=(1,), dilation=(1,))
    of = quantized(0.1, 200)  # 0 lies above what is there
    x = torch.tensor([[[3, 5, 2]]], dtype=torch.uint8)
    assert Int8(step, (of,), of).run(x).tolist() == [[[5, 5, 5]]]


def test_tables():
    of, to = quantized(0.05, 128), quantized(1 / 255)
    sigmoid = int8.table("sigmoid", of, to)
    expected = [min(255, max(0, round(1 / (1 + math.exp(-of.scale * (q - 128))) / to.scale))) for q in range(256)]
    assert sigmoid.tolist() == expected
    step = Table(name="t", output="y", input="x", table=sigmoid)
    x = bytes_of(2, 5, 3)
    assert Int8(step, (of,), to).run(x).tolist() == np.array(expected)[x.numpy()].tolist()
    assert int8.table("none", of, of).tolist() == list(range(256))


def test_numbers_become_bytes_and_numbers_again():
    to = quantized(0.25, 100)
    x = torch.tensor([0.0, -0.0, 0.125, 0.375, -0.125, 40, -26, 1e30, -1e30, math.inf, -math.inf, math.nan])
    q = int8.quantize(x, to)
    assert q.tolist() == [100, 100, 100, 102, 100, 255, 0, 255, 0, 255, 0, 100]  # ties to even
    assert int8.dequantize(q, to).tolist() == [0, 0, 0, 0.5, 0, 38.75, -25, 38.75, -25, 38.75, -25, 0]
    every = torch.arange(256, dtype=torch.uint8)
    for scale, zero in ((0.0173, 0), (3e-5, 255), (777.7, 13)):
        assert torch.equal(int8.quantize(int8.dequantize(every, quantized(scale, zero)), quantized(scale, zero)), every)


def test_the_weights_of_a_layer_are_whole_numbers():
    whole = whole_numbers(64, 5, 3, 3)
    step = conv(whole, bias=torch.zeros(64))
    assert torch.equal(int8.levels(step), whole)
    with pytest.raises(ValueError, match="the weights of layer are not quantised"):
        int8.levels(replace(step, weight_scale=None))


def test_a_plan_runs_with_the_quantisation_of_its_values():
    of, to = quantized(0.02, 128), quantized(0.5, 60)
    step = conv(whole_numbers(4, 3, 3, 3), input="q", output="y")
    into, out = Quantize(name="i", input="x", output="q"), Dequantize(name="o", input="y", output="z")
    float32, uint8 = torch.float32, torch.uint8
    values = {"x": Value((3, 6, 6), float32), "q": Value((3, 6, 6), uint8, "", of)}
    values |= {"y": Value((4, 4, 4), uint8, "", to), "z": Value((4, 4, 4), float32)}
    plan = Plan(("x",), ("z",), True, (into, step, out), values, {}, None)
    x = torch.randn(2, 3, 6, 6)
    (got,) = reference.run(plan, (x,))
    y = Int8(step, (of,), to).run(int8.quantize(x, of))
    assert torch.equal(got, int8.dequantize(y, to))
    assert (got - reference.run_step(step, {"q": x})).abs().max() < 0.5


@pytest.mark.parametrize(
    ("scale", "zero", "message"),
    [
        *((scale, 0, "scale") for scale in (0.0, 0.1, math.inf, math.nan, -1.0)),
        *((1.0, zero, "zero point") for zero in (-1, 256, 1.5, True)),
    ],
)
def test_what_bytes_cannot_mean(scale, zero, message):
    with pytest.raises(ValueError, match=f"the {message} of a quantised value must be"):
        Quantized(scale, zero)


ONE, TWO = quantized(1.0), quantized(2.0)


@pytest.mark.parametrize(
    ("step", "operands", "result", "message"),
    [
        (Quantize(name="s", input="x", output="y"), (ONE,), ONE, "one of what it reads and makes is quantised"),
        (Dequantize(name="s", input="x", output="y"), (None,), None, "one of what it reads and makes is quantised"),
        (conv(torch.ones(1, 1, 1)), (ONE, ONE), ONE, "it has 1 inputs, and the quantisation of 2 is given"),
        (conv(torch.ones(1, 1, 1)), (None,), ONE, "it reads float32"),
        (conv(torch.ones(1, 1, 1), residual="r"), (ONE, ONE), None, "adds a residual without quantising"),
        (conv(torch.ones(1, 1, 1), activation="gelu"), (ONE,), ONE, "gelu is no bound: it needs a table"),
        (conv(torch.ones(1, 1, 1), weight_scale=None), (ONE,), ONE, "a scale of the weights for every output channel"),
        (conv(torch.ones(2, 1, 1), weight_scale=torch.ones(1)), (ONE,), ONE, "a scale of the weights for every output"),
        (Flatten(name="s", input="x", output="y"), (ONE,), None, "some of what it reads or makes is float32"),
        (Flatten(name="s", input="x", output="y"), (ONE,), TWO, "have different scales or zero points"),
        (Binary(name="s", op="add", x="x", y="y", output="z", activation="tanh"), (ONE, ONE), ONE, "tanh is no bound"),
        (Table(name="s", input="x", output="y", table=torch.ones(256)), (ONE,), ONE, r"its table is \(256,\) of"),
        (Affine(name="s", input="x", output="y"), (ONE,), ONE, "a activation has no meaning on bytes"),
    ],
)
def test_steps_without_a_meaning(step, operands, result, message):
    with pytest.raises(ValueError, match=f"cannot be computed in int8: .*{message}"):
        Int8(step, operands, result)
