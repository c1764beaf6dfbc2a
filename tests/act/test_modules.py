import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) + F.silu(x + self.bias, inplace=False) * x.sigmoid()


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(x), 0.5, self.training)


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = torch.sigmoid(x)
        return y if mask is None else y * mask


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if x.sum() > 0 else x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Tanh()
        self.body = nn.Sequential(nn.Linear(8, 8), shared, nn.GELU(approximate="tanh"), nn.SiLU(inplace=True), shared)
        self.gate = nn.Sigmoid()
        self.block = Block()
        self.act = F.gelu
        self.dropping, self.masked, self.branching = Dropping(), Masked(), Branching()
        self.cell = nn.LSTMCell(8, 8)
        self.lstm = nn.LSTM(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.block(self.gate(self.body(x))))
        y = self.masked(self.dropping(y))
        h: Tensor = self.cell(self.lstm(y)[0])[0]
        return h


def test_swap_and_restore():
    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(4, 8)
    before, keys = net(x), list(net.state_dict())
    seen = []
    net.gate.register_forward_hook(lambda *_: seen.append(1))
    report = act.swap(net, "ktanh", grad="x")
    replaced, kept = dict(report.replaced), dict(report.kept)
    assert {"body.1", "body.2", "body.3", "gate", "act", "cell", "block"} == set(replaced)
    assert sum(name == "block" for name, _ in report.replaced) == 3
    assert set(kept) == {"dropping", "masked", "branching", "lstm"}
    assert "training" in kept["dropping"]
    assert "default" in kept["masked"]
    assert "cannot trace" in kept["branching"]
    assert "inside PyTorch" in kept["lstm"]
    assert "replaced 9, kept 4" in str(report)
    assert list(net.state_dict()) == keys
    after = net(x)
    assert seen
    assert not torch.equal(after, before)
    assert torch.allclose(after, before, atol=0.05)
    assert torch.equal(copy.deepcopy(net)(x), after)
    after.sum().backward()
    with torch.no_grad():  # the rewritten forward reads the module's own parameters
        net.block.layer = nn.Linear(8, 8)
        net.block.bias.add_(1)
    changed = net(x)
    assert not torch.equal(changed, after)
    report.restore()
    assert type(net.body[1]) is nn.Tanh
    assert type(net.cell) is nn.LSTMCell
    assert net.act is F.gelu
    assert "forward" not in net.block.__dict__
    assert not {"mode", "grad", "table"} & set(net.gate.__dict__)
    act.swap(net, "exact")
    assert torch.allclose(net(x), changed, atol=0.05)


def test_exact_swap_of_a_float_model_is_a_drop_in():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU())
    x = torch.randn(10, 8)
    before = net(x)
    act.swap(net)
    assert torch.allclose(net(x), before, atol=1e-6)


def test_swap_of_an_activation_and_of_a_transformer_layer():
    alone: nn.Module = nn.Tanh()
    report = act.swap(alone, "hard")
    assert isinstance(alone, act.Tanh)
    assert "(the model): Tanh" in str(report)
    assert alone(torch.tensor([7.0])) == 1
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    before = layer(x)
    report = act.swap(layer, "ktanh")
    assert report.replaced == [("activation", "gelu")]
    after = layer(x)
    assert not torch.equal(after, before)
    assert torch.allclose(after, before, atol=0.05)
    report.restore()
    assert torch.allclose(layer(x), before, atol=1e-6)


def test_swap_twice_keeps_the_first():
    block = Block()
    act.swap(block)
    again = act.swap(block)
    assert again.kept == [("", "its forward was replaced before")]


def test_swap_checks_its_options_before_it_changes_anything():
    net = nn.Sequential(nn.Tanh())
    with pytest.raises(ValueError, match="mode must be"):
        act.swap(net, "swift")
    assert type(net[0]) is nn.Tanh


def test_silu_in_place_is_pytorchs():
    class Call(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nn.functional.silu(x, inplace=True)
            return x

    for ours in (act.SiLU(inplace=True), nn.SiLU(inplace=True), Call()):
        act.swap(ours)
        x = torch.randn(6)
        y = x.clone()
        ours(y)
        assert torch.equal(y, act.silu(x))
        leaf, other = (torch.randn(6, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
        ours(leaf * 1).sum().backward()
        nn.functional.silu(other * 1, inplace=True).sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        assert other.grad is not None
        assert torch.allclose(leaf.grad, other.grad)
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            ours(leaf)
        with pytest.raises(RuntimeError, match="more than one element"):
            ours(torch.zeros(1).expand(4))
    assert repr(act.SiLU(inplace=True)) == "SiLU(mode='exact', inplace=True)"


def test_swap_passes_over_torchscript_and_stops_fused_encoders():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Linear(3, 3))
    model = nn.Sequential(nn.Tanh(), scripted, nn.SiLU())
    report = act.swap(model)
    assert [name for name, _ in report.replaced] == ["0", "2"]
    assert report.kept == [("1", "compiled by TorchScript, which cannot be looked into")]
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=nn.GELU(), batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = layer(x)
        report = act.swap(layer, "hard")
        assert not torch.allclose(layer(x), before, atol=1e-4)
        report.restore()
        assert torch.equal(layer(x), before)
