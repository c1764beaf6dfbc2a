"""``rarefy::recurrence``: a recurrent layer over sequences with the batch in front, as graphs of the engine have it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import rarefy.act.sequences  # noqa: F401 - registers the operators
from rarefy.act.sequences import run_gru, run_lstm


def over_sequence(
    products: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Sequence[Tensor],
    reverse: bool,
    cells: bool,
    mode: str,
    table: str,
) -> Tensor:
    """Compute what a :class:`rarefy.engine.plan.Recurrence` is, in PyTorch; its fields."""
    batch, steps, gates = products.shape
    hidden = weight.shape[1]
    lstm = gates == 4 * hidden
    zeros = products.new_zeros(batch, hidden)
    h, c = states[0] if states else zeros, states[-1] if states else zeros
    rows = products.transpose(0, 1).reshape(steps * batch, gates)
    if cells:  # which are kept for a gradient, each beside its tanh
        y, *_, kept = torch.ops.rarefy.lstm(rows, weight, None, h, c, None, reverse, mode, table, True)
        y = torch.cat([y, kept[:, :hidden]], 1)
    elif lstm:
        y, *_ = run_lstm(rows, weight, None, h, c, None, reverse, mode, table)
    else:
        y, *_ = run_gru(rows, weight, bias, h, None, reverse, mode, table)
    return y.view(steps, batch, y.shape[1]).transpose(0, 1).contiguous()


recurrence = torch.library.custom_op("rarefy::recurrence", over_sequence, mutates_args=())


@recurrence.register_fake
def _fake(
    products: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Sequence[Tensor],
    reverse: bool,
    cells: bool,
    mode: str,
    table: str,
) -> Tensor:
    return products.new_empty(products.shape[0], products.shape[1], weight.shape[1] * (1 + cells))
