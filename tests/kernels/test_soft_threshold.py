"""The operator against autograd of the published formula, on every path that this machine can run."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy import kernels
from rarefy.kernels.soft_threshold import count_above, soft_threshold

PATHS = [*sorted({k.isa for k in kernels.table() if k.supported}), "pytorch"]
SHAPES = [(1,), (7,), (9, 41), (5, 3, 3, 3), (16, 341), (3, 70_001), (4, 3, 2, 2, 2), (0, 4)]


def exact_values(*shape):
    """Multiples of 1/64 below 2: every sum of their products with alpha in halves is exact, whatever its order."""
    return torch.randint(-128, 129, shape) / 64


def per_layer(weight, value):
    return torch.full((1,) * weight.dim(), value)


def str_reference(weight, threshold):
    """Soft Threshold Reparameterization as published: autograd does the rest."""
    return torch.sign(weight) * torch.relu(weight.abs() - threshold)


@pytest.fixture(params=PATHS)
def path(request):
    with kernels.forced(request.param):
        yield request.param


def gradients(function, weight, threshold, grad):
    weight, threshold = weight.clone().requires_grad_(), threshold.clone().requires_grad_()
    out = function(weight, threshold)
    out.backward(grad)
    return out.detach(), weight.grad, threshold.grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_alpha_0_is_autograd_of_str_bit_for_bit(path, shape, per_channel):
    weight, grad = exact_values(*shape), exact_values(*shape)
    if per_channel and len(shape) > 1:
        threshold = torch.randint(1, 100, (shape[0],) + (1,) * (len(shape) - 1)) / 64
    else:
        threshold = per_layer(weight, 0.5)
    expected = gradients(str_reference, weight, threshold, grad)
    got = gradients(lambda w, t: soft_threshold(w, t, torch.tensor(0.0)), weight, threshold, grad)
    for name, a, b in zip(("output", "weight gradient", "threshold gradient"), got, expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("shape", SHAPES)
def test_alpha_1_is_the_identity_straight_through_bit_for_bit(path, shape):
    weight, grad = exact_values(*shape), torch.randn(shape)
    _, grad_weight, _ = gradients(
        lambda w, t: soft_threshold(w, t, torch.tensor(1.0)), weight, per_layer(weight, 0.7), grad
    )
    assert torch.equal(grad_weight, grad)


def test_hand_computed(path):
    weight = torch.tensor([[1.0, -1.0, 0.25, -0.25, 0.0, 0.5]])
    grad = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    out, grad_weight, grad_threshold = gradients(
        lambda w, t: soft_threshold(w, t, torch.tensor(0.5)), weight, per_layer(weight, 0.5), grad
    )
    assert out.tolist() == [[0.5, -0.5, 0, 0, 0, 0]]  # |W| = T is masked
    assert grad_weight.tolist() == [[1, 2, 2, 4, 8, 16]]
    # -(1*1 - 1*2 + .5*4 - .5*8 + 0 + .5*32): an exact zero has sign 0, and its weight still gets alpha of the gradient
    assert grad_threshold.item() == -13


def test_sparse_backward_cuts_below_the_bound(path):
    weight = torch.tensor([[1.0, 0.4, -0.3, 0.1]])
    grad = torch.ones(1, 4)
    lower = per_layer(weight, 0.3)
    _, grad_weight, grad_threshold = gradients(
        lambda w, t: soft_threshold(w, t, torch.tensor(0.5), lower), weight, per_layer(weight, 0.5), grad
    )
    assert grad_weight.tolist() == [[1, 0.5, 0.5, 0]]
    assert grad_threshold.item() == -(1 + 0.5 - 0.5)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    alpha=st.floats(0, 1),
    per_channel=st.booleans(),
    threshold=st.floats(0, 2),
    channels_last=st.booleans(),
)
def test_every_path_agrees_with_pytorch(shape, alpha, per_channel, threshold, channels_last):
    weight, grad = torch.randn(shape), torch.randn(shape)
    if channels_last and len(shape) == 4:
        weight = weight.to(memory_format=torch.channels_last)
    shape_of_threshold = ((shape[0] if per_channel else 1),) + (1,) * (len(shape) - 1)
    thresholds = torch.full(shape_of_threshold, threshold)
    results = {}
    for name in PATHS:
        with kernels.forced(name):
            results[name] = gradients(lambda w, t: soft_threshold(w, t, torch.tensor(alpha)), weight, thresholds, grad)
    reference = results.pop("pytorch")
    for got in results.values():
        assert torch.equal(got[0], reference[0])
        assert torch.equal(got[1], reference[1])
        torch.testing.assert_close(got[2], reference[2], rtol=1e-5, atol=1e-4)
    for a, b in itertools.pairwise(results.values()):
        assert torch.equal(a[2], b[2]), "native paths add in one order"


def test_threads_do_not_change_the_bits():
    weight, grad = torch.randn(3, 700_001), torch.randn(3, 700_001)
    threshold = torch.tensor([[0.3], [0.5], [0.7]])
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(gradients(lambda w, t: soft_threshold(w, t, torch.tensor(0.3)), weight, threshold, grad))
    torch.set_num_threads(1)
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


def test_nan_and_infinity_pass_through(path):
    weight = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.1]])
    out = soft_threshold(weight, per_layer(weight, 0.5), torch.tensor(0.5))
    assert out[0, 0].isnan()
    assert out[0, 1:].tolist() == [float("inf"), -float("inf"), 0]


def test_non_dense_weights_and_gradients(path):
    base = torch.randn(8, 12)
    weight, threshold, alpha = base[:, ::2], torch.full((1, 1), 0.4), torch.tensor(0.25)
    expected = soft_threshold(weight.contiguous(), threshold, alpha)
    assert torch.equal(soft_threshold(weight, threshold, alpha), expected)
    dense = torch.randn(6, 8, requires_grad=True)
    soft_threshold(dense, threshold, alpha).t().backward(torch.ones(8, 6))
    assert torch.equal(dense.grad, torch.where(dense.abs() > 0.4, 1.0, 0.25))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_keep_theirs(path, dtype):
    weight = exact_values(6, 10).to(dtype).requires_grad_()
    threshold = per_layer(weight, 0.5).requires_grad_()
    out = soft_threshold(weight, threshold, torch.tensor(0.5))
    out.backward(torch.ones_like(out))
    assert out.dtype == weight.grad.dtype == dtype
    assert threshold.grad.dtype == torch.float32
    assert torch.equal(out.float(), str_reference(weight.detach().float(), threshold.detach()))


def test_count_above(path):
    weight = torch.randn(16, 5, 3, 3)
    for threshold in (per_layer(weight, 0.5), torch.rand(16, 1, 1, 1)):
        assert count_above(weight, threshold).item() == int((weight.abs() > threshold).sum())
    assert count_above(torch.empty(0, 3), torch.zeros(1, 1)).item() == 0


def test_opcheck(path):
    weight = torch.randn(4, 6, requires_grad=True)
    threshold = torch.full((1, 1), 0.5, requires_grad=True)
    arguments = (weight, threshold, torch.tensor(0.5))
    torch.library.opcheck(torch.ops.rarefy.soft_threshold, arguments)
    torch.library.opcheck(torch.ops.rarefy.soft_threshold, (*arguments, torch.full((1, 1), 0.2)))


def test_the_operator_keeps_no_copy_of_the_weights():
    weight = torch.randn(64, 64, requires_grad=True)
    threshold = torch.full((1, 1), 0.5, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = soft_threshold(weight, threshold, torch.tensor(0.5))
    large = {t.data_ptr() for t in kept if t.numel() > 1}
    assert large == {weight.data_ptr()}
    assert out.data_ptr() != weight.data_ptr()
