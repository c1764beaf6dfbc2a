"""The Triton kernels of thresholds in Triton's interpreter: ``make test-triton`` runs this file."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from rarefy import kernels
from rarefy.kernels import _thresholds_triton, thresholds
from rarefy.kernels.thresholds import ThresholdedLayers, mask_

from .threshold_cases import KINDS, Case


@pytest.fixture
def interpreted(monkeypatch):
    """Where a kernel of a GPU would run, run it here."""

    def chosen(device, dtype):
        return _thresholds_triton if dtype in _thresholds_triton.TYPES else thresholds._thresholds_pytorch

    monkeypatch.setattr(thresholds, "_implementation", chosen)


# The interpreter takes milliseconds a program: few chunks, and all kinds of tails.
FEW = [(1,), (2, 4097), (9, 41), (341,), (5, 3, 3, 3), (3, 1, 2, 2), (2, 3, 2, 2, 2), (0, 4), ()]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("float64", "large")])
def test_the_bits_of_pytorch(kind, monkeypatch, interpreted):
    case = Case(kind, FEW)
    if kind == "bfloat16":
        # The interpreter cuts where a GPU rounds: numbers whose results need neither.
        for name in ("dense", "grads"):
            setattr(case, name, [(64 * t).round().clamp(-127, 127) / 64 for t in getattr(case, name)])
        case.thresholds = (64 * case.thresholds).round() / 64
        case.alpha, case.shrink = ((2 * t).round() / 2 for t in (case.alpha, case.shrink))
    got = case.run()
    monkeypatch.undo()
    with kernels.forced("pytorch"):
        case.same(got, case.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_infinities(monkeypatch, interpreted, dtype):
    given = torch.tensor([float("nan"), float("inf"), -float("inf"), -2.0, 0.1], dtype=dtype)
    layers = ThresholdedLayers([given.clone()], [given.clone()], [1])
    layers.after(torch.tensor([0.5]), torch.ones(1))
    assert layers.weights[0][0].isnan()
    assert layers.weights[0][1:].tolist() == [float("inf"), -float("inf"), -1.5, 0]
    assert layers.count(torch.tensor([0.5])).tolist() == [3]
    grad = torch.full_like(given, 3.0)
    assert layers.before([grad], torch.tensor([0.5]), torch.zeros(1)).tolist() == [3]
    assert grad.tolist() == [3, 3, 3, 3, 0]
    mask_([given], [torch.tensor([False, False, True, True, False])])
    assert given.tolist() == [0, 0, -float("inf"), -2, 0]


def test_tables_are_made_again_when_a_tensor_moves(interpreted):
    weight, latent = torch.full((5000,), 2.0), torch.zeros(5000)
    layers = ThresholdedLayers([weight], [latent], [1])
    for value in (2.0, 3.0):
        weight.data = torch.full((5000,), value)
        layers.after(torch.ones(1), torch.ones(1))
        assert weight.unique().tolist() == [value - 1]
        for _ in range(2):
            grad = torch.ones(5000)
            assert layers.before([grad], torch.ones(1), torch.ones(1)).tolist() == [-5000]


def test_numbers_keep_all_their_bits():
    numbers = (2**62 + 1, 0, 2**53 + 1, 1)
    assert _thresholds_triton._uploaded(numbers, torch.device("cpu"), 0).tolist() == list(numbers)


def test_a_table_of_chunks():
    chunk = _thresholds_triton.CHUNK
    table, of_row, of_layer = _thresholds_triton._table(((2, chunk + 1), (1, 0), (0, 0), (1, 3)), torch.device("cpu"))
    assert table.tolist() == [
        [0, 0, 0, chunk + 1],
        [0, 0, chunk, chunk + 1],
        [0, 1, chunk + 1, 2 * chunk + 2],
        [0, 1, 2 * chunk + 1, 2 * chunk + 2],
        [3, 3, 0, 3],
    ]
    assert of_row.tolist() == [0, 2, 4, 4, 5]
    assert of_layer.tolist() == [0, 4, 4, 4, 5]
    huge = _thresholds_triton._table(((1, 2**31 + chunk),), torch.device("cpu"))[0]
    assert huge[-1].tolist() == [0, 0, 2**31, 2**31 + chunk]


def test_the_probe_runs():
    _thresholds_triton.probe(torch.device("cpu"))


def test_sums_of_many_chunks():
    partial = torch.arange(5000, dtype=torch.float32)
    first, sums = torch.tensor([0, 3, 3, 3000, 5000]), torch.empty(4)
    _thresholds_triton._sum_kernel[(4,)](partial, first, sums, _thresholds_triton.tl.float64, _thresholds_triton.LANES)
    assert sums.tolist() == [3, 0, sum(range(3, 3000)), sum(range(3000, 5000))]
