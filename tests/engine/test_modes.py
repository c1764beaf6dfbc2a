"""The modes of rarefy.act on the engine: its bits, in layers and gates, in files and in int8."""

import functools

import pytest
import torch
from torch import Tensor, nn

from rarefy import act, engine
from rarefy.act.spec.table import Table, load
from rarefy.engine import int8
from rarefy.engine.attention import additive_scores
from rarefy.engine.binding import available
from rarefy.engine.building import NativeSegment
from rarefy.engine.onnx_int8 import save_int8_onnx
from rarefy.engine.plan import MODED, Affine, GRUGates, LSTMCell, LSTMHidden, Quantized
from rarefy.kernels import forced
from tests.engine.layers import paths, run
from tests.engine.test_file import forged, refused

native = pytest.mark.skipif(not available(), reason="there is no native engine")
#: Of K-TanH: the paper's table, and other ones of shifts that kernels take.
TABLES = ("tanh_bf16_ktanh", "tanh_bf16_monotone", "tanh_bf16_few_shifts")


def table(name: str) -> Table:
    return load(name).to_format("fp32")


def function(name: str, mode: str, given: Table | None = None):
    """A function of rarefy.act by the name that the engine has for it."""
    options = {} if given is None else {"table": given}
    if name == "gelu_tanh":
        return functools.partial(act.gelu, mode=mode, approximate="tanh", **options)
    return functools.partial(getattr(act, name), mode=mode, **options)


def numbers() -> Tensor:
    """Every 60013th float32; those around which rows of tables and lines begin; and what is special."""
    spread = torch.arange(-(2**31), 2**31, 60013).to(torch.int32).view(torch.float32)
    tiny = torch.tensor([1, 2, 0x7FFFFF, 0x800000], dtype=torch.int32).view(torch.float32)
    near = torch.linspace(-9, 9, 5000)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1.0, 3.0, 0.25, 3.75])
    return torch.cat([spread, tiny, -tiny, near, special, -special])


def same(got: Tensor, expected: Tensor) -> None:
    there = ~expected.isnan()
    assert torch.equal(got.isnan(), ~there)
    assert torch.equal(got[there].view(torch.int32), expected[there].view(torch.int32))


@pytest.mark.parametrize("isa", paths())
@pytest.mark.parametrize("name", MODED)
def test_the_bits_of_rarefy_act(name, isa):
    x = numbers()
    cases = [("hard", None), ("ktanh", None), *(("ktanh", table(each)) for each in TABLES)]
    for mode, given in cases:
        text = "" if given is None else f" {given.text}"
        step = Affine(name="act", output="y", input="x", activation=f"{name} {mode}{text}")
        made = run(step, {"x": x.reshape(1, 1, 1, -1)}, isa).flatten()
        same(made, function(name, mode, given)(x))


@pytest.mark.parametrize("isa", paths())
@pytest.mark.parametrize("name", MODED)
def test_exact_of_rarefy_act_has_its_limits(name, isa):
    x = torch.tensor([-torch.inf, torch.inf, torch.nan, -0.0, 0.0])
    for mode in ("exact", "fast"):
        step = Affine(name="act", output="y", input="x", activation=f"{name} {mode}")
        same(run(step, {"x": x.reshape(1, 1, 1, -1)}, isa).flatten(), function(name, mode)(x))


@pytest.mark.parametrize("isa", paths())
@pytest.mark.parametrize("mode", ["ktanh", "hard"])
def test_gates(mode, isa):
    torch.manual_seed(0)
    for given in ("", table("tanh_bf16_monotone").text) if mode == "ktanh" else ("",):
        tanh, sigmoid = (functools.partial(f, mode=mode, table=given or None) for f in (act.tanh, act.sigmoid))
        how = {"name": "gates", "output": "y", "mode": mode, "table": given}
        gates, state, x, h = (torch.randn(7, count * 37) * 3 for count in (4, 1, 3, 3))
        i, f, g, o = gates.chunk(4, 1)
        cell = LSTMCell(**how, gates="gates", state="state")
        values = {"gates": gates, "state": state}
        same(run(cell, values, isa), sigmoid(f) * state + sigmoid(i) * tanh(g))
        same(run(LSTMHidden(**how, gates="gates", state="state"), values, isa), sigmoid(o) * tanh(state))
        if isa == "pytorch":  # whose addcmul may round once
            continue
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), h.chunk(3, 1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        fresh = tanh(x_n + r * h_n)
        step = GRUGates(**how, x="x", h="h", state="state")
        same(run(step, {"x": x, "h": h, "state": state}, isa), (state - fresh) * z + fresh)


@pytest.mark.parametrize("isa", paths())
def test_scores_of_attention(isa):
    torch.manual_seed(0)
    keys, queries, vector = torch.randn(3, 6, 21) * 3, torch.randn(3, 21), torch.randn(21)
    given = table("tanh_bf16_monotone")
    for mode, text in (("hard", ""), ("ktanh", ""), ("ktanh", given.text)):
        with forced(isa):
            scores = additive_scores(keys, queries, vector, mode, text)
        mixed = act.tanh(keys + queries.unsqueeze(1), mode, table=text or None)
        torch.testing.assert_close(scores, mixed @ vector, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="mode must be one of"):
        additive_scores(keys, queries, vector, "soft")
    with pytest.raises(ValueError, match="given by its JSON"):
        additive_scores(keys, queries, vector, "ktanh", "/tmp/some.json")


class Net(nn.Module):
    """A convolution and a linear layer with a function behind each."""

    def __init__(self, call) -> None:
        super().__init__()
        self.conv, self.last, self.call = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.last(self.call(self.conv(x)).mean((2, 3))))


def whole(model: nn.Module) -> nn.Module:
    """The model with weights of few bits: sums of inputs of few bits then do not round."""
    for weight in model.parameters():
        weight.data = (weight.data * 16).round() / 16
    return model.eval().requires_grad_(False)


@native
@pytest.mark.parametrize("mode", ["exact", "ktanh", "hard"])
@pytest.mark.parametrize("name", MODED)
def test_layers_take_the_function_along(name, mode):
    torch.manual_seed(0)
    model, x = whole(Net(function(name, mode))), (torch.randn(2, 3, 8, 8) * 8).round() / 8
    compiled = engine.compile(model, x, 1, choose="native")
    assert all(isinstance(each, NativeSegment) for each in compiled._items)
    assert "activation" not in [step.kind for step in compiled.steps()]
    torch.testing.assert_close(compiled(x), model(x), atol=0.02 if mode == "ktanh" else 1e-6, rtol=1e-5)


@pytest.mark.parametrize("choose", ["native", "torch"])
def test_files_carry_mode_and_table(choose, tmp_path):
    torch.manual_seed(0)
    given = table("tanh_bf16_monotone")
    given.save(tmp_path / "own.json")
    model = whole(Net(functools.partial(act.silu, mode="ktanh", table=str(tmp_path / "own.json"))))
    x = (torch.randn(2, 3, 8, 8) * 8).round() / 8
    compiled = engine.compile(model, x, 1, choose=choose)
    (tmp_path / "own.json").unlink()  # the engine has it
    engine.save(compiled, tmp_path / "a.engine")
    again = engine.load(tmp_path / "a.engine")
    assert torch.equal(again(x), compiled(x))
    plain = whole(Net(functools.partial(act.silu, mode="ktanh")))
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(plain(x), compiled(x))
    torch.testing.assert_close(compiled(x), Net.forward(_with(model, given), x), atol=0.02, rtol=0)


def _with(model: Net, given: Table) -> Net:
    model.call = functools.partial(act.silu, mode="ktanh", table=given)
    return model


def test_forged_modes_are_refused(tmp_path):
    model, x = whole(Net(functools.partial(act.silu, mode="ktanh"))), torch.randn(2, 3, 8, 8)
    engine.save(engine.compile(model, x, 1, choose="torch"), tmp_path / "a.engine")
    data = (tmp_path / "a.engine").read_bytes()
    wrong = load("gelu_bf16").text
    for activation in ("silu soft", "silu ktanh /etc/passwd", f"silu ktanh {wrong}", "relu hard", "silu ", 3):

        def change(header, activation=activation):
            fields = [each["fields"] for each in header["items"] if "activation" in each.get("fields", {})]
            assert fields[0]["activation"] == "silu ktanh"
            fields[0]["activation"] = activation

        refused(tmp_path / "b.engine", forged(data, change))


@pytest.mark.parametrize("mode", ["exact", "ktanh", "hard"])
@pytest.mark.parametrize("name", MODED)
def test_tables_of_bytes(name, mode):
    of, to = Quantized(0.0625, 130), Quantized(0.03125, 120)
    x = of.scale * (torch.arange(256.0) - of.zero_point)
    expected = (function(name, mode)(x).double() / to.scale + to.zero_point).round().clamp(0, 255)
    assert torch.equal(int8.table(f"{name} {mode}", of, to).double(), expected)


@native
@pytest.mark.parametrize("mode", ["ktanh", "hard"])
def test_int8(mode, tmp_path):
    torch.manual_seed(0)
    model, x = Net(functools.partial(act.silu, mode=mode)).eval().requires_grad_(False), torch.randn(8, 3, 8, 8)
    compiled = engine.compile(model, x, 1, precision="int8", calibration=[x], error_budget=10.0, choose="native")
    assert all(step.kind != "activation" or step.note is None for step in compiled.steps())
    assert (compiled(x) - model(x)).abs().max() < 0.05
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match=f'ONNX has no silu of mode "{mode}"'):
        save_int8_onnx(model, x, [x], tmp_path / "a.onnx", error_budget=10.0)


@native
def test_a_table_that_kernels_do_not_have_runs_in_torch():
    torch.manual_seed(0)
    given = load("tanh_bf16_carry64").to_format("fp32")
    model, x = whole(Net(functools.partial(act.tanh, mode="ktanh", table=given))), torch.randn(2, 3, 8, 8)
    compiled = engine.compile(model, x, 1, choose="native")
    assert any("its table is none of tanh" in (step.note or "") for step in compiled.steps())
    torch.testing.assert_close(compiled(x), model(x), atol=0.02, rtol=0)
