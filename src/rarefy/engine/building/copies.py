"""Views as native programs copy them: parts of values to other places and layouts (``rarefy_function``, "view")."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rarefy.engine.binding import CHANNELS_FIRST
from rarefy.engine.places import geometry
from rarefy.engine.plan import View
from rarefy.engine.views import apart, row_major


def _planes(shape: tuple[int, ...], layout: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sizes of channels and pixels of a sample in the order in which it counts them, and which are the channels."""
    channels, height, width = geometry(shape, layout)
    pixels = height * width
    return ((channels, pixels), (0, 1)) if layout == CHANNELS_FIRST else ((pixels, channels), (1, 0))


def described(
    view: View,
    shape: tuple[int, ...],
    layout: int,
    to: int,
    whole: tuple[int, ...] | None = None,
    begin: tuple[int, ...] = (),
) -> list[int] | None:
    """One part of a native view (``rarefy_function``): of a value of that shape and layout, to another layout.

    It is the whole result, or what begins there in one of the shape ``whole``.

    None where a stride of it is no step along channels or pixels.
    """
    sizes, (channel, pixel) = _planes(shape, layout)
    found = apart(view, sizes)
    if found is None:
        return None
    whole = whole or view.sizes
    (*_, fastest), (channel_out, pixel_out) = _planes(whole, to)
    entries, dimensions = row_major(whole), list[int]()
    first = divmod(sum(at * entry for at, entry in zip(begin, entries, strict=False)), fastest)
    for atoms, entry in zip(found.atoms, entries, strict=True):
        step = entry * math.prod(atom.size for atom in atoms)
        for atom in atoms:
            step //= atom.size
            into = divmod(step, fastest) if step >= fastest else (0, step)
            moved = [0, 0]
            moved[atom.axis] = atom.step
            dimensions += [atom.size, moved[channel], moved[pixel], into[channel_out], into[pixel_out]]
    start = [found.start[channel], found.start[pixel], first[channel_out], first[pixel_out]]
    return [len(dimensions) // 5, *start, *dimensions]


def is_range(part: Sequence[int]) -> bool:
    """Whether a part of a native view takes channels as they are."""
    count, _, pixel, *_ = part
    steps = [part[at + 1 : at + 5] for at in range(5, 5 + 5 * count, 5)]
    return pixel == 0 and all(a == c and b == d for a, b, c, d in steps)


def as_it_is(name: str, output: str, value: str, sizes: tuple[int, ...]) -> View:
    """All numbers of a value in their order, in another shape perhaps."""
    return View(name=name, output=output, input=value, numbers=math.prod(sizes), sizes=sizes, strides=row_major(sizes))
