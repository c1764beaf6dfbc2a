"""How the steps of :mod:`rarefy.engine.plan.moving` are added to a program."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.engine.binding import CHANNELS_FIRST, CHANNELS_LAST
from rarefy.engine.building.copies import as_it_is, described, is_range
from rarefy.engine.building.draft import CannotError, Draft, Made, laid
from rarefy.engine.places import geometry
from rarefy.engine.plan import NATIVE, Concat, Flatten, Join, Resize, Upsample, View
from rarefy.engine.reference import bind
from rarefy.engine.views import in_order, of_places

#: Steps that read a value of their program where it lies.
_READS_PLANES = tuple(kind for kind in NATIVE if kind is not View)


def concat(draft: Draft, step: Concat) -> Made:
    """The channels of all operands."""
    xs = draft.values(step.inputs, CHANNELS_FIRST)
    by_name = dict(zip(step.inputs, xs, strict=True))
    number = draft.builder.concat([by_name[each] for each in step.operands], name=step.output)
    return laid(draft.shape(step.operands[0]), CHANNELS_FIRST), number


def upsample(draft: Draft, step: Upsample) -> Made:
    """Every pixel several times."""
    (x,) = draft.values(step.inputs, CHANNELS_FIRST)
    down, across = (1, *step.factor)[-2:]
    return CHANNELS_FIRST, draft.builder.upsample(x, (down, across), name=step.output)


def resize(draft: Draft, step: Resize) -> Made:
    """An image of another size."""
    (x,) = draft.values(step.inputs, CHANNELS_FIRST)
    sizes = draft.shape(step.input)[1:]
    tables = [_taken(step, sizes, axis) for axis in (0, 1)]
    numbers = [int(step.mode == "bilinear"), *step.sizes, *(int(place) for taken, _ in tables for place in taken)]
    shares = [share for _, share in tables] if step.mode == "bilinear" else []
    return CHANNELS_FIRST, draft.builder.tensor("resize", [x], numbers, shares, name=step.output)


def _taken(step: Resize, sizes: Sequence[int], axis: int) -> tuple[Tensor, Tensor]:
    """Where each row or column begins in an image of those sizes, and the share of the next one: both (size,)."""
    size, out = sizes[axis], step.sizes[axis]
    if step.mode == "nearest":
        compute, (_, *options), _ = bind(step)
        ramp = torch.arange(size, dtype=torch.float32).reshape((-1, 1) if axis == 0 else (1, -1)).expand(1, 1, *sizes)
        taken = compute(ramp, *options)[0, 0].select(1 - axis, 0)
        return taken.long(), torch.zeros(out, dtype=torch.float32)
    factor = None if step.factors is None else step.factors[axis]
    to = torch.arange(out, dtype=torch.float32)
    if step.align_corners:
        between = (size - 1) / (out - 1) if out > 1 else 0.0
    else:
        between = 1.0 / factor if factor else size / out
    pixel = torch.tensor(between, dtype=torch.float32)
    at = to * pixel if step.align_corners else (pixel * (to + 0.5) - 0.5).clamp(min=0)
    taken = at.long().clamp(max=size - 1)
    return taken, (at - taken).clamp(0, 1)


def flatten(draft: Draft, step: Flatten) -> Made:
    """All numbers as a vector."""
    if draft.layouts.get(step.input) == CHANNELS_LAST:
        whole = math.prod(draft.shape(step.input))
        return _copied(draft, as_it_is(step.name, step.output, step.input, (whole,)))
    (x,) = draft.values(step.inputs, CHANNELS_FIRST)
    return None, draft.builder.flatten(x, name=step.output)


def view(draft: Draft, step: View) -> Made:
    """A view of a value of the program, where a copy here costs less than PyTorch's view outside."""
    if draft.rows or step.input not in draft.layouts:
        raise CannotError("what it views is made elsewhere: PyTorch copies nothing")
    readers = draft.users[step.output]
    outside = [user for user in draft.users[step.input] if not isinstance(user, (View, *_READS_PLANES))]
    torch_alone = step.output in draft.plan.outputs or not any(isinstance(user, NATIVE) for user in readers)
    if torch_alone and (in_order(step) or outside or step.input in draft.plan.outputs):
        raise CannotError("PyTorch reads both what it views and the view, and copies nothing")
    return _copied(draft, step)


def _copied(draft: Draft, step: View) -> Made:
    """A view as a copy between planes, or as a range of channels that needs none."""
    layout, wanted = draft.layouts[step.input], draft.wanted(step.output)
    from_layout = CHANNELS_FIRST if layout is None else layout
    x, shape, sizes = draft.ids[step.input, from_layout], draft.shape(step.input), step.sizes
    if not sizes:
        raise CannotError("it has no axes")
    found = {to: described(step, shape, from_layout, to) for to in (CHANNELS_FIRST, CHANNELS_LAST)}
    if wanted is None:
        free = [to for to, part in found.items() if part is not None and is_range(part)]
        wanted = free[0] if free else CHANNELS_FIRST
    part = found[wanted]
    if part is None:
        raise CannotError("its numbers lie in no even steps")
    return laid(sizes, wanted), draft.copy(x, step, wanted, part)


def join(draft: Draft, step: Join) -> Made:
    """Parts of values as copies between planes, at least one of them of a value of the program."""
    if draft.rows or not any(name in draft.layouts for name in step.inputs):
        raise CannotError("its parts are made elsewhere: PyTorch copies them as fast")
    there = [layout for name in step.inputs if (layout := draft.layouts.get(name)) is not None]
    known, wanted = (there or [CHANNELS_LAST])[0], draft.wanted(step.output)
    wanted = known if wanted is None else wanted
    numbers, operands = list[int](), list[tuple[str, int]]()
    for places, shape, begin in zip(step.parts, step.shapes, step.begins, strict=True):
        layout = draft.layouts.get(places.value, wanted)
        layout = CHANNELS_FIRST if layout is None else layout
        part = of_places(step, places, shape)
        known_shape = draft.shape(places.value)
        found = described(part, known_shape, layout, wanted, step.sizes, begin)
        if found is None:  # in the other layout they may
            layout = 1 - layout
            found = described(part, known_shape, layout, wanted, step.sizes, begin)
            if found is None or len(known_shape) == 1:
                raise CannotError("its numbers lie in no even steps")
            if places.value in draft.layouts:
                draft.turn(places.value, layout)
        operands.append((places.value, layout))
        numbers += found
    xs = [draft.value(name, layout) for name, layout in operands]
    about = [*geometry(step.sizes, wanted), len(xs), *numbers]
    made = draft.builder.tensor("view", xs, about, name=step.output)
    return laid(step.sizes, wanted), made
