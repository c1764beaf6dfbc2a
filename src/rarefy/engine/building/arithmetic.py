"""How the steps of :mod:`rarefy.engine.plan.arithmetic` are added to a program."""

from __future__ import annotations

from collections.abc import Sequence

from rarefy.engine.binding import CHANNELS_FIRST, CHANNELS_LAST
from rarefy.engine.builder import OPERATIONS, Windows
from rarefy.engine.building.copies import as_it_is, described
from rarefy.engine.building.draft import CannotError, Draft, Made, laid
from rarefy.engine.places import geometry
from rarefy.engine.plan import REDUCTIONS, Affine, Binary, GlobalAverage, Pointwise, Pool, Reduce


def affine(draft: Draft, step: Affine) -> Made:
    """A factor and a summand for every channel, or an activation alone."""
    scale, shift = step.scale, step.shift
    even = all(part is None or bool((part == part[0]).all()) for part in (scale, shift))
    layout = CHANNELS_FIRST if step.axis == 1 else CHANNELS_LAST
    layout = draft.elementwise_layout(step) if even else layout
    (x,) = draft.values(step.inputs, layout)
    if even:
        channels = draft.builder.shape(x)[0]
        scale, shift = (None if part is None else part[:1].expand(channels) for part in (scale, shift))
    number = draft.builder.affine(x, scale, shift, step.activation, name=step.output)
    return laid(draft.shape(step.input), layout), number


def binary(draft: Draft, step: Binary) -> Made:
    """The sum or the product of two values."""
    layout = draft.elementwise_layout(step)
    x, y = draft.values(step.inputs, layout)
    number = draft.builder.binary(x, y, multiply=step.op == "mul", activation=step.activation, name=step.output)
    return laid(draft.shape(step.x), layout), number


def pointwise(draft: Draft, step: Pointwise) -> Made:
    """An expression."""
    made = draft.plan.values[step.output].shape
    if made is None or draft.rows or any(len(draft.shape(name, 3)) != len(made) for name in step.operands):
        raise CannotError("its operands have other axes than its result")
    layout = draft.elementwise_layout(step)
    values = dict(zip(step.operands, draft.values(step.operands, layout), strict=True))
    numbers, constants = [len(step.sizes)], []
    for size, constant in zip(step.sizes, step.split(), strict=True):
        whole = constant.reshape(*(1,) * (len(made) - len(size)), *size)
        numbers += geometry(tuple(whole.shape), layout)
        constants.append(whole.movedim(-1, 0) if layout == CHANNELS_LAST else whole)
    for operation, x, y in step.code:
        numbers += [OPERATIONS.index(operation), x, y]
    number = draft.builder.tensor(
        "pointwise", [values[name] for name in step.operands], numbers, constants, name=step.output
    )
    return laid(made, layout), number


def pool(draft: Draft, step: Pool) -> Made:
    """A maximum or an average over windows."""
    (x,) = draft.values(step.inputs, CHANNELS_FIRST)
    sizes = draft.shape(step.input)[1:]
    outs = (draft.plan.values[step.output].shape or ())[1:]
    ends = []
    for axis, size in enumerate(sizes):
        reach = (outs[axis] - 1) * step.stride[axis] + step.dilation[axis] * (step.kernel[axis] - 1) + 1
        ends.append(reach - size - step.padding[axis] if step.ceil_mode else step.padding[axis])
        if step.op == "average" and step.count_include_pad and ends[-1] > step.padding[axis]:
            raise CannotError("the native average pool does not divide by windows cut off by ceil_mode")
    pads = tuple(zip(step.padding, (max(0, end) for end in ends), strict=True))
    windows = Windows(sizes, step.kernel, step.stride, step.dilation, pads)
    return CHANNELS_FIRST, draft.builder.pool(
        x,
        average=step.op == "average",
        count_padding=step.count_include_pad,
        kernel=windows.kernel,
        stride=windows.stride,
        dilation=windows.dilation,
        padding=windows.padding,
        depth=windows.depth,
        name=step.output,
    )


def global_average(draft: Draft, step: GlobalAverage) -> Made:
    """The mean over all pixels."""
    (x,) = draft.values(step.inputs, CHANNELS_FIRST)
    return CHANNELS_FIRST if step.keepdim else None, draft.builder.global_average(x, name=step.output)


def reduce(draft: Draft, step: Reduce) -> Made:
    """A reduction over axes, and where others are wanted than it leaves, its copy to these."""
    if draft.rows:
        raise CannotError("its samples are not those of the network")
    shape, first = draft.shape(step.input), draft.elementwise_layout(step)
    whole = {layout: _over(shape, step.axes, layout) for layout in (first, 1 - first)}
    layout = next((each for each, axes in whole.items() if axes is not None), None)
    if layout is None:
        raise CannotError("its axes are no channels, rows or columns")
    (x,) = draft.values(step.inputs, layout)
    numbers = [REDUCTIONS.index(step.op), whole[layout] or 0]
    made = draft.builder.tensor("reduce", [x], numbers, name=step.output)
    kept = tuple(1 if axis in step.axes else size for axis, size in enumerate(shape))
    sizes = kept if step.keepdim else tuple(size for axis, size in enumerate(shape) if axis not in step.axes)
    wanted = draft.wanted(step.output)
    to = layout if wanted is None or step.keepdim else wanted
    if geometry(sizes, to) != geometry(kept, layout) or (to != layout and len(sizes) > 1):
        view = as_it_is(step.name, step.output, step.output, sizes)
        part = described(view, kept, layout, to)
        assert part is not None
        made = draft.copy(made, view, to, part)
    return laid(sizes, to), made


def _over(shape: Sequence[int], axes: Sequence[int], layout: int) -> int | None:
    """The axes of a sample as those of planes: 1 channels, 2 rows, 4 columns, added up; None where they are none."""
    count = len(shape)
    order = [*range(count)] if layout == CHANNELS_FIRST else [count - 1, *range(count - 1)]
    found = 0
    for bit, part in ((1, order[:1]), (2, order[1:-1]), (4, order[1:][-1:])):
        inside = {axis in axes for axis in part if shape[axis] > 1}
        if len(inside) > 1:
            return None
        found |= bit if True in inside else 0
    return found or None
