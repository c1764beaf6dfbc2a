"""Triton kernels of LSTM and GRU on a GPU: of each step one product, and one launch for all that is left of it.

Activations are those of :mod:`rarefy.act.kernels.triton`, so what is stored has the bits of the CPU but for the sums of
products. A step's place is an argument, and its tensors are the sequence's: the host only launches. Needs the package
``triton``, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from rarefy.act.kernels.aten import FORMAT_OF
from rarefy.act.kernels.gpu import Kernel
from rarefy.act.kernels.triton import decode, encode, on, parts

BLOCK = 256
_SIZES = ["begin", "n"]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _read(pointer, some, name: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of the format in float32."""
    return decode(tl.load(pointer, mask=some, other=0), name)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _write(pointer, x, some, name: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(pointer, encode(x, name), mask=some)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _activation(a, compute: tl.constexpr, rows, numbers: tl.constexpr, name: tl.constexpr):  # type: ignore[no-untyped-def]
    """An activation of float32 numbers, rounded to the format before and after; in float32."""
    return decode(compute(encode(a, name), rows, numbers), name)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sigmoid_slope(y, hard: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.where((y > 0.0) & (y < 1.0), 1.0 / 6.0, 0.0) if hard else y * (1.0 - y)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tanh_slope(y, hard: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.where((y > -1.0) & (y < 1.0), 1.0, 0.0) if hard else 1.0 - y * y


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator, unused-ignore]
def _lstm_forward(  # type: ignore[no-untyped-def]
    products, product, c, h, y, gates, cells, sigmoid_rows, tanh_rows,
    begin: tl.int64, n: tl.int64, hidden: tl.constexpr, keep: tl.constexpr,
    sigmoid: tl.constexpr, sigmoid_numbers: tl.constexpr, tanh: tl.constexpr, tanh_numbers: tl.constexpr,
    name: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One step of n numbers, the rows from ``begin`` on: c and h, the state, in place; y, and what is kept."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    some = at < n
    row, unit = at // hidden, at % hidden
    inner, outer = row * 4 * hidden + unit, (begin + row) * 4 * hidden + unit
    # a = W x + b + U h
    a_i = tl.load(products + outer, mask=some).to(tl.float32) + tl.load(product + inner, mask=some)
    a_f = tl.load(products + outer + hidden, mask=some).to(tl.float32) + tl.load(product + inner + hidden, mask=some)
    a_g = tl.load(products + outer + 2 * hidden, mask=some).to(tl.float32) + tl.load(
        product + inner + 2 * hidden, mask=some
    )
    a_o = tl.load(products + outer + 3 * hidden, mask=some).to(tl.float32) + tl.load(
        product + inner + 3 * hidden, mask=some
    )
    i = _activation(a_i, sigmoid, sigmoid_rows, sigmoid_numbers, name)
    f = _activation(a_f, sigmoid, sigmoid_rows, sigmoid_numbers, name)
    o = _activation(a_o, sigmoid, sigmoid_rows, sigmoid_numbers, name)
    g = _activation(a_g, tanh, tanh_rows, tanh_numbers, name)
    # c' = f c + i g,   h' = o tanh(c')
    after = f * _read(c + at, some, name) + i * g
    t = _activation(after, tanh, tanh_rows, tanh_numbers, name)
    m = o * t
    _write(c + at, after, some, name)
    _write(h + at, m, some, name)
    _write(y + begin * hidden + at, m, some, name)
    if keep:
        _write(gates + outer, i, some, name)
        _write(gates + outer + hidden, f, some, name)
        _write(gates + outer + 2 * hidden, g, some, name)
        _write(gates + outer + 3 * hidden, o, some, name)
        outer = (begin + row) * 2 * hidden + unit
        _write(cells + outer, after, some, name)
        _write(cells + outer + hidden, t, some, name)


@triton.jit(do_not_specialize=[*_SIZES, "known", "before"])  # type: ignore[untyped-decorator, unused-ignore]
def _lstm_backward(  # type: ignore[no-untyped-def]
    carry, dc, dy, c, gates, cells, d,
    begin: tl.int64, n: tl.int64, known: tl.int64, before: tl.int64,
    hidden: tl.constexpr, upstream: tl.constexpr, hard: tl.constexpr, name: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One step: d, and over dc that of the c before, which lies in the rows of the step before from ``before`` on.

    Of the n numbers, ``known`` had a step before; the others began at c. ``carry`` is the gradient of h by the later
    steps.
    """
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    some = at < n
    row, unit = at // hidden, at % hidden
    outer = (begin + row) * 4 * hidden + unit
    i, f = _read(gates + outer, some, name), _read(gates + outer + hidden, some, name)
    g, o = _read(gates + outer + 2 * hidden, some, name), _read(gates + outer + 3 * hidden, some, name)
    t = _read(cells + (begin + row) * 2 * hidden + hidden + unit, some, name)
    dh = tl.load(carry + at, mask=some)
    if upstream:
        dh += _read(dy + begin * hidden + at, some, name)
    inner = tl.load(dc + at, mask=some) + dh * o * _tanh_slope(t, hard)
    earlier = at < known
    past = _read(cells + (before + row) * 2 * hidden + unit, some & earlier, name)
    past += _read(c + at, some & (at >= known), name)
    _write(d + outer, inner * g * _sigmoid_slope(i, hard), some, name)
    _write(d + outer + hidden, inner * past * _sigmoid_slope(f, hard), some, name)
    _write(d + outer + 2 * hidden, inner * i * _tanh_slope(g, hard), some, name)
    _write(d + outer + 3 * hidden, dh * t * _sigmoid_slope(o, hard), some, name)
    tl.store(dc + at, inner * f, mask=some)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator, unused-ignore]
def _gru_forward(  # type: ignore[no-untyped-def]
    products, product, bias, h, y, gates, sigmoid_rows, tanh_rows,
    begin: tl.int64, n: tl.int64, hidden: tl.constexpr, keep: tl.constexpr,
    sigmoid: tl.constexpr, sigmoid_numbers: tl.constexpr, tanh: tl.constexpr, tanh_numbers: tl.constexpr,
    name: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One step, as :func:`_lstm_forward`."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    some = at < n
    row, unit = at // hidden, at % hidden
    inner, outer = row * 3 * hidden + unit, (begin + row) * 3 * hidden + unit
    a_r = tl.load(products + outer, mask=some).to(tl.float32) + tl.load(product + inner, mask=some)
    a_z = tl.load(products + outer + hidden, mask=some).to(tl.float32) + tl.load(product + inner + hidden, mask=some)
    m = tl.load(product + inner + 2 * hidden, mask=some) + tl.load(bias + unit, mask=some)
    r = _activation(a_r, sigmoid, sigmoid_rows, sigmoid_numbers, name)
    z = _activation(a_z, sigmoid, sigmoid_rows, sigmoid_numbers, name)
    # n = tanh(x + r (h W + b)),   h' = (h - n) z + n
    a_n = tl.load(products + outer + 2 * hidden, mask=some).to(tl.float32) + r * m
    fresh = _activation(a_n, tanh, tanh_rows, tanh_numbers, name)
    after = (_read(h + at, some, name) - fresh) * z + fresh
    _write(h + at, after, some, name)
    _write(y + begin * hidden + at, after, some, name)
    if keep:
        outer = (begin + row) * 4 * hidden + unit
        _write(gates + outer, r, some, name)
        _write(gates + outer + hidden, z, some, name)
        _write(gates + outer + 2 * hidden, fresh, some, name)
        _write(gates + outer + 3 * hidden, m, some, name)


@triton.jit(do_not_specialize=[*_SIZES, "known", "before"])  # type: ignore[untyped-decorator, unused-ignore]
def _gru_backward(  # type: ignore[no-untyped-def]
    carry, around, dy, h, y, gates, d, through,
    begin: tl.int64, n: tl.int64, known: tl.int64, before: tl.int64,
    hidden: tl.constexpr, upstream: tl.constexpr, hard: tl.constexpr, name: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One step: the gradients of the products of x and of h; those of h by later steps are ``carry`` and ``around``.

    ``around`` is what goes to h around the products; the rest is as in :func:`_lstm_backward`.
    """
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    some = at < n
    row, unit = at // hidden, at % hidden
    outer = (begin + row) * 4 * hidden + unit
    r, z = _read(gates + outer, some, name), _read(gates + outer + hidden, some, name)
    fresh, m = _read(gates + outer + 2 * hidden, some, name), _read(gates + outer + 3 * hidden, some, name)
    dh = tl.load(carry + at, mask=some) + tl.load(around + at, mask=some)
    if upstream:
        dh += _read(dy + begin * hidden + at, some, name)
    past = _read(y + before * hidden + at, some & (at < known), name) + _read(h + at, some & (at >= known), name)
    dn = dh * (1.0 - z) * _tanh_slope(fresh, hard)
    dr = dn * m * _sigmoid_slope(r, hard)
    dz = dh * (past - fresh) * _sigmoid_slope(z, hard)
    outer = (begin + row) * 3 * hidden + unit
    _write(d + outer, dr, some, name)
    _write(d + outer + hidden, dz, some, name)
    _write(d + outer + 2 * hidden, dn, some, name)
    _write(through + outer, dr, some, name)
    _write(through + outer + hidden, dz, some, name)
    _write(through + outer + 2 * hidden, dn * r, some, name)
    tl.store(around + at, dh * z, mask=some)


# ---- launches


class Step(NamedTuple):
    """The rows of one step, and how many of them had a step before, whose rows begin at ``before``."""

    begin: int
    rows: int
    known: int
    before: int


def steps_of(steps: list[tuple[int, int]]) -> list[Step]:
    """Return the steps of a sequence, which are given in the order of time by their first and last rows."""
    found, past, known = [], 0, 0
    for begin, end in steps:
        found.append(Step(begin, end - begin, min(known, end - begin), past))
        past, known = begin, end - begin
    return found


def runs(mode: str, table: str, dtype: torch.dtype) -> bool:
    """Tell whether there are kernels of these activations."""
    return all(parts(function, mode, dtype, table) is not None for function in ("sigmoid", "tanh"))


@functools.cache
def _forward(
    jit: Any, mode: str, table: str, dtype: torch.dtype, device: torch.device, hidden: int, keep: bool
) -> Kernel:
    rows, constants = [], []
    for function in ("sigmoid", "tanh"):
        compute, table_rows, numbers = parts(function, mode, dtype, table)  # type: ignore[misc]
        rows.append(on(table_rows, device))
        constants += [compute, numbers]
    return Kernel(jit, None, device, tuple(rows), (hidden, keep, *constants, FORMAT_OF[dtype].name), BLOCK)


@functools.cache
def _backward(jit: Any, dtype: torch.dtype, device: torch.device, hidden: int, upstream: bool, hard: bool) -> Kernel:
    return Kernel(jit, None, device, (), (hidden, upstream, hard, FORMAT_OF[dtype].name), BLOCK)


def _bits(*tensors: Tensor) -> list[Tensor]:
    """Return numbers of the format by their bits, as the kernels take them."""
    return [tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32) for tensor in tensors]


def _laid(*tensors: Tensor) -> tuple[tuple[Tensor, ...], list[int]]:
    """Return tensors contiguous, from multiples of 16 bytes on, as all that is written is, and where they lie."""
    laid = [tensor.contiguous() for tensor in tensors]
    laid = [tensor.clone() if tensor.data_ptr() & 15 else tensor for tensor in laid]
    return tuple(laid), [tensor.data_ptr() for tensor in laid]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a @ b to ``out``, in float32."""
    if not a.is_cuda:
        out.copy_(a.float() @ b.float())
    elif a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def lstm(
    products: Tensor, weight: Tensor, c: Tensor, h: Tensor, y: Tensor, kept: tuple[Tensor, Tensor],
    steps: list[tuple[int, int]], mode: str, table: str,
) -> None:  # fmt: skip
    """Run a layer: c and h, the state, in place; y [rows, hidden] and ``kept`` (or no rows of it) are written.

    The products are in the format or in float32; all that is written is contiguous.
    """
    hidden, keep = y.shape[1], kept[0].shape[0] > 0
    kernel = _forward(_lstm_forward, mode, table, h.dtype, h.device, hidden, keep)
    wide, product = weight.t(), torch.empty(h.shape[0], 4 * hidden, dtype=torch.float32, device=h.device)
    tensors, places = _laid(products, product, *_bits(c, h, y, *kept))
    for begin, end in steps:
        n = end - begin
        _product(h[:n], wide, product[:n])
        kernel.launch(tensors, places, -(-n * hidden // BLOCK), begin, n * hidden)


def lstm_backward(
    dy: Tensor | None, carry: Tensor, weight: Tensor, c: Tensor, gates: Tensor, cells: Tensor, dc: Tensor, d: Tensor,
    steps: list[tuple[int, int]], hard: bool,
) -> None:  # fmt: skip
    """Write d, the gates' gradients, and over ``carry`` and ``dc`` [batch, hidden], in float32, those of h and c."""
    hidden = c.shape[1]
    kernel = _backward(_lstm_backward, c.dtype, c.device, hidden, dy is not None, hard)
    tensors, places = _laid(carry, dc, *_bits(c if dy is None else dy, c, gates, cells, d))
    for begin, n, known, before in reversed(steps_of(steps)):
        kernel.launch(tensors, places, -(-n * hidden // BLOCK), begin, n * hidden, known * hidden, before)
        _product(d[begin : begin + n], weight, carry[:n])


def gru(
    products: Tensor, weight: Tensor, bias: Tensor, h: Tensor, y: Tensor, kept: Tensor,
    steps: list[tuple[int, int]], mode: str, table: str,
) -> None:  # fmt: skip
    """Run a layer, as :func:`lstm`; the bias is in float32."""
    hidden, keep = y.shape[1], kept.shape[0] > 0
    kernel = _forward(_gru_forward, mode, table, h.dtype, h.device, hidden, keep)
    wide, product = weight.t(), torch.empty(h.shape[0], 3 * hidden, dtype=torch.float32, device=h.device)
    tensors, places = _laid(products, product, bias, *_bits(h, y, kept))
    for begin, end in steps:
        n = end - begin
        _product(h[:n], wide, product[:n])
        kernel.launch(tensors, places, -(-n * hidden // BLOCK), begin, n * hidden)


def gru_backward(
    dy: Tensor | None, carry: Tensor, weight: Tensor, h: Tensor, y: Tensor, gates: Tensor, d: Tensor, through: Tensor,
    steps: list[tuple[int, int]], hard: bool,
) -> None:  # fmt: skip
    """Write the gradients of the products of x, d, and of h, ``through``, and over ``carry`` that of h."""
    hidden = h.shape[1]
    kernel = _backward(_gru_backward, h.dtype, h.device, hidden, dy is not None, hard)
    around = torch.zeros_like(carry)
    tensors, places = _laid(carry, around, *_bits(h if dy is None else dy, h, y, gates, d, through))
    for begin, n, known, before in reversed(steps_of(steps)):
        kernel.launch(tensors, places, -(-n * hidden // BLOCK), begin, n * hidden, known * hidden, before)
        _product(through[begin : begin + n], weight, carry[:n])
    carry += around


def probe(device: torch.device) -> None:
    """Compile and launch a kernel; raises what Triton raises where it cannot."""
    one, wide = torch.zeros(1, 4, dtype=torch.bfloat16, device=device), torch.zeros(1, 1, device=device)
    lstm_backward(None, wide, one.view(4, 1), one[:, :1], one, one[:, :2], wide.clone(), one.clone(), [(0, 1)], False)
