"""A model is swapped without being rewritten: every way to call an activation, and every way to handle a model."""

import copy
import functools
import io
import pickle
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode

from rarefy import act
from tests.act.test_functional import same
from tests.apart import apart

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*side effects:UserWarning",
    "ignore:The PyTorch API of nested tensors:UserWarning",
)


def helper(x):
    return torch.sigmoid(x) * 2


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.tanh(x)


class Plain:
    def __init__(self):
        self.inner = {"deep": [F.silu]}

    def __call__(self, x):
        return self.inner["deep"][0](x)

    def named(self, x):
        return x.sigmoid()


class Holding(nn.Module):
    """Keeps one thing as an attribute and calls it."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, x):
        return self.held(x)


class Method(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = self._tanh

    def _tanh(self, x):
        return torch.tanh(x)

    def forward(self, x):
        return self.act(x)


class Super(nn.GELU):
    def forward(self, x):
        return super().forward(x)


class Grandchild(Method):
    def forward(self, x):
        return super().forward(x)


class Default(nn.Module):
    def forward(self, x, function=torch.tanh, *, unused=None):
        return function(x)


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        for _ in range(2):
            y = torch.tanh(x)
        return y


class Named(nn.Module):
    def forward(self, x):
        return getattr(F, "silu")(x)  # noqa: B009


class Computed(nn.Module):
    name = "tanh"

    def forward(self, x):
        return getattr(x, self.name)()


TABLE = {"silu": [(F.silu,)]}


class Container(nn.Module):
    def forward(self, x):
        return TABLE["silu"][0][0](x)


class Made(nn.Module):
    def forward(self, x):
        return nn.Sigmoid()(x)


class Object(nn.Module):
    def __init__(self):
        super().__init__()
        self.helper = Plain()

    def forward(self, x):
        return self.helper.named(x)


def method(name):
    def forward(self, x):
        return getattr(x * 1, name)()

    return type("ByMethod", (nn.Module,), {"forward": forward})()


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    @decorated
    @torch.no_grad()
    def forward(self, x):
        return x.tanh()


class Local(nn.Module):
    def forward(self, x):
        from torch.nn.functional import gelu

        return gelu(x)


FORMS = {
    "module": (nn.GELU, "gelu"),
    "partial": (lambda: Holding(functools.partial(F.gelu, approximate="tanh")), "gelu_tanh"),
    "attribute": (lambda: Holding(F.silu), "silu"),
    "lambda": (lambda: Holding(lambda x: torch.tanh(x) * 1), "tanh"),
    "helper": (lambda: Holding(lambda x: helper(x) / 2), "sigmoid"),
    "object": (lambda: Holding(Plain()), "silu"),
    "method of an object": (Object, "sigmoid"),
    "module in a list": (lambda: Holding([nn.Tanh()][0].forward), "tanh"),
    "bound method": (Method, "tanh"),
    "super": (Super, "gelu"),
    "parent's forward": (Grandchild, "tanh"),
    "default argument": (Default, "tanh"),
    "control flow": (Branch, "tanh"),
    "getattr": (Named, "silu"),
    "computed name": (Computed, "tanh"),
    "container": (Container, "silu"),
    "made in forward": (Made, "sigmoid"),
    "autograd function": (lambda: Holding(Function.apply), "tanh"),
    "decorated": (Decorated, "tanh"),
    "imported in forward": (Local, "gelu"),
    "tanh_": (lambda: method("tanh_"), "tanh"),
    "sigmoid_": (lambda: method("sigmoid_"), "sigmoid"),
    "torch.tanh_": (lambda: Holding(lambda x: torch.tanh_(x * 1)), "tanh"),
    "out": (lambda: Holding(lambda x: torch.sigmoid(x, out=torch.empty_like(x))), "sigmoid"),
    "expit": (lambda: Holding(torch.special.expit), "sigmoid"),
    "F.tanh": (lambda: Holding(F.tanh), "tanh"),
    "inplace": (lambda: Holding(lambda x: F.silu(x * 1, inplace=True)), "silu"),
    "operator": (lambda: Holding(torch.ops.aten.gelu), "gelu"),
    "overload": (lambda: Holding(torch.ops.aten.silu_.default), "silu"),
}


def ours(function, x, mode):
    if function == "gelu_tanh":
        return act.gelu(x, mode, approximate="tanh")
    return getattr(act, function)(x, mode)


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_call_an_activation_is_replaced(form):
    make, function = FORMS[form]
    x = torch.randn(50, dtype=torch.bfloat16) * 3
    for mode in ("hard", "exact"):
        model = make()
        report = act.swap(model, mode)
        for _ in range(3):
            assert same(model(x.clone()), ours(function, x, mode))
        assert len(report.replaced) == 1, report
        assert not report.kept
        report.restore()
        assert torch.equal(model(x.clone()), make()(x.clone()))


@pytest.mark.parametrize(
    ("make", "function"),
    [
        (lambda: nn.SiLU(inplace=True), act.silu),
        (lambda: Holding(lambda x: F.silu(x, inplace=True)), act.silu),
        (lambda: Holding(torch.sigmoid_), act.sigmoid),
    ],
)
def test_inplace_writes_over_its_argument(make, function):
    model, x = make(), torch.randn(6)
    act.swap(model, "hard")
    for _ in range(2):
        y = x.clone()
        assert model(y) is y
        assert torch.equal(y, function(x, "hard"))
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(leaf * 1).sum().backward()
    function(other, "hard").sum().backward()
    assert torch.equal(leaf.grad, other.grad)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        model(leaf)


def test_other_functions_are_left_alone():
    class Other(nn.Module):
        def forward(self, x):
            return F.hardtanh(torch.relu(x)) + F.softmax(x, -1) + torch.arctanh(x / 9) + x.exp().clamp(max=2)

    model, x = Other(), torch.randn(8)
    before = model(x)
    report = act.swap(model, "hard")
    assert torch.equal(model(x), before)
    assert (report.replaced, report.kept, report.watched) == ([], [], [])


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.act = functools.partial(F.gelu, approximate="tanh")

    def forward(self, x: Tensor, scale: float = 1.0, *, flag: bool = False) -> Tensor:
        x = self.act(self.layer(x))
        if flag:
            x = (x * 1).tanh_()
        return helper(x) * scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU())
        self.gelu = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gelu(self.body(self.inner(x, flag=True))))

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))


class Expected(Net):
    """The same, written with ours; ``mode`` is a class attribute."""

    mode = "hard"

    def forward(self, x: Tensor) -> Tensor:
        x = act.gelu(self.inner.layer(x), self.mode, approximate="tanh")
        x = act.sigmoid(act.tanh(x, self.mode), self.mode) * 2
        x = act.silu(self.body[2](self.body[1](self.body[0](x))), self.mode)
        return act.sigmoid(act.gelu(x, self.mode), self.mode)


def nets(mode="hard", dtype=torch.float32):
    net = Net().to(dtype)
    want = Expected().to(dtype)
    want.load_state_dict(net.state_dict())
    want.mode = mode
    return net, want, torch.randn(4, 8).to(dtype)


def test_the_report_and_the_way_back():
    net, want, x = nets()
    original = copy.deepcopy(net)
    keys, before = list(net.state_dict()), net(x)
    report = act.swap(net, "hard")
    assert report.replaced == [("body.3", "SiLU"), ("gelu", "GELU")]
    assert report.watched == ["", "inner"]
    assert "replaced 2, kept 0, watched 2" in str(report)
    assert same(net(x), want(x))
    assert set(report.replaced) == {
        ("body.3", "SiLU"),
        ("gelu", "GELU"),
        ("inner", "gelu_tanh called"),
        ("inner", "tanh called"),
        ("inner", "sigmoid called"),
        ("", "sigmoid called"),
    }
    assert "(the model): sigmoid called" in str(report)
    assert list(net.state_dict()) == keys
    assert [type(m).__name__ for m in net.modules()] == [type(m).__name__ for m in original.modules()]
    assert isinstance(net, Net)
    assert repr(net) == repr(original)
    report.restore()
    assert torch.equal(net(x), before)
    assert [type(m) for m in net.modules()] == [type(m) for m in original.modules()]
    assert [set(m.__dict__) for m in net.modules()] == [set(m.__dict__) for m in original.modules()]
    assert not report.replaced


def test_parts_of_a_model_are_swapped_for_themselves():
    net, want, x = nets()
    act.swap(net, "hard")
    assert same(
        net.features(x), act.tanh(want.body[0:3](x).pipe if False else act.silu(want.body[:3](x), "hard"), "hard")
    )
    assert same(
        net.inner(x, 2.0), 2 * act.sigmoid(act.gelu(net.inner.layer(x), "hard", approximate="tanh"), "hard") * 2
    )
    assert same(net.forward(x), want(x))


def test_the_mode_is_on_in_watched_code_alone():
    class Asking(nn.Module):
        def forward(self, x):
            modes.append(_get_current_function_mode())
            return x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.asking = Asking()

        def forward(self, x):
            modes.append(_get_current_function_mode())
            return torch.tanh(self.asking(x))

    modes, x = [], torch.randn(8).bfloat16()
    model = nn.Sequential(Outer(), Asking())
    act.swap(model)
    model(x)
    modes.clear()
    model(x)
    assert [mode is not None for mode in modes] == [True, False, False]

    class Failing(nn.Module):
        def forward(self, x):
            raise KeyError(torch.tanh(x))

    model = Failing()
    act.swap(model)
    for _ in range(2):
        with pytest.raises(KeyError):
            model(x)
        assert _get_current_function_mode() is None


@pytest.mark.parametrize("mode", ["hard", "exact"])
def test_copies_and_pickles_stay_swapped(mode):
    net, want, x = nets(mode, torch.bfloat16)
    act.swap(net, mode)
    y = net(x)
    assert same(y, want(x))
    assert same(copy.deepcopy(net)(x), y)
    assert same(copy.copy(net)(x), y)
    assert same(pickle.loads(pickle.dumps(net))(x), y)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert same(again(x), y)
    assert same(again.features(x), net.features(x))
    cell = nn.LSTMCell(8, 8).bfloat16()
    act.swap(cell, "ktanh")
    assert same(pickle.loads(pickle.dumps(cell))(x)[0], cell(x)[0])
    assert not torch.equal(cell(x)[0], act.LSTMCell(8, 8).bfloat16()(x)[0])
    assert type(cell).__name__ == "LSTMCell"


def test_what_records_a_model_records_ours(tmp_path):
    net, want, x = nets()
    net.eval().requires_grad_(False)
    act.swap(net, "hard")
    y = want(x)
    graph = torch.fx.symbolic_trace(net)
    assert same(graph(x), y)
    assert not {node.target for node in graph.graph.nodes} & {torch.tanh, torch.sigmoid, "tanh_", "sigmoid"}
    assert same(torch.jit.trace(net, (x,))(x), y)
    for strict in (False, True):
        program = torch.export.export(net, (x,), strict=strict)
        assert torch.allclose(program.module()(x), y, atol=1e-6)
        names = {str(node.target) for node in program.graph.nodes}
        assert not any(name in "".join(names) for name in ("tanh", "sigmoid", "silu", "gelu"))
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(net, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(result), y, atol=1e-6)


@pytest.mark.parametrize("gradients", [False, True])
def test_torch_compile_makes_one_graph(gradients):
    net, want, x = nets("hard", torch.bfloat16)
    act.swap(net, "hard")
    with torch.set_grad_enabled(gradients):
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        for batch in (x, x[:3]):
            assert same(compiled(batch), want(batch))
    torch._dynamo.reset()


def test_gradients_are_those_of_ours():
    net, want, x = nets("ktanh", torch.bfloat16)
    act.swap(net, "ktanh")
    net(x).sum().backward()
    want(x).sum().backward()
    for a, b in zip(net.parameters(), want.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    alone = nn.Tanh()
    act.swap(alone, grad="x")
    far = torch.tensor([4.0], dtype=torch.bfloat16, requires_grad=True)
    alone(far).backward()
    assert far.grad > 0


def test_attributes_take_effect_and_side_effects_happen_once():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.calls, self.act = 1.0, 0, torch.tanh

        def forward(self, x):
            self.calls += 1
            return self.act(x) * self.scale

    model, x = Counting(), torch.randn(5).bfloat16()
    act.swap(model, "hard")
    assert model.calls == 0
    assert same(model(x), act.tanh(x, "hard"))
    model.scale, model.act = 2.0, torch.sigmoid
    assert same(model(x), act.sigmoid(x, "hard") * 2)
    model.act = torch.relu
    assert same(model(x), torch.relu(x) * 2)
    assert model.calls == 3


def test_a_callable_that_comes_as_an_argument_is_seen_when_the_model_runs_first():
    class Called(nn.Module):
        def forward(self, x, function):
            return function(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.called = Called()

        def forward(self, x, function):
            return self.called(x, function)

    model, x = Outer(), torch.randn(5).bfloat16()
    report = act.swap(model, "hard")
    assert not report.watched
    assert same(model(x, torch.tanh), act.tanh(x, "hard"))
    assert report.replaced == [("called", "tanh called")]
    assert report.watched == ["called"]
    assert same(model(x, F.silu), act.silu(x, "hard"))
    report.restore()
    assert type(model.called) is Called


def test_what_is_left_is_told():
    class Several(nn.Module):
        def forward(self, x):
            return F.softplus(x, beta=2.0) + F.elu(x, 0.5) + F.tanhshrink(x) + torch.tanh(x.double())

    model, x = Several(), torch.randn(8)
    before = model(x)
    report = act.swap(model)
    assert torch.equal(model(x), before)
    assert not report.replaced
    reasons = [reason for _, reason in report.kept]
    assert "softplus is called with arguments that it has not here" in reasons
    assert "elu is called with arguments that it has not here" in reasons
    assert "tanhshrink computes its tanh inside PyTorch" in reasons
    assert "there is no tanh of float64 here" in reasons

    parts = {"rnn": nn.RNN(4, 4), "cell": nn.RNNCell(4, 4), "glu": nn.GLU(), "elu": nn.ELU(0.5), "mish": nn.Mish()}
    report = act.swap(nn.ModuleDict(parts), "ktanh")
    kept = dict(report.kept)
    assert set(kept) == {"rnn", "cell", "glu", "elu", "mish"}
    assert all("inside PyTorch" in kept[name] for name in ("rnn", "cell", "glu"))
    assert "arguments" in kept["elu"]
    assert kept["mish"] == 'mish has no mode "ktanh"'
    report = act.swap(nn.ModuleDict({"rnn": nn.RNN(4, 4), "relu": nn.RNN(4, 4, nonlinearity="relu")}))
    assert [name for name, _ in report.kept] == ["rnn"]


def test_float32_keeps_pytorchs_function_where_it_is_faster():
    model = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
    x = torch.randn(4, 8)
    before = model(x)
    report = act.swap(model)
    assert torch.equal(model(x), before)
    assert not report.replaced
    assert report.kept == [("1", "PyTorch's silu of float32 is faster and about as exact")]
    model.bfloat16()
    assert same(model(x.bfloat16()), act.silu(model[0](x.bfloat16())))
    assert report.replaced == [("1", "SiLU")]


@pytest.mark.parametrize("make", [nn.Tanh, lambda: Holding(torch.tanh)])
def test_float32_of_many_numbers_is_ours_where_that_is_faster(make):
    model, many = make(), torch.randn(8192)
    report = act.swap(model)
    for _ in range(3):
        assert same(model(many), act.tanh(many))
        assert torch.equal(model(many[:9]), torch.tanh(many[:9]))
    assert len(report.replaced) == 1
    assert report.kept == [("", "PyTorch's tanh of float32 of few numbers is faster and about as exact")]


def test_recurrent_layers_are_ours():
    for kind, ours in ((nn.LSTM, act.LSTM), (nn.GRU, act.GRU), (nn.LSTMCell, act.LSTMCell), (nn.GRUCell, act.GRUCell)):
        for mode in ("exact", "hard"):
            layer, want = kind(16, 16).bfloat16(), ours(16, 16).bfloat16()
            want.load_state_dict(layer.state_dict())
            setattr(want, "mode" if kind in (nn.LSTMCell, nn.GRUCell) else "activation_mode", mode)
            x = torch.randn(80, 16).bfloat16()
            report = act.swap(layer, mode)
            first, second = (each[0] if isinstance(each, tuple) else each for each in (layer(x), want(x)))
            assert same(first, second)
            assert report.replaced == [("", kind.__name__)]
            first.sum().backward()
            report.restore()
            assert type(layer) is kind
    assert dict(act.swap(nn.LSTM(4, 4)).kept) == {"": "PyTorch's LSTM of float32 is faster and about as exact"}
    cell, x = nn.LSTMCell(4, 4).bfloat16(), torch.randn(2, 4).bfloat16()
    before = cell(x)[0]
    report = act.swap(cell)
    assert torch.equal(cell(x)[0], before)
    assert report.kept == [("", "PyTorch's LSTMCell of few numbers is faster")]


def test_a_table_of_another_format_is_not_used():
    model = nn.Sequential(nn.Tanh())
    report = act.swap(model, "ktanh", table="tanh_bf16_monotone")
    x = torch.randn(9)
    assert torch.equal(model(x), torch.tanh(x))
    assert report.kept == [("0", "the table is one of tanh in bf16")]
    assert same(model(x.bfloat16()), act.tanh(x.bfloat16(), "ktanh", table="tanh_bf16_monotone"))


def test_options_are_checked_before_anything_is_changed():
    net = nn.Sequential(nn.Tanh())
    with pytest.raises(ValueError, match="mode must be"):
        act.swap(net, "quick")
    with pytest.raises(ValueError, match='grad must be "y" or "x" for tanh'):
        act.swap(net, grad="z")
    with pytest.raises(ValueError, match='grad must be "x" for tanh in mode "hard"'):
        act.swap(net, "hard", grad="y")
    for model, given in ((torch.tanh, "builtin_function_or_method"), ([net], "list"), (nn.Tanh, "the class Tanh")):
        with pytest.raises(TypeError, match=f"an instance of torch.nn.Module, got {given}"):
            act.swap(model)  # type: ignore[arg-type]
    assert type(net[0]) is nn.Tanh


def test_swapping_twice_keeps_the_first_and_takes_what_is_new():
    net, want, x = nets()
    first = act.swap(net, "hard")
    again = act.swap(net, "exact")
    assert {reason for _, reason in again.kept} == {"swapped before: restore() that first"}
    assert not again.replaced
    assert same(net(x), want(x))
    net.body[3] = nn.SiLU()
    assert [name for name, _ in act.swap(net, "hard").replaced] == ["body.3"]
    assert same(net(x), want(x))
    first.restore()
    assert type(net) is Net


def test_a_class_of_the_same_name_is_tried_before_it_is_replaced():
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(x * 0.79)) + 1

    fields = {"forward": forward, "__module__": "transformers.activations"}
    model = type("NewGELUActivation", (nn.Module,), fields)()
    x = torch.randn(40).bfloat16()
    report = act.swap(model, "exact")
    assert same(model(x), 0.5 * x * (1 + act.tanh(x * 0.79)) + 1)
    assert report.replaced == [("", "tanh called")]


def test_a_forward_of_the_instance_is_watched():
    net, want, x = nets()
    old = net.gelu.forward
    net.gelu.forward = functools.partial(lambda module, y: old(y), net.gelu)  # as accelerate's hooks do
    report = act.swap(net, "hard")
    assert same(net(x), want(x))
    assert ("gelu", "gelu called") in report.replaced


def test_torchscript_graphs_and_hooks_are_told():
    @torch.jit.script
    def scripted(x):
        return torch.tanh(x)

    class Calls(nn.Module):
        def forward(self, x):
            return scripted(x)

    class Quiet(nn.Module):
        def forward(self, x):
            return torch.relu(x)

    graph = torch.fx.symbolic_trace(Holding(torch.tanh))
    hooked = Quiet()
    hooked.register_forward_hook(lambda module, given, result: torch.sigmoid(result))
    model = nn.ModuleDict({"calls": Calls(), "script": torch.jit.script(Quiet()), "graph": graph, "hooked": hooked})
    kept = dict(act.swap(model).kept)
    assert set(kept) == {"calls", "script", "graph", "hooked"}
    assert "function of TorchScript" in kept["calls"]
    assert "compiled by TorchScript" in kept["script"]
    assert "torch.fx" in kept["graph"]
    assert "hook" in kept["hooked"]


@pytest.mark.parametrize("activation", ["gelu", F.gelu, nn.GELU(), lambda x: F.gelu(x) * 1, torch.sigmoid])
@pytest.mark.parametrize("decoder", [False, True])
def test_layers_of_transformers(activation, decoder):
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    layer = kind(8, 2, 16, dropout=0.0, activation=activation, batch_first=True).eval()
    given = (torch.randn(2, 3, 8),) * (1 + decoder)
    want = copy.deepcopy(layer)
    function = act.sigmoid if activation is torch.sigmoid else act.gelu
    want.activation = None if isinstance(activation, nn.Module) else want.activation
    want.__dict__["activation"] = lambda x: function(x, "hard")
    want.activation_relu_or_gelu = 0
    with torch.no_grad():
        before, expected = layer(*given), want(*given)
        report = act.swap(layer, "hard")
        for _ in range(2):
            assert torch.allclose(layer(*given), expected, atol=1e-6)
        assert not torch.allclose(before, expected, atol=1e-4)
        assert len(report.replaced) == 1
        if not (decoder and isinstance(activation, nn.Module)):  # PyTorch's copy of that one has relu
            assert torch.allclose(copy.deepcopy(layer)(*given), expected, atol=1e-6)
        report.restore()
        assert torch.equal(layer(*given), before)


def test_the_fused_path_of_a_layer_stays_where_gelu_is_pytorchs(monkeypatch):
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True).eval()
    x, calls = torch.randn(2, 3, 8), []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fused(*a))
    report = act.swap(layer)
    with torch.no_grad():
        layer(x)
        assert len(calls) == 1
        layer.bfloat16()(x.bfloat16())
    assert len(calls) == 1
    assert "float32" in report.kept[0][1]
    assert report.replaced == [("", "gelu called")]


class Unit(nn.Module):
    def __init__(self, act=None, width=256):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, width), nn.Linear(8, width)
        self.down_proj = nn.Linear(width, 8)
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        """A docstring."""
        down = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down


class Turned(Unit):
    def forward(self, y):
        return self.down_proj(self.up_proj(y) * self.act_fn(self.gate_proj(y)))


class Halves(Unit):
    def __init__(self, act=None):
        super().__init__(act)
        self.gate_up_proj = nn.Linear(8, 512)

    def forward(self, hidden):
        up = self.gate_up_proj(hidden)
        gate, up = up.chunk(2, dim=-1)
        up = up * self.act_fn(gate)
        return self.down_proj(up)


@pytest.mark.parametrize("kind", [Unit, Turned, Halves])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU, lambda: nn.GELU(approximate="tanh")])
def test_gated_perceptrons_are_one_unit(kind, activation, monkeypatch):
    from rarefy.act import gated

    model = kind(activation()).bfloat16()
    plain, x = copy.deepcopy(model), torch.randn(100, 8).bfloat16()
    act.swap(plain.act_fn)
    calls = []
    for name, unit in list(gated.UNITS.items()):
        monkeypatch.setitem(gated.UNITS, name, lambda *a, unit=unit, **k: calls.append(1) or unit(*a, **k))
    report = act.swap(model)
    fired = []
    for child in (model.down_proj, model.up_proj, model.gate_proj):
        child.register_forward_hook(lambda *_: fired.append(1))
    with torch.no_grad():
        assert same(model(x), plain(x))
    assert calls
    assert len(fired) == (1 if kind is Halves else 3)
    assert ("", "gated unit") in report.replaced
    model(x).sum().backward()
    plain(x).sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.allclose(a.grad.float(), b.grad.float(), atol=0.1, rtol=0.05)
    calls.clear()
    model.act_fn.register_forward_hook(lambda *_: fired.append("act"))
    with torch.no_grad():
        assert same(model(x), plain(x))
    assert not calls
    assert "act" in fired


@pytest.mark.parametrize("kind", [Unit, Halves])
def test_gated_perceptrons_are_recorded_and_compiled(kind):
    model, x = kind().bfloat16().requires_grad_(False), torch.randn(100, 8).bfloat16()
    act.swap(model, "hard")
    y = model(x)
    assert same(torch.compile(model, backend="eager", fullgraph=True)(x), y)
    torch._dynamo.reset()
    assert same(torch.export.export(model, (x,)).module()(x), y)
    assert same(torch.jit.trace(model, (x,))(x), y)
    assert same(torch.fx.symbolic_trace(model)(x), y)


def test_a_perceptron_that_is_written_otherwise_is_no_unit():
    class Other(Unit):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x + 1))

    model = Other().bfloat16()
    report = act.swap(model)
    assert [name for name, _ in report.replaced] == ["act_fn"]


def _replica():
    net, want, x = nets()
    act.swap(net, "hard")
    wrapped = nn.parallel.DistributedDataParallel(net)
    y = wrapped(x)
    assert same(y, want(x))
    y.sum().backward()
    want(x).sum().backward()
    for a, b in zip(net.parameters(), want.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_distributed_data_parallel(tmp_path):
    apart(_replica, tmp_path)


def test_an_encoder_of_padded_sequences():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    with torch.no_grad():
        before = encoder(x, src_key_padding_mask=padding)
        report = act.swap(encoder, "hard")
        for _ in range(2):
            after = encoder(x, src_key_padding_mask=padding)
            assert not torch.allclose(after[~padding], before[~padding], atol=1e-4)
        assert [what for _, what in report.replaced] == ["gelu called"] * 2
        report.restore()
        assert torch.equal(encoder(x, src_key_padding_mask=padding), before)


def test_unusual_modules():
    class Static(nn.Module):
        forward = staticmethod(torch.tanh)

    class Raising(nn.Module):
        @property
        def bad(self):
            raise RuntimeError

        def __getattr__(self, name):
            if name == "worse":
                raise KeyError(name)
            return super().__getattr__(name)

        def forward(self, x):
            return x.tanh()

    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(8)

        def forward(self, x):
            return torch.tanh(self.layer(x))

    x = torch.randn(2, 8)
    for model in (Static(), Raising(), nn.Tanh()):
        report = act.swap(model, "hard")
        for _ in range(2):
            assert same(model(x), act.tanh(x, "hard"))
        report.restore()
    upsample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), model)
    act.swap(upsample, "hard").restore()
    assert upsample[0].mode == "nearest"
    lazy = Lazy()
    report = act.swap(lazy, "hard")
    for _ in range(2):
        assert same(lazy(x), act.tanh(lazy.layer(x), "hard"))
    report.restore()
    assert (type(lazy), type(lazy.layer)) == (Lazy, nn.Linear)


def test_transforms_of_functions_and_scripting():
    net, want, x = nets()
    act.swap(net, "hard")
    parameters = dict(net.named_parameters())
    by_row = torch.vmap(lambda row: torch.func.functional_call(net.body, {}, (row,)))(x)
    assert torch.allclose(by_row, act.silu(want.body[:3](x), "hard"), atol=1e-6)
    gradients = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).sum())(parameters)
    want(x).sum().backward()
    for name, parameter in want.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-6)
    with pytest.raises(RuntimeError, match="restore"):
        torch.jit.script(net)


def eager_attention_forward(x):
    return torch.tanh(x)


INTERFACES = {"sdpa": torch.relu}


class Attention(nn.Module):
    """Chooses its form as the attentions of transformers do."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation="sdpa")

    def forward(self, x):
        modes.append(_get_current_function_mode())
        interface = INTERFACES.get(self.config._attn_implementation, eager_attention_forward)
        return interface(x)


modes: list[object] = []


def test_attention_is_watched_in_the_form_that_calls_tanh():
    attention, x = Attention(), torch.randn(8).bfloat16()
    model = nn.Sequential(attention)
    act.swap(model, "hard")
    model(x)
    modes.clear()
    assert same(model(x), torch.relu(x))
    attention.config._attn_implementation = "eager"
    assert same(model(x), act.tanh(x, "hard"))
    assert [mode is not None for mode in modes] == [False, True]
