"""Every float32 input, all 2^32 of them, through every kernel of every function: ``make test-float32``.

``python -m tests.act.check_float32 [--pieces N] [FUNCTION ...]`` tries N of the 1024 pieces, evenly spread; the
functions are ktanh, tanh, sigmoid, silu, gelu, gelu_tanh, and sigmoid_fast, silu_fast, gelu_fast. A function takes
minutes on one core. K-TanH must equal its table, tanh its quartics, bit for bit; the others must keep their bounds
against float64, NaN stay NaN and infinities give their limits.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rarefy import act, kernels
from rarefy.act.kernels import native
from rarefy.act.spec import formats, oracle, quartic, reference

PIECES = 1024
CHUNK = 1 << 16  # small enough that everything stays in the cache
FUNCTIONS = ("ktanh", *oracle.TABLED, "sigmoid_fast", "silu_fast", "gelu_fast")
LIMIT_BITS = np.float32(quartic.LIMIT).view(np.uint32)
TINY_BITS = np.float32(2.0**-30).view(np.uint32)
ISAS = sorted({kernel.isa for kernel in kernels.table() if kernel.supported and kernel.name == "act_tanh32"})

Words = npt.NDArray[np.uint32]


@dataclass
class Worst:
    """The largest errors found so far."""

    absolute: float = 0.0
    ulp: float = 0.0


def chunks(piece: int) -> Iterator[Words]:
    for begin in range(piece << 22, (piece + 1) << 22, CHUNK):
        yield np.arange(begin, begin + CHUNK, dtype=np.int64).astype(np.uint32)


def quartics(x: Words) -> Words:
    """What the quartics of tanh give; at once where all results of a chunk are one, or the inputs."""
    if not x.size:  # all of the chunk are NaN
        return x
    magnitude = x & np.uint32(0x7FFFFFFF)
    if magnitude.min() >= LIMIT_BITS:
        y = (x & np.uint32(0x80000000)) | quartic.tanh().compute(np.array([LIMIT_BITS]))[0]
    elif magnitude.max() < TINY_BITS:  # fused: x + c x^2 rounds to x
        y = x
    else:
        return quartic.tanh().compute(x)
    assert np.array_equal(y[::4096], quartic.tanh().compute(x[::4096]))
    return y


def truth(function: str, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The oracle; erfc, which is slow, only where it is not 0, 1 or 2 in float64."""
    largest, least = np.abs(x).max(initial=0.0), np.abs(x).min(initial=np.inf)
    if function != "gelu" or (largest > 2.0**-60 and least < 40.0):
        return oracle.evaluate(function, x)
    true = x * 0.5 if largest <= 2.0**-60 else np.where(x > 0, x, -0.0)
    assert np.array_equal(true[::4096], oracle.evaluate(function, x[::4096]))
    return true


def check(function: str, x: Words, worst: Worst) -> None:
    """One chunk through the kernels of each instruction set. Raises AssertionError."""
    if function == "ktanh":
        table = act.load("tanh_bf16_ktanh").to_format("fp32")
        want = table.compute(x)
        for isa, y in ran(native.for_table(table), x):
            assert np.array_equal(y, want), isa
        return
    function, mode = (function.removesuffix("_fast"), "fast") if function.endswith("_fast") else (function, "exact")
    nan = formats.FP32.is_nan(x)
    real = x[~nan]
    program = native.quartic(quartic.tanh()) if function == "tanh" else native.float32(function, mode)
    with np.errstate(under="ignore", over="ignore"):
        wide = real.view(np.float32).astype(np.float64)
        true = truth(function, wide)
    exact = quartics(real) if function == "tanh" else None
    before = None
    for isa, y in ran(program, x):
        assert np.isnan(y[nan].view(np.float32)).all(), isa
        got = y[~nan]
        assert exact is None or np.array_equal(got, exact), isa
        if before is not None and np.array_equal(got, before):
            continue  # the bounds hold as they did
        before = got
        value = got.view(np.float32).astype(np.float64)
        assert np.array_equal(got >> 31, (np.signbit(true)).astype(np.uint32)), isa
        with np.errstate(invalid="ignore"):
            error = np.where(value == true, 0.0, np.abs(value - true))  # infinities too
        worst.absolute = max(worst.absolute, float(error.max(initial=0.0)))
        ulps = reference.ulps(value, true)
        worst.ulp = max(worst.ulp, float(ulps.max(initial=0.0)))
        assert (ulps <= reference.bound32(function, mode, wide)).all(), isa
    assert function != "tanh" or worst.absolute <= quartic.MAX_ABS


def ran(program: native.KernelSteps, x: Words) -> Iterator[tuple[str, Words]]:
    for isa in ISAS:
        with kernels.forced(isa):
            y = np.empty_like(x)
            program.run(x, y)
        yield isa, y


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("functions", nargs="*", choices=[*FUNCTIONS, []], metavar="FUNCTION")
    parser.add_argument("--pieces", type=int, default=PIECES, metavar="N")
    options = parser.parse_args()
    for function in options.functions or FUNCTIONS:
        worst, begin = Worst(), time.process_time()
        for done in range(options.pieces):
            for x in chunks(done * PIECES // options.pieces):
                check(function, x, worst)
        bits = "equal to its table" if function == "ktanh" else f"at most {worst.ulp:.4f} ulp"
        if function == "tanh":
            bits += f" and {worst.absolute:.3e}, equal to its quartics"
        seconds = time.process_time() - begin
        print(f"{function}: {options.pieces << 22} inputs, {', '.join(ISAS)}: {bits} ({seconds:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
