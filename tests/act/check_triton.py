"""The Triton kernels in Triton's interpreter, on every input: ``make test-triton`` runs this file."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from rarefy.act.kernels import aten, triton
from rarefy.act.spec import oracle, reference

CASES = [(function, mode) for function in oracle.FUNCTIONS for mode in reference.modes(function)]
SMALL = [dtype for dtype, fmt in aten.FORMAT_OF.items() if fmt.bits <= 16]


@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize(("function", "mode"), CASES)
def test_every_input(function, mode, dtype):
    fmt = aten.FORMAT_OF[dtype]
    x = torch.from_numpy(fmt.all_bits().astype(fmt.dtype)).view(dtype)
    got = triton.activation(x, function, mode)
    integer = torch.int16 if fmt.bits == 16 else torch.uint8
    assert torch.equal(got.view(integer), aten.activation(x, function, mode).view(integer))


def test_tables_tails_and_errors():
    x = torch.randn(1027).bfloat16()
    for name in ("tanh_bf16_monotone", "tanh_bf16_carry64", "tanh_bf16"):
        got = triton.activation(x, "tanh", "ktanh", name)
        assert torch.equal(got, aten.activation(x, "tanh", "ktanh", name))
    assert triton.activation(x[:0], "tanh").numel() == 0
    with pytest.raises(TypeError, match="at most 16 bits"):
        triton.activation(torch.zeros(3), "tanh")
