import copy

import pytest
import torch
from torch import nn

from rarefy import act
from tests.act.test_functional import same


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (act.Tanh("ktanh", table="tanh_bf16_monotone"), lambda x: act.tanh(x, "ktanh", table="tanh_bf16_monotone")),
        (act.Sigmoid(grad="x"), act.sigmoid),
        (act.SiLU("hard"), lambda x: act.silu(x, "hard")),
        (act.GELU(approximate="tanh"), lambda x: act.gelu(x, approximate="tanh")),
    ],
)
def test_modules_are_their_functions(module, function):
    x = torch.randn(50).bfloat16()
    assert same(module(x), function(x))
    assert same(copy.deepcopy(module)(x), function(x))
    assert not module.state_dict()


def test_module_options():
    assert repr(act.Tanh("ktanh", table="tanh_bf16_monotone")) == "Tanh(mode='ktanh', table='tanh_bf16_monotone')"
    assert repr(act.Sigmoid(grad="x")) == "Sigmoid(mode='exact', grad='x')"
    with pytest.raises(ValueError, match="mode must be"):
        act.Tanh("swift")
    with pytest.raises(ValueError, match="a table goes with"):
        act.Tanh(table="tanh_bf16")
    with pytest.raises(ValueError, match="grad must be"):
        act.SiLU(grad="y")
    with pytest.raises(ValueError, match="approximate"):
        act.GELU(approximate="erf")


def test_lstm_cell():
    theirs = nn.LSTMCell(5, 7)
    ours = act.LSTMCell(5, 7)
    ours.load_state_dict(theirs.state_dict())
    x, h, c = torch.randn(3, 5), torch.randn(3, 7), torch.randn(3, 7)
    for state in ((h, c), None):
        for a, b in zip(ours(x, state), theirs(x, state), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_silu_in_place_is_pytorchs():
    ours = act.SiLU(inplace=True)
    x = torch.randn(6)
    y = x.clone()
    ours(y)
    assert torch.equal(y, act.silu(x))
    leaf, other = (torch.randn(6, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    ours(leaf * 1).sum().backward()
    nn.functional.silu(other * 1, inplace=True).sum().backward()
    assert torch.allclose(leaf.grad, other.grad)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        ours(leaf)
    with pytest.raises(RuntimeError, match="more than one element"):
        ours(torch.zeros(1).expand(4))
    assert repr(ours) == "SiLU(mode='exact', inplace=True)"
