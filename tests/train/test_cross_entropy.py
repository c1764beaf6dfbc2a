"""The cross-entropy of translation against PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from rarefy.train import cross_entropy as module
from rarefy.train.cross_entropy import cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sum_and_gradient_are_pytorchs(dtype, smoothing, monkeypatch):
    monkeypatch.setattr(module, "CACHED", 50)  # three rows at a time
    torch.manual_seed(0)
    logits = (4 * torch.randn(11, 16)).to(dtype)
    logits[2, 3] = -torch.inf if smoothing == 0 else 5.0
    targets = torch.randint(1, 16, (11,))
    targets[[0, 6, 10]] = 0
    targets[2] = 5
    found = []
    for way in (
        lambda x: cross_entropy(x, targets, 0, smoothing),
        lambda x: F.cross_entropy(x.float(), targets, ignore_index=0, label_smoothing=smoothing, reduction="sum"),
    ):
        x = logits.clone().requires_grad_()
        total = way(x)
        (gradient,) = torch.autograd.grad(total * 3.0, x)
        found.append((total.detach(), gradient))
    (ours, d), (theirs, expected) = found
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, rtol=1e-6)
    assert d.dtype == dtype
    assert torch.allclose(d.float(), expected.float(), rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert (d[[0, 6, 10]] == 0).all()


def test_nothing_that_counts_is_zero():
    x = torch.randn(3, 5, requires_grad=True)
    total = cross_entropy(x, torch.zeros(3, dtype=torch.int64), 0, 0.1)
    total.backward()
    assert total.item() == 0
    assert x.grad is not None
    assert (x.grad == 0).all()
    assert cross_entropy(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 0).item() == 0
