"""The native int8 programs give the bytes of the arithmetic in PyTorch, for every kernel and shape."""

import itertools
import random

import numpy as np
import pytest
import torch

from rarefy import kernels
from rarefy.engine import int8
from rarefy.engine.builder import LAYOUTS
from rarefy.engine.building import NativeSegment, Options
from rarefy.engine.execute import Runner
from rarefy.engine.lowering import lower
from rarefy.engine.plan import (
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

ISAS = (
    sorted({each.isa for each in kernels.table() if each.name == "int8" and each.supported}) if kernels.table() else []
)
pytestmark = pytest.mark.skipif(not ISAS, reason="there is no native library")


class Network:
    """A plan that grows step by step, and what each value is for one input."""

    def __init__(self, shape, of, batch=1, seed=0):
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.steps, self.values, self.outputs = [], {}, []
        self.batch = batch
        self.values["x"] = Value(shape, torch.float32)
        self.input = torch.randn((batch, *shape), generator=self.torch) * 2
        self.found = {"x": self.input}
        self.last = self.add(Quantize(name="q", output="q", input="x"), of)

    def add(self, step, quantized):
        self.steps.append(step)
        operands = tuple(self.values[name].quantized for name in step.inputs)
        made = int8.Int8(step, operands, quantized).run(*(self.found[name] for name in step.inputs))
        self.found[step.output] = made
        self.values[step.output] = Value(tuple(made.shape[1:]), made.dtype, quantized=quantized)
        return step.output

    def name(self):
        return f"v{len(self.steps)}"

    def quantized(self):
        return Quantized(float(np.float32(self.random.uniform(0.01, 0.3))), self.random.choice([0, 0, 7, 128, 255]))

    def weight(self, *shape, density):
        size = torch.Size(shape)
        whole = torch.randint(-127, 128, size, generator=self.torch)
        kept = torch.rand(size, generator=self.torch) < density
        return self.scaled(whole * kept)

    def scaled(self, whole):
        scale = torch.rand(len(whole), generator=self.torch) * 0.01 + 0.001
        return {"weight": int8.weights(whole, scale), "weight_scale": scale}

    def conv(self, x, out, kernel, *, density=0.3, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), groups=1,
             residual=None, activation="none", to=None, weights=None):  # fmt: skip
        channels = self.found[x].shape[1]
        given = weights or self.weight(out, channels // groups, *kernel, density=density)
        bias = torch.randn(out, generator=self.torch)
        step = Conv(name=self.name(), output=self.name(), input=x, bias=bias, stride=stride, padding=padding,
                    dilation=dilation, groups=groups, residual=residual, activation=activation, **given)  # fmt: skip
        return self.add(step, to or self.quantized())

    def dequantize(self, x):
        name = self.name()
        return self.add(Dequantize(name=name, output=name, input=x), None)

    def check(self, *values, isas=None, threads=(1, 2)):
        """The program gives these values, quantised or not, at this batch size, one by one, and on two threads."""
        values = values or (self.steps[-1].output,)
        plan = Plan(("x",), values, False, tuple(self.steps), self.values, {}, None)
        shapes = {name: tuple(x.shape) for name, x in self.found.items()}
        for isa, layout in itertools.product(isas or ISAS, (None, *LAYOUTS)):
            layouts = {} if layout is None else dict.fromkeys(shapes, layout)
            with kernels.forced(isa):
                lowered = lower(plan, Options("measure", "float32", 1, 0.0, shapes, self.batch, layouts))
            (segment,) = lowered.items
            assert isinstance(segment, NativeSegment)
            assert segment.program.facts.isa == isa
            for count in threads:
                for _ in range(2):  # what was left in the memory of the first run does not matter
                    self._check(segment, values, isa, count, self.input, slice(None))
                self._check(segment, values, isa, count, self.input[-1:], slice(-1, None))

    def _check(self, segment, values, isa, threads, x, part):
        given = dict(zip(segment.makes, segment.run(threads, x), strict=True))
        for name in values:
            torch.testing.assert_close(
                given[name], self.found[name][part], rtol=0, atol=0, msg=f"{name} {isa} {threads}"
            )


GEOMETRIES = {
    "1x1": {"kernel": (1, 1)},
    "1x1 stride 2": {"kernel": (1, 1), "stride": (2, 2)},
    "3x3 same": {"kernel": (3, 3), "padding": ((1, 1), (1, 1))},
    "3x3 valid": {"kernel": (3, 3)},
    "3x3 stride 2": {"kernel": (3, 3), "stride": (2, 2), "padding": ((1, 1), (1, 1))},
    "3x3 stride 2, one side": {"kernel": (3, 3), "stride": (2, 2), "padding": ((0, 1), (0, 1))},
    "7x7 stride 2": {"kernel": (7, 7), "stride": (2, 2), "padding": ((3, 3), (3, 3))},
    "5x5 dilated": {"kernel": (5, 5), "padding": ((4, 4), (4, 4)), "dilation": (2, 2)},
    "2x2": {"kernel": (2, 2), "padding": ((0, 1), (1, 0))},
    "1x7": {"kernel": (1, 7), "padding": ((0, 0), (3, 3))},
    "3x1 stride 3": {"kernel": (3, 1), "stride": (3, 2), "padding": ((2, 1), (0, 0))},
    "wide padding": {"kernel": (1, 1), "padding": ((3, 2), (1, 4))},
    "4x4 stride 4": {"kernel": (4, 4), "stride": (4, 4)},
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("size", [(9, 11), (14, 14), (7, 7)])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_convolution(geometry, size, batch):
    net = Network((5, *size), Quantized(0.03125, 117), batch, seed=batch)
    x = net.conv("q", 9, (1, 1), to=Quantized(0.5, 3))
    y = net.conv(x, 6, **GEOMETRIES[geometry], activation="relu")
    net.conv(y, 7, (3, 3), padding=((1, 1), (1, 1)), density=1.0)
    net.check(y, net.steps[-1].output)


@pytest.mark.parametrize("groups", [2, 6, 12])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_groups(groups, stride):
    net = Network((12, 10, 10), Quantized(0.03125, 117))
    net.conv("q", 24, (3, 3), stride=stride, padding=((1, 1), (1, 1)), groups=groups, density=0.8, activation="relu6")
    net.check()


@pytest.mark.parametrize("sign", [1, -1, 0])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 1000])
@pytest.mark.parametrize("pixels", [(1, 1), (5, 5)])
def test_no_sum_saturates(sign, count, pixels):
    """Weights of 127 or -128 and pixels of 255, or of 0 beside a zero point of 255; signs alike or in turn."""
    positive = (torch.arange(count) % 2 == 0) if sign == 0 else torch.full((count,), sign > 0)
    whole = torch.where(positive, 127, -128).reshape(1, count, 1, 1).repeat(3, 1, 1, 1)
    for zero_point, bright in ((0, True), (255, False)):
        net = Network((count, *pixels), Quantized(1.0, zero_point))
        net.found["x"].fill_(255.0 if bright else -255.0)
        net.found["q"] = int8.quantize(net.found["x"], Quantized(1.0, zero_point))
        assert {*net.found["q"].unique().tolist()} == {255 if bright else 0}
        scale = torch.full((3,), 1.0)
        given = {"weight": int8.weights(whole, scale), "weight_scale": scale}
        net.conv("q", 3, (1, 1), weights=given, to=Quantized(float(count * 300), 128))
        net.check()


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.0])
def test_vectors(batch, density):
    net = Network((70,), Quantized(0.03125, 117), batch)
    given = net.weight(33, 70, density=density)
    add = net.add(Linear(name="l", output="l", input="q", bias=None, activation="relu", **given), net.quantized())
    given = net.weight(33, 33, density=density)
    net.add(Linear(name="r", output="r", input=add, residual=add, **given), net.quantized())
    bias = torch.randn(10, generator=net.torch)
    net.add(Linear(name="f", output="f", input="r", bias=bias, **net.weight(10, 33, density=0.9)), None)
    net.check("l", "r", "f")


@pytest.mark.parametrize("batch", [1, 2, 4, 6])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 300), (9, 16), (17, 33), (20, 601), (8, 1500)])
def test_rows_of_any_kind(rows, columns, batch):
    """Full, empty and nearly empty rows beside others, weights far apart, and the largest ones side by side."""
    net = Network((columns,), Quantized(0.03125, 117), batch, seed=rows)
    chance = net.torch
    whole = torch.randint(-127, 128, (rows, columns), generator=chance)
    for row in range(rows):
        density = (0.4, 1.0, 0.0, 0.05, 0.7)[row % 5]
        whole[row] *= torch.rand(columns, generator=chance) < density
    whole[rows // 2, : columns // 2] = torch.tensor([127, -127, -127, 127, 127, 0, 127]).repeat(columns)[: columns // 2]
    whole[:, 320:1200] = 0
    whole[-1, -1] = -127
    net.add(
        Linear(name="l", output="l", input="q", bias=torch.randn(rows, generator=chance), **net.scaled(whole)), None
    )
    net.check("l")


def test_a_vector_beside_a_kernel():
    """What a convolution reads around a plane of one pixel is zero points, whatever layer wrote the pixel."""
    net = Network((40, 1, 1), Quantized(0.03125, 117), 3)
    x = net.conv("q", 24, (1, 1), to=Quantized(0.0625, 200))
    y = net.conv(x, 24, (3, 3), padding=((1, 1), (1, 1)), to=Quantized(0.0625, 90))
    net.conv(y, 24, (1, 1), density=0.5, residual=x)
    net.check(x, y, net.steps[-1].output)


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens(batch):
    net = Network((13, 24), Quantized(0.03125, 117), batch)
    net.add(Linear(name="l", output="l", input="q", bias=None, **net.weight(40, 24, density=0.2)), net.quantized())
    net.add(Table(name="t", output="t", input="l", table=torch.randperm(256, generator=net.torch).to(torch.uint8)),
            net.quantized())  # fmt: skip
    net.add(Linear(name="m", output="m", input="t", bias=None, residual="q", **net.weight(24, 40, density=0.2)),
            net.quantized())  # fmt: skip
    net.add(Linear(name="f", output="f", input="m", bias=None, **net.weight(8, 24, density=0.2)), None)
    net.check("m", "f", "t")


POOLS = [
    {"op": op, "kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil, "count_include_pad": include}
    for op in ("max", "average")
    for kernel, stride, padding in (((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 2), (1, 0)))
    for ceil, include in ((False, True), (False, False), (True, False))
]


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: "-".join(map(str, p.values())))
@pytest.mark.parametrize("batch", [1, 3])
def test_pools(pool, batch):
    of = Quantized(0.03125, 117)
    net = Network((6, 9, 10), of, batch)
    to = of if pool["op"] == "max" else Quantized(0.0625, 60)
    net.add(Pool(name="p", output="p", input="q", dilation=(1, 1), **pool), to)
    net.conv("p", 5, (3, 3), padding=((1, 1), (1, 1)))
    net.check("p", net.steps[-1].output)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("size", [(6, 7), (16, 16)])
def test_other_steps(batch, size):
    net = Network((8, *size), Quantized(0.03125, 117), batch)
    same = {"kernel": (3, 3), "padding": ((1, 1), (1, 1))}
    a = net.conv("q", 8, **same, activation="relu")
    b = net.conv(a, 8, **same, residual="q", activation="relu")
    c = net.add(Binary(name="c", output="c", op="add", x=a, y=b, activation="relu"), net.quantized())
    g = net.add(GlobalAverage(name="g", output="g", input=c, keepdim=True), net.quantized())
    s = net.conv(g, 8, (1, 1), density=0.9)
    t = net.add(Table(name="t", output="t", input=s, table=torch.arange(255, -1, -1).to(torch.uint8)), net.quantized())
    m = net.add(Binary(name="m", output="m", op="mul", x=c, y=t), net.quantized())
    k = net.conv(m, 3, **same, to=net.values["m"].quantized)
    joined = net.add(Concat(name="k", output="k", operands=(m, k, m)), net.values["m"].quantized)
    d = net.conv(joined, 4, **same)
    u = net.add(Upsample(name="u", output="u", input=d, factor=(2, 3)), net.values[d].quantized)
    e = net.conv(u, 4, **same, stride=(2, 3))
    f = net.add(Flatten(name="f", output="f", input=e), net.values[e].quantized)
    h = net.add(Linear(name="h", output="h", input=f, **net.weight(5, net.found[f].shape[1], density=0.1)), None)
    z = net.dequantize(e)
    net.check(b, c, g, m, joined, d, u, e, f, h, z)


def test_what_is_too_large_runs_in_pytorch():
    net = Network((34000,), Quantized(0.03125, 117))
    net.add(Linear(name="l", output="l", input="q", bias=None, **net.weight(2, 34000, density=0.1)), net.quantized())
    net.add(Linear(name="m", output="m", input="l", bias=None, **net.weight(2, 2, density=1.0)), None)
    plan = Plan(("x",), ("m",), True, tuple(net.steps), net.values, {}, None)
    shapes = {name: tuple(x.shape) for name, x in net.found.items()}
    lowered = lower(plan, Options("measure", "float32", 1, 0.0, shapes, 1))
    assert "a row has at most" in lowered.reasons["l"]
    (made,) = Runner(lowered.items, ["x"], ["m"], {})([net.input], 1)
    assert torch.equal(made, net.found["m"])


def test_signals():
    net = Network((6, 50), Quantized(0.03125, 117), 2)
    given = net.weight(8, 6, 5, density=0.4)
    net.add(Conv(name="c", output="c", input="q", stride=(2,), padding=((2, 2),), dilation=(1,), **given),
            net.quantized())  # fmt: skip
    net.check()


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed):
    draw = random.Random(seed)
    net = Network((draw.choice([1, 3, 4]), draw.randint(5, 40), draw.randint(5, 40)), Quantized(0.03125, 117),
                  draw.choice([1, 2, 6, 9]), seed=seed)  # fmt: skip
    x, all_values = "q", []
    for _ in range(8):
        *_, height, width = net.found[x].shape
        fitting = [g for g in GEOMETRIES.values() if all(
            (k - 1) * d + 1 <= size + sum(pad)
            for k, d, size, pad in zip(g["kernel"], g.get("dilation", (1, 1)), (height, width),
                                       g.get("padding", ((0, 0), (0, 0))), strict=True)
        )]  # fmt: skip
        geometry = draw.choice(fitting)
        y = net.conv(x, draw.choice([4, 8, 17, 33]), **geometry, density=draw.choice([0.05, 0.3, 1.0]),
                     activation=draw.choice(["none", "relu", "relu6"]))  # fmt: skip
        if draw.random() < 0.5:
            same = {"kernel": (1, 1)} if draw.random() < 0.5 else {"kernel": (3, 3), "padding": ((1, 1), (1, 1))}
            y = net.conv(y, net.found[y].shape[1], **same, residual=y, activation="relu")
        all_values.append(y)
        x = y
    net.check(*all_values)
