"""Triton kernels of one step of an LSTM or a GRU on a GPU: gates and state, and their gradients, in one launch each.

bfloat16 and float16: an activation is a lookup of its answers, which stay in the cache, so its bits are those of the
CPU. Needs the package ``triton``, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from rarefy.act.kernels import aten
from rarefy.act.kernels.aten import FORMAT_OF

BLOCK = 256


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rounded(a, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """Float32 numbers in the format, to nearest even; by integers in bfloat16, since Triton's interpreter truncates."""
    if kind == tl.bfloat16:
        u = a.to(tl.int32, bitcast=True)
        u = tl.where(a != a, 0x7FC00000, u + 0x7FFF + ((u >> 16) & 1))  # noqa: PLR0124
        return (u >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return a.to(kind)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _activation(answers, a):  # type: ignore[no-untyped-def]
    """The answer to float32 numbers, rounded to the format of the answers first; in float32."""
    bits = _rounded(a, answers.dtype.element_ty).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.load(answers + bits).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sigmoid_slope(y, hard: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.where((y > 0.0) & (y < 1.0), 1.0 / 6.0, 0.0) if hard else y * (1.0 - y)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tanh_slope(y, hard: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.where((y > -1.0) & (y < 1.0), 1.0, 0.0) if hard else 1.0 - y * y


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _lstm_forward(  # type: ignore[no-untyped-def]
    products, product, c, h, y, gates, cells, sigmoid, tanh, n, hidden, keep: tl.constexpr, block: tl.constexpr
):
    at = tl.program_id(0) * block + tl.arange(0, block)
    some = at < n
    row, unit = at // hidden, at % hidden
    first = row * 4 * hidden + unit
    a_i = tl.load(products + first, mask=some).to(tl.float32) + tl.load(product + first, mask=some)
    first += hidden
    a_f = tl.load(products + first, mask=some).to(tl.float32) + tl.load(product + first, mask=some)
    first += hidden
    a_g = tl.load(products + first, mask=some).to(tl.float32) + tl.load(product + first, mask=some)
    first += hidden
    a_o = tl.load(products + first, mask=some).to(tl.float32) + tl.load(product + first, mask=some)
    i, f, o, g = _activation(sigmoid, a_i), _activation(sigmoid, a_f), _activation(sigmoid, a_o), _activation(tanh, a_g)
    # c' = f c + i g,   h' = o tanh(c')
    after = f * tl.load(c + at, mask=some).to(tl.float32) + i * g
    t = _activation(tanh, after)
    m = o * t
    tl.store(c + at, _rounded(after, c.dtype.element_ty), mask=some)
    tl.store(h + at, _rounded(m, h.dtype.element_ty), mask=some)
    tl.store(y + at, _rounded(m, y.dtype.element_ty), mask=some)
    if keep:
        first = row * 4 * hidden + unit
        tl.store(gates + first, _rounded(i, gates.dtype.element_ty), mask=some)
        tl.store(gates + first + hidden, _rounded(f, gates.dtype.element_ty), mask=some)
        tl.store(gates + first + 2 * hidden, _rounded(g, gates.dtype.element_ty), mask=some)
        tl.store(gates + first + 3 * hidden, _rounded(o, gates.dtype.element_ty), mask=some)
        tl.store(cells + row * 2 * hidden + unit, _rounded(after, cells.dtype.element_ty), mask=some)
        tl.store(cells + row * 2 * hidden + hidden + unit, _rounded(t, cells.dtype.element_ty), mask=some)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _lstm_backward(  # type: ignore[no-untyped-def]
    up, before, gates, cells, dc, d, n, hidden, before_row, hard: tl.constexpr, block: tl.constexpr
):
    at = tl.program_id(0) * block + tl.arange(0, block)
    some = at < n
    row, unit = at // hidden, at % hidden
    first = row * 4 * hidden + unit
    i = tl.load(gates + first, mask=some).to(tl.float32)
    f = tl.load(gates + first + hidden, mask=some).to(tl.float32)
    g = tl.load(gates + first + 2 * hidden, mask=some).to(tl.float32)
    o = tl.load(gates + first + 3 * hidden, mask=some).to(tl.float32)
    t = tl.load(cells + row * 2 * hidden + hidden + unit, mask=some).to(tl.float32)
    dh = tl.load(up + at, mask=some)
    inner = tl.load(dc + at, mask=some) + dh * o * _tanh_slope(t, hard)
    past = tl.load(before + row * before_row + unit, mask=some).to(tl.float32)
    tl.store(d + first, inner * g * _sigmoid_slope(i, hard), mask=some)
    tl.store(d + first + hidden, inner * past * _sigmoid_slope(f, hard), mask=some)
    tl.store(d + first + 2 * hidden, inner * i * _tanh_slope(g, hard), mask=some)
    tl.store(d + first + 3 * hidden, dh * t * _sigmoid_slope(o, hard), mask=some)
    tl.store(dc + at, inner * f, mask=some)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gru_forward(  # type: ignore[no-untyped-def]
    products, product, bias, h, y, gates, sigmoid, tanh, n, hidden, keep: tl.constexpr, block: tl.constexpr
):
    at = tl.program_id(0) * block + tl.arange(0, block)
    some = at < n
    row, unit = at // hidden, at % hidden
    first = row * 3 * hidden + unit
    a_r = tl.load(products + first, mask=some).to(tl.float32) + tl.load(product + first, mask=some)
    first += hidden
    a_z = tl.load(products + first, mask=some).to(tl.float32) + tl.load(product + first, mask=some)
    first += hidden
    inner = tl.load(product + first, mask=some) + tl.load(bias + unit, mask=some)
    r, z = _activation(sigmoid, a_r), _activation(sigmoid, a_z)
    # n = tanh(x + r (h W + b)),   h' = (h - n) z + n
    fresh = _activation(tanh, tl.load(products + first, mask=some).to(tl.float32) + r * inner)
    m = (tl.load(h + at, mask=some).to(tl.float32) - fresh) * z + fresh
    tl.store(h + at, _rounded(m, h.dtype.element_ty), mask=some)
    tl.store(y + at, _rounded(m, y.dtype.element_ty), mask=some)
    if keep:
        first = row * 4 * hidden + unit
        tl.store(gates + first, _rounded(r, gates.dtype.element_ty), mask=some)
        tl.store(gates + first + hidden, _rounded(z, gates.dtype.element_ty), mask=some)
        tl.store(gates + first + 2 * hidden, _rounded(fresh, gates.dtype.element_ty), mask=some)
        tl.store(gates + first + 3 * hidden, _rounded(inner, gates.dtype.element_ty), mask=some)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gru_backward(  # type: ignore[no-untyped-def]
    up, before, gates, d, through, rest, n, hidden, hard: tl.constexpr, block: tl.constexpr
):
    at = tl.program_id(0) * block + tl.arange(0, block)
    some = at < n
    row, unit = at // hidden, at % hidden
    first = row * 4 * hidden + unit
    r = tl.load(gates + first, mask=some).to(tl.float32)
    z = tl.load(gates + first + hidden, mask=some).to(tl.float32)
    fresh = tl.load(gates + first + 2 * hidden, mask=some).to(tl.float32)
    inner = tl.load(gates + first + 3 * hidden, mask=some).to(tl.float32)
    dh = tl.load(up + at, mask=some)
    dn = dh * (1.0 - z) * _tanh_slope(fresh, hard)
    dr = dn * inner * _sigmoid_slope(r, hard)
    dz = dh * (tl.load(before + at, mask=some).to(tl.float32) - fresh) * _sigmoid_slope(z, hard)
    first = row * 3 * hidden + unit
    tl.store(d + first, dr, mask=some)
    tl.store(d + first + hidden, dz, mask=some)
    tl.store(d + first + 2 * hidden, dn, mask=some)
    tl.store(through + first, dr, mask=some)
    tl.store(through + first + hidden, dz, mask=some)
    tl.store(through + first + 2 * hidden, dn * r, mask=some)
    tl.store(rest + at, dh * z, mask=some)


def probe(device: torch.device) -> None:
    """Compile and launch a kernel; raises what Triton raises where it cannot."""
    one = torch.zeros(8, dtype=torch.bfloat16, device=device)
    lstm_backward(one[:1].float().view(1, 1), one[:1].view(1, 1), one, one, one[:1].float(), one.float(), False)


def _answers(mode: str, table: str, like: Tensor) -> tuple[Tensor, Tensor]:
    fmt, device = FORMAT_OF[like.dtype].name, str(like.device)
    sigmoid, tanh = (aten.constant("values", f, mode, fmt, table, device) for f in ("sigmoid", "tanh"))
    return sigmoid, tanh


def _launch(kernel: Any, n: int, *arguments: Any) -> None:
    if n:
        kernel[(triton.cdiv(n, BLOCK),)](*arguments, block=BLOCK)


def lstm_forward(
    products: Tensor, product: Tensor, c: Tensor, h: Tensor, y: Tensor, kept: tuple[Tensor, Tensor] | None, *how: str
) -> None:
    """Take a step of y.shape[0] rows: c and h, the state, in place; y, and what is kept, are written; contiguous."""
    gates, cells = kept if kept is not None else (y, y)
    places = (products, product, c, h, y, gates, cells, *_answers(how[0], how[1], h))
    _launch(_lstm_forward, y.numel(), *places, y.numel(), y.shape[1], kept is not None)


def lstm_backward(up: Tensor, before: Tensor, gates: Tensor, cells: Tensor, dc: Tensor, d: Tensor, hard: bool) -> None:
    """Write the gates' gradients of a step to d, and over dc that of the c before; ``before`` may have long rows."""
    n, hidden = up.numel(), up.shape[1]
    _launch(_lstm_backward, n, up, before, gates, cells, dc, d, n, hidden, before.stride(0), hard)


def gru_forward(
    products: Tensor, product: Tensor, bias: Tensor, h: Tensor, y: Tensor, kept: Tensor | None, *how: str
) -> None:
    """Take a step of y.shape[0] rows: h, the state, in place; y, and what is kept, are written; bias in float32."""
    places = (products, product, bias, h, y, y if kept is None else kept, *_answers(how[0], how[1], h))
    _launch(_gru_forward, y.numel(), *places, y.numel(), y.shape[1], kept is not None)


def gru_backward(
    up: Tensor, before: Tensor, gates: Tensor, d: Tensor, through: Tensor, rest: Tensor, hard: bool
) -> None:
    """Write the gradients of a step: of the products of x and of h, and over ``rest`` what goes to h around them."""
    n, hidden = up.numel(), up.shape[1]
    _launch(_gru_backward, n, up, before, gates, d, through, rest, n, hidden, hard)
