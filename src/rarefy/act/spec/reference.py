"""What every function gives in every mode and format, bit by bit: the reference of the kernels and of the fallback.

Modes:

``exact``
    Correctly rounded for every input of a format of at most 16 bits: by a shipped :class:`~rarefy.act.Table`, or, for
    the functions that have none, by float64, which is seen to be enough. In float32 sigmoid, silu and gelu are within 1
    unit of the last place, tanh within 6, the others within 0.51 (:data:`MAX_ULP`).
``fast``
    The same bits in formats of at most 16 bits. In float32 a few units of the last place, in half the time; silu and
    gelu lose more of their far negative tails, which :data:`FAST_TAILS` bounds. Of quick_gelu it is ``exact``.
``ktanh``
    The paper (arXiv 1909.07729). tanh is the published table, or another; the others derive from it (section 3)::

        sigmoid(x) = 1/2 + 1/2 t(x/2)        silu(x) = x/2 * (1 + t(x/2))
        gelu(x)    = x/2 * (1 + t(z)),       z = x * (A + B * x^2),  A = sqrt(2/pi),  B = 0.044715 A

    in float32, one rounded operation after another, with the argument of t and the result rounded to the format;
    quick_gelu as gelu with z = 0.851 x. A table for the function itself is used directly. 8-bit formats compute in bf16
    and round the result.
``hard``
    The control: min(max(x, -1), 1), relu6(x + 3) / 6, x * (relu6(x + 3) / 6), x * (relu6(1.702 x + 3) / 6), in float32.

mish, softplus, hardswish, elu and exp do not derive from tanh and have the mode ``exact`` alone.

NaN stays as it is; silu, gelu, mish and hardswish of minus infinity are -0, their limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from rarefy.act.spec import formats, oracle, subnormals
from rarefy.act.spec.formats import Bits, Format
from rarefy.act.spec.table import Table, load

MODES = ("exact", "fast", "ktanh", "hard")
#: The bounds of modes "exact" and "fast" in float32, in units of the last place of the true value (2^-149 at least);
#: below the input that FAST_TAILS names, mode "fast" has the bound that stands there.
_ONCE = dict.fromkeys(("quick_gelu", "mish", "softplus", "hardswish", "elu", "exp"), 0.51)
MAX_ULP = {
    "exact": {"tanh": 6.0, "sigmoid": 1.0, "silu": 1.0, "gelu": 1.0, "gelu_tanh": 1.0, **_ONCE},
    "fast": {"tanh": 6.0, "sigmoid": 3.0, "silu": 3.5, "gelu": 6.0, "gelu_tanh": 1.0, "quick_gelu": 0.51},
}
FAST_TAILS = {"silu": (-88.0, 53.0), "gelu": (-8.0, 11.0)}
PUBLISHED = "tanh_bf16_ktanh"

#: A and B of z = x * (A + B * x^2), as float32 numbers.
GELU_A = float(np.float32(math.sqrt(2.0 / math.pi)))
GELU_B = float(np.float32(math.sqrt(2.0 / math.pi) * 0.044715))

Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]


def bound32(function: str, mode: str, x: Wide) -> Wide:
    """Return how far results of float32 may lie from the true value, for every input: see :data:`MAX_ULP`."""
    below, more = FAST_TAILS.get(function, (-math.inf, 0.0)) if mode == "fast" else (-math.inf, 0.0)
    return np.where(x < below, more, MAX_ULP[mode][function])


def ulps(y: Wide, true: Wide) -> Wide:
    """Return the distance of float32 results from the true values in units of the last place; of infinities 0."""
    size = np.where(np.isfinite(true), np.abs(true), 1.0)
    last = np.exp2(np.maximum(np.floor(np.log2(np.maximum(size, 2.0**-200))), -126.0) - 23.0)
    with np.errstate(invalid="ignore"):
        return np.where(y == true, 0.0, np.abs(y - true) / last)


def modes(function: str) -> tuple[str, ...]:
    """Return the modes that a function has."""
    return MODES if function in _HARD else ("exact",)


def check_mode(function: str, mode: str) -> None:
    """Raise ValueError unless the function has the mode."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode not in modes(function):
        raise ValueError(f'{function} has the mode "exact" alone, since it does not derive from tanh; got {mode!r}')


def check(function: str, mode: str, fmt: Format, table: Table | None) -> None:
    """Raise ValueError unless the function has the mode and can use the table for the format."""
    check_mode(function, mode)
    if table is None:
        return
    if mode != "ktanh":
        raise ValueError(f'a table goes with mode="ktanh", got mode={mode!r}')
    if table.function not in ("tanh", function):
        raise ValueError(
            f"{function} needs a table of {function} or of tanh; {table.name!r} is one of {table.function}"
        )
    if table.format != fmt.name:
        raise ValueError(
            f"table {table.name!r} is for {table.format}, the input is {fmt.name}; fit one for {fmt.name}"
            " or move a shift table to a longer mantissa with Table.to_format"
        )


@lru_cache(maxsize=64)
def table_for(function: str, mode: str, fmt: Format, given: Table | None) -> Table | None:
    """Return the one table that gives the answers directly, or None when they are derived or arithmetic."""
    check(function, mode, fmt, given)
    if mode in ("exact", "fast") and fmt.bits <= 16:
        return load(f"{function}_{fmt.name}") if function in oracle.TABLED else None
    if mode == "ktanh" and given is not None and given.function == function:
        return given
    if mode == "ktanh" and function == "tanh" and fmt.bits > 8:
        return core(fmt, given)
    return None


def core(fmt: Format, given: Table | None) -> Table:
    """Return the tanh table that mode ``ktanh`` derives the other functions from."""
    if given is not None:
        return given
    published = load(PUBLISHED)
    return published if fmt.name == published.format else published.to_format(fmt)


@lru_cache(maxsize=64)
@subnormals.kept()
def answers(function: str, mode: str, fmt: Format, given: Table | None = None) -> npt.NDArray[Any]:
    """Return the results for all inputs of a format of at most 16 bits, indexed by bits; read-only."""
    table = table_for(function, mode, fmt, given)
    bits = fmt.all_bits()
    result: npt.NDArray[Any]
    if table is not None:
        result = table.compute(bits)
    elif mode in ("exact", "fast"):
        result = oracle.rounded(function, fmt, bits)[0].astype(fmt.dtype)
    elif mode == "ktanh" and fmt.bits == 8:
        wide = answers(function, mode, formats.BF16)[formats.BF16.encode(fmt.decode(bits))]
        result = _narrow(fmt, bits, formats.BF16.decode(wide))
    else:
        result = compute(function, mode, fmt, bits, given)
    result.setflags(write=False)
    return result


@subnormals.kept()
def compute(function: str, mode: str, fmt: Format, bits: npt.ArrayLike, given: Table | None = None) -> npt.NDArray[Any]:
    """Compute modes ``ktanh`` and ``hard`` of any array of bf16, fp16 or fp32 bits, from their definition."""
    b = np.asarray(bits, dtype=np.int64)
    table = table_for(function, mode, fmt, given)
    if table is not None:
        return table.compute(b)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        x = fmt.decode(b).astype(np.float32)
        if mode == "hard":
            y = _HARD[function](x)
        else:
            tanh = core(fmt, given)

            def t(z: Floats) -> Floats:
                return fmt.decode(tanh.compute(_round(fmt, z))).astype(np.float32)

            y = _derived(function, x, t)
    if function not in ("tanh", "sigmoid"):
        y = np.where(np.isneginf(x), np.float32(-0.0), y)
    return _narrow(fmt, b, y.astype(np.float64))


def _round(fmt: Format, values: Floats) -> Bits:
    # NaN may come out of infinities that cancel; what it encodes to is never used
    return fmt.encode(values.astype(np.float64))


def _narrow(fmt: Format, bits: Bits, values: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    return np.where(fmt.is_nan(bits), bits, fmt.encode(values)).astype(fmt.dtype)


def _derived(function: str, x: Floats, t: Callable[[Floats], Floats]) -> Floats:
    half, one = np.float32(0.5), np.float32(1.0)
    h = x * half
    if function == "tanh":
        return t(x)
    if function == "sigmoid":
        return half + half * t(h)
    if function == "silu":
        return h * (one + t(h))
    if function == "quick_gelu":
        return h * (one + t(np.float32(0.851) * x))
    z = x * (np.float32(GELU_A) + np.float32(GELU_B) * (x * x))
    return h * (one + t(z))


def _relu6(x: Floats) -> Floats:
    return np.minimum(np.maximum(x, np.float32(0.0)), np.float32(6.0))


def _hard_gelu(x: Floats) -> Floats:
    return x * (_relu6(np.float32(1.702) * x + np.float32(3.0)) / np.float32(6.0))


_HARD: dict[str, Callable[[Floats], Floats]] = {
    "tanh": lambda x: np.minimum(np.maximum(x, np.float32(-1.0)), np.float32(1.0)),
    "sigmoid": lambda x: _relu6(x + np.float32(3.0)) / np.float32(6.0),
    "silu": lambda x: x * (_relu6(x + np.float32(3.0)) / np.float32(6.0)),
    "gelu": _hard_gelu,
    "gelu_tanh": _hard_gelu,
    "quick_gelu": _hard_gelu,
}
