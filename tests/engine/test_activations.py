"""The engine's curved activation functions against float64, over all of float32, under every instruction set."""

import math

import pytest
import torch
from torch import Tensor

from rarefy.engine.plan import Affine, Linear
from tests.engine.layers import check, paths, run

REFERENCES = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    # by erfc: 1 + erf would cancel
    "gelu": lambda x: x / 2 * torch.erfc(-x * math.sqrt(0.5)),
    "gelu_tanh": lambda x: x / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "tanh": torch.tanh,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}
#: The largest error, in units of the last place, from each number on: what native/src/engine/activations-inl.h states.
LIMITS = {
    "sigmoid": {-math.inf: 2.6},
    "tanh": {-math.inf: 2.6},
    "silu": {-math.inf: 53, -88: 3.2},
    "gelu": {-math.inf: 10.2, -8: 6, -3: 5.5},
    "gelu_tanh": {-math.inf: 153, -8: 64, -5: 18, -3: 11, -1: 2.8},
}
#: Without fused multiply-adds.
PORTABLE = {
    **LIMITS,
    "gelu": {-math.inf: 72, -8: 21, -3: 7.2},
    "gelu_tanh": {-math.inf: 210, -8: 122, -5: 36, -3: 16, -1: 3},
}
NATIVE = paths()[1:]


def activated(name: str, x: Tensor, isa: str) -> Tensor:
    step = Affine(name="act", output="y", input="x", activation=name)
    return run(step, {"x": x.reshape(1, 1, 1, -1)}, isa).flatten()


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


@pytest.mark.slow
@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("name", REFERENCES)
def test_errors_over_all_of_float32(isa, name):
    x = torch.arange(-(2**31), 2**31, 3989).int().view(torch.float32)
    x = x[x.isfinite()]
    result, expected = activated(name, x, isa).double(), REFERENCES[name](x.double())
    expected = torch.where(expected.isfinite(), expected, -0.0)  # the limit, where the formula multiplies infinity by 0
    unit = torch.exp2(expected.abs().clamp_min(2.0**-126).log2().floor() - 23)
    errors = (result - expected).abs() / unit
    limits = PORTABLE if isa in ("portable", "neon") else LIMITS
    for start, limit in limits[name].items():
        worst = errors[x >= start].max().item()
        assert worst <= limit, f"{worst} from {start} on"
    assert torch.equal(result.signbit(), expected.signbit())


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("name", REFERENCES)
def test_special_values(isa, name):
    nans = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x7F800101, -1, -(2**22)]).int().view(torch.float32)
    assert activated(name, nans, isa).isnan().all()
    gated = name in ("silu", "gelu", "gelu_tanh")
    top, least = torch.finfo(torch.float32).max, 2.0**-149
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, top, -top, least, -least])
    if gated:
        # x times a gate that is 0 at minus infinity: NaN, as in PyTorch; half of the least number is a tie, to 0, and
        # where nothing is fused what x loses is one
        limit = -0.0 if name == "gelu" else torch.nan
        tie = least if name == "gelu" and isa in ("portable", "neon") else 0.0
        expected = [0.0, -0.0, torch.inf, limit, top, -0.0, tie, -0.0]
    elif name == "tanh":
        expected = [0.0, -0.0, 1.0, -1.0, 1.0, -1.0, least, -least]
    else:
        expected = [0.5, 0.5, 1.0, 0.0, 1.0, 0.0, 0.5, 0.5]
    result, wanted = activated(name, x, isa), torch.tensor(expected)
    number = ~wanted.isnan()
    assert torch.equal(bits(result[number]), bits(wanted[number]))
    assert torch.equal(result.isnan(), wanted.isnan())


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("name", REFERENCES)
def test_results_do_not_depend_on_the_place_in_a_vector(isa, name):
    x = torch.randn(67, generator=torch.Generator().manual_seed(0)) * 3
    whole = activated(name, x, isa)
    for start, stop in [(0, n) for n in range(1, 36)] + [(k, 67) for k in range(1, 17)]:
        assert torch.equal(bits(activated(name, x[start:stop], isa)), bits(whole[start:stop]))


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("name", REFERENCES)
def test_one_row_of_a_linear_layer(isa, name):
    step = Linear(name="fc", output="y", input="x", weight=torch.randn(203, 30), bias=None, activation=name)
    check(step, {"x": torch.randn(1, 30)}, isa)
