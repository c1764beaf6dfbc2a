"""The Triton kernels of LSTM and GRU in Triton's interpreter, against PyTorch's operators: ``make test-triton``."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import pytest
import torch

from rarefy import act, kernels
from rarefy.act import cells
from rarefy.act.kernels import cells_triton
from tests.act.test_recurrent import flat, gradients, near, ours


@pytest.fixture
def fused(monkeypatch):
    """Let tensors on the CPU, without native kernels, take Triton's way; ``fused["on"]`` turns it off."""
    how = {"on": True}
    monkeypatch.setattr(cells, "_triton", lambda like, gates=None: cells_triton if how["on"] else None)
    monkeypatch.setattr(cells, "gradient_dtype", lambda like: like.dtype)  # as on a GPU
    return how


@pytest.mark.parametrize("mode", ["exact", "ktanh", "hard"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_steps_are_those_of_pytorch(fused, kind, dtype, mode):
    torch.manual_seed(0)
    cells_triton.probe(torch.device("cpu"))
    with kernels.forced("pytorch"):
        for bidirectional, hidden, batch in ((False, 37, 9), (True, 8, 3)):
            module: Any = getattr(act, kind)(5, hidden, mode=mode, dtype=dtype, bidirectional=bidirectional)
            directions = 2 if bidirectional else 1
            x = torch.randn(3, batch, 5).to(dtype)
            states = [torch.randn(directions, batch, hidden).to(dtype) for _ in range(2 if kind == "LSTM" else 1)]
            weights = [torch.randn(3, batch, directions * hidden), *(torch.randn(s.shape) for s in states)]
            found = {}
            for on in (True, False):
                fused["on"] = on
                y, after = ours(module, x, states)
                found[on] = [y, *after]
                found[on] += gradients(module, x, states, weights, ours)
            outputs = 1 + len(states)
            # the interpreter's fma, which exact functions of float32 take, rounds twice
            bound = 2**-21 if (dtype, mode) == (torch.float32, "exact") else 0.0
            for a, b in zip(found[True][:outputs], found[False][:outputs], strict=True):
                near(a, b, bound)
            for a, b in zip(found[True][outputs:], found[False][outputs:], strict=True):
                near(a, b, 2**-8)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_packed_sequences(fused, kind):
    torch.manual_seed(0)
    module: Any = getattr(act, kind)(3, 6, dtype=torch.bfloat16, bidirectional=True)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3).bfloat16() for n in (4, 3, 1)])
    results = []
    with kernels.forced("pytorch"):
        for on in (True, False):
            fused["on"] = on
            y, after = module(packed)
            (y.data.float().sum() + sum(a.float().sum() for a in flat(after))).backward()
            results.append((y.data, [p.grad.clone() for p in module.parameters()]))
            module.zero_grad()
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        near(a, b, 2**-8)
