"""LSTM and GRU against cells written out here from rarefy.act's functions, and against torch.nn's."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from rarefy import act, kernels
from rarefy.act import cells

RUNS = [k.isa for k in kernels.table() if k.name == "lstm_bf16" and k.supported]
KINDS = ["LSTM", "GRU"]
MODES = ["exact", "ktanh", "hard"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def step(
    kind: str, x: Tensor, states: list[Tensor], weights: list[Tensor | None], mode: str, table: Any
) -> list[Tensor]:
    """One step of a cell as the module's docstring writes it."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    assert w_ih is not None
    assert w_hh is not None
    h, dtype = states[0], x.dtype
    zero = torch.zeros(())
    b_i, b_h = (zero if b is None else b.float() for b in (b_ih, b_hh))
    p, q = x.float() @ w_ih.float().t(), h.float() @ w_hh.float().t()

    def as_made(p: Tensor) -> Tensor:
        return p.to(dtype).float() if cells.multiplies(x) else p

    def sigmoid(a: Tensor) -> Tensor:
        return act.sigmoid(a.to(dtype), mode, table=table).float()

    def tanh(a: Tensor) -> Tensor:
        return act.tanh(a.to(dtype), mode, table=table).float()

    if kind == "LSTM":
        a = as_made(p + (b_i + b_h)) + q
        i, f, g, o = a.chunk(4, -1)
        c = (sigmoid(f) * states[1].float() + sigmoid(i) * tanh(g)).to(dtype)
        h = (sigmoid(o) * tanh(c)).to(dtype)
        return [h if w_hr is None else (h.float() @ w_hr.float().t()).to(dtype), c]
    width = h.shape[-1]
    p = as_made(p + b_i + (zero if b_hh is None else F.pad(b_hh[: 2 * width].float(), (0, width))))
    inner = q[..., 2 * width :] + (zero if b_hh is None else b_hh[2 * width :].float())
    a = (p + q)[..., : 2 * width]
    r, z = sigmoid(a).chunk(2, -1)
    n = tanh(p[..., 2 * width :] + r * inner)
    return [((h.float() - n) * z + n).to(dtype)]


def weights_of(module: Any, layer: int, suffix: str) -> list[Tensor | None]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    return [getattr(module, f"{name}_l{layer}{suffix}", None) for name in names]


def reference(module: Any, x: Tensor, states: list[Tensor], lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
    """All layers of padded x [steps, batch, input], a sequence at a time; of states [layers, batch, size]."""
    kind, last = module.mode, []
    directions = ("", "_reverse") if module.bidirectional else ("",)
    for layer in range(module.num_layers):
        outputs = []
        for suffix in directions:
            weights = weights_of(module, layer, suffix)
            rows, ends = [], []
            for b, length in enumerate(lengths):
                now = [state[len(last), b : b + 1] for state in states]
                order = range(length) if suffix == "" else range(length - 1, -1, -1)
                ys: dict[int, Tensor] = {}
                for t in order:
                    now = step(kind, x[t, b : b + 1], now, weights, module.activation_mode, module.table)
                    ys[t] = now[0]
                y = torch.cat([ys[t] for t in range(length)])
                rows.append(F.pad(y, (0, 0, 0, x.shape[0] - length)))
                ends.append(now)
            outputs.append(torch.stack(rows, 1))
            last.append([torch.cat(some) for some in zip(*ends, strict=True)])
        x = torch.cat(outputs, -1)
    return x, [torch.stack(some) for some in zip(*last, strict=True)]


def simple(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give weights with which sums in float32 are exact in any order: halves, and one of W_hh and W_hr in each row."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            values = torch.randint(-3, 4, p.shape, generator=generator) * 0.5
            if "hh" in name or "hr" in name:
                if p.dim() == 2:
                    column = torch.randint(0, p.shape[1], (p.shape[0], 1), generator=generator)
                    values = torch.zeros(p.shape).scatter_(1, column, values.abs().clamp(min=0.5)[:, :1])
                else:
                    values = torch.zeros(p.shape)
            p.copy_(values)
    return module


def halves(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(1)) * 0.5


def flat(states: Any) -> list[Tensor]:
    return list(states) if isinstance(states, tuple) else [states]


def given(kind: str, states: list[Tensor]) -> Any:
    return tuple(states) if kind == "LSTM" else states[0]


def near(a: Tensor, b: Tensor, bound: float) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert (a.float() - b.float()).abs().max().item() <= bound * (1 + b.float().abs().max().item())


LAYERS = [
    {},
    {"num_layers": 2},
    {"bias": False},
    {"bidirectional": True, "num_layers": 2},
    {"proj_size": 3},
    {"proj_size": 2, "num_layers": 2, "bidirectional": True, "bias": False},
]


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_steps_made_of_the_functions(kind, mode, dtype, options):
    if kind == "GRU" and "proj_size" in options:
        pytest.skip("nn.GRU has no projection")
    steps, batch, hidden = 4, 3, 19
    module: Any = simple(getattr(act, kind)(5, hidden, mode=mode, dtype=dtype, **options))
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or hidden, hidden) if kind == "LSTM" else (hidden,)
    x, states = halves(steps, batch, 5).to(dtype), [halves(count, batch, size).to(dtype) for size in sizes]
    with torch.no_grad():
        expected, last = reference(module, x, states, [steps] * batch)
    with torch.no_grad():
        y, after = module(x, given(kind, states))
    # of float32 products with the state are not exact, and a kernel may not round them
    bound = 2e-6 if dtype == torch.float32 else 0.0
    near(y, expected, bound)
    for a, b in zip(flat(after), last, strict=True):
        near(a, b, bound)
    with_gradient, _ = module(x, given(kind, states))
    assert torch.equal(with_gradient, y)
    with kernels.forced("pytorch"), torch.no_grad():
        near(module(x, given(kind, states))[0], y, bound)


@pytest.mark.parametrize("isa", RUNS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_has_the_bits_of_pytorch_forms(kind, dtype, mode, isa):
    """At sizes around those of vectors, tiles and blocks."""
    sizes = ((1, 1, 3), (8, 2, 2), (17, 5, 2), (33, 70, 2), (130, 3, 2), (16, 1, 1), (65, 2, 3), (64, 17, 2))
    for hidden, batch, steps in sizes:
        module: Any = simple(getattr(act, kind)(3, hidden, mode=mode, dtype=dtype))
        x = halves(steps, batch, 3).to(dtype)
        with torch.no_grad(), kernels.forced(isa):
            y, after = module(x)
        with torch.no_grad(), kernels.forced("pytorch"):
            expected, last = module(x)
        bound = 2e-6 if dtype == torch.float32 else 0.0
        near(y, expected, bound)
        for a, b in zip(flat(after), flat(last), strict=True):
            near(a, b, bound)


def gradients(module: Any, x: Tensor, states: list[Tensor], weights: list[Tensor], run: Any) -> list[Tensor]:
    inputs = [x, *states, *module.parameters()]
    for t in inputs:
        t.grad = None
        t.requires_grad_()
    y, after = run(module, x, states)
    total = (y.float() * weights[0]).sum()
    for a, w in zip(after, weights[1:], strict=True):
        total = total + (a.float() * w).sum()
    return list(torch.autograd.grad(total, inputs))


def ours(module: Any, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    y, after = module(x, given(module.mode, states))
    return y, flat(after)


def written(module: Any, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return reference(module, x, states, [x.shape[0]] * x.shape[1])


@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("mode", ["exact", "hard"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd_over_the_steps(kind, mode, options):
    if kind == "GRU" and "proj_size" in options:
        pytest.skip("nn.GRU has no projection")
    torch.manual_seed(0)
    steps, batch, hidden = 3, 2, 11
    module: Any = getattr(act, kind)(5, hidden, mode=mode, **options)
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or hidden, hidden) if kind == "LSTM" else (hidden,)
    x, states = torch.randn(steps, batch, 5), [torch.randn(count, batch, size) for size in sizes]
    width = (module.proj_size or hidden) * (2 if module.bidirectional else 1)
    weights = [torch.randn(steps, batch, width), *(torch.randn_like(state) for state in states)]
    expected = gradients(module, x, states, weights, written)
    for isa in (None, "portable", "pytorch"):
        with kernels.forced(isa):
            for a, b in zip(gradients(module, x, states, weights, ours), expected, strict=True):
                near(a, b, 5e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_bfloat16_are_rounded_once_and_alike_in_all_forms(kind, mode):
    torch.manual_seed(0)
    steps, batch, hidden = 4, 5, 37
    module: Any = getattr(act, kind)(5, hidden, 1, mode=mode, dtype=torch.bfloat16)
    states = [torch.randn(1, batch, hidden).bfloat16() for _ in range(2 if kind == "LSTM" else 1)]
    x = torch.randn(steps, batch, 5).bfloat16()
    weights = [torch.randn(steps, batch, hidden), *(torch.randn(1, batch, hidden) for _ in states)]
    with kernels.forced("pytorch"):
        expected = gradients(module, x, states, weights, ours)
    wide = copy.deepcopy(module).float()
    exact = gradients(wide, x.detach().float(), [s.detach().float() for s in states], weights, ours)
    for isa in (None, "portable"):
        with kernels.forced(isa):
            found = gradients(module, x, states, weights, ours)
        for a, b, c in zip(found, expected, exact, strict=True):
            assert a.dtype == torch.bfloat16
            near(a, b, 2**-6)
            near(a.float(), c, 0.05 if mode == "exact" else 0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_unused_outputs_and_frozen_inputs_have_no_gradient(kind):
    module: Any = getattr(act, kind)(3, 4)
    x = torch.randn(2, 3, 3, requires_grad=True)
    _, after = module(x)
    flat(after)[-1].sum().backward()
    assert x.grad is not None
    module.weight_hh_l0.requires_grad_(False)
    module.zero_grad()
    module(torch.randn(2, 3, 3))[0].sum().backward()
    assert module.weight_hh_l0.grad is None
    assert module.weight_ih_l0.grad is not None


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind, options):
    if kind == "GRU" and "proj_size" in options:
        pytest.skip("nn.GRU has no projection")
    lengths, steps, hidden = [2, 5, 1, 5], 5, 9
    sizes = (options.get("proj_size", hidden), hidden) if kind == "LSTM" else (hidden,)
    count = options.get("num_layers", 1) * (2 if "bidirectional" in options else 1)
    x, states = halves(steps, 4, 3), [halves(count, 4, size) for size in sizes]
    for isa in (None, "portable", "pytorch"):
        for dtype, bound in ((torch.float32, 5e-6), (torch.bfloat16, 0.0)):
            module: Any = simple(getattr(act, kind)(3, hidden, dtype=dtype, **options))
            typed = [state.to(dtype) for state in states]
            packed = pack_padded_sequence(x.to(dtype), torch.tensor(lengths), enforce_sorted=False)
            with kernels.forced(isa), torch.no_grad():
                y, after = module(packed, given(kind, typed))
                expected, last = reference(module, x.to(dtype), typed, lengths)
            assert isinstance(y, PackedSequence)
            padded, back = pad_packed_sequence(y)
            assert back.tolist() == lengths
            near(padded, expected, bound)
            for a, b in zip(flat(after), last, strict=True):
                near(a, b, bound)
        with kernels.forced(isa):
            theirs: Any = getattr(nn, kind)(3, hidden, **options)
            module = getattr(act, kind)(3, hidden, **options)
            module.load_state_dict(theirs.state_dict())
            packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
            for each in (module, theirs):
                y, after = each(packed, given(kind, states))
                (y.data.sum() + sum(a.sum() for a in flat(after))).backward()
            for p, q in zip(module.parameters(), theirs.parameters(), strict=True):
                near(p.grad, q.grad, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_exact_is_a_drop_in(kind):
    """state_dict both ways, layouts, no batch, an empty batch, no states; the values of nn's within float32's noise."""
    torch.manual_seed(0)
    for options in ({}, {"batch_first": True}, {"num_layers": 2, "bidirectional": True, "bias": False}):
        theirs: Any = getattr(nn, kind)(6, 10, **options)
        module: Any = getattr(act, kind)(6, 10, **options)
        assert [(n, p.shape) for n, p in module.named_parameters()] == [
            (n, p.shape) for n, p in theirs.named_parameters()
        ]
        module.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(module.state_dict())
        for shape in ((4, 3, 6), (4, 6), (1, 1, 6), (3, 0, 6) if "batch_first" not in options else (0, 3, 6)):
            x = torch.randn(shape)
            a, b = module(x), theirs(x)
            for ours_, theirs_ in zip([a[0], *flat(a[1])], [b[0], *flat(b[1])], strict=True):
                assert ours_.shape == theirs_.shape
                assert torch.allclose(ours_, theirs_, atol=2e-6)
            again = module(x, a[1])
            for ours_, theirs_ in zip(flat(again[1]), flat(theirs(x, a[1])[1]), strict=True):
                assert torch.allclose(ours_, theirs_, atol=2e-6)
    strided = torch.randn(6, 3, 4).transpose(0, 2)
    module = getattr(act, kind)(6, 10)
    assert torch.equal(module(strided)[0], module(strided.contiguous())[0])


@pytest.mark.parametrize("kind", KINDS)
def test_cells(kind):
    torch.manual_seed(0)
    theirs: Any = getattr(nn, f"{kind}Cell")(5, 7)
    cell: Any = getattr(act, f"{kind}Cell")(5, 7)
    cell.load_state_dict(theirs.state_dict())
    for shape in ((3,), ()):
        x, states = torch.randn(*shape, 5), [torch.randn(*shape, 7) for _ in range(2 if kind == "LSTM" else 1)]
        for hx in (given(kind, states), None):
            for a, b in zip(flat(cell(x, hx)), flat(theirs(x, hx)), strict=True):
                assert a.shape == b.shape
                assert torch.allclose(a, b, atol=1e-6)
    for mode, dtype in itertools.product(MODES, DTYPES):
        simple_cell: Any = simple(getattr(act, f"{kind}Cell")(5, 7, mode=mode, dtype=dtype))
        x, states = halves(3, 5).to(dtype), [halves(3, 7).to(dtype) for _ in range(2 if kind == "LSTM" else 1)]
        weights = [getattr(simple_cell, n) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        expected = step(kind, x, states, [*weights, None], mode, None)
        for a, b in zip(flat(simple_cell(x, given(kind, states))), expected, strict=True):
            near(a, b, 2e-6 if dtype == torch.float32 else 0.0)
    without: Any = getattr(act, f"{kind}Cell")(5, 7, bias=False)
    flat(without(torch.randn(3, 5)))[0].sum().backward()
    assert without.weight_ih.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_pieces_is_the_sequence(kind):
    """h and c are what the next piece needs: they are rounded as they are stored."""
    module: Any = simple(getattr(act, kind)(3, 20, dtype=torch.bfloat16))
    x = halves(6, 2, 3).bfloat16()
    with torch.no_grad():
        whole, last = module(x)
        first, state = module(x[:1])
        second, state = module(x[1:], state)
    assert torch.equal(torch.cat([first, second]), whole)
    assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(last), strict=True))


def test_tables_of_tanh_in_mode_ktanh():
    x = halves(3, 2, 3).bfloat16()
    monotone: Any = simple(act.LSTM(3, 9, mode="ktanh", table="tanh_bf16_monotone", dtype=torch.bfloat16))
    with torch.no_grad():
        expected, _ = reference(monotone, x, [torch.zeros(1, 2, 9).bfloat16()] * 2, [3, 3])
        assert torch.equal(monotone(x)[0], expected)
    assert repr(monotone) == "LSTM(3, 9, mode='ktanh', table='tanh_bf16_monotone')"
    assert repr(act.GRUCell(3, 4, mode="hard")) == "GRUCell(3, 4, mode='hard')"
    assert repr(act.GRU(3, 4)) == "GRU(3, 4)"
    with pytest.raises(ValueError, match="is for bf16, the input is fp32"):
        act.LSTM(3, 4, mode="ktanh", table="tanh_bf16_monotone")(torch.zeros(2, 1, 3))


def test_dropout_is_between_layers_and_in_training_alone():
    torch.manual_seed(0)
    module = act.LSTM(4, 8, 2, dropout=0.5)
    plain = act.LSTM(4, 8, 2)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(3, 2, 4)
    first, _ = module(x)
    assert not torch.equal(first, module(x)[0])
    assert torch.equal(module.eval()(x)[0], plain(x)[0])
    torch.manual_seed(1)
    expected = module.train()(x)[0]
    torch.manual_seed(1)
    bottom, top = act.LSTM(4, 8), act.LSTM(8, 8)
    bottom.load_state_dict({k: v for k, v in module.state_dict().items() if k.endswith("l0")})
    top.load_state_dict({k.replace("l1", "l0"): v for k, v in module.state_dict().items() if k.endswith("l1")})
    torch.manual_seed(1)
    assert torch.equal(top(F.dropout(bottom(x)[0].view(6, 8), 0.5).view(3, 2, 8))[0], expected)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        act.GRU(3, 4, dropout=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_functional_calls(kind):
    torch.manual_seed(0)
    module: Any = getattr(act, kind)(3, 5, 2, mode="ktanh", table="tanh_bf16_monotone", dtype=torch.bfloat16)
    x = torch.randn(2, 3, 3).bfloat16()
    y = module(x)[0]
    assert torch.equal(copy.deepcopy(module)(x)[0], y)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x)[0], y)
    doubled = {name: 2 * p for name, p in module.named_parameters()}
    assert not torch.equal(torch.func.functional_call(module, doubled, (x,))[0], y)
    assert module.to(torch.float32).weight_ih_l0.dtype == torch.float32
    cell: Any = getattr(act, f"{kind}Cell")(3, 5, mode="hard")
    assert torch.equal(flat(pickle.loads(pickle.dumps(cell))(torch.ones(1, 3)))[0], flat(cell(torch.ones(1, 3)))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_its_dtype(kind):
    torch.manual_seed(0)
    module: Any = getattr(act, kind)(3, 5, 2, bidirectional=True)
    cell: Any = getattr(act, f"{kind}Cell")(3, 5)
    narrow, narrow_cell = copy.deepcopy(module).bfloat16(), copy.deepcopy(cell).bfloat16()
    x = torch.randn(4, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, after = module(x)
        step_ = cell(x[0])
        y.float().sum().backward()
    assert torch.equal(y, narrow(x.bfloat16())[0])
    assert {t.dtype for t in flat(after)} == {torch.bfloat16}
    assert torch.equal(flat(step_)[0], flat(narrow_cell(x[0].bfloat16()))[0])
    assert module.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's own look at it
@pytest.mark.parametrize("kind", KINDS)
def test_compile_and_export(kind):
    torch.manual_seed(0)
    module: Any = getattr(act, kind)(3, 5, 2, bidirectional=True, batch_first=True)
    x = torch.randn(2, 4, 3)
    y, _ = module(x)
    # as with nn's, Dynamo leaves the module to eager mode unless it is told otherwise
    assert torch.equal(torch.compile(module, backend="aot_eager")(x)[0], y)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        check_one_graph(kind, module, x, y)


def check_one_graph(kind: str, module: Any, x: Tensor, y: Tensor) -> None:
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x)[0], y)
    y.sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    compiled(x)[0].sum().backward()
    for p, g in zip(module.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, g, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(compiled(x)[0], y)
    exported = torch.export.export(module.requires_grad_(False).eval(), (x,))
    assert any(f"rarefy.{kind.lower()}" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x)[0], y)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operators_describe_themselves_rightly(kind):
    """Schema, fake tensors, and autograd of the operators themselves, with offsets too."""
    batch, hidden = 3, 4
    offsets = torch.tensor([0, 3, 5])
    h, c = torch.randn(batch, hidden, requires_grad=True), torch.randn(batch, hidden, requires_grad=True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for dtype in (torch.float32, torch.bfloat16):
        h, c = (torch.randn(batch, hidden, dtype=dtype, requires_grad=True) for _ in range(2))
        if kind == "LSTM":
            products, weight = torch.randn(5, 16), torch.randn(16, hidden, dtype=dtype)
            arguments: tuple[Any, ...] = (products, weight, None, h, c, offsets, False, "exact", "", True)
            torch.library.opcheck(torch.ops.rarefy.lstm.default, arguments, test_utils=tests)
        else:
            products, weight = torch.randn(5, 12), torch.randn(12, hidden, dtype=dtype)
            arguments = (products, weight, torch.randn(hidden), h, offsets, True, "exact", "", True)
            torch.library.opcheck(torch.ops.rarefy.gru.default, arguments, test_utils=tests)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_vmap_and_scripts_are_refused(kind):
    module: Any = getattr(act, kind)(3, 4)
    x = torch.randn(2, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match=r"does not run under torch\.vmap"):
        torch.vmap(lambda each: module(each)[0])(torch.randn(2, 2, 3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for each in (module, getattr(act, f"{kind}Cell")(3, 4)):
            with pytest.raises(RuntimeError, match="cannot be scripted"):
                torch.jit.script(each)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_pytorchs(kind):
    theirs, module = getattr(nn, kind)(3, 4), getattr(act, kind)(3, 4)
    state = torch.zeros(1, 2, 4)

    def hx(*states: Tensor) -> Any:
        return given(kind, list(states)[: 2 if kind == "LSTM" else 1])

    bad: list[tuple[Any, ...]] = [
        (torch.zeros(3),),
        (torch.zeros(2, 2, 5),),
        (torch.zeros(0, 2, 3),),
        (torch.zeros(2, 2, 3), hx(state[0], state[0])),
        (torch.zeros(2, 3), hx(state, state)),
        (torch.zeros(2, 3, 3), hx(state, state)),
        (torch.zeros(2, 2, 3, dtype=torch.float64),),
    ]
    packed = pack_sequence([torch.zeros(2, 5)])
    if kind == "GRU":
        bad.append((packed,))
    else:  # nn.LSTM does not look at it
        with pytest.raises(RuntimeError, match=r"input\.size\(-1\) must be equal to input_size"):
            module(packed)
    for arguments in bad:
        with pytest.raises((RuntimeError, ValueError)) as expected:
            theirs(*arguments)
        with pytest.raises(type(expected.value)) as found:
            module(*arguments)
        assert str(found.value) == str(expected.value)
    cell, theirs = getattr(act, f"{kind}Cell")(3, 4), getattr(nn, f"{kind}Cell")(3, 4)
    two = torch.zeros(2, 4)
    for arguments in (
        (torch.zeros(2, 2, 3),),
        (torch.zeros(2, 3), hx(state, state)),
        (torch.zeros(2, 5),),
        (torch.zeros(3, 3), hx(two, two)),
        (torch.zeros(2, 3), hx(two[:, :3], two[:, :3])),
    ):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            theirs(*arguments)
        with pytest.raises(type(expected.value)) as found:
            cell(*arguments)
        assert str(found.value) == str(expected.value)


def test_errors_of_its_own():
    with pytest.raises(ValueError, match="mode must be one of exact"):
        act.LSTM(3, 4, mode="quick")
    with pytest.raises(ValueError, match="a table goes with"):
        act.GRU(3, 4, table="tanh_bf16_monotone")
    with pytest.raises(ValueError, match="table must be one of tanh"):
        act.GRUCell(3, 4, mode="ktanh", table="sigmoid_bf16")
    with pytest.raises(TypeError, match="table must be a Table, the name of a shipped one or a .json file, got int"):
        act.LSTMCell(3, 4, mode="ktanh", table=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LSTM and GRU take bfloat16, float16, float32; got float64: convert"):
        act.LSTM(3, 4, dtype=torch.float64)(torch.zeros(2, 1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"h_0 of hx is torch\.bfloat16: use \.to"):
        act.GRU(3, 4)(torch.zeros(2, 1, 3), torch.zeros(1, 1, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="of the weights' dtype"):
        act.LSTMCell(3, 4)(torch.zeros(2, 3).bfloat16())


def test_the_operators_refuse_what_does_not_fit():
    h = torch.zeros(2, 4)
    lstm, gru = torch.ops.rarefy.lstm, torch.ops.rarefy.gru
    weight = torch.zeros(16, 4)
    good = (torch.zeros(4, 16), weight, None, h, h, None, False, "exact", "", False)
    assert lstm(*good)[0].shape == (4, 4)
    for index, value, match in (
        (0, torch.zeros(4, 15), "must be"),
        (0, torch.zeros(3, 16), "no whole number of steps"),
        (1, weight.bfloat16(), "one dtype"),
        (2, torch.zeros(3, 3), "projection must be"),
        (5, torch.tensor([0, 2, 5]), "offsets must go from 0 to 4"),
        (5, torch.tensor([0, 1, 4]), "offsets must go from 0 to 4"),
        (5, torch.tensor([0.0, 4.0]), "offsets must be int64"),
        (7, "quick", "mode must be"),
    ):
        with pytest.raises(ValueError, match=match):
            lstm(*good[:index], value, *good[index + 1 :])
    with pytest.raises(ValueError, match="bias must be"):
        gru(torch.zeros(4, 12), torch.zeros(12, 4), torch.zeros(3), h, None, False, "exact", "", False)
    with pytest.raises(RuntimeError, match="keep=True"):
        lstm(good[0].requires_grad_(), *good[1:])


def test_threads_do_not_change_the_bits(monkeypatch):
    monkeypatch.setattr(cells, "_THREADED", 1)
    torch.manual_seed(0)
    module = act.LSTM(8, 33)
    x = torch.randn(3, 21, 8)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            y, (h, c) = module(x)
            results.append([y, h, c, *torch.autograd.grad(y.sum(), list(module.parameters())[1:2])])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][2], results[1][2])


def test_flushed_subnormals_of_the_caller_do_not_reach_the_kernels():
    if not torch.set_flush_denormal(False):
        pytest.skip("this machine cannot flush")
    module: Any = simple(act.GRU(2, 8, mode="hard"))
    x = torch.zeros(1, 1, 2)
    h = torch.full((1, 1, 8), 1e-39)
    with torch.no_grad():
        expected = module(x, h)[0]
        torch.set_flush_denormal(True)
        try:
            found = module(x, h)[0]
        finally:
            torch.set_flush_denormal(False)
    assert torch.equal(found, expected)
