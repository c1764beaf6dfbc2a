"""What a stranger tried on act.swap: calls, hooks and classes as they are seldom written."""

import abc
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rarefy import act
from rarefy.act import gated, roles, swapping

ACTS = {"tanh": torch.tanh, "gelu": F.gelu}


@pytest.fixture(autouse=True)
def _every_size(monkeypatch):
    """Gated units whatever their size."""
    monkeypatch.setattr("rarefy.act.roles._MANY", 1)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.a, self.d = nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)
        self.u = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.d(self.u(hidden) * self.a(self.g(hidden)))


class Drawing(Gate):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))


class Unwatched(TorchDispatchMode):
    """Counts PyTorch's own activations of bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.tanh, torch.ops.aten.gelu, torch.ops.aten.sigmoid):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_gated_unit_is_called_as_it_was_written():
    torch.manual_seed(0)
    x = torch.randn(4, 8).bfloat16()
    model = Drawing().bfloat16()
    torch.manual_seed(1)
    before = model(hidden=x)
    report = act.swap(model)
    torch.manual_seed(1)
    after = model(hidden=x)
    assert ("", "gated unit") in report.replaced
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)
    with pytest.raises(TypeError, match="argument"):
        model()
    with pytest.raises(TypeError, match="argument"):
        model(x, x)


@pytest.mark.parametrize("way", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_its_activation_fire(way):
    model, seen = Gate().bfloat16(), []
    act.swap(model)
    getattr(model.a, way)(lambda *_: seen.append(1))
    model(torch.randn(4, 8).bfloat16().requires_grad_()).sum().backward()
    assert seen == [1]


class Method(nn.Module):
    forward = torch.tanh


class Partial(nn.Module):
    forward = functools.partial(F.gelu, approximate="tanh")


class OfTheClass(nn.Module):
    @classmethod
    def forward(cls, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


@pytest.mark.parametrize("kind", [Method, Partial, OfTheClass])
def test_a_forward_that_is_no_plain_function_runs_as_it_is(kind):
    x = torch.randn(4, 8).bfloat16()
    for model in (kind(), nn.Sequential(nn.Identity(), kind())):
        before = model(x)
        report = act.swap(model)
        for _ in range(2):
            torch.testing.assert_close(model(x), before, rtol=0.02, atol=0.02)
        report.restore()
        assert torch.equal(model(x), before)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @property
    def scale(self) -> Tensor:
        return self.fc.weight.sigmoid()


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.c.scale


def block(layer, f, x):
    return f(layer(x))


class Helped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.name = nn.Linear(8, 8), "tanh"

    def forward(self, x: Tensor) -> Tensor:
        return block(self.fc, ACTS.get(self.name), x)


@pytest.mark.parametrize("kind", [Parent, Helped])
def test_what_the_first_run_saw_is_replaced_ever_after(kind):
    model, x = kind().bfloat16(), torch.randn(4, 8).bfloat16()
    act.swap(model)
    for _ in range(3):
        with Unwatched() as counted:
            model(x)
        assert counted.seen == []


def test_a_first_run_that_fails_does_not_count():
    model, x = Helped().bfloat16(), torch.randn(4, 8).bfloat16()
    report = act.swap(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 9).bfloat16())
    with Unwatched() as counted:
        model(x)
    assert counted.seen == []
    assert len(report.replaced) == 1


class Registered(nn.Module):
    known: dict[str, type] = {}  # noqa: RUF012

    def __init_subclass__(cls, **_) -> None:
        if cls.__name__ in Registered.known:
            raise ValueError(f"duplicate {cls.__name__}")
        Registered.known[cls.__name__] = cls


class Late(Registered):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class Named(nn.Module):
    def __init_subclass__(cls, *, key: str) -> None:
        cls.key = key


class Keyed(Named, key="keyed"):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class Last(type):
    def __new__(cls, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> type:
        if any(isinstance(base, Last) for base in bases):
            raise TypeError("no class may derive from this one")
        return super().__new__(cls, name, bases, members)


class Final(nn.Module, metaclass=Last):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class Abstract(nn.Module, abc.ABC):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@pytest.mark.parametrize("kind", [Late, Keyed, Final, Abstract])
def test_classes_with_a_say_in_what_derives_from_them_are_swapped_with_the_rest(kind):
    model, x = nn.Sequential(nn.GELU(), kind()), torch.randn(3, 4).bfloat16()
    known = dict(Registered.known)
    report = act.swap(model, "hard")
    assert torch.equal(model(x), act.tanh(act.gelu(x, "hard"), "hard"))
    assert [name for name, _ in report.replaced] == ["0", "1"]
    assert isinstance(model[1], kind)
    assert not isinstance(kind(), type(model[1]))
    assert isinstance(kind(), kind)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    assert Registered.known == known
    report.restore()
    assert [type(module) for module in model] == [nn.GELU, kind]


def test_a_swap_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), Late())

    def interrupted(kind: type[nn.Module], role: roles.Role) -> type[nn.Module]:
        if kind is Late:
            raise KeyboardInterrupt
        return roles.class_of(kind, role)

    monkeypatch.setattr(swapping, "class_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        act.swap(model)
    assert [type(module) for module in model] == [nn.Linear, nn.GELU, Late]
    assert not any("_rarefy" in module.__dict__ for module in model.modules())


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.__dict__["frozen"] = True

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("frozen"):
            raise AttributeError("frozen")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def test_a_module_that_cannot_be_changed_is_swapped_nevertheless():
    model, x = Frozen(), torch.randn(3).bfloat16()
    report = act.swap(model)
    assert torch.equal(model(x), act.tanh(x))
    report.restore()
    assert type(model) is Frozen


def test_swapping_on_meta():
    class Mine(nn.GELU):
        pass

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), Mine(), nn.LSTM(3, 3))
        act.swap(model)
        assert model(torch.randn(2, 3))[0].shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quick_gelu_has_its_slope_far_out(dtype):
    x = torch.tensor([3e38, -3e38, 50.0, -50.0], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(act.quick_gelu(x).sum(), x)
    assert slope.tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0], abs=1e-6)


def test_operators_of_aten_are_caught():
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.mish(x) + torch.ops.aten.hardswish(x)

    model, x = Model(), torch.randn(50).bfloat16()
    act.swap(model)
    assert torch.equal(model(x), act.mish(x) + act.hardswish(x))


def test_the_units_are_those_of_the_module():
    assert set(gated.UNITS) == {"silu", "gelu", "gelu_tanh"}
