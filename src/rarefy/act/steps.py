"""The recurrence of :mod:`rarefy.act.cells` in differentiable PyTorch operators, for forward-mode derivatives.

The results are rounded where those of the kernels are. Derivatives follow from the operators, of every order and in
both modes; those of the activations are of the form "y", in mode "hard" the slopes of the lines, as the kernels' are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.act import gradients, operator
from rarefy.act.cells import steps_of


def _activation(x: Tensor, function: str, mode: str, table: str) -> Tensor:
    return operator.apply(x, function, mode, gradients.resolve(function, mode, None), table)


def _over(new: Tensor, old: Tensor) -> Tensor:
    """Return a state after a step: the rows that had one, and those of sequences that were over, or not begun."""
    return new if new.shape[0] == old.shape[0] else torch.cat([new, old[new.shape[0] :]])


def _rows(steps: list[Tensor], h: Tensor, reverse: bool) -> Tensor:
    """Return the rows of all steps, which come in the order of time; ``h`` says what a row is like."""
    return torch.cat([h[:0], *(steps[::-1] if reverse else steps)])


def lstm(
    products: Tensor,
    weight: Tensor,
    projection: Tensor | None,
    h: Tensor,
    c: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    mode: str,
    table: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and h and c after the last step; arguments as :func:`rarefy.act.cells.lstm`."""
    hidden, dtype = c.shape[1], h.dtype
    wide, out = weight.float().t(), None if projection is None else projection.float().t()
    outputs = []
    for begin, end in steps_of(products.shape[0], h.shape[0], offsets, reverse):
        n = end - begin
        a = (products[begin:end] + h[:n].float() @ wide).to(dtype)
        g = _activation(a[:, 2 * hidden : 3 * hidden], "tanh", mode, table).float()
        s = _activation(a, "sigmoid", mode, table).float()
        i, f, o = s[:, :hidden], s[:, hidden : 2 * hidden], s[:, 3 * hidden :]
        # c' = f c + i g,   h' = o tanh(c')
        state = (f * c[:n].float() + i * g).to(dtype)
        m = (o * _activation(state, "tanh", mode, table).float()).to(dtype)
        y = m if out is None else (m.float() @ out).to(dtype)
        h, c = _over(y, h), _over(state, c)
        outputs.append(y)
    return _rows(outputs, h, reverse), h, c


def gru(
    products: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    mode: str,
    table: str,
) -> tuple[Tensor, Tensor]:
    """Return y, and h after the last step; arguments as :func:`rarefy.act.cells.gru`."""
    hidden, dtype = h.shape[1], h.dtype
    wide = weight.float().t()
    outputs = []
    for begin, end in steps_of(products.shape[0], h.shape[0], offsets, reverse):
        n = end - begin
        x, p = products[begin:end].float(), h[:n].float() @ wide
        inner = p[:, 2 * hidden :] if bias is None else p[:, 2 * hidden :] + bias.float()
        s = _activation((x[:, : 2 * hidden] + p[:, : 2 * hidden]).to(dtype), "sigmoid", mode, table).float()
        r, z = s.chunk(2, 1)
        # n = tanh(x + r (h W + b)),   h' = (h - n) z + n
        fresh = _activation((x[:, 2 * hidden :] + r * inner).to(dtype), "tanh", mode, table).float()
        y = ((h[:n].float() - fresh) * z + fresh).to(dtype)
        h = _over(y, h)
        outputs.append(y)
    return _rows(outputs, h, reverse), h
