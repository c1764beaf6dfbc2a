"""Gated units: their bits, shapes, gradients, and what watches operators."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import act_blocks
import act_gated
from rarefy import act, kernels
from rarefy.act import gated, gradients
from rarefy.act.kernels import slopes
from tests.act.test_functional import call, everything, floats, theirs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]

UNITS: dict[str, Callable[..., Tensor]] = gated.UNITS
CASES = [(function, mode) for function in UNITS for mode in ("exact", "ktanh", "hard")]
PATHS = [*sorted({k.isa for k in kernels.table() if k.supported and k.name == "gated_bf16"}), "pytorch"]
DTYPES = list(gated.DTYPES)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, but that any NaN equals any other."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    a, b = (torch.where(torch.isnan(t), torch.nan, t) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integer), b.view(integer))


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gates, every one that there is of 16 bits, and numbers to multiply by."""
    gate = floats() if dtype == torch.float32 else everything(dtype)
    up = torch.randn(gate.shape, generator=torch.Generator().manual_seed(3)) * 3
    up[::7], up[1::49], up[2::49], up[3::49] = 1.0, torch.inf, 0.0, torch.nan
    up[4::49], up[5::49] = 1e-39, -1e-6
    return gate, up.to(dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_the_bits_are_those_of_two_steps(function, mode, path):
    for dtype in DTYPES:
        gate, up = inputs(dtype)
        with kernels.forced(path):
            for other in (up, up.flip(0), torch.full_like(up, -1.75)):
                want = call(function, gate, mode) * other
                assert same(UNITS[function](gate, other, mode), want)
            joined = torch.cat((gate.view(4, -1), up.view(4, -1)), -1)
            want = call(function, gate, mode) * up
            assert same(UNITS[function](joined, mode=mode), want.view(4, -1))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_gradients_are_rounded_once(function, mode, path):
    for dtype in DTYPES:
        gate, up = inputs(dtype)
        upstream = up.roll(1)
        slope = slopes.slopes(gate, function, mode)
        want_gate = (upstream.float() * up.float() * slope).to(dtype)
        want_up = (upstream.float() * call(function, gate, mode).float()).to(dtype)
        with kernels.forced(path):
            a, b = gate.clone().requires_grad_(), up.clone().requires_grad_()
            UNITS[function](a, b, mode).backward(upstream)  # type: ignore[no-untyped-call]
            assert a.grad is not None
            assert b.grad is not None
            assert same(a.grad, want_gate)
            assert same(b.grad, want_up)
            x = torch.cat((gate.view(4, -1), up.view(4, -1)), -1).requires_grad_()
            UNITS[function](x, mode=mode).backward(upstream.view(4, -1))  # type: ignore[no-untyped-call]
            assert x.grad is not None
            assert same(x.grad, torch.cat((want_gate.view(4, -1), want_up.view(4, -1)), -1))


@pytest.mark.parametrize("function", UNITS)
def test_slopes_are_the_derivatives(function):
    for dtype, bound in ((torch.bfloat16, 1e-7), (torch.float16, 1e-7), (torch.float32, 1e-6)):
        x = inputs(dtype)[0]
        x = x[torch.isfinite(x)]
        wide = x.double().clamp(-100, 100).requires_grad_()
        (true,) = torch.autograd.grad(theirs(function, wide).sum(), wide)
        got = slopes.slopes(x, function, "exact")
        assert got.dtype == torch.float32
        assert (got - true).abs().max() < bound
        assert torch.equal(slopes.slopes(x, function, "hard"), gradients.hard(x, function))
    limits = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for dtype in DTYPES:
        got = slopes.slopes(limits.to(dtype), function, "exact")
        assert got[:2].tolist() == pytest.approx([1.0, 0.0], abs=1e-30)
        assert torch.isnan(got[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_layouts_and_out(dtype):
    generator = torch.Generator().manual_seed(1)
    base = (torch.randn(6, 10, 8, generator=generator) * 3).to(dtype)
    for x in (base, base.transpose(0, 1), base[::2, 1::3], base.transpose(0, 2)[:, :, ::3], base[0, 0], base[:, :0]):
        gate, up = x.chunk(2, -1) if x.shape[-1] else (x, x)
        want = act.silu(gate.contiguous()) * up
        for got in (act.silu_and_mul(x), act.silu_and_mul(gate, up), act.silu_and_mul(gate.contiguous(), up)):
            assert same(got, want)
            assert got.is_contiguous()
        out = torch.empty_like(got)
        assert act.silu_and_mul(x, out=out) is out
        assert same(out, want)
        strided = torch.empty((*want.shape, 2), dtype=dtype)[..., 1]
        assert same(act.silu_and_mul(gate, up, out=strided), want)
        for itself in (0, 1):
            pair = [gate.clone(), up.clone()]
            version = pair[itself]._version
            assert same(act.silu_and_mul(*pair, out=pair[itself]), want)
            assert pair[itself]._version > version
        a, b = (t.clone().requires_grad_() for t in (gate, up))
        upstream = torch.randn(want.shape, generator=generator).to(dtype)
        first = torch.autograd.grad(act.silu_and_mul(a, b), (a, b), upstream)
        parent = x.detach().clone().requires_grad_()
        second = torch.autograd.grad(act.silu_and_mul(*parent.chunk(2, -1)), parent, upstream)[0]
        third = torch.autograd.grad(act.silu_and_mul(parent), parent, upstream)[0]
        assert same(torch.cat(first, -1), third)
        assert same(second, third)
        assert third.is_contiguous()
    assert act.silu_and_mul(base[:0]).shape == (0, 10, 4)
    assert act.gelu_and_mul(base[0, 0, 0], base[1, 1, 1]).shape == ()
    # a result over part of what it reads
    room = base[:, :, :4].contiguous().reshape(-1)
    shifted = room.clone()
    want = act.silu_and_mul(shifted[:-3], shifted[:-3])
    assert same(act.silu_and_mul(shifted[:-3], shifted[:-3], out=shifted[3:]), want)


def test_threads_give_the_same():
    before = torch.get_num_threads()
    x = torch.randn(37, 2 * 20011).bfloat16()
    upstream = torch.randn(37, 20011).bfloat16()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for y in (x, x.reshape(1, -1), x.reshape(-1, 2)):
                leaf = y.clone().requires_grad_()
                result = act.silu_and_mul(leaf)
                (g,) = torch.autograd.grad(result, leaf, upstream.reshape(result.shape))
                assert same(result, act.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1])
                found.append(g)
    finally:
        torch.set_num_threads(before)
    for one, several in zip(found[:3], found[3:], strict=True):
        assert same(one, several)


def test_bad_arguments_are_named():
    x = torch.zeros(3, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"a last dimension that is even, got \(4, 3\): give up as a tensor"):
        act.silu_and_mul(x.t())
    with pytest.raises(ValueError, match="a last dimension that is even"):
        act.silu_and_mul(x[0, 0])
    with pytest.raises(ValueError, match=r"up must have the shape, .* got \(3, 2\)"):
        act.silu_and_mul(x, x[:, :2])
    with pytest.raises(ValueError, match=r"up must have .* got \(3, 4\), torch.float32"):
        act.gelu_and_mul(x, x.float())
    with pytest.raises(TypeError, match="the gate of gelu_tanh_and_mul must be a tensor, got float"):
        act.gelu_tanh_and_mul(1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="up of silu_and_mul must be a tensor, got list"):
        act.silu_and_mul(x, [1.0])  # type: ignore[arg-type]
    for dtype in (torch.float64, torch.float8_e4m3fn, torch.int32):
        with pytest.raises(TypeError, match=r"silu_and_mul takes bfloat16, float16, float32; got"):
            act.silu_and_mul(x.to(dtype))
    with pytest.raises(TypeError, match=r"silu_and_mul takes a dense tensor, got layout .*: use x.to_dense\(\)"):
        act.silu_and_mul(x.to_sparse())
    with pytest.raises(TypeError, match="table must be a Table, the name of a shipped one or a .json file, got int"):
        act.silu_and_mul(x, mode="ktanh", table=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be one of exact, fast, ktanh, hard"):
        act.silu_and_mul(x, mode="fastest")
    with pytest.raises(ValueError, match='grad must be "x"'):
        act.silu_and_mul(x, grad="y")
    with pytest.raises(ValueError, match="a table goes with"):
        act.silu_and_mul(x, table="silu_bf16")
    with pytest.raises(ValueError, match=r"out of silu_and_mul must be of \(3, 2\)"):
        act.silu_and_mul(x, out=torch.zeros(3, 4))
    with pytest.raises(TypeError, match="out must be a tensor"):
        act.silu_and_mul(x, out=[])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="does not support gradients"):
        act.silu_and_mul(x.requires_grad_(), out=torch.zeros(3, 2, dtype=x.dtype))


def test_tables_and_modules():
    x = torch.randn(5, 12).bfloat16()
    gate, up = x.chunk(2, -1)
    table = act.load("tanh_bf16_monotone")
    want = act.silu(gate, "ktanh", table=table) * up
    assert same(act.silu_and_mul(x, mode="ktanh", table=table), want)
    assert same(act.SiluAndMul("ktanh", table="tanh_bf16_monotone")(x), want)
    assert same(act.GeluAndMul("hard")(gate, up), act.gelu(gate, "hard") * up)
    assert same(act.GeluTanhAndMul()(x), act.gelu(gate, approximate="tanh") * up)
    assert repr(act.SiluAndMul()) == "SiluAndMul(mode='exact')"


@pytest.mark.parametrize("function", UNITS)
def test_transforms_and_second_derivatives(function):
    x, other = torch.randn(3, 6), torch.randn(3, 6)

    def ours(v: Tensor, u: Tensor | None = None) -> Tensor:
        return UNITS[function](v, u).sum()

    def reference(v: Tensor, u: Tensor | None = None) -> Tensor:
        gate, up = v.chunk(2, -1) if u is None else (v, u)
        return (theirs(function, gate) * up).sum()

    grad, vmap = torch.func.grad, torch.func.vmap
    assert torch.allclose(vmap(grad(ours))(x), vmap(grad(reference))(x), atol=1e-5)
    for dims in ((0, 0), (0, None), (None, 0), (1, 1)):
        v, u = (x if dim is not None else x[0] for dim in dims[:1]), (other if dims[1] is not None else other[0])
        (v,) = v
        if dims == (1, 1):
            v, u = v.t(), u.t()
        both = [vmap(grad(f, argnums=(0, 1)), in_dims=dims)(v, u) for f in (ours, reference)]
        for a, b in zip(*both, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    hessians = [torch.func.hessian(f)(x[0]) for f in (ours, reference)]  # type: ignore[no-untyped-call]
    assert torch.allclose(*hessians, atol=1e-4)
    tangents = (torch.randn(3, 6), torch.randn(3, 6))
    forwards = [torch.func.jvp(f, (x, other), tangents)[1] for f in (ours, reference)]  # type: ignore[no-untyped-call]
    assert torch.allclose(*forwards, atol=1e-4)
    second = []
    for f in (ours, reference):
        a, b = x.clone().requires_grad_(), other.clone().requires_grad_()
        first = torch.autograd.grad(f(a, b), (a, b), create_graph=True)
        second.append(torch.cat(torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (a, b))))
    assert torch.allclose(*second, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, up = torch.randn(5, 6).to(dtype), torch.randn(5, 6).to(dtype)
    for arguments in ((x, None), (x, up), (x.clone().requires_grad_(), None), (x.t(), up.t())):
        result = torch.library.opcheck(torch.ops.rarefy.gated.default, (*arguments, "silu", "exact", ""))
        assert set(result.values()) == {"SUCCESS"}
    result = torch.library.opcheck(torch.ops.rarefy.gated_backward.default, (up, x, up, "silu", "exact", ""))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.slow
def test_compiled_gives_the_same_bits():
    torch.compiler.reset()
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(6, 20).to(dtype).requires_grad_()

        def f(v: Tensor) -> Tensor:
            return act.gelu_tanh_and_mul(v) + act.silu_and_mul(v[:, 10:], v[:, :10])

        got, want = torch.compile(f, fullgraph=True)(x), f(x)
        assert same(got, want)
        assert same(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, want)))
    with pytest.raises(Exception, match="last dimension that is even"):
        torch.compile(act.silu_and_mul, fullgraph=True)(torch.randn(3, 5))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_records_operators():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert act.silu_and_mul(torch.randn(3, 4)).shape == (3, 2)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), act.SiluAndMul())
    x, other = torch.randn(3, 4), torch.randn(5, 4)
    with torch.no_grad():
        traced = torch.jit.trace(net, x)
        assert same(traced(other), net(other))
    assert "rarefy::gated" in str(traced.inlined_graph)

    class Symbolic(torch.nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return act.silu_and_mul(v)

    symbolic = torch.fx.symbolic_trace(Symbolic())
    assert [n.target for n in symbolic.graph.nodes if n.op == "call_function"] == [act.silu_and_mul]
    net.requires_grad_(False)
    program = torch.export.export(net, (x,))
    assert not any("rarefy" in str(n.target) for n in program.graph.nodes)
    assert same(program.module()(x), net(x))

    class Named(Tensor):
        pass

    assert type(act.silu_and_mul(x.as_subclass(Named))) is Named


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("how", ["scripted", "dynamo"])
def test_onnx_has_the_bits(how, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return act.silu_and_mul(x)

    x = torch.randn(40, 64)
    torch.onnx.export(Net(), (x,), tmp_path / "m.onnx", dynamo=how == "dynamo", verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    assert same(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), Net()(x))


def test_flushing_subnormals_changes_no_bit():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    torch.set_flush_denormal(False)
    # no more than one thread of PyTorch takes: others flush as they did when they started
    given = {dtype: tuple(t[:2000] for t in inputs(dtype)) for dtype in DTYPES}

    def every() -> dict[tuple[Any, ...], tuple[Tensor, Tensor]]:
        result = {}
        for path in PATHS:
            for dtype in DTYPES:
                gate, up = given[dtype]
                leaf = gate.clone().requires_grad_()
                with kernels.forced(path):
                    y = act.silu_and_mul(leaf, up)
                    result[path, dtype] = y.detach(), torch.autograd.grad(y, leaf, up.roll(1))[0]
        return result

    torch.set_flush_denormal(True)
    try:
        slopes.lookup.cache_clear()
        found = every()
    finally:
        torch.set_flush_denormal(False)
    for key, pair in every().items():
        assert all(same(a, b) for a, b in zip(pair, found[key], strict=True))


def test_the_result_is_the_model_of_pytorch():
    x = torch.randn(200, 64)
    gate, up = x.chunk(2, -1)
    assert torch.allclose(act.silu_and_mul(x), F.silu(gate) * up, atol=1e-5)
    assert torch.allclose(act.gelu_and_mul(x), F.gelu(gate) * up, atol=1e-5)


def test_tables_in_the_docs_are_those_of_the_results():
    docs = " ".join((Path(__file__).parents[2] / "docs" / "results" / "activations.md").read_text().split())
    for figures in (act_gated, act_blocks):
        assert " ".join(figures.table().split()) in docs
