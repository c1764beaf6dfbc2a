"""The true functions in float64, and correct rounding with a proof that float64 was enough.

Every function is written so that float64 keeps a relative error below :data:`RELATIVE_ERROR` on its whole range, tails
included. A rounded result is then right whenever the float64 value is farther from every tie than that error, which
:func:`rounded` checks for each input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from rarefy.act.spec import subnormals
from rarefy.act.spec.formats import Bits, Format, Values

#: Bound of the relative error of the functions below; the tests hold them against 200-bit arithmetic.
RELATIVE_ERROR = 2.0**-42

#: One of :data:`FUNCTIONS` by name, or a function of your own from float64 arrays to float64 arrays.
Function: TypeAlias = str | Callable[[Values], Values]

#: The functions with shipped tables, native kernels of their own and every mode.
TABLED = ("tanh", "sigmoid", "silu", "gelu", "gelu_tanh")

FUNCTIONS = (*TABLED, "quick_gelu", "mish", "softplus", "hardswish", "elu", "exp")

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def tanh(x: Values) -> Values:
    """Return the hyperbolic tangent."""
    return np.tanh(x)


def sigmoid(x: Values) -> Values:
    """Return 1 / (1 + e^-x), without loss in the negative tail."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def silu(x: Values) -> Values:
    """Return Swish, x * sigmoid(x); its limit at minus infinity is -0."""
    return _times(x, sigmoid(x))


def gelu(x: Values) -> Values:
    """Return GELU, x * Phi(x) = x/2 * erfc(-x / sqrt 2)."""
    return _times(x, 0.5 * _erfc(-x * math.sqrt(0.5)))


def gelu_tanh(x: Values) -> Values:
    """Return GELU by tanh, x/2 * (1 + tanh(z)) = x * sigmoid(2z),  z = sqrt(2/pi) * (x + 0.044715 x^3)."""
    with np.errstate(over="ignore"):
        return _times(x, sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def quick_gelu(x: Values) -> Values:
    """Return x * sigmoid(1.702 x)."""
    return _times(x, sigmoid(1.702 * x))


def mish(x: Values) -> Values:
    """Return Mish, x * tanh(log(1 + e^x)); its limit at minus infinity is -0."""
    e = np.exp(-np.abs(x))
    # tanh(log(1 + e^x)) = w / (w + 2),  w = e^x (e^x + 2); over e^2x for positive x
    w = np.where(x >= 0, 1.0 + 2.0 * e, e * (e + 2.0))
    return _times(x, w / (w + 2.0 * np.where(x >= 0, e * e, 1.0)))


def softplus(x: Values) -> Values:
    """Return log(1 + e^x)."""
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def hardswish(x: Values) -> Values:
    """Return x * min(max(x + 3, 0), 6) / 6; its limit at minus infinity is -0."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(x), -0.0, x * np.minimum(np.maximum(x + 3.0, 0.0), 6.0) / 6.0)


def elu(x: Values) -> Values:
    """Return ELU of alpha 1: x for positive x, else e^x - 1."""
    return np.where(x > 0, x, np.expm1(np.where(x > 0, 0.0, x)))


def exp(x: Values) -> Values:
    """Return e^x."""
    with np.errstate(over="ignore"):
        return np.exp(x)


def _times(x: Values, gate: Values) -> Values:
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(x), -0.0, x * gate)


_ORACLES: dict[str, Callable[[Values], Values]] = {
    "tanh": tanh,
    "sigmoid": sigmoid,
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "mish": mish,
    "softplus": softplus,
    "hardswish": hardswish,
    "elu": elu,
    "exp": exp,
}

# f(x) = x/2 + c x^2 + ... near 0: the sign of the second term breaks ties where x/2 is one.
_HALVES = ("silu", "gelu", "gelu_tanh", "quick_gelu", "hardswish")
_TINY = 2.0**-60


def evaluate(function: Function, x: Values) -> Values:
    """Return the true value at float64 ``x`` of one of :data:`FUNCTIONS` or a callable."""
    wide = np.asarray(x, dtype=np.float64)
    if isinstance(function, str):
        if function not in _ORACLES:
            raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}, got {function!r}")
        return _ORACLES[function](wide)
    with np.errstate(all="ignore"):  # infinities are among the inputs
        value = np.asarray(function(wide), dtype=np.float64)
    if value.shape != wide.shape:
        raise ValueError(f"{name_of(function)} must give one number for each input: {wide.shape} gave {value.shape}")
    return value


def name_of(function: Function) -> str:
    """Return what a table calls the function."""
    return function if isinstance(function, str) else getattr(function, "__name__", "function")


def is_odd(function: Function) -> bool:
    """Tell whether f(-x) = -f(x), tried at 1000 points up to 16."""
    if isinstance(function, str):
        return function == "tanh"
    x = np.linspace(0.0, 16.0, 1000)
    return bool(np.allclose(evaluate(function, -x), -evaluate(function, x), rtol=1e-9, atol=1e-12))


@subnormals.kept()
def rounded(function: Function, fmt: Format, bits: Bits) -> tuple[Bits, float]:
    """Round ``function`` of every bit pattern correctly; also return the least distance to a tie.

    The distance is in units of the last place. NaN patterns come back unchanged. Raises ArithmeticError when a value
    lies so near a tie that float64 cannot decide. A callable is taken at its word: what is rounded are its float64
    values, and nothing is proven about them.
    """
    x = fmt.decode(bits)
    value = evaluate(function, x)
    residual = np.where((np.abs(x) < _TINY) & (x != 0), 1.0, 0.0) if function in _HALVES else np.zeros_like(x)
    # x (x + 3) is exact in float64 where x is not tiny, a sixth of it rounded once: what shows as a tie is one
    open_ties = np.isfinite(value) & (residual == 0) & (function != "hardswish")
    margin = float(fmt.tie_distance(value[open_ties]).min()) if open_ties.any() else 0.5
    # An error of RELATIVE_ERROR is at most 2^(m+1) times as much in units of the last place.
    if isinstance(function, str) and margin <= RELATIVE_ERROR * 2.0 ** (fmt.mantissa_bits + 1):
        raise ArithmeticError(f"{function} in {fmt.name} comes within {margin} ulp of a tie: float64 cannot decide")
    return np.where(fmt.is_nan(bits), bits, fmt.encode(value, residual)), margin
