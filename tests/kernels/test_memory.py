"""What native kernels are given: plain memory, or an error that says what to do."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from rarefy import kernels


def freed():
    x = torch.zeros(3)
    x.untyped_storage().resize_(0)
    return x


def fake():
    with FakeTensorMode():
        return torch.zeros(3)


COMPLEX = torch.zeros(3, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        ([0.0], TypeError, "takes a tensor, got list"),
        (torch.zeros(3, device="meta"), ValueError, r"got one on meta: call it with cpu\(\)"),
        (torch.eye(3).to_sparse(), ValueError, r"layout torch.sparse_coo: call it with to_dense\(\)"),
        (COMPLEX.conj(), ValueError, r"resolve_conj\(\)"),
        (COMPLEX.conj().imag, ValueError, r"resolve_neg\(\)"),
        (torch._efficientzerotensor(3), ValueError, r"zeros without memory: call it with clone\(\)"),
        (freed(), ValueError, "memory was freed"),
        (fake(), ValueError, "got a FakeTensor: give its local tensor"),
    ],
)
def test_what_has_no_plain_memory_is_refused(tensor, error, message):
    with pytest.raises(error, match=message):
        kernels.address(tensor)


def test_tensors_seen_by_a_transform_are_refused():
    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(ValueError, match="inside a transform of torch.func"):
            transform(lambda x: x.sum() * kernels.address(x))(torch.ones(3))


def test_plain_tensors():
    for tensor in (torch.zeros(3), nn.Parameter(torch.zeros(3)), torch.zeros(4, 4)[1:, ::2], torch.zeros(0)):
        assert kernels.address(tensor) == tensor.data_ptr()
    with torch.inference_mode():
        assert kernels.address(torch.zeros(2)) > 0
