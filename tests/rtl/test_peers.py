"""Peers: known errors, known values, and the hardware equal to the model on every input."""

import numpy as np
import pytest

from rarefy.act.spec import oracle
from rarefy.act.spec.formats import BF16
from rarefy.bench import rtl as peers

# Largest errors as they were first measured with another generator.
ERRORS = {
    "HardTanh": 0.2384,
    "PLAN": 0.0383,
    "constants, 32": 0.0236,
    "constants, 64": 0.0118,
    "constants, 128": 0.0063,
    "constants, 256": 0.0050,
    "RALUT": 0.0107,
    "uniform, 128": 0.0157,
    "uniform, 512": 0.0045,
    "lines, 16": 0.0055,
    "lines, 32": 0.0050,
    "fixed point, 1024": 0.0078,
    "exact": 0.0019,
}


def test_every_peer_has_its_known_error():
    assert {name: round(make().about.max_abs, 4) for name, make in peers.PEERS.items()} == ERRORS


def test_values_by_hand():
    x = BF16.encode([0.5, 1.5, -3.0, 0.125, np.inf])
    assert BF16.decode(peers.hard_tanh().compute(x)).tolist() == [0.5, 1.0, -1.0, 0.125, 1.0]
    # PLAN: 1/2 + M/4 in [1/2, 1); 0.8125 + (x - 1.1875) / 8 in [1.1875, 2)
    assert BF16.decode(peers.plan().compute(BF16.encode([0.5, 0.75, 1.1875, -2.5]))).tolist() == [
        0.5,
        0.625,
        0.8359375,
        -1.0,
    ]
    fixed = peers.fixed_point()
    assert fixed.format.decode(fixed.compute(fixed.format.encode([0.0, 31.0, -31.0]))).tolist() == [
        0.0,
        np.floor(np.tanh(4 - 1 / 128) * 1024) / 1024,
        -1.0 + 1 / 1024 * (np.floor(np.tanh(-4) * 1024) + 1024),
    ]


def test_the_exact_one_is_correctly_rounded():
    bits = BF16.all_bits()
    right, _ = oracle.rounded("tanh", BF16, bits)
    finite = ~BF16.is_nan(bits)
    assert np.array_equal(peers.exact().compute(bits)[finite], right[finite])


def test_nan_gives_a_quiet_nan_of_the_same_payload():
    for name, make in peers.PEERS.items():
        if name != "fixed point, 1024":
            assert list(make().compute(np.array([0x7F81, 0xFFC3]))) == [0x7FC1, 0xFFC3]


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="rows must be 8, 16, 32, ... 512, got 100"):
        peers.constants(100)
    with pytest.raises(ValueError, match="rows must be a power of two from 16 to 4096, got 1000"):
        peers.fixed_point(1000)
    with pytest.raises(ValueError, match="error must be from 0.002 to 0.25"):
        peers.ralut(0.001)
