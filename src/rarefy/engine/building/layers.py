"""How the steps of :mod:`rarefy.engine.plan.layers` are added to a program."""

from __future__ import annotations

import itertools
import math

import torch

from rarefy.engine.binding import CHANNELS_FIRST, CHANNELS_LAST
from rarefy.engine.builder import Function, Windows, bits
from rarefy.engine.building.draft import CannotError, Draft, Made, laid
from rarefy.engine.building.segments import SegmentPort
from rarefy.engine.places import geometry
from rarefy.engine.plan import (
    REDUCTIONS,
    Conv,
    ConvTranspose,
    Embedding,
    GroupNorm,
    GRUGates,
    Linear,
    LSTMCell,
    LSTMHidden,
    Norm,
    Recurrence,
)
from rarefy.engine.transposed import phases
from rarefy.engine.views import row_major


def conv(draft: Draft, step: Conv) -> Made:
    """A convolution."""
    x, *residual = draft.values(step.inputs, CHANNELS_FIRST)
    return CHANNELS_FIRST, _conv(draft, step, x, *residual)


def _conv(draft: Draft, step: Conv, x: int, residual: int = -1) -> int:
    windows = Windows(draft.shape(step.input)[1:], step.weight.shape[2:], step.stride, step.dilation, step.padding)
    return draft.builder.conv(
        x,
        step.weight[:, :, None] if step.weight.dim() == 3 else step.weight,
        step.bias,
        stride=windows.stride,
        dilation=windows.dilation,
        padding=windows.padding,
        depth=windows.depth,
        groups=step.groups,
        residual=residual,
        activation=step.activation,
        storage=draft.options.storage,
        choice=draft.options.choice,
        name=step.output,
    )


def conv_transpose(draft: Draft, step: ConvTranspose) -> Made:
    """A convolution to all phases of the result, and their shuffle."""
    (x,) = draft.values(step.inputs, CHANNELS_FIRST)
    made = phases(step, draft.shape(step.input)[1:])
    ones = (1,) * len(step.stride)
    conv_of_phases = Conv(
        name=step.name,
        output=step.output,
        input=step.input,
        weight=made.weight,
        bias=made.bias,
        stride=ones,
        padding=made.padding,
        dilation=ones,
        groups=step.groups,
        activation=step.activation,
    )
    places = _conv(draft, conv_of_phases, x)
    numbers, count = list[int](), math.prod(step.stride)
    before, after = row_major(made.made), row_major(made.sizes)  # pixels from one place of an axis to the next
    for phase, begin in enumerate(itertools.product(*map(range, step.stride))):
        rest = [-(-(size - at) // s) for size, at, s in zip(made.sizes, begin, step.stride, strict=True)]
        if min(rest) < 1:
            continue
        pixel = sum(at * each for at, each in zip(begin, after, strict=True))
        numbers += [1 + len(rest), phase, 0, 0, pixel]  # channel and pixel in what it reads, and in the result
        numbers += [len(step.weight), count, 0, 1, 0]
        for each in zip(rest, before, step.stride, after, strict=True):
            numbers += [each[0], 0, each[1], 0, each[2] * each[3]]
    parts = len(numbers) // (10 + 5 * len(step.stride))
    shape = (*geometry((len(step.weight), *made.sizes), CHANNELS_FIRST), parts)
    return CHANNELS_FIRST, draft.builder.tensor("view", [places] * parts, [*shape, *numbers], name=step.output)


def linear(draft: Draft, step: Linear) -> Made:
    """A linear layer, as a convolution over one pixel."""
    x, *residual = draft.values(step.inputs, CHANNELS_LAST)
    number = draft.builder.conv(
        x,
        step.weight[:, :, None, None],
        step.bias,
        residual=residual[0] if residual else -1,
        activation=step.activation,
        storage=draft.options.storage,
        choice=draft.options.choice,
        name=step.output,
    )
    return None if draft.rows else laid(draft.shape(step.input), CHANNELS_LAST), number


def norm(draft: Draft, step: Norm) -> Made:
    """A norm over the last axis or the channels."""
    layout = CHANNELS_LAST if step.axis == -1 else CHANNELS_FIRST
    (x,) = draft.values(step.inputs, layout)
    function: Function = "layer norm" if step.centred else "rms norm"
    return laid(draft.shape(step.input), layout), _normalised(draft, function, step, x, [bits(step.eps)])


def group_norm(draft: Draft, step: GroupNorm) -> Made:
    """A norm over groups of channels."""
    (x,) = draft.values(step.inputs, CHANNELS_FIRST)
    number = _normalised(draft, "group norm", step, x, [bits(step.eps), step.groups])
    return laid(draft.shape(step.input), CHANNELS_FIRST), number


def _normalised(draft: Draft, function: Function, step: Norm | GroupNorm, x: int, numbers: list[int]) -> int:
    channels = draft.builder.shape(x)[0]
    weight = torch.ones(channels, dtype=torch.float32) if step.weight is None else step.weight
    bias = torch.zeros(channels, dtype=torch.float32) if step.bias is None else step.bias
    return draft.builder.tensor(function, [x], numbers, [weight, bias], name=step.output)


def embedding(draft: Draft, step: Embedding) -> Made:
    """Rows of a table by whole numbers, which go into the program as they are."""
    made, value = draft.plan.values[step.output].sample, draft.plan.values[step.input]
    if draft.rows or not made or value.shape is None:
        raise CannotError("its samples are not those of the network")
    key = (step.input, CHANNELS_FIRST)
    if key not in draft.ids:
        port = SegmentPort(step.input, value.shape, integer=value.dtype.itemsize)
        draft.ids[key] = draft.builder.input((port.numbers, 1, 1), CHANNELS_FIRST, step.input)
        draft.inputs[key] = port
    reduction = -1 if step.reduction is None else REDUCTIONS.index(step.reduction)
    pixels = geometry(made, CHANNELS_LAST)[1:]
    numbers = [value.dtype.itemsize // 4, len(step.weight), reduction, *pixels]
    number = draft.builder.tensor("embedding", [draft.ids[key]], numbers, [step.weight], name=step.output)
    return laid(made, CHANNELS_LAST), number


def gates(draft: Draft, step: LSTMCell | GRUGates) -> Made:
    """The gates of one step of a recurrent layer."""
    if any(len(draft.shape(name)) != 1 for name in step.inputs):
        raise CannotError("its state is no vector")
    values, mode, table = draft.values(step.inputs, CHANNELS_FIRST), step.mode, step.table
    match step:
        case LSTMHidden():
            return None, draft.builder.lstm_hidden(*values, mode=mode, table=table, name=step.output)
        case LSTMCell():
            return None, draft.builder.lstm_cell(*values, mode=mode, table=table, name=step.output)
    return None, draft.builder.gru(*values, mode=mode, table=table, name=step.output)


def recurrence(draft: Draft, step: Recurrence) -> Made:
    """A recurrent layer over a sequence."""
    (products,) = draft.values((step.products,), CHANNELS_LAST)
    states = draft.values(step.states, CHANNELS_FIRST)
    hidden = step.weight.shape[1]
    return CHANNELS_LAST, draft.builder.recurrence(
        products,
        states,
        step.weight,
        None if step.bias is None else torch.nn.functional.pad(step.bias, (2 * hidden, 0)),
        reverse=step.reverse,
        cells=step.cells,
        mode=step.mode,
        table=step.table,
        storage=draft.options.storage,
        choice=draft.options.choice,
        name=step.output,
    )
