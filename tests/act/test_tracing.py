"""What records operators (TorchScript, torch.export, ONNX, torch.fx) records the function, and its bits."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rarefy import act
from rarefy.act.kernels import plain
from rarefy.act.spec import oracle
from tests.act.test_functional import CASES, SMALL, bits_of, call, everything, floats, same
from tests.apart import apart

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class One(nn.Module):
    """One function, of float32 tensors converted to a dtype and back."""

    def __init__(self, function: str, mode: str = "exact", dtype: torch.dtype = torch.float32, **more: Any) -> None:
        super().__init__()
        self.function, self.mode, self.dtype, self.more = function, mode, dtype, more

    def forward(self, x: Tensor) -> Tensor:
        return call(self.function, x.to(self.dtype), self.mode, **self.more).float()


def but_for_nan(a: Tensor, b: Tensor) -> bool:
    nan = torch.isnan(b.float())
    return bool(torch.isnan(a.float()[nan]).all()) and torch.equal(bits_of(a)[~nan], bits_of(b)[~nan])


@pytest.mark.parametrize(("function", "mode"), CASES)
def test_the_form_without_bits_has_the_bits(function, mode):
    for dtype in SMALL:
        x = everything(dtype)
        assert but_for_nan(plain.activation(x, function, mode), call(function, x, mode))
    assert same(plain.activation(floats(), function, mode), call(function, floats(), mode))


def test_the_form_without_bits_runs_tables_of_float32():
    for name in ("tanh_bf16_monotone", "gelu_bf16_shifts", "tanh_bf16_shifts"):
        table = act.load(name).to_format("fp32")
        want = call(table.function, floats(), "ktanh", table=table)
        assert same(plain.activation(floats(), table.function, "ktanh", table.text), want)


@pytest.mark.parametrize("known", [False, True])
def test_torchscript_traces_the_operator(known):
    net = nn.Sequential(nn.Linear(6, 6), act.GELU("ktanh"), nn.Linear(6, 6), act.Tanh())
    x, other = torch.randn(4, 6), torch.randn(9, 6)
    with torch.no_grad():
        if known:
            net(x)
        traced = torch.jit.trace(net, x)
        assert torch.allclose(traced(other), net(other), atol=1e-6)
    assert "rarefy::activation" in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    loaded(other).sum().backward()
    net(other).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(next(loaded.parameters()).grad, next(net.parameters()).grad, atol=1e-6)


class FromAFile(nn.Module):
    def forward(self, x):
        return act.tanh(x, "ktanh", table="mine.json")


def test_a_trace_has_the_table_that_was_in_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = act.load("tanh_bf16_carry64")
    table.save("mine.json")
    x = everything(torch.bfloat16)
    traced, symbolic = torch.jit.trace(FromAFile(), x), fx.symbolic_trace(FromAFile())
    torch.jit.save(traced, "net.pt")
    Path("mine.json").unlink()
    wanted = act.tanh(x, "ktanh", table=table)
    assert not same(wanted, act.tanh(x, "ktanh"))
    for model in (traced, torch.jit.load("net.pt"), symbolic):
        assert same(model(x), wanted)


def test_torchscript_cannot_compile_a_module_and_says_so():
    net = nn.Sequential(nn.Linear(3, 3), act.SiLU())
    with pytest.raises(RuntimeError, match=r"SiLU of rarefy.act cannot be scripted: use torch.jit.trace"):
        torch.jit.script(net)


def run(path: Path, x: Tensor) -> list[Tensor]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


class Several(nn.Module):
    """Several functions of one input, in one graph: an export costs much more than what it records."""

    def __init__(self, *functions: One) -> None:
        super().__init__()
        self.functions = nn.ModuleList(functions)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [function(x) for function in self.functions]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["scripted", "dynamo"])
@pytest.mark.parametrize(
    ("dtype", "functions"),
    [
        (
            torch.float32,
            [
                *(One(function) for function in oracle.FUNCTIONS),
                One("silu", "fast"),
                One("gelu", "fast"),
                One("gelu", "ktanh"),
                One("silu", "hard"),
                One("gelu", "ktanh", table=act.load("gelu_bf16_shifts").to_format("fp32")),
            ],
        ),
        (torch.bfloat16, [One("tanh", dtype=torch.bfloat16)]),
        (torch.float16, [One("silu", "ktanh", dtype=torch.float16)]),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else "",
)
def test_onnx_has_the_bits(dtype, functions, how, tmp_path):
    pytest.importorskip("onnxscript")
    model = Several(*functions)
    x = floats() if dtype == torch.float32 else everything(dtype).float()
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=how == "dynamo", verbose=False)
    for function, found, right in zip(functions, run(tmp_path / "m.onnx", x), model(x), strict=True):
        assert but_for_nan(found, right), (function.function, function.mode)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_become_onnx_or_say_how(strict, tmp_path):
    pytest.importorskip("onnxscript")
    net = nn.Sequential(nn.Linear(6, 6), act.Tanh())
    x = torch.randn(4, 6)
    program = torch.export.export(net, (x,), strict=strict)
    assert same(program.run_decompositions().module()(x), net(x))
    with pytest.raises(Exception, match="requires_grad_") as caught:
        torch.onnx.export(program, (), tmp_path / "m.onnx", dynamo=True, verbose=False)
    assert "give torch.onnx.export the model itself" in str(caught.value)
    net.requires_grad_(False)
    program = torch.export.export(net, (x,), strict=strict)
    assert not any("rarefy" in str(n.target) for n in program.graph.nodes if n.op == "call_function")
    assert same(program.run_decompositions().module()(x), net(x))
    torch.onnx.export(program, (), tmp_path / "m.onnx", dynamo=True, verbose=False)
    assert torch.allclose(run(tmp_path / "m.onnx", x)[0], net(x), atol=1e-6)


def test_symbolic_trace_keeps_the_call():
    table = act.load("tanh_bf16_monotone")

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return act.gelu(act.tanh(x, "ktanh", table=table), approximate="tanh")

    x = torch.randn(20).bfloat16()
    traced = fx.symbolic_trace(Net())
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [act.tanh, act.gelu]
    assert same(traced(x), Net()(x))


def test_tensor_subclasses_keep_their_class():
    class Named(Tensor):
        pass

    x = torch.randn(5)
    y = act.silu(x.as_subclass(Named))
    assert type(y) is Named
    assert same(y.as_subclass(Tensor), act.silu(x))


def _shards() -> None:
    from torch.distributed.tensor import DTensor, Partial, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    x = torch.randn(4, 8)
    for placement in (Shard(0), Partial()):
        given = DTensor.from_local(x.clone(), mesh, [placement]).requires_grad_()
        y = act.silu(given)
        assert isinstance(y, DTensor)
        assert not any(place.is_partial() for place in y.placements)
        assert same(y.full_tensor().detach(), act.silu(x))
    plain_x = x.clone().requires_grad_()
    act.silu(plain_x).sum().backward()  # type: ignore[no-untyped-call]
    shard = DTensor.from_local(x.clone(), mesh, [Shard(0)]).requires_grad_()
    act.silu(shard).sum().backward()
    assert shard.grad is not None
    assert plain_x.grad is not None
    assert torch.allclose(shard.grad.full_tensor(), plain_x.grad)


def test_distributed_tensors_are_computed_shard_by_shard(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("PyTorch was built without torch.distributed")
    apart(_shards, tmp_path)
