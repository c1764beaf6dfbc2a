"""torch.compile, export, functional transforms, opcheck."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rarefy import act
from rarefy.act.spec import oracle, reference
from tests.act.test_functional import CASES, call, everything, floats, same, theirs

# PyTorch's own: importing Inductor, and tracing an autograd.Function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("mode", reference.MODES)
def test_inductor_gives_the_same_bits_in_one_graph(mode):
    def every(x: Tensor) -> list[Tensor]:
        return [call(function, x, mode) for function, its in CASES if its == mode]

    compiled = torch.compile(every, fullgraph=True)
    for dtype in (torch.bfloat16, torch.float16):
        x = everything(dtype)
        for got, want in zip(compiled(x), every(x), strict=True):
            assert same(got, want)
    for got, want in zip(compiled(floats()), every(floats()), strict=True):
        assert same(got, want)


def test_inductor_fuses_with_what_stands_around():
    from torch._inductor.utils import run_and_get_code

    def f(x: Tensor) -> Tensor:
        return act.tanh(x * 2) * 3

    x = torch.randn(1000).bfloat16()
    got, code = run_and_get_code(torch.compile(f, fullgraph=True), x)
    assert same(got, f(x))
    assert sum(line.startswith("cpp_fused") for text in code for line in text.splitlines()) == 1


@pytest.mark.slow
def test_compiled_gradients_and_tables():
    table = act.load("tanh_bf16_monotone")
    x = torch.randn(300).bfloat16().requires_grad_()
    for f in (
        act.tanh,
        lambda v: act.tanh(v, grad="x"),
        act.silu,
        lambda v: act.tanh(v, "ktanh", table=table),
        lambda v: act.sigmoid(v, "ktanh", table="tanh_bf16_monotone"),
        lambda v: act.gelu(v, "hard"),
    ):
        want = f(x)
        (gradient,) = torch.autograd.grad(want.sum(), x)
        got = torch.compile(f, fullgraph=True)(x)
        (compiled,) = torch.autograd.grad(got.sum(), x)
        assert same(got, want)
        assert torch.allclose(compiled.float(), gradient.float(), atol=0.008)


def test_compiled_errors_and_out():
    x = torch.randn(5).bfloat16()
    out = torch.empty_like(x)
    torch.compile(lambda v, o: act.tanh(v, out=o), fullgraph=True)(x, out)
    assert same(out, act.tanh(x))
    with pytest.raises(Exception, match="out must have"):
        torch.compile(lambda v, o: act.tanh(v, out=o), fullgraph=True)(x[:1], out)
    with pytest.raises(Exception, match="mode must be one of"):
        torch.compile(lambda v: act.tanh(v, "swift"), fullgraph=True)(x)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 6)
        self.act = act.GELU("ktanh")

    def forward(self, x: Tensor) -> Tensor:
        return act.tanh(self.act(self.layer(x)), "ktanh")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_export(strict, gradient):
    net = Net().bfloat16().requires_grad_(gradient)
    x = torch.randn(4, 6).bfloat16()
    program = torch.export.export(net, (x,), strict=strict)
    assert same(program.module()(x), net(x))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert any("rarefy" in t for t in targets) == gradient
    if gradient:
        program.module()(x).sum().backward()
        assert all(p.grad is not None for p in program.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("function", "mode", "grad"),
    [("tanh", "exact", "y"), ("sigmoid", "ktanh", "x"), ("silu", "exact", "x"), ("gelu", "hard", "x")],
)
def test_opcheck(function, mode, grad, dtype):
    x = torch.randn(5, 3).to(dtype)
    for argument in (x, x.clone().requires_grad_(), x.t()):
        result = torch.library.opcheck(torch.ops.rarefy.activation.default, (argument, function, mode, grad, ""))
        assert set(result.values()) == {"SUCCESS"}


def _second(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.func.jacrev(torch.func.jacrev(f))


def test_functional_transforms():
    x = torch.randn(3, 4)
    for function in oracle.FUNCTIONS:

        def ours(v: Tensor, function: str = function) -> Tensor:
            return call(function, v).sum()

        def reference(v: Tensor, function: str = function) -> Tensor:
            return theirs(function, v).sum()

        assert torch.allclose(
            torch.func.vmap(torch.func.grad(ours))(x), torch.func.vmap(torch.func.grad(reference))(x), atol=1e-6
        )
        assert torch.allclose(_second(ours)(x[0]), _second(reference)(x[0]), atol=1e-5)
    assert same(torch.func.vmap(act.tanh)(x), act.tanh(x))


def test_double_backward():
    x = torch.randn(20, requires_grad=True)
    for function in oracle.FUNCTIONS:
        second = []
        for f in (call, theirs):
            (g,) = torch.autograd.grad(f(function, x).sum(), x, create_graph=True)
            second.append(torch.autograd.grad(g.sum(), x)[0])
        assert torch.allclose(second[0], second[1], atol=1e-5)


def test_fake_and_tracing_modes():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        y = act.tanh(torch.randn(3, 4))
        assert y.shape == (3, 4)
    x = torch.randn(4)
    graph = make_fx(lambda v: act.tanh(v) + 1)(x)
    assert any("rarefy" in str(n.target) for n in graph.graph.nodes)
    assert same(graph(x), act.tanh(x) + 1)
