"""``torch.set_default_dtype``: a float32 model trains as without it, to the bit."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy import sparse
from tests.sparse.methods import EVERY, assert_equal, batch, create, network


@contextlib.contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", EVERY)
def test_a_float32_model_trains_alike_under_any_default_dtype(case, dtype):
    ends = []
    for used in (torch.float32, dtype):
        torch.manual_seed(1)
        model, batches = network(), [batch(step) for step in range(20)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with default(torch.float32 if "flops" in case else used):  # whose example input is made inside
            sparsifier = create(case, model, 20)
        with default(used):
            sparsifier.attach(optimizer)
            for images, labels in batches:
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
            ends.append({"layers": sparsifier.state_dict()["layers"]})
            sparsifier.finalize()
        ends[-1]["model"] = model.state_dict()
    assert_equal(*ends)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_accelerated_products_are_of_float32(dtype):
    ends = []
    for used in (torch.float32, dtype):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        x = torch.randn(64, 256)
        sparsifier = sparse.create("static", model, target=0.98, total_steps=30)
        with default(used):
            acceleration = sparse.accelerate(sparsifier.attach(optimizer))
            for _ in range(30):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            assert acceleration.choices()  # so that the kernels have run
            acceleration.restore()
        ends.append(model[0].weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
