from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from rarefy import act, kernels
from rarefy.act import gradients
from rarefy.act.kernels import aten, launch
from rarefy.act.spec import formats, oracle, reference

SMALL = {dtype: fmt for dtype, fmt in aten.FORMAT_OF.items() if fmt.bits <= 16}
DTYPES = list(aten.FORMAT_OF)
CASES = [(function, mode) for function in oracle.FUNCTIONS for mode in reference.modes(function)]
PATHS = [None, "portable", "pytorch"]
INTEGER = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def call(function: str, x: Tensor, mode: str = "exact", **options: object) -> Tensor:
    if function == "gelu_tanh":
        return act.gelu(x, mode, approximate="tanh", **options)  # type: ignore[arg-type]
    return getattr(act, function)(x, mode, **options)  # type: ignore[no-any-return]


def theirs(function: str, x: Tensor) -> Tensor:
    if function == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if function == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return getattr(torch if function in ("tanh", "sigmoid", "exp") else F, function)(x)  # type: ignore[no-any-return]


def everything(dtype: torch.dtype) -> Tensor:
    fmt = aten.FORMAT_OF[dtype]
    return torch.from_numpy(fmt.all_bits().astype(fmt.dtype)).view(dtype)


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(INTEGER[8 * x.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits; in float32 any NaN equals any other."""
    if a.dtype == torch.float32:
        a, b = (torch.where(torch.isnan(t), torch.nan, t) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))


def floats() -> Tensor:
    rng = np.random.default_rng(0)
    u = rng.integers(0, 1 << 32, 60_000, dtype=np.uint32)
    x = torch.from_numpy(u).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3.75, 0.25, 15.0, 88.8, -88.8])
    return torch.cat([special, x, torch.randn(60_000, generator=torch.Generator().manual_seed(0)) * 4])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_every_input_on_every_path(function, mode, path):
    for dtype, fmt in SMALL.items():
        x = everything(dtype)
        want = torch.from_numpy(
            reference.answers(function, mode, fmt).view(np.int16 if fmt.bits == 16 else np.uint8).copy()
        )
        with kernels.forced(path):
            assert torch.equal(bits_of(call(function, x, mode)), want)
            for arithmetic in (False, True):
                assert torch.equal(bits_of(aten.activation(x, function, mode, arithmetic=arithmetic)), want)


@pytest.mark.parametrize("function", oracle.FUNCTIONS)
def test_exact_is_correctly_rounded(function):
    for dtype, fmt in SMALL.items():
        right, _ = oracle.rounded(function, fmt, fmt.all_bits())
        got = bits_of(call(function, everything(dtype))).numpy().astype(np.int64) & ((1 << fmt.bits) - 1)
        assert np.array_equal(got, right)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("function", [function for function, mode in CASES if mode == "ktanh"])
def test_float32_ktanh_and_hard_are_their_definition(function, path):
    x = floats()
    bits = x.view(torch.int32).numpy().view(np.uint32)
    for mode in ("ktanh", "hard"):
        want = torch.from_numpy(reference.compute(function, mode, formats.FP32, bits)).view(torch.float32)
        with kernels.forced(path):
            assert same(call(function, x, mode), want)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("function", "mode"), [case for case in CASES if case[1] in ("exact", "fast")])
def test_float32_keeps_its_bound(function, mode, path):
    x = floats()
    keep = ~torch.isnan(x)
    with kernels.forced(path):
        got = call(function, x, mode)
    assert torch.isnan(got[~keep]).all()
    wide = x[keep].double().numpy()
    true, y = oracle.evaluate(function, wide), got[keep].double().numpy()
    true = np.where(true >= 2.0**128 - 2.0**103, np.inf, true)  # exp: no float32 is so large
    assert np.array_equal(y[~np.isfinite(true)], true[~np.isfinite(true)])
    assert np.array_equal(np.signbit(y), np.signbit(true))
    assert (reference.ulps(y, true) <= reference.bound32(function, mode, wide)).all()


@pytest.mark.parametrize(("function", "mode"), [case for case in CASES if case[1] in ("exact", "fast")])
def test_float32_has_one_result_on_every_path(function, mode):
    generator = torch.Generator().manual_seed(7)
    tails = [torch.rand(20_000, generator=generator) * -width for width in (1, 12, 110)]
    x = torch.cat([floats(), *tails, torch.randn(20_000, generator=generator) * 1e-3])
    want = call(function, x, mode)
    for path in PATHS[1:]:
        with kernels.forced(path):
            assert same(call(function, x, mode), want)


def test_ktanh_table_argument():
    x = everything(torch.bfloat16)
    table = act.load("tanh_bf16_monotone")
    want = torch.from_numpy(table.compute(np.arange(65536)).view(np.int16))
    for given in (table, "tanh_bf16_monotone"):
        assert torch.equal(bits_of(act.tanh(x, "ktanh", table=given)), want)
    for arithmetic in (False, True):
        assert torch.equal(bits_of(aten.activation(x, "tanh", "ktanh", table.text, arithmetic)), want)
    wide = act.tanh(floats(), "ktanh", table=table.to_format("fp32"))
    with kernels.forced("pytorch"):
        assert same(wide, act.tanh(floats(), "ktanh", table=table.to_format("fp32")))
    derived = reference.answers("sigmoid", "ktanh", formats.BF16, table)
    assert torch.equal(bits_of(act.sigmoid(x, "ktanh", table=table)), torch.from_numpy(derived.view(np.int16).copy()))
    direct = act.load("sigmoid_bf16")
    assert same(act.sigmoid(x, "ktanh", table=direct), act.sigmoid(x))


def test_derived_functions_are_near():
    """Maximum errors of the derived functions, |x| <= 16, in bf16."""
    x = everything(torch.bfloat16)
    x = x[x.abs() <= 16]
    for function, bound in {"sigmoid": 0.0059, "silu": 0.0283, "gelu_tanh": 0.0144}.items():
        true = oracle.evaluate(function, x.double().numpy())
        assert np.abs(call(function, x, "ktanh").double().numpy() - true).max() < bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", oracle.FUNCTIONS)
def test_shapes_and_layouts(function, dtype):
    base = (torch.randn(6, 10, 8, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    for mode in reference.modes(function):
        whole = call(function, base, mode)
        assert same(call(function, base.transpose(0, 2), mode), whole.transpose(0, 2))
        assert call(function, base.transpose(0, 2), mode).stride() == base.transpose(0, 2).stride()
        assert same(call(function, base[::2, 1::3, 3:], mode), whole[::2, 1::3, 3:])
        assert same(call(function, base[:, :1].expand(6, 10, 8), mode), whole[:, :1].expand(6, 10, 8))
        assert same(call(function, base[0, 0, 0], mode), whole[0, 0, 0])
        assert call(function, base[:0], mode).shape == (0, 10, 8)
        nchw = base.unsqueeze(0).to(memory_format=torch.channels_last)
        assert same(call(function, nchw, mode), whole.unsqueeze(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_out_and_in_place(dtype):
    x = (torch.randn(7, 9) * 3).to(dtype)
    for function, mode in CASES:
        want = call(function, x, mode)
        out = torch.empty_like(x)
        assert call(function, x, mode, out=out) is out
        assert same(out, want)
        strided = torch.empty(9, 7, dtype=dtype).t()
        assert same(call(function, x, mode, out=strided), want)
        itself = x.clone()
        version = itself._version
        assert same(call(function, itself, mode, out=itself), want)
        assert itself._version > version
        room = torch.cat([x.reshape(-1), x.new_zeros(5)])
        assert same(call(function, room[:63], mode, out=room[5:]), want.reshape(-1))


def test_negated_views():
    z = torch.randn(50, dtype=torch.complex64).conj().imag
    assert z.is_neg()
    assert same(act.tanh(z), act.tanh(z.clone()))


def test_threads(monkeypatch):
    x = torch.randn(1 << 21).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = act.tanh(x)
        torch.set_num_threads(2)
        two = act.tanh(x)
    finally:
        torch.set_num_threads(before)
    assert same(one, two)
    assert same(one, torch.tanh(x))


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float64, torch.bool], ids=str)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=r"tanh takes bfloat16, .*; got " + str(dtype).removeprefix("torch.")):
        act.tanh(torch.zeros(3, dtype=dtype))


def test_bad_arguments_are_named():
    x = torch.zeros(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="mode must be one of exact, fast, ktanh, hard, got 'swift'"):
        act.tanh(x, "swift")
    for call_in in (act.tanh, lambda x, mode: act.silu_and_mul(x, x, mode)):
        with pytest.raises(ValueError, match=r"mode must be one of exact, fast, ktanh, hard, got \['exact'\]"):
            call_in(x, ["exact"])
    for function in ("mish", "softplus", "hardswish", "elu", "exp"):
        with pytest.raises(ValueError, match=f"{function} has the mode \"exact\" alone, .* got 'ktanh'"):
            call(function, x, "ktanh")
    with pytest.raises(ValueError, match='a table goes with mode="ktanh"'):
        act.tanh(x, table="tanh_bf16_monotone")
    with pytest.raises(ValueError, match="is for bf16, the input is fp16"):
        act.tanh(x.half(), "ktanh", table="tanh_bf16_monotone")
    with pytest.raises(ValueError, match="tanh needs a table of tanh"):
        act.tanh(x, "ktanh", table="gelu_bf16")
    with pytest.raises(ValueError, match="table must be"):
        act.tanh(x, "ktanh", table="nothing")
    for call_with in (lambda table: act.tanh(x, "ktanh", table=table), lambda table: act.Tanh("ktanh", table=table)):
        with pytest.raises(
            TypeError, match="table must be a Table, the name of a shipped one or a .json file, got int"
        ):
            call_with(3)
    with pytest.raises(ValueError, match="grad must be"):
        act.tanh(x, grad="z")
    with pytest.raises(ValueError, match='grad must be "x" for silu'):
        act.silu(x, grad="y")
    with pytest.raises(ValueError, match='in mode "hard"'):
        act.tanh(x, "hard", grad="y")
    with pytest.raises(ValueError, match="approximate must be"):
        act.gelu(x, approximate="erf")
    with pytest.raises(ValueError, match="out must have"):
        act.tanh(x, out=torch.zeros(3))
    with pytest.raises(ValueError, match="out must have"):
        act.tanh(x, out=torch.zeros(4, dtype=x.dtype))
    with pytest.raises(TypeError, match="takes a tensor, got list"):
        act.tanh([1.0])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="does not support gradients"):
        act.tanh(x.requires_grad_(), out=torch.zeros(3, dtype=x.dtype))


def test_a_file_is_what_it_holds_at_the_call(tmp_path, monkeypatch):
    x = everything(torch.bfloat16)
    published, wider = act.load("tanh_bf16_ktanh"), act.load("tanh_bf16_carry64")
    calls: dict[str, Callable[..., Tensor]] = {
        "function": lambda table: act.tanh(x, "ktanh", table=table),
        "module": lambda table: act.Tanh("ktanh", table=table)(x),
        "gated unit": lambda table: act.silu_and_mul(x, x, "ktanh", table=table),
    }
    for folder, table in (("one", published), ("one", wider), ("two", published)):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        table.save("a.json")
        for what, using in calls.items():
            wanted = using(table)
            assert same(using("a.json"), wanted), what
            assert same(using(Path("a.json")), wanted), what
    assert not same(calls["function"](published), calls["function"](wider))
    for path in ("a.json", Path("a.json")):
        compiled = torch.compile(lambda x, path=path: act.tanh(x, "ktanh", table=path), backend="eager", fullgraph=True)
        assert same(compiled(x), calls["function"](published))


def test_a_file_without_a_table_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cut.json").write_text("{")
    Path("list.json").write_text("[]")
    Path("row.json").write_text(act.load("tanh_bf16_ktanh").to_json().replace("[126,", "[999,", 1))
    x = torch.zeros(3, dtype=torch.bfloat16)
    for table, message in (
        ("cut.json", "'cut.json': not a table: "),
        (Path("list.json"), "'list.json': not a table of version 1"),
        ("row.json", "'row.json': tanh_bf16_ktanh: row "),
    ):
        for using in (
            act.load,
            lambda table: act.tanh(x, "ktanh", table=table),
            lambda table: act.LSTM(1, 1, mode="ktanh", table=table),
        ):
            with pytest.raises(ValueError, match=message):
                using(table)
    with pytest.raises(FileNotFoundError, match="none.json"):
        act.tanh(x, "ktanh", table="none.json")


@pytest.mark.parametrize("path", [None, "pytorch"])
def test_gradient_y_equals_pytorchs_bits(path):
    x = everything(torch.bfloat16)
    x = x[torch.isfinite(x)]
    for function in ("tanh",):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        with kernels.forced(path):
            call(function, a).backward(torch.ones_like(x))  # type: ignore[no-untyped-call]
        theirs(function, b).backward(torch.ones_like(x))  # type: ignore[no-untyped-call]
        assert a.grad is not None
        assert b.grad is not None
        assert same(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "function", ["silu", "gelu", "gelu_tanh", "quick_gelu", "mish", "hardswish", "elu", "softplus"]
)
def test_slopes_have_their_limits_at_infinity(function, dtype):
    large = torch.finfo(dtype).max / 8
    x = torch.tensor([-torch.inf, -large, large, torch.inf], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(call(function, x).sum(), x, create_graph=True)  # type: ignore[no-untyped-call]
    assert slope.tolist() == [0.0, 0.0, 1.0, 1.0]
    (bend,) = torch.autograd.grad(slope.sum(), x)
    assert bend.tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("function", "mode"), [case for case in CASES if case[1] != "hard"])
def test_gradients_against_float64(function, mode):
    """grad="x" is the derivative of the true function, whatever the mode; "y" follows the result's error."""
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 0.006)):
        x = (torch.linspace(-9, 9, 4001)).to(dtype)
        wide = x.double().requires_grad_()
        theirs(function, wide).sum().backward()  # type: ignore[no-untyped-call]
        ours = x.clone().requires_grad_()
        call(function, ours, mode, grad="x").sum().backward()  # type: ignore[no-untyped-call]
        assert ours.grad is not None
        assert wide.grad is not None
        assert ((ours.grad.double() - wide.grad).abs() / wide.grad.abs().clamp(min=1.0)).max() < bound
        assert ours.grad.dtype == dtype


def test_gradient_x_does_not_vanish_and_has_no_bias():
    x = torch.tensor([3.6, 5.0, 8.0, -20.0], dtype=torch.bfloat16, requires_grad=True)
    (y,) = torch.autograd.grad(act.tanh(x, grad="y").sum(), x)
    (direct,) = torch.autograd.grad(act.tanh(x, grad="x").sum(), x)
    assert (y == 0).all()
    assert (direct > 0).all()
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    true = 1 - torch.tanh(x.detach().double()) ** 2
    bias = {}
    for mode, grad in (("ktanh", "y"), ("ktanh", "x"), ("exact", "y")):
        (g,) = torch.autograd.grad(act.tanh(x, mode, grad=grad).sum(), x)
        bias[mode, grad] = float((g.double() - true).mean())
    assert bias["ktanh", "y"] == pytest.approx(1.1e-3, rel=0.15)
    assert abs(bias["ktanh", "x"]) < 5e-5
    assert abs(bias["exact", "y"]) < 5e-5


# PyTorch's own decompositions for forward mode are scripted
scripted = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@scripted
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_forward_mode_equals_reverse_mode(function, mode):
    x = torch.linspace(-4.03, 4.01, 101)
    tangent = torch.randn(101, generator=torch.Generator().manual_seed(0))
    for grad in gradients.forms(function, mode):

        def f(v: Tensor, grad: str = grad) -> Tensor:
            return call(function, v, mode, grad=grad)

        y, forward = torch.func.jvp(f, (x,), (tangent,))  # type: ignore[no-untyped-call]
        _, pull = torch.func.vjp(f, x)
        assert same(y, f(x))
        assert torch.allclose(forward, pull(tangent)[0], atol=1e-6)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent)))
        assert dual.tangent is not None
        assert same(dual.tangent, forward)
        assert same(dual.primal, y)
        some = x[:4]
        assert torch.allclose(
            torch.func.hessian(lambda v: f(v).sum())(some),  # type: ignore[no-untyped-call]
            torch.func.jacrev(torch.func.jacrev(lambda v: f(v).sum()))(some),  # type: ignore[no-untyped-call]
            atol=1e-5,
        )


@scripted
def test_out_refuses_tangents():
    x = torch.zeros(3)
    with forward_ad.dual_level():
        assert act.tanh(x, out=torch.empty(3)).shape == (3,)
        with pytest.raises(RuntimeError, match="does not support gradients"):
            act.tanh(forward_ad.make_dual(x, x), out=torch.empty(3))


def test_hard_gradients():
    for function in (function for function, mode in CASES if mode == "hard"):
        x = torch.linspace(-4.03, 4.01, 311, dtype=torch.float32, requires_grad=True)
        (g,) = torch.autograd.grad(call(function, x, "hard").sum(), x)
        wide = x.detach().double().requires_grad_()
        (true,) = torch.autograd.grad(aten.hard32(wide, function).sum(), wide)
        assert torch.allclose(g.double(), true, atol=1e-6)


def test_gradient_of_8_bit_formats():
    x = torch.tensor([0.5, -1.0, 2.0]).to(torch.float8_e4m3fn).requires_grad_()
    y = act.tanh(x)
    (g,) = torch.autograd.grad(y, x, torch.ones(3).to(torch.float8_e4m3fn))
    assert same(g, (1 - y.detach().float() ** 2).to(torch.float8_e4m3fn))


def test_autocast_leaves_the_dtype_alone():
    layer = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = act.silu(layer(torch.randn(4, 8)))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()  # type: ignore[no-untyped-call]
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.fixture
def flushing():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_flushing_subnormals_changes_no_bit(function, mode, path, flushing):
    launch._steps.clear()
    launch.ready.clear()
    for cache in (reference.answers, reference.table_for):
        cache.cache_clear()
    aten._names.clear()
    x = torch.cat([floats()[:2000], torch.tensor([1e-40, -1e-40, 1.2e-38, -2.3e-38])])
    with kernels.forced(path):
        got = {dtype: call(function, everything(dtype), mode) for dtype in SMALL}
        single = call(function, x, mode)
    assert torch.tensor(1e-40) * 1.0 == 0.0  # the mode is the caller's again
    torch.set_flush_denormal(False)
    with kernels.forced(path):
        assert all(same(y, call(function, everything(dtype), mode)) for dtype, y in got.items())
        assert same(single, call(function, x, mode))


def test_flushing_reaches_no_thread(flushing):
    x = torch.full((1 << 20,), 1e-40)
    assert same(act.tanh(x), x)


def test_tensors_without_memory_by_strides():
    x = torch.randn(4, 8)
    act.tanh(x)
    act.gelu(x, "ktanh")
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    nested = torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged)
    for function, mode in (("tanh", "exact"), ("gelu", "ktanh")):
        with pytest.raises(ValueError, match="memory was freed"):
            call(function, freed, mode)
        with pytest.raises(ValueError, match="memory was freed"):
            call(function, x, mode, out=freed)
        with pytest.raises(TypeError, match=r"takes a dense tensor, got layout torch.sparse_coo: use x.to_dense\(\)"):
            call(function, x.to_sparse(), mode)
        with pytest.raises(TypeError, match="out must be a dense tensor, got layout torch.sparse_coo"):
            call(function, x, mode, out=x.to_sparse())
        with pytest.raises(TypeError, match="got a nested tensor: pad it"):
            call(function, nested, mode)
        assert same(call(function, torch._efficientzerotensor(4, 8), mode), torch.zeros(4, 8))
        assert call(function, x.to("meta"), mode).device.type == "meta"
        functional_tensor = torch._to_functional_tensor(x)
        assert same(torch._from_functional_tensor(call(function, functional_tensor, mode)), call(function, x, mode))
        with pytest.raises(RuntimeError, match="more than one element"):
            call(function, x, mode, out=torch.zeros(4, 1).expand(4, 8))


def test_out_in_inference_mode():
    x = torch.randn(9)
    with torch.inference_mode():
        act.tanh(x, out=(out := torch.empty(9)))
        act.tanh(x, out=out)
    assert same(out, act.tanh(x))


def test_out_in_functional_transforms():
    x, out = torch.randn(3, 4), torch.empty(3, 4)
    torch.func.vmap(lambda v, o: act.silu(v, out=o))(x, out)
    assert same(out, act.silu(x))
    with pytest.raises(RuntimeError, match="does not support gradients"):
        torch.func.grad(lambda v: act.silu(v, out=torch.empty_like(v)).sum())(x)
