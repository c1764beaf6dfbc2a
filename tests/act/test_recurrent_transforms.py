"""LSTM and GRU under forward mode, the transforms of torch.func, torch.jit.trace and exports to ONNX."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from rarefy import act

KINDS = ["LSTM", "GRU"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.usefixtures("plain_lstm"),
]


@pytest.fixture
def plain_lstm(monkeypatch):
    """Without oneDNN, whose LSTM has no forward mode."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


def first(result: Any) -> Tensor:
    """The output, or the first state of a cell."""
    while isinstance(result, tuple):
        result = result[0]
    return result


def pair(name: str, *sizes: int, **options: Any) -> tuple[Any, Any]:
    """Ours, and PyTorch's of the same weights."""
    ours, theirs = getattr(act, name)(*sizes, **options), getattr(nn, name)(*sizes, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize("frozen", [False, True])
def test_tangents_are_those_of_pytorch(name, frozen):
    ours, theirs = pair(name, 4, 5)
    for module in (ours, theirs):
        module.requires_grad_(not frozen)
    x, t = torch.randn(2, 3, *([] if "Cell" in name else [2]), 4).unbind(0)
    y, tangent = torch.func.jvp(lambda x: first(ours(x)), (x,), (t,))
    want, expected = torch.func.jvp(lambda x: first(theirs(x)), (x,), (t,))
    assert expected.abs().max() > 0.01
    assert torch.allclose(y, want, atol=1e-6)
    assert torch.allclose(tangent, expected, atol=1e-5)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(first(ours(forward_ad.make_dual(x, t))))
        assert torch.allclose(dual.tangent, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["exact", "ktanh", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_mode_has_the_results_and_gradients_of_the_kernels(kind, mode, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for layers, bidirectional, bias, packed in itertools.product((1, 2), (False, True), (False, True), (False, True)):
        module = getattr(act, kind)(4, 5, layers, bias=bias, bidirectional=bidirectional, mode=mode, dtype=dtype)
        if packed:
            x: Any = pack_sequence([torch.randn(n, 4, dtype=dtype) for n in (4, 3, 1)])
            like, sizes = x.data, x.batch_sizes
        else:
            like = torch.randn(4, 3, 4, dtype=dtype)

        def call(data: Tensor, module: Any = module, sizes: Any = sizes if packed else None) -> tuple[Tensor, Tensor]:
            y, last = module(data if sizes is None else PackedSequence(data, sizes))
            return (y if sizes is None else y.data), last[0] if isinstance(last, tuple) else last

        t = torch.randn_like(like)
        both, tangents = torch.func.jvp(call, (like,), (t,))
        results, back = torch.func.vjp(call, like)
        upstream = tuple(torch.randn_like(y) for y in results)
        for y, want in zip(both, results, strict=True):
            assert torch.allclose(y, want, atol=tolerance)
        # u . (J t) = (J^T u) . t
        ahead = sum((u.float() * tangent.float()).sum() for u, tangent in zip(upstream, tangents, strict=True))
        behind = (back(upstream)[0].float() * t.float()).sum()
        assert torch.allclose(ahead, behind, atol=1e-4 if dtype == torch.float32 else 0.5)


def test_forward_mode_takes_projections():
    ours, theirs = pair("LSTM", 4, 5, proj_size=3)
    x = torch.randn(3, 2, 4)
    got, want = (torch.func.jvp(lambda x, m=m: m(x)[0], (x,), (x,)) for m in (ours, theirs))
    assert torch.allclose(got[0], want[0], atol=1e-6)
    assert torch.allclose(got[1], want[1], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_has_second_derivatives(kind):
    ours, theirs = pair(kind, 2, 3)
    x = torch.randn(3, 1, 2)
    got, want = (torch.func.hessian(lambda x, m=m: m(x)[0].square().sum())(x) for m in (ours, theirs))
    assert want.abs().max() > 0.01
    assert torch.allclose(got, want, atol=1e-5)


def test_a_swapped_model_keeps_its_tangents():
    for kind in KINDS:
        ours, theirs = pair(kind, 4, 5)
        ours.activation_mode = "hard"
        model = nn.Sequential(theirs)
        assert act.swap(model, "hard").replaced
        x = torch.randn(3, 2, 4)
        got, want = (torch.func.jvp(lambda x, m=m: first(m(x)), (x,), (x,))[1] for m in (model, ours))
        assert want.abs().max() > 0.01
        assert torch.equal(got, want)


def test_an_operator_does_not_lose_a_tangent_in_silence():
    h = torch.zeros(2, 5)
    with forward_ad.dual_level():
        products = forward_ad.make_dual(torch.randn(6, 20), torch.ones(6, 20))
        with pytest.raises(RuntimeError, match="no forward-mode derivative: call the module itself"):
            torch.ops.rarefy.lstm(products, torch.randn(20, 5), None, h, h, None, False, "exact", "", False)
        with pytest.raises(RuntimeError, match="no forward-mode derivative: call the module itself"):
            torch.ops.rarefy.gru(products[:, :15], torch.randn(15, 5), None, h, None, False, "exact", "", False)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_functional_gradients_are_those_of_autograd(kind, swapped):
    ours, theirs = pair(kind, 4, 5)
    model = nn.Sequential(theirs if swapped else ours)
    if swapped:
        assert act.swap(model, "hard").replaced
    x = torch.randn(3, 2, 4)
    model(x)[0].square().sum().backward()

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given, (x,))[0].square().sum()

    got = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    for name, p in model.named_parameters():
        assert torch.allclose(got[name], p.grad, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_that_are_not_taken_are_refused_in_words(kind):
    module = getattr(act, kind)(3, 4)
    x = torch.randn(2, 3, 3)

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].square().sum()

    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x)
    with pytest.raises(NotImplementedError, match=r"does not run under torch\.vmap"):
        torch.func.jacrev(lambda x: module(x)[0])(x)
    with pytest.raises(NotImplementedError, match=r"does not run under torch\.vmap"):
        torch.vmap(torch.func.grad(loss))(x[None])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_torchscript_traces_modules_that_train(kind):
    module = getattr(act, kind)(4, 5, batch_first=True)
    x = torch.randn(3, 2, 4)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, x), file)  # which checks what it recorded
    file.seek(0)
    loaded = torch.jit.load(file)
    loaded(x)[0].sum().backward()
    module(x)[0].sum().backward()
    for theirs, ours in zip(loaded.parameters(), module.parameters(), strict=True):
        assert torch.allclose(theirs.grad, ours.grad, atol=1e-6)


class Step(nn.Module):
    """A cell that takes the first step of a sequence."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        y = self.cell(x[0])
        return y[0] if isinstance(y, tuple) else y


def network(name: str, mode: str = "exact") -> nn.Module:
    """A layer, or a cell, of ours; or one of PyTorch's that is swapped."""
    torch.manual_seed(0)
    if name == "swapped":
        swapped = nn.GRU(4, 5, num_layers=2, bidirectional=True).eval()
        assert act.swap(swapped, mode=mode).replaced
        return swapped
    module = getattr(act, name)(4, 5, mode=mode).eval()
    return Step(module) if name.endswith("Cell") else module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("LSTM", "exact"),
        ("LSTM", "fast"),
        ("GRU", "exact"),
        ("LSTMCell", "exact"),
        ("GRUCell", "fast"),
        ("swapped", "exact"),
    ],
)
def test_onnx_has_torchs_own(name, mode, dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = network(name, mode), torch.randn(3, 2, 4)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=dynamo, **({"verbose": False} if dynamo else {}))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (got, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = model(x)
    torch.testing.assert_close(
        torch.from_numpy(got), wanted if isinstance(wanted, Tensor) else wanted[0], atol=1e-6, rtol=0
    )


def causes(error: BaseException | None) -> str:
    return "" if error is None else f"{error}\n{causes(error.__cause__)}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(
    ("name", "mode", "dtype"),
    [
        ("LSTM", "hard", torch.float32),
        ("GRUCell", "ktanh", torch.float32),
        ("LSTMCell", "hard", torch.float32),
        ("swapped", "exact", torch.bfloat16),
        ("swapped", "hard", torch.float32),
    ],
)
def test_onnx_that_has_not_the_numbers_says_what_to_do(name, mode, dtype, dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    model, x = network(name, mode).to(dtype), torch.randn(3, 2, 4, dtype=dtype)
    with pytest.raises(Exception, match="ONNX|torch.export") as caught:
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=dynamo, **({"verbose": False} if dynamo else {}))
    assert "restore() of its report" in causes(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_does_not_become_onnx_and_says_so(tmp_path):
    pytest.importorskip("onnxscript")
    program = torch.export.export(network("GRU"), (torch.randn(3, 2, 4),))
    with pytest.raises(Exception, match="ONNX|torch.export") as caught:
        torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True, verbose=False)
    assert "where torch.onnx.export is given the model itself" in causes(caught.value)


def test_what_a_swap_takes_away_is_told_with_the_way_back():
    model = nn.GRU(4, 5)
    x = torch.randn(3, 2, 4, requires_grad=True)

    def penalty() -> Tensor:
        (slope,) = torch.autograd.grad(model(x)[0].sum(), x, create_graph=True)
        slope.square().sum().backward()
        return model.weight_hh_l0.grad

    wanted = penalty()
    report = act.swap(model)
    with pytest.raises(RuntimeError, match=r"after rarefy.act.swap: restore\(\) of its report"):
        penalty()
    with pytest.raises(NotImplementedError, match=r"after rarefy.act.swap: restore\(\) of its report"):
        torch.vmap(lambda each: model(each)[0])(x[None])
    report.restore()
    model.zero_grad()
    assert torch.equal(penalty(), wanted)
