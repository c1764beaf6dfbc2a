"""How the steps of :mod:`rarefy.engine.plan.places` are added to a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from rarefy.engine.binding import CHANNELS_FIRST, CHANNELS_LAST
from rarefy.engine.builder import Function, bits
from rarefy.engine.building.draft import CannotError, Draft, Made, laid
from rarefy.engine.places import by_axes, contiguous, geometry
from rarefy.engine.plan import Attention, Linear, MatMul, Norm, Placed, Places, Softmax

#: Channels and pixels from one index of an axis to the next.
_Move = tuple[int, int]


@dataclass(frozen=True)
class _Native:
    """Places in the layout of a program's value."""

    layout: int
    offset: _Move
    moves: tuple[_Move, ...]

    def numbers(self, order: Sequence[int]) -> list[int]:
        """What the program is told, the axes in this order; along one that is -1 nothing moves."""
        moves = [self.moves[axis] if axis >= 0 else (0, 0) for axis in order]
        return [*self.offset, *(each for move in moves for each in move)]


@dataclass(frozen=True)
class _Described:
    """The arguments of :meth:`rarefy.engine.builder.Builder.tensor`: values with their layouts, and the result's."""

    function: Function
    values: tuple[tuple[str, int], ...]
    layout: int
    numbers: tuple[int, ...]
    constants: tuple[Tensor, ...] = ()


def placed(draft: Draft, step: Placed) -> Made:
    """A step whose values lie at places: a product of values, a softmax, an attention."""
    if draft.rows:
        raise CannotError("its samples are not those of the network")
    shapes = {name: draft.shape(name) for name in step.inputs}
    layouts = dict[str, tuple[int, ...]]()
    for name in step.inputs:
        made = draft.layouts.get(name)
        layouts[name] = (CHANNELS_LAST, CHANNELS_FIRST) if made is None else (made,)
    users = draft.users[step.output]
    linear = any(isinstance(user, Linear) or (isinstance(user, Norm) and user.axis == -1) for user in users)
    layouts[step.output] = (CHANNELS_LAST,) if linear else (CHANNELS_LAST, CHANNELS_FIRST)
    found = _describe(step, shapes, layouts)
    if found is None:
        raise CannotError("its numbers lie in another order than a program has them")
    xs = [draft.value(name, layout) for name, layout in found.values]
    number = draft.builder.tensor(found.function, xs, found.numbers, found.constants, name=step.output)
    return laid(step.shape, found.layout), number


def _describe(
    step: Placed, shapes: Mapping[str, tuple[int, ...]], layouts: Mapping[str, Sequence[int]]
) -> _Described | None:
    """How a program computes a step, of values of these shapes in one of these layouts, and of the result.

    None where the numbers lie as they do in no layout.
    """
    axes = len(step.sizes)
    vectors = {  # the axis along which vectors are loaded
        Attention: {"query": axes - 4, "key": axes - 3, "value": axes - 3, "mask": axes - 4, "result": axes - 4},
        MatMul: {"right": axes - 2, "result": axes - 2},
        Softmax: {},
    }[type(step)]
    found = dict[str, _Native]()
    for name, places in {**step.operands, "result": step.result}.items():
        shape = step.shape if name == "result" else shapes[places.value]
        native = _native(places, step.sizes, shape, layouts[places.value], vectors.get(name, -1))
        if native is None:
            return None
        found[name] = native
    result = found.pop("result")
    match step:
        case Attention():
            order, own = [*range(axes)], [bits(step.scale), int(step.causal), int(step.empty_is_zero)]
            function: Function = "attention"
        case MatMul():
            order, own, function = [*range(axes)], [bits(step.scale)], "matmul"
            m, n = axes - 3, axes - 2
            if result.moves[n] != (0, 1) and result.moves[m] == (0, 1):  # the same product, transposed
                order[m], order[n] = n, m
                found = {"right": found["right"], "left": found["left"]}
        case Softmax():
            own, function = [], "softmax"
            order = _softmax_order(step, found["x"], result)
        case _:
            raise AssertionError(step)
    constants, last = list[Tensor](), list[int]()
    if isinstance(step, Attention) and step.bias is not None:
        bias, places = _turned(step.bias, axes)
        constants = [bias]
        last = [0, places.offset, *(each for stride in places.strides for each in (0, stride))]
    numbers = [len(order), *(step.sizes[axis] if axis >= 0 else 1 for axis in order)]
    numbers += geometry(step.shape, result.layout)
    for native in (*found.values(), result):
        numbers += native.numbers(order)
    operands = step.operands
    values = tuple((operands[name].value, native.layout) for name, native in found.items())
    return _Described(function, values, result.layout, (*numbers, *last, *own), tuple(constants))


def _native(
    places: Places, sizes: tuple[int, ...], shape: tuple[int, ...], layouts: Sequence[int], along: int
) -> _Native | None:
    """Places in one of the layouts, the first where ``along`` goes from pixel to pixel, or the first of all."""
    found = list[_Native]()
    for layout in layouts:
        channels, height, width = geometry(shape, layout)
        last = layout == CHANNELS_LAST
        digits = by_axes(places, sizes, (height * width, channels) if last else (channels, height * width))
        if digits is not None:
            offset, *moves = [(pair[last], pair[not last]) for pair in (digits.offset, *digits.steps)]
            found.append(_Native(layout, offset, tuple(moves)))
    loaded = [each for each in found if along >= 0 and each.moves[along] == (0, 1)]
    return (*loaded, *found, None)[0]


def _softmax_order(step: Softmax, x: _Native, result: _Native) -> list[int]:
    """The axes with the one last but one whose indices lie side by side; -1 where there is no other axis."""
    *outer, last = range(len(step.sizes))
    if not outer:
        return [-1, last]
    columns = max(outer, key=lambda axis: ((x.moves[axis] == (0, 1)) + (result.moves[axis] == (0, 1)), axis))
    return [*(axis for axis in outer if axis != columns), columns, last]


def _turned(bias: Tensor, axes: int) -> tuple[Tensor, Places]:
    """A constant mask with its queries last, and where its numbers are by the axes of attention."""
    turned = bias.reshape(*(1,) * (axes - 2 - bias.dim()), *bias.shape).transpose(-1, -2).contiguous()
    by_axis = [*range(axes - 4), axes - 3, axes - 4]
    return turned, contiguous("", turned.shape, by_axis, axes)
