"""Every float32 input through tanh, exact and K-TanH: ``make test-float32`` runs all 2^32, for a night.

``python -m tests.act.check_float32 [PIECES]`` tries that many of the 1024 pieces, evenly spread.
"""

import sys

import numpy as np

from rarefy import act
from rarefy.act import formats, native, quartic

PIECES = 1024


def check(piece: int) -> float:
    """One piece of 2^22 inputs; returns the largest error in units of the last place. Raises AssertionError."""
    x = np.arange(piece << 22, (piece + 1) << 22, dtype=np.int64).astype(np.uint32)
    table, exact = act.load("tanh_bf16_ktanh").to_format("fp32"), quartic.tanh()
    y = np.empty_like(x)
    native.program(table).run(x, y)
    assert np.array_equal(y, table.compute(x))
    native.quartic(exact).run(x, y)
    nan = formats.FP32.is_nan(x)
    assert np.array_equal(y[~nan], exact.compute(x[~nan]))
    assert np.isnan(y[nan].view(np.float32)).all()
    true = np.tanh(x[~nan].view(np.float32).astype(np.float64))
    error = np.abs(y[~nan].view(np.float32) - true)
    assert error.max(initial=0.0) <= quartic.MAX_ABS
    last = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(true), 1e-45))), -126.0) - 23.0)
    ulp = float((error / last).max(initial=0.0))
    assert ulp <= quartic.MAX_ULP
    return ulp


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else PIECES
    worst = 0.0
    for done in range(count):
        worst = max(worst, check(done * PIECES // count))
    print(f"{count << 22} inputs: no difference, at most {worst:.2f} units of the last place")
