"""Thresholds over lists of layers: by hand, against autograd of the formula, and every path against PyTorch's."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy import kernels
from rarefy.kernels import _thresholds_native, _thresholds_pytorch, thresholds
from rarefy.kernels.thresholds import ThresholdedLayers, mask_

from .threshold_cases import KINDS, SHAPES, Case

PATHS = [*sorted({k.isa for k in kernels.table() if k.supported and k.name == "mask_f32"}), "pytorch"]
NAN, INF = math.nan, math.inf


@pytest.fixture(params=PATHS)
def path(request):
    with kernels.forced(request.param):
        yield request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def one(weight, rows=1):
    """A layer whose weight, used and dense, is the given one."""
    return ThresholdedLayers([weight.clone()], [weight.clone()], [rows])


def test_before_by_hand(path):
    layers = one(torch.tensor([[1.0, -1.0, 0.25, -0.25, 0.0, 0.5]]))
    layers.weights[0].zero_()
    grad = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    got = layers.before([grad], torch.tensor([0.5]), torch.tensor([0.5]))
    assert grad.tolist() == [[1, 2, 2, 4, 8, 16]]  # |W| = T is masked
    assert layers.weights[0].tolist() == [[1, -1, 0.25, -0.25, 0, 0.5]]
    # -(1*1 - 1*2 + .5*4 - .5*8 + 0 + .5*32): an exact zero has sign 0, and its weight still gets alpha of the gradient
    assert got.tolist() == [-13]
    assert got.dtype == torch.float32


def test_the_sparse_backward_cuts_below_the_bound(path):
    layers = one(torch.tensor([[1.0, 0.4, -0.3, 0.1], [1.0, 0.4, -0.3, 0.1]]), rows=2)
    grad = torch.ones(2, 4)
    got = layers.before([grad], torch.tensor([0.5, 0.2]), torch.tensor([0.5]), torch.tensor([0.3, 0.0]))
    assert grad.tolist() == [[1, 0.5, 0.5, 0], [1, 1, 1, 0.5]]
    assert got.tolist() == [-(1 + 0.5 - 0.5), -(1 + 1 - 1 + 0.5)]


def test_after_by_hand(path):
    given = [[1.0, -1.0, 0.25, -0.5, -0.0, 0.75], [1.0, -1.0, 0.25, -0.5, -0.0, 0.75]]
    weights = [torch.tensor(given), torch.tensor(given)]
    layers = ThresholdedLayers(weights, [torch.zeros(2, 6), torch.zeros(2, 6)], [1, 2])
    layers.after(torch.tensor([0.5, 0.5, 0.75]), torch.tensor([1.0, 0.0]))
    assert weights[0].tolist() == [[0.5, -0.5, 0, 0, 0, 0.25]] * 2
    assert weights[1].tolist() == [[1, -1, 0, 0, 0, 0.75], [1, -1, 0, 0, 0, 0]]
    for latent in layers.latents:
        assert latent.tolist() == given
        assert latent[0, 4].signbit()
    assert not weights[0][0, 4].signbit()  # what is masked is +0
    half = one(torch.tensor([1.0, -1.0, 0.5]))
    half.after(torch.tensor([0.5]), torch.tensor([0.5]))
    assert half.weights[0].tolist() == [0.75, -0.75, 0]


def test_nan_infinities_and_zeros(path):
    given = torch.tensor([[NAN, INF, -INF, -0.0, 0.1, 1e-42, -2.0]])
    for shrink, expected in ((1.0, -1.5), (0.0, -2.0)):
        layers = one(given)
        layers.after(torch.tensor([0.5]), torch.tensor([shrink]))
        assert layers.weights[0][0, 0].isnan()
        assert layers.weights[0][0, 1:].tolist() == [INF, -INF, 0, 0, 0, expected]
        assert torch.equal(layers.latents[0].view(torch.int32), given.view(torch.int32))
        grad = torch.full_like(given, 3.0)
        got = layers.before([grad], torch.tensor([0.5]), torch.tensor([0.0]))
        assert grad.tolist() == [[3, 3, 3, 0, 0, 0, 3]]
        assert got.tolist() == [-(3 - 3 - 3)]  # NaN has no sign
        assert torch.equal(layers.weights[0].view(torch.int32), given.view(torch.int32))
    assert one(given).count(torch.tensor([0.5])).tolist() == [3]
    # A gradient that is not finite counts where the weight has a sign, and only there.
    for weight, is_nan in ((0.0, False), (1.0, True)):
        layers = one(torch.full((3,), weight))
        got = layers.before([torch.tensor([1.0, NAN, 1.0])], torch.tensor([0.5]), torch.ones(1))
        assert bool(got.isnan()) is is_nan


def test_count(path):
    layers = ThresholdedLayers(
        [torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(0, 3)],
        [torch.tensor([[0.5, -0.6, 0.7], [0.1, 0.2, -0.3]]) for _ in range(2)] + [torch.zeros(0, 3)],
        [1, 2, 0],
    )
    live = layers.count(torch.tensor([0.5, 0.5, 0.1]))
    assert live.tolist() == [2, 4, 0]
    assert live.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_masks_zero_and_keep_bits(path, dtype):
    given = torch.tensor([[NAN, INF, -0.0, 1.5], [NAN, -INF, -0.0, 2.5]], dtype=dtype)
    keep = torch.tensor([[True] * 4, [False] * 4])
    tensors = [
        given.clone(),
        given.t().contiguous().t(),
        given.clone(),
        torch.zeros(0, 2, dtype=dtype),
        given[:, :2].clone(),
    ]
    mask_(tensors, [keep, keep, keep.t().contiguous().t(), torch.zeros(0, 2, dtype=torch.bool), keep[:, :2]])
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[given.element_size()]
    for got in (*tensors[:3], tensors[4]):
        width = got.shape[1]
        assert torch.equal(got[0].contiguous().view(integer), given[0, :width].contiguous().view(integer))
        assert got[1].contiguous().view(integer).tolist() == [0] * width


@pytest.mark.parametrize("kind", KINDS)
def test_every_path_has_the_bits_of_pytorch(kind):
    case = Case(kind)
    with kernels.forced("pytorch"):
        expected = case.run()
    for isa in PATHS[:-1]:
        with kernels.forced(isa):
            case.same(case.run(), expected)


@pytest.mark.skipif(not kernels.table(), reason="no native kernels were built")
def test_which_path_runs(monkeypatch):
    calls = []
    for module in (_thresholds_native, _thresholds_pytorch):
        for name in ("before", "after", "count", "mask"):
            monkeypatch.setattr(module, name, _told(calls, module, name))
    pytorch = {"transposed rows", "strided", "bfloat16", "mixed"}
    for kind in ("float32", "channels_last", "odd gradients", "transposed", *pytorch):
        calls.clear()
        Case(kind).run()
        used = {module for module, name in calls if name != "mask"}
        assert used == {_thresholds_pytorch if kind in pytorch else _thresholds_native}, kind
    calls.clear()
    with kernels.forced("pytorch"):
        Case("float32").run()
    assert {module for module, _ in calls} == {_thresholds_pytorch}


def _told(calls, module, name):
    function = getattr(module, name)

    def told(*arguments):
        calls.append((module, name))
        return function(*arguments)

    return told


def test_native_paths_and_threads_add_in_one_order(threads):
    results = []
    for isa in PATHS[:-1]:
        for count in (1, 2, 3):
            threads(count)
            with kernels.forced(isa):
                results.append(Case("large").run())
    for got in results[1:]:
        for name in got:
            for a, b in zip(got[name], results[0][name], strict=True):
                assert torch.equal(a, b), name


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 12), min_size=0, max_size=4), min_size=0, max_size=5),
    per_row=st.booleans(),
    alpha=st.floats(0, 1, width=32),
    shrink=st.floats(0, 1, width=32),
    threshold=st.floats(0, 2, width=32),
    bounded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_layers(shapes, per_row, alpha, shrink, threshold, bounded, seed):
    case = Case(shapes=shapes, rows=per_row, alpha=alpha, shrink=shrink, bounded=bounded, seed=seed)
    case.thresholds.mul_(threshold)
    with kernels.forced("pytorch"):
        expected = case.run()
    for isa in PATHS[:-1]:
        with kernels.forced(isa):
            case.same(case.run(), expected)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_step_is_that_of_autograd_through_the_formula(path, per_row, alpha):
    """W^ = sign(W) max(|W| - T, 0): alpha 0 is its own gradient, alpha 1 the gradient as if nothing was masked."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 7), (4, 3, 3, 3), (2, 9, 5)]
    # Multiples of 1/64: every sum is exact, whatever its order.
    dense = [torch.randint(-128, 129, shape, generator=generator) / 64 for shape in shapes]
    grads = [torch.randint(-128, 129, shape, generator=generator) / 64 for shape in shapes]
    rows = [shape[0] if per_row else 1 for shape in shapes]
    values = torch.randint(1, 100, (sum(rows),), generator=generator) / 64

    layers = ThresholdedLayers([w.clone() for w in dense], [torch.zeros_like(w) for w in dense], rows)
    layers.after(values, torch.ones(3))
    used = [weight.clone() for weight in layers.weights]
    new = [grad.clone() for grad in grads]
    got = layers.before(new, values, torch.full((3,), alpha))

    expected = []
    for index, (weight, part) in enumerate(zip(dense, values.split(rows), strict=True)):
        w = weight.clone().requires_grad_()
        t = part.view(-1, *(1,) * (weight.dim() - 1)).clone().requires_grad_()
        out = torch.sign(w) * torch.relu(w.abs() - t)
        assert torch.equal(used[index], out)
        if alpha == 1.0:
            out = w - torch.sign(w) * t
        out.backward(grads[index])
        assert torch.equal(new[index], w.grad)
        assert torch.equal(layers.weights[index], weight)
        expected.append(t.grad.flatten())
    assert torch.equal(got, torch.cat(expected))


def test_a_missing_gradient_counts_as_zeros(path):
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    layers = ThresholdedLayers([torch.zeros(2), torch.zeros(2)], weights, [1, 1])
    grad = torch.tensor([1.0, 1.0])
    assert layers.before([None, grad], torch.zeros(2), torch.ones(2)).tolist() == [0, -2]
    assert [weight.tolist() for weight in layers.weights] == [[1, 2], [3, 4]]


def test_parameters_are_written_and_autograd_is_told(path):
    linear = nn.Linear(3, 2, bias=False)
    out = (linear.weight * linear.weight).sum()
    layers = ThresholdedLayers([linear.weight], [linear.weight.detach().clone()], [1])
    layers.after(torch.zeros(1), torch.ones(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    versions = [linear.weight._version, layers.latents[0]._version]
    layers.before([torch.ones(2, 3)], torch.zeros(1), torch.ones(1))
    assert linear.weight._version > versions[0]
    assert linear.weight.requires_grad
    assert linear.weight.grad is None


def test_neighbours_in_memory_stay(path):
    held = torch.full((3, 5000), 7.0)
    weight, latent, grad = (part[17:4021] for part in held)
    layers = ThresholdedLayers([weight], [latent], [1])
    layers.after(torch.tensor([7.0]), torch.ones(1))
    layers.before([grad], torch.tensor([7.0]), torch.zeros(1))
    mask_([weight], [torch.zeros(4004, dtype=torch.bool)])
    assert held[:, :17].unique().tolist() == held[:, 4021:].unique().tolist() == [7]
    assert weight.unique().tolist() == grad.unique().tolist() == [0]


def test_weights_may_move_and_layers_be_copied(path):
    linear = nn.Linear(2, 2, bias=False)
    layers = ThresholdedLayers([linear.weight], [torch.zeros(2, 2)], [1])
    layers.after(torch.zeros(1), torch.ones(1))
    linear.weight.data = torch.full((2, 2), 3.0)
    layers.after(torch.ones(1), torch.ones(1))
    assert linear.weight.unique().tolist() == [2]
    assert layers.latents[0].unique().tolist() == [3]
    other = copy.deepcopy(layers)
    other.after(torch.ones(1), torch.ones(1))
    assert other.weights[0].unique().tolist() == [1]
    assert linear.weight.unique().tolist() == [2]
    linear.weight.data = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"latents\[0\] must be as weights\[0\], torch.float64"):
        layers.after(torch.ones(1), torch.ones(1))


def test_what_the_caller_has_flushed_to_zero_is_not_here():
    given = torch.tensor([1e-42, -3e-42])
    layers = one(given)
    if not kernels.table() or not torch.set_flush_denormal(True):
        pytest.skip("needs native kernels, and a CPU that flushes")
    try:
        layers.after(torch.zeros(1), torch.ones(1))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(layers.weights[0], given)


A, B = torch.ones(4, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ThresholdedLayers([A], [B], [1, 1]), "one number of rows, got 1, 1 and 2"),
        (lambda: ThresholdedLayers([A], [B], [3]), r"rows\[0\] must be 1 or 4 for a weight of shape \(4, 3\), got 3"),
        (lambda: ThresholdedLayers([A], [B.double()], [1]), r"latents\[0\] must be as weights\[0\].*got torch.float64"),
        (lambda: ThresholdedLayers([A], [B[:3]], [1]), r"shape \(4, 3\) on cpu, got .* of shape \(3, 3\)"),
        (lambda: ThresholdedLayers([A], [B.to("meta")], [1]), "on cpu, got .* on meta"),
        (
            lambda: ThresholdedLayers([A], [B.t().contiguous().t()], [1]),
            r"have the strides \(3, 1\) of its weight, got",
        ),
        (lambda: ThresholdedLayers([A.int()], [B.int()], [1]), r"weights\[0\] must be of a floating dtype"),
        (lambda: ThresholdedLayers([A], [A], [1]), "share memory: give a tied weight once"),
        (lambda: ThresholdedLayers([A, A.to("meta")], [B, B.to("meta")], [1, 1]), "one ThresholdedLayers for each"),
    ],
)
def test_layers_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


T, ONE = torch.full((5,), 2.0), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, g: x.after(T[:4], ONE), r"thresholds must be float32 of shape \(5,\), one a row, on cpu.*\(4,\)"),
        (lambda x, g: x.after(T.double(), ONE), "thresholds must be float32 .* got torch.float64"),
        (lambda x, g: x.after(T.to("meta"), ONE), "thresholds .* on meta"),
        (lambda x, g: x.after(T, torch.tensor(1.0)), r"shrink must be float32 of shape \(2,\), one a layer"),
        (lambda x, g: x.count(T[:1]), "thresholds must be"),
        (lambda x, g: x.before(g[:1], T, ONE), "grads must be as many as weights, 2, got 1"),
        (lambda x, g: x.before([g[0], g[1].half()], T, ONE), r"grads\[1\] must be as weights\[1\], torch.float32"),
        (lambda x, g: x.before([g[0], torch.ones(1, 3).expand(4, 3)], T, ONE), r"grads\[1\] is expanded"),
        (lambda x, g: x.before(g, T, ONE[:1]), "alpha must be float32"),
        (lambda x, g: x.before(g, T, ONE, T[:2]), "lower must be float32"),
        (lambda x, g: mask_(g, [g[0] > 0]), "2 tensors and 1 masks"),
        (lambda x, g: mask_(g, [g[0] > 2, g[1]]), r"masks\[1\] must be bool .* got torch.float32"),
        (lambda x, g: mask_(g, [g[0] > 2, g[1][:1] > 2]), r"masks\[1\] must be bool of shape \(4, 3\)"),
        (lambda x, g: mask_([g[0].int(), g[1]], [g[0] > 2, g[1] > 2]), r"tensors\[0\] must be of a floating dtype"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(path, call, message):
    layers = ThresholdedLayers([torch.ones(4, 3) for _ in range(2)], [torch.zeros(4, 3) for _ in range(2)], [1, 4])
    grads = [torch.ones(4, 3) for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        call(layers, grads)
    for tensor in (*layers.weights, *grads):
        assert tensor.unique().tolist() == [1]
    assert torch.cat(layers.latents).unique().tolist() == [0]


@pytest.mark.skipif(not kernels.table(), reason="no native kernels were built")
def test_memory_that_is_not_there_is_refused():
    layers = one(torch.ones(4))
    layers.latents[0].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="memory was freed"):
        layers.count(torch.zeros(1))


def test_shapes_cover_chunks_and_their_tails():
    sizes = {math.prod(shape) for shape in SHAPES}
    assert {1, 9, 341, 4097, 0} <= sizes
    assert max(sizes) > 2 * _thresholds_native.CHUNK
    assert thresholds.ThresholdedLayers([], [], []).count(torch.zeros(0)).tolist() == []
