"""The recurrence of one layer of an LSTM or a GRU in one direction: native kernels, or PyTorch operators step by step.

Rows are those of all steps, one step after another. What is stored is in the format of h: activated gates, c, tanh(c)
and h, each rounded once as it is computed. Sums of products with the weights, and all gradients, are float32; but the
gradients of gates, which products and sums take, are rounded to bfloat16, and on a GPU to any format.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rarefy import kernels
from rarefy.act import operator
from rarefy.act.kernels import launch
from rarefy.kernels._memory import address

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_THREADED = 1 << 21  # multiply-adds from which a thread of its own pays: not measured on many cores


class Gates(NamedTuple):
    """What the activations of a layer are: ``mode`` and ``table`` as the operator has them."""

    mode: str
    table: str

    def sigmoid(self, x: Tensor) -> Tensor:
        """Compute the gates of sigmoid."""
        return operator.forward(x, "sigmoid", self.mode, self.table)

    def tanh(self, x: Tensor) -> Tensor:
        """Compute the gates of tanh."""
        return operator.forward(x, "tanh", self.mode, self.table)


# ---- native


class _Gate(ctypes.Structure):
    _fields_ = (("entry", ctypes.c_void_p), ("table", ctypes.c_void_p), ("kind", ctypes.c_int64))


_ENTRY, _OF_TANH, _CLAMP, _CLAMP_SIXTH = range(4)


class _Recurrent(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("steps", "batch", "hidden", "reverse", "threads")),
        ("offsets", ctypes.c_void_p),
        ("sigmoid", _Gate),
        ("tanh", _Gate),
        ("narrow", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("products", "weights", "bias", "h", "c", "y", "gates", "cells", "scratch")
        ),
    )


class _Gradients(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "h_n", "products", "hidden", "h", "c")),
        ("hard", ctypes.c_int64),
    )


_gates: dict[tuple[Gates, torch.dtype, str | None], tuple[_Gate, _Gate] | None] = {}


def _native_gates(gates: Gates, dtype: torch.dtype) -> tuple[_Gate, _Gate] | None:
    """Return how a native kernel computes sigmoid and tanh; None where it cannot."""
    key = (gates, dtype, kernels.isa())
    if key not in _gates:
        _gates[key] = _choose(gates, dtype)
    return _gates[key]


def _choose(gates: Gates, dtype: torch.dtype) -> tuple[_Gate, _Gate] | None:
    found: dict[str, _Gate] = {}
    for function in ("sigmoid", "tanh"):
        steps = launch.steps_of(function, gates.mode, dtype, gates.table)
        kernel = None if steps is None else steps.kernel()
        if kernel is not None:
            found[function] = _Gate(ctypes.cast(kernel[0], ctypes.c_void_p).value, kernel[1], _ENTRY)
    if dtype == torch.float32 and gates.mode == "hard":
        found.setdefault("tanh", _Gate(None, None, _CLAMP))
        found.setdefault("sigmoid", _Gate(None, None, _CLAMP_SIXTH))
    if dtype == torch.float32 and gates.mode == "ktanh" and "tanh" in found:
        found.setdefault("sigmoid", _Gate(found["tanh"].entry, found["tanh"].table, _OF_TANH))
    return (found["sigmoid"], found["tanh"]) if len(found) == 2 else None


def _native(name: str, dtype: torch.dtype, tensors: tuple[Tensor | None, ...], *arguments: Any) -> Any:
    """Return the kernel ``name`` of this dtype if it may run on these tensors, else None."""
    if dtype not in _NAMES or launch.watched() or not all(t is None or launch.is_readable(t) for t in tensors):
        return None
    return kernels.find(f"{name}_{_NAMES[dtype]}", None, *arguments)


def _place(tensor: Tensor | None) -> int:
    """Return where a tensor that was found readable lies, 0 for one that is not there or has no elements."""
    if tensor is None or tensor.numel() == 0:
        return 0
    return tensor.data_ptr() or address(tensor)  # which says what is wrong with memory that was freed


def _described(
    products: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    c: Tensor | None,
    offsets: Tensor | None,
    reverse: bool,
    gates: tuple[_Gate, _Gate],
    kept: tuple[Tensor, Tensor | None, Tensor | None],
    scratch: Tensor,
) -> _Recurrent:
    """Return the structure of a call; all tensors are contiguous, and live as long as the call."""
    rows, (batch, hidden) = kept[0].shape[0], h.shape
    steps = offsets.numel() - 1 if offsets is not None else rows // batch if batch else 0
    work = rows * hidden * weight.shape[0]
    threads = max(1, min(torch.get_num_threads(), work // _THREADED))
    narrow = products is not None and products.dtype != torch.float32
    places = map(_place, (products, weight, bias, h, c, *kept, scratch))
    return _Recurrent(steps, batch, hidden, reverse, threads, _place(offsets), *gates, narrow, *places)


def _scratch(gates: int, batch: int, hidden: int, *, backward: bool) -> Tensor:
    """Return the room of so many gates that a call needs, as the header says."""
    rows, depth = batch + 15, gates * hidden + 31
    forward_size = (gates * (hidden + 15) + rows) * (hidden + 31)
    backward_size = (rows + depth) * (hidden + 63) + rows * depth
    return torch.empty(backward_size if backward else forward_size, dtype=torch.float32)


# ---- steps


def offsets_of(sizes: Tensor) -> Tensor:
    """Return where the rows of each step begin, and where those of the last end, of the batch sizes of a sequence."""
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def steps_of(rows: int, batch: int, offsets: Tensor | None, reverse: bool) -> list[tuple[int, int]]:
    """Return the first row and the one after the last of every step, in the order of time."""
    if offsets is None:
        begins = list(range(0, rows, batch)) if batch else []
        steps = [(begin, begin + batch) for begin in begins]
    else:
        places = offsets.tolist()
        steps = list(itertools.pairwise(places))
    return steps[::-1] if reverse else steps


def previous(y: Tensor, h: Tensor, offsets: Tensor | None, reverse: bool) -> Tensor:
    """Return the h before each row of ``y`` [rows, size]; ``h`` [batch, size] is that before the first step."""
    if offsets is None:
        batch = h.shape[0]
        return torch.cat([y[batch:], h] if reverse else [h, y[: y.shape[0] - batch]])
    steps = steps_of(y.shape[0], h.shape[0], offsets, reverse)
    parts: list[list[Tensor]] = []
    known, end = 0, 0  # rows of the step before
    for begin, stop in steps:
        n, before = stop - begin, end - known
        parts.append([y[before : before + min(n, known)], h[min(n, known) : n]])
        known, end = n, stop
    return torch.cat([part for step in (parts[::-1] if reverse else parts) for part in step])


def _before(rows: Tensor, first: Tensor, begin: int, end: int) -> Tensor:
    """Return a step's state before it: that of the step before it, rows begin to end, and of sequences that begin."""
    known = min(first.shape[0], end - begin)
    before = rows[begin : begin + known]
    return before if known == first.shape[0] else torch.cat([before, first[known:]])


def _widened(weight: Tensor) -> Tensor:
    """Return a weight as the products of all steps take it: in float32 on the CPU, where other products are slow."""
    return weight.float() if weight.device.type == "cpu" else weight


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32, of tensors on the CPU or of one format."""
    if b.dtype == torch.float32:
        return a.float() @ b
    a = a.to(b.dtype)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def _sigmoid_slope(y: Tensor, hard: bool) -> Tensor:
    return ((y > 0) & (y < 1)).float() / 6.0 if hard else y * (1.0 - y)


def _tanh_slope(y: Tensor, hard: bool) -> Tensor:
    return (y.abs() < 1).float() if hard else 1.0 - y * y


def gradient_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of gradients of gates of such a tensor; float16 on the CPU has not the range for them."""
    return torch.float32 if like.device.type == "cpu" and like.dtype == torch.float16 else like.dtype


def _triton(like: Tensor, gates: Gates | None = None) -> Any:
    """Return the module of Triton's kernels where they may run on such a tensor, with these gates, else None."""
    if like.device.type != "cuda" or kernels.isa() == "pytorch":
        return None
    module = _probed(like.device)
    return None if module is None or (gates is not None and not module.runs(*gates, like.dtype)) else module


@functools.cache
def _probed(device: torch.device) -> Any:
    try:
        from rarefy.act.kernels import cells_triton

        cells_triton.probe(device)
    except ImportError:
        return None
    except Exception as error:  # a device that is too old, no C compiler: Triton has an exception for each
        warnings.warn(f"Triton does not run on {device}, so LSTM and GRU run in PyTorch: {error}", stacklevel=2)
        return None
    return cells_triton


# ---- LSTM


def lstm(
    products: Tensor,
    weight: Tensor,
    projection: Tensor | None,
    h: Tensor,
    c: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    gates: Gates,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y [rows, size], h and c after the last step, and for the gradients the gates [rows, 4 hidden] and cells.

    products [rows, 4 hidden] are those of the input with the biases, in float32 or the format; weight
    [4 hidden, size]; projection [size, hidden]; h [batch, size]; c [batch, hidden]. Gates: i, f, g, o; cells
    [rows, 2 hidden]: c and tanh(c). With ``keep`` false both come back without rows.
    """
    rows, hidden = products.shape[0], c.shape[1]
    h, c = (torch.clone(t, memory_format=torch.contiguous_format) for t in (h, c))
    y = h.new_empty(rows, h.shape[1])
    kept = h.new_empty(rows if keep else 0, 4 * hidden), h.new_empty(rows if keep else 0, 2 * hidden)
    tensors = (products, weight, projection, h, c, offsets)
    kernel = _native("lstm", h.dtype, tensors, ctypes.c_void_p) if projection is None else None
    chosen = None if kernel is None else _native_gates(gates, h.dtype)
    if kernel is not None and chosen is not None:
        scratch = _scratch(4, h.shape[0], hidden, backward=False)
        products, weight = products.contiguous(), weight.contiguous()
        call = _described(products, weight, None, h, c, offsets, reverse, chosen, (y, *kept), scratch)
        kernel(ctypes.byref(call))
        return y, h, c, kept[0], kept[1]
    fused = _triton(h, gates) if projection is None else None
    if fused is not None:
        fused.lstm(products, weight, c, h, y, kept, steps_of(rows, h.shape[0], offsets, reverse), *gates)
        return y, h, c, kept[0], kept[1]
    wide = _widened(weight).t()
    out = None if projection is None else _widened(projection).t()
    for begin, end in steps_of(rows, h.shape[0], offsets, reverse):
        n = end - begin
        a = (products[begin:end] + _product(h[:n], wide)).to(h.dtype)
        s, g = gates.sigmoid(a), gates.tanh(a[:, 2 * hidden : 3 * hidden])
        i, f, o = s[:, :hidden], s[:, hidden : 2 * hidden], s[:, 3 * hidden :]
        # c' = f c + i g,   h' = o tanh(c')
        c[:n] = f.float() * c[:n].float() + i.float() * g.float()
        t = gates.tanh(c[:n])
        m = (o.float() * t.float()).to(h.dtype)
        h[:n] = m if out is None else _product(m, out)
        y[begin:end] = h[:n]
        if keep:
            torch.cat([i, f, g, o], 1, out=kept[0][begin:end])
            torch.cat([c[:n], t], 1, out=kept[1][begin:end])
    return y, h, c, kept[0], kept[1]


def lstm_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    weight: Tensor,
    projection: Tensor | None,
    c: Tensor,
    gates: Tensor,
    cells: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the products, of h before a projection (no rows without), of h and of c.

    They are float32, but for the first: see :func:`gradient_dtype`.

    ``dy``, ``dh`` and ``dc`` are those of what :func:`lstm` gives; c is the one before the first step.
    """
    rows, (batch, hidden), size = gates.shape[0], c.shape, weight.shape[1]
    d = torch.empty(rows, 4 * hidden, dtype=gradient_dtype(c), device=c.device)
    carry = torch.zeros(batch, size, device=c.device) if dh is None else dh.float()
    dc = torch.zeros(batch, hidden, device=c.device) if dc is None else torch.clone(dc.float())
    totals = torch.empty(0 if projection is None else rows, size, dtype=torch.float32, device=c.device)
    tensors = (dy, dh, dc, weight, projection, c, gates, cells, offsets)
    pointers = (ctypes.c_void_p, ctypes.c_void_p)
    kernel = _native("lstm_backward", c.dtype, tensors, *pointers) if projection is None else None
    if kernel is not None:
        scratch = _scratch(4, batch, hidden, backward=True)
        weight, c = weight.contiguous(), c.contiguous()
        dy, dh = (None if t is None else t.contiguous() for t in (dy, dh))
        carry, dc = torch.empty(batch, hidden), dc.contiguous()
        call = _described(
            None, weight, None, c, c, offsets, reverse, (_Gate(), _Gate()), (gates, gates, cells), scratch
        )
        kernel(ctypes.byref(call), ctypes.byref(_gradients(dy, dh, d, None, carry, dc, hard)))
        return d, totals, carry, dc
    carry = torch.clone(carry, memory_format=torch.contiguous_format)
    c, dc = c.contiguous(), dc.contiguous()
    steps = steps_of(rows, batch, offsets, reverse)
    fused = _triton(c) if projection is None else None
    if fused is not None:
        fused.lstm_backward(dy, carry, weight, c, gates, cells, dc, d, steps, hard)
        return d, totals, carry, dc
    wide, out = _widened(weight), None if projection is None else _widened(projection)
    for index in range(len(steps) - 1, -1, -1):
        begin, end = steps[index]
        n = end - begin
        up = carry[:n] if dy is None else carry[:n] + dy[begin:end].float()
        before = c[:n]
        if index > 0:
            before = _before(cells[:, :hidden], before, *steps[index - 1])
        if out is not None:
            totals[begin:end] = up
            up = _product(up, out)
        i, f, g, o = gates[begin:end].float().chunk(4, 1)
        t = cells[begin:end, hidden:].float()
        before = before.float()
        inner = dc[:n] + up * o * _tanh_slope(t, hard)
        parts = [inner * g * _sigmoid_slope(i, hard), inner * before * _sigmoid_slope(f, hard)]
        parts += [inner * i * _tanh_slope(g, hard), up * t * _sigmoid_slope(o, hard)]
        torch.cat(parts, 1, out=d[begin:end])
        dc[:n] = inner * f
        carry[:n] = _product(d[begin:end], wide)
    return d, totals, carry, dc


def _gradients(
    dy: Tensor | None, dh: Tensor | None, d: Tensor, hidden: Tensor | None, h: Tensor, c: Tensor | None, hard: bool
) -> _Gradients:
    return _Gradients(*map(_place, (dy, dh, d, hidden, h, c)), hard)


# ---- GRU


def gru(
    products: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    gates: Gates,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [rows, hidden], h after the last step, and for the gradients the gates [rows, 4 hidden].

    products [rows, 3 hidden] are those of the input with the biases, of the third gate the input's bias alone;
    ``bias`` [hidden] is that gate's with the hidden state; weight [3 hidden, hidden]; h [batch, hidden]. Gates: r, z,
    n and h W_hn^T + bias; with ``keep`` false without rows.
    """
    rows, hidden = products.shape[0], h.shape[1]
    h = torch.clone(h, memory_format=torch.contiguous_format)
    y = torch.empty(rows, hidden, dtype=h.dtype, device=h.device)
    kept = h.new_empty(rows if keep else 0, 4 * hidden)
    kernel = _native("gru", h.dtype, (products, weight, bias, h, offsets), ctypes.c_void_p)
    chosen = None if kernel is None else _native_gates(gates, h.dtype)
    added = None if bias is None else bias.float()
    if kernel is not None and chosen is not None:
        scratch = _scratch(3, h.shape[0], hidden, backward=False)
        products, weight = products.contiguous(), weight.contiguous()
        added = None if added is None else added.contiguous()
        call = _described(products, weight, added, h, None, offsets, reverse, chosen, (y, kept, None), scratch)
        kernel(ctypes.byref(call))
        return y, h, kept
    steps = steps_of(rows, h.shape[0], offsets, reverse)
    fused = _triton(h, gates)
    if fused is not None:
        flat = torch.zeros(hidden, device=h.device) if added is None else added
        fused.gru(products, weight, flat, h, y, kept, steps, *gates)
        return y, h, kept
    wide = _widened(weight).t()
    for begin, end in steps:
        n = end - begin
        x, p = products[begin:end].float(), _product(h[:n], wide)
        inner = p[:, 2 * hidden :] if added is None else p[:, 2 * hidden :] + added
        s = gates.sigmoid((x[:, : 2 * hidden] + p[:, : 2 * hidden]).to(h.dtype))
        r, z = s.chunk(2, 1)
        # n = tanh(x + r (h W + b)),   h' = (h - n) z + n
        fresh = gates.tanh((x[:, 2 * hidden :] + r.float() * inner).to(h.dtype))
        m = fresh.float()
        h[:n] = (h[:n].float() - m) * z.float() + m
        y[begin:end] = h[:n]
        if keep:
            torch.cat([r, z, fresh, inner.to(h.dtype)], 1, out=kept[begin:end])
    return y, h, kept


def gru_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    weight: Tensor,
    h: Tensor,
    y: Tensor,
    gates: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the products of the input and of the hidden state, and in float32 of h.

    The first two are as :func:`gradient_dtype` says.

    ``dy`` and ``dh`` are those of what :func:`gru` gives; h is the one before the first step.
    """
    rows, (batch, hidden) = gates.shape[0], h.shape
    d, through = (torch.empty(rows, 3 * hidden, dtype=gradient_dtype(h), device=h.device) for _ in range(2))
    carry = torch.zeros(batch, hidden, device=h.device)
    if dh is not None:
        carry.copy_(dh)
    tensors = (dy, dh, weight, h, y, gates, offsets)
    kernel = _native("gru_backward", h.dtype, tensors, ctypes.c_void_p, ctypes.c_void_p)
    if kernel is not None:
        scratch = _scratch(3, batch, hidden, backward=True)
        weight, h, y = weight.contiguous(), h.contiguous(), y.contiguous()
        dy, dh = (None if t is None else t.contiguous() for t in (dy, dh))
        carry = torch.empty(batch, hidden)
        call = _described(None, weight, None, h, None, offsets, reverse, (_Gate(), _Gate()), (y, gates, None), scratch)
        kernel(ctypes.byref(call), ctypes.byref(_gradients(dy, dh, d, through, carry, None, hard)))
        return d, through, carry
    h, fused = h.contiguous(), _triton(h)
    steps = steps_of(rows, batch, offsets, reverse)
    if fused is not None:
        fused.gru_backward(dy, carry, weight, h, y, gates, d, through, steps, hard)
        return d, through, carry
    wide = _widened(weight)
    for index in range(len(steps) - 1, -1, -1):
        begin, end = steps[index]
        n = end - begin
        up = carry[:n] if dy is None else carry[:n] + dy[begin:end].float()
        before = h[:n]
        if index > 0:
            before = _before(y, before, *steps[index - 1])
        r, z, fresh, inner = gates[begin:end].float().chunk(4, 1)
        before = before.float()
        dn = up * (1.0 - z) * _tanh_slope(fresh, hard)
        dr = dn * inner * _sigmoid_slope(r, hard)
        dz = up * (before - fresh) * _sigmoid_slope(z, hard)
        torch.cat([dr, dz, dn], 1, out=d[begin:end])
        torch.cat([dr, dz, dn * r], 1, out=through[begin:end])
        carry[:n] = up * z + _product(through[begin:end], wide)
    return d, through, carry


# ---- products over all rows


def multiplies(like: Tensor) -> bool:
    """Tell whether the device multiplies matrices of such a tensor as they are; else float32 is faster, and closer."""
    if like.device.type != "cpu" or like.dtype == torch.float32:
        return True
    return like.dtype == torch.bfloat16 and _has_bfloat16_products()


@functools.cache
def _has_bfloat16_products() -> bool:
    """Tell whether the processor has products of bfloat16 numbers, which oneDNN takes: AVX512_BF16 or AMX."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def weight_gradient(d: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a weight, d^T x, in the format of x: one product over all rows."""
    if multiplies(x):
        return d.to(x.dtype).t() @ x
    return (d.float().t() @ x.float()).to(x.dtype)


def projected(gates: Tensor, cells: Tensor) -> Tensor:
    """Return o tanh(c), which an LSTM's projection takes, from what it kept."""
    hidden = cells.shape[1] // 2
    return (gates[:, 3 * hidden :].float() * cells[:, hidden:].float()).to(gates.dtype)
