"""Every kind of layer against PyTorch in float64: shapes, patterns of zeros, batch sizes, instruction sets."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy import engine, kernels
from rarefy.engine.onednn import PackedConv
from rarefy.engine.plan import (
    ACTIVATIONS,
    Affine,
    Binary,
    Concat,
    Conv,
    Flatten,
    GlobalAverage,
    Linear,
    Pool,
    Upsample,
)
from tests.engine.layers import PATTERNS, check, compare, paths, run, sparse, wide

CHOICES = ("sparse", "dense", "native")
EXAMPLES = settings(derandomize=True, deadline=None, max_examples=25, database=None)


def conv(weight, *, stride=1, padding=0, dilation=1, **more):
    axes = weight.dim() - 2
    return Conv(
        name="conv",
        output="y",
        input="x",
        weight=weight,
        stride=(stride,) * axes,
        padding=((padding, padding),) * axes,
        dilation=(dilation,) * axes,
        **more,
    )


#: (in, out, kernel), (height, width), options: what networks are made of.
LAYERS = [
    ((16, 24, 1), (7, 7), {}),
    ((64, 40, 1), (14, 14), {}),
    ((20, 16, 1), (9, 13), {"stride": 2}),
    ((16, 16, 3), (7, 7), {"padding": 1}),
    ((12, 20, 3), (16, 16), {"padding": 1}),
    ((8, 8, 3), (13, 11), {"padding": 1, "stride": 2}),
    ((8, 8, 3), (12, 12), {"padding": 2, "dilation": 2}),
    ((6, 10, 5), (11, 9), {"padding": 2}),
    ((3, 16, 7), (32, 32), {"padding": 3, "stride": 2}),
    ((8, 12, 3), (10, 10), {"padding": 1, "groups": 4}),
    ((24, 24, 3), (15, 15), {"padding": 1, "groups": 24}),
    ((24, 48, 3), (8, 8), {"padding": 1, "stride": 2, "groups": 24}),
    ((5, 7, 2), (6, 6), {}),
    ((33, 17, 1), (1, 1), {}),
    ((1, 1, 1), (1, 1), {}),
]


@pytest.mark.parametrize("isa", paths())
@pytest.mark.parametrize("pattern", PATTERNS)
def test_convolutions_with_every_pattern_of_zeros(isa, pattern):
    for (channels, out, kernel), size, options in LAYERS:
        groups = options.get("groups", 1)
        weight = PATTERNS[pattern](torch.randn(out, channels // groups, kernel, kernel))
        step = conv(weight, bias=torch.randn(out), activation="relu", **options)
        for choose in CHOICES[: 1 if isa == "pytorch" else 2]:
            check(step, {"x": torch.randn(2, channels, *size)}, isa, choose)


@pytest.mark.parametrize("isa", paths())
@pytest.mark.parametrize("batch", [1, 2, 7, 16])
def test_batch_sizes(isa, batch):
    step = conv(sparse(torch.randn(20, 12, 3, 3), 0.2), padding=1, residual="r", activation="relu")
    x = {"x": torch.randn(batch, 12, 9, 9), "r": torch.randn(batch, 20, 9, 9)}
    check(step, x, isa)
    linear = Linear(name="fc", output="y", input="x", weight=sparse(torch.randn(30, 50), 0.2), bias=torch.randn(30))
    check(linear, {"x": torch.randn(batch, 50)}, isa)


@st.composite
def convolutions(draw):
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 1, 2, 5]))
    depthwise = draw(st.booleans()) and groups > 1
    per_group = 1 if depthwise else draw(st.integers(1, 9))
    out = groups * (draw(st.integers(1, 2)) if depthwise else draw(st.integers(1, 9)))
    kernel = [draw(st.integers(1, 4)) for _ in range(axes)]
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    padding = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(axes))
    least = [max(1, d * (k - 1) + 1 - sum(p)) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [low + draw(st.integers(0, 18 if axes < 3 else 7)) for low in least]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 1.0]))
    weight = torch.randn(out, per_group, *kernel, generator=generator)
    weight = torch.where(torch.rand(weight.shape, generator=generator) < density, weight, 0.0)
    step = Conv(
        name="conv",
        output="y",
        input="x",
        weight=weight,
        bias=torch.randn(out, generator=generator) if draw(st.booleans()) else None,
        stride=tuple(draw(st.integers(1, 3)) for _ in range(axes)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        residual="r" if draw(st.booleans()) else None,
        activation=draw(st.sampled_from(ACTIVATIONS)),
    )
    batch = draw(st.integers(1, 3))
    inputs = {"x": torch.randn(batch, groups * per_group, *size, generator=generator)}
    if step.residual is not None:
        plain = Conv(**{**vars(step), "residual": None})
        inputs["r"] = torch.randn(wide(plain, inputs).shape, generator=generator)
    return step, inputs


@pytest.mark.parametrize("isa", paths())
@EXAMPLES
@given(case=convolutions(), choose=st.sampled_from(CHOICES))
def test_convolutions_of_any_shape(isa, case, choose):
    check(*case, isa, choose)


@pytest.mark.parametrize("isa", paths())
@EXAMPLES
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    features=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    activation=st.sampled_from(ACTIVATIONS),
    residual=st.booleans(),
)
def test_linear_layers_of_any_shape(isa, shape, features, density, activation, residual):
    step = Linear(
        name="fc",
        output="y",
        input="x",
        weight=sparse(torch.randn(features[1], features[0]), density),
        bias=torch.randn(features[1]),
        residual="r" if residual else None,
        activation=activation,
    )
    inputs = {"x": torch.randn(*shape, features[0])}
    if residual:
        inputs["r"] = torch.randn(*shape, features[1])
    check(step, inputs, isa)


@pytest.mark.parametrize("isa", paths())
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero_and_near(isa, activation):
    near = torch.linspace(-8, 8, 1001)
    far = torch.tensor([-1e30, -90.0, -20.0, -1e-30, -0.0, 0.0, 1e-40, 20.0, 90.0, 1e30])
    x = torch.cat([near, far]).reshape(1, 1, 1, -1)
    step = Affine(name="act", output="y", input="x", activation=activation)
    if activation != "none":
        check(step, {"x": x}, isa)
        special = {"x": torch.tensor([[[[float("nan"), float("inf"), -float("inf")]]]])}
        result, limit = run(step, special, isa).flatten().double(), wide(step, special).flatten()
        assert result[0].isnan()
        # x * phi(x) comes to infinity and 0; where it is computed as a product, of 0 and infinity, to NaN.
        gated = activation in ("silu", "gelu", "gelu_tanh", "hardswish")
        for value, right in zip(result[1:], (torch.inf, 0.0) if gated else limit[1:].tolist(), strict=True):
            assert value == pytest.approx(right, abs=1e-6) or (gated and value.isnan())
    weight = torch.ones(1, 1, 1, 1)
    check(conv(weight, activation=activation), {"x": x.clamp(-1e4, 1e4)}, isa)


@pytest.mark.parametrize("isa", paths())
@EXAMPLES
@given(
    axes=st.integers(1, 3),
    average=st.booleans(),
    kernel=st.tuples(*[st.integers(1, 4)] * 3),
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    padded=st.booleans(),
    dilation=st.integers(1, 2),
    size=st.tuples(*[st.integers(7, 20)] * 2, st.integers(7, 10)),
    count=st.booleans(),
    ceil_mode=st.booleans(),
)
def test_pools_of_any_shape(isa, axes, average, kernel, stride, padded, dilation, size, count, ceil_mode):
    step = Pool(
        name="pool",
        output="y",
        input="x",
        op="average" if average else "max",
        kernel=kernel[:axes],
        stride=stride[:axes],
        padding=tuple(k // 2 if padded else 0 for k in kernel[:axes]),
        dilation=(1 if average else dilation,) * axes,
        ceil_mode=ceil_mode and not (average and count),
        count_include_pad=average and count,
    )
    check(step, {"x": torch.randn(2, 5, *size[:axes])}, isa)


@pytest.mark.parametrize("isa", paths())
@pytest.mark.parametrize("shape", [(3, 17, 5, 7), (2, 33, 1, 1), (1, 4, 16, 16), (2, 6, 9)])
def test_steps_without_weights(isa, shape):
    x, y = torch.randn(shape), torch.randn(shape)
    channels = shape[1]
    ends = {"name": "step", "output": "y"}
    scale, shift = torch.randn(channels), torch.randn(channels)
    check(Affine(**ends, input="x", scale=scale, shift=shift, activation="relu6"), {"x": x}, isa)
    check(Affine(**ends, input="x", shift=shift), {"x": x}, isa)
    check(Affine(**ends, input="x", scale=scale, activation="hardswish"), {"x": x}, isa)
    check(Binary(**ends, op="add", x="x", y="z", activation="relu"), {"x": x, "z": y}, isa)
    check(Binary(**ends, op="mul", x="x", y="z"), {"x": x, "z": y}, isa)
    check(Binary(**ends, op="mul", x="x", y="x"), {"x": x}, isa)
    vector = torch.randn(*shape[:2], *(1,) * (len(shape) - 2))
    check(Binary(**ends, op="mul", x="x", y="z", activation="silu"), {"x": x, "z": vector}, isa)
    check(GlobalAverage(**ends, input="x", keepdim=False), {"x": x}, isa)
    check(GlobalAverage(**ends, input="x", keepdim=True), {"x": x}, isa)
    check(Concat(**ends, operands=("x", "z", "x")), {"x": x, "z": torch.randn(shape[0], 3, *shape[2:])}, isa)
    check(Upsample(**ends, input="x", factor=(2, 3)[: len(shape) - 2]), {"x": x}, isa)
    check(Flatten(**ends, input="x"), {"x": x}, isa)


@pytest.mark.parametrize("isa", paths())
@pytest.mark.parametrize("choose", CHOICES[:2])
def test_nan_and_infinity_reach_what_they_touch_and_nothing_else(isa, choose):
    """An output is NaN or infinite if a nonzero weight reaches such an input; right if no weight at all does."""
    for (channels, out, kernel), size, options in LAYERS:
        groups = options.get("groups", 1)
        weight = sparse(torch.randn(out, channels // groups, kernel, kernel), 0.15)
        x = torch.randn(2, channels, *size)
        for bad in (float("nan"), float("inf"), -float("inf")):
            where = torch.rand(x.shape) < 0.01
            where.view(-1)[0] = True
            result = run(conv(weight, **options), {"x": torch.where(where, bad, x)}, isa, choose)
            marks = {"x": where.float()}
            must = wide(conv((weight != 0).float(), **options), marks) > 0
            may = wide(conv(torch.ones_like(weight), **options), marks) > 0
            expected = wide(conv(weight, **options), {"x": torch.where(where, 0.0, x)})
            assert not result[must].isfinite().any()
            torch.testing.assert_close(result[~may].double(), expected[~may], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", paths())
def test_maximum_over_nan_is_nan(isa):
    x = torch.randn(1, 3, 9, 9)
    x[0, 1, 4, 4] = float("nan")
    sizes = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    step = Pool(name="pool", output="y", input="x", op="max", **sizes)
    assert torch.equal(run(step, {"x": x}, isa).isnan(), wide(step, {"x": x}).isnan())


@pytest.mark.parametrize("isa", paths())
def test_bfloat16_weights_are_rounded_and_sums_are_not(isa):
    weight = sparse(torch.randn(24, 30, 3, 3), 0.2)
    x = {"x": torch.randn(2, 30, 8, 8)}
    result = run(conv(weight, padding=1), x, isa, precision="bfloat16")
    rounded = wide(conv(weight.bfloat16().float(), padding=1), x)
    assert (result - wide(conv(weight, padding=1), x)).abs().max() > 1e-3  # it did round
    torch.testing.assert_close(result.double(), rounded, rtol=1e-5, atol=1e-5)


def test_a_wrong_result_is_seen(monkeypatch):
    step = conv(torch.randn(8, 8, 3, 3), padding=1)
    x = {"x": torch.randn(1, 8, 6, 6)}
    right = run(step, x, "pytorch")
    for wrong in (right + 1e-3, right.roll(1, 1), right.nan_to_num() * torch.nan):
        monkeypatch.setattr("tests.engine.layers.run", lambda *a, wrong=wrong, **k: wrong)
        with pytest.raises(AssertionError):
            check(step, x, "pytorch")


def test_onednn_with_packed_weights():
    for (channels, out, kernel), size, options in LAYERS:
        groups = options.get("groups", 1)
        weight = torch.randn(out, channels // groups, kernel, kernel)
        for more in ({"bias": torch.randn(out), "activation": "relu"}, {"residual": "r", "activation": "silu"}, {}):
            inputs = {"x": torch.randn(3, channels, *size)}
            step = conv(weight, **options, **more)
            if "residual" in more:
                inputs["r"] = torch.randn(wide(conv(weight, **options), inputs).shape)
            compare(step, inputs, PackedConv(step, (1, channels, *size)).run(*inputs.values()))
    step = Conv(
        **{**vars(conv(torch.randn(4, 3, 3, 2))), "padding": ((2, 0), (0, 1)), "stride": (2, 1), "dilation": (1, 2)}
    )
    inputs = {"x": torch.randn(2, 3, 9, 8)}
    compare(step, inputs, PackedConv(step, (2, 3, 9, 8)).run(*inputs.values()))


#: Layers with long sums, and the shapes of their inputs.
LONG = {
    "tiled": (lambda: conv(torch.rand(6, 900, 3, 3), padding=1), (1, 900, 5, 5)),
    "pointwise": (lambda: conv(torch.rand(6, 1500, 1, 1)), (1, 1500, 7, 7)),
    "groups": (lambda: conv(torch.rand(6, 120, 5, 5), padding=2, groups=2), (1, 240, 9, 9)),
    "depthwise": (lambda: conv(torch.rand(3, 1, 35, 35), padding=17, groups=3), (1, 3, 40, 40)),
    "tokens": (lambda: Linear(name="l", output="y", input="x", weight=torch.rand(5, 3000)), (1, 9, 3000)),
    "vector": (lambda: Linear(name="l", output="y", input="x", weight=torch.rand(5, 50000)), (1, 50000)),
    "long vector": (
        lambda: Linear(name="l", output="y", input="x", weight=torch.rand(2, 10**6), bias=None),
        (1, 10**6),
    ),
    "average": (lambda: GlobalAverage(name="m", output="y", input="x", keepdim=True), (1, 2, 900, 1000)),
}


@pytest.mark.parametrize("isa", [isa for isa in paths() if isa != "pytorch"])
@pytest.mark.parametrize("name", LONG)
def test_long_sums_of_positive_terms(isa, name):
    make, shape = LONG[name]
    step, x = make(), {"x": torch.rand(shape)}
    for density in (1.0, 0.4) if name != "average" else (1.0,):
        if density < 1:
            step = replace(step, weight=sparse(step.weight, density))
        expected = wide(step, x)
        error = {
            choose: ((run(step, x, path, choose) - expected) / expected).abs().max()
            for path, choose in [("pytorch", "native"), (isa, "sparse"), (isa, "dense")]
        }
        limit = max(1.2e-6, 2 * error.pop("native"))
        assert max(error.values()) < limit, error


@pytest.mark.parametrize("isa", [isa for isa in paths() if isa != "pytorch"])
def test_long_sums_are_the_same_bits_in_sparse_and_dense_tiles(isa):
    for channels, kernel, groups in ((700, 3, 1), (90, 5, 2), (2, 27, 1), (3000, 1, 1)):
        weight = sparse(torch.randn(10, channels // groups, kernel, kernel), 0.5)
        weight[1] = 0  # rows without weights and with weights at the end alone
        weight[2, : channels // groups - 1] = 0
        step = conv(weight, bias=torch.randn(10), padding=kernel // 2, groups=groups)
        x = {"x": torch.randn(1, channels, 9, 10)}
        assert torch.equal(run(step, x, isa, "sparse"), run(step, x, isa, "dense"))


class _Odd(nn.Module):
    """Residuals, a concatenation and a depthwise layer, on planes of any size."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, 2, 1)
        self.a, self.b = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 3, padding=1)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.wide = nn.Conv2d(24, 24, 5, padding=2, groups=24)
        self.last = nn.Conv2d(24, 12, 1)

    def forward(self, x):
        x = self.first(x).relu()
        y = x + self.a(x)
        both = torch.cat([y, self.b(y)], 1)
        both = both + self.deep(both).relu()
        return self.last(self.wide(both)) + y


@pytest.mark.parametrize("isa", [isa for isa in paths() if isa != "pytorch"])
def test_planes_that_are_no_whole_vectors(isa):
    model = _Odd().eval()
    for side in ((2, 3), (13, 27), (37, 34)):
        x = torch.randn(3, 3, *side)
        with torch.no_grad():
            expected = model.double()(x.double())
        with kernels.forced(isa):
            for choose in ("sparse", "dense"):
                compiled = engine.compile(model.float(), x, 1, choose=choose)
                for batch in (1, 3):
                    torch.testing.assert_close(compiled(x[:batch]).double(), expected[:batch], rtol=1e-4, atol=1e-5)
