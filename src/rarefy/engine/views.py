"""Views: the operators of PyTorch that move numbers and compute none, as :class:`rarefy.engine.plan.View` has them.

Entry (i, j, ...) of a view is number ``offset + i strides[0] + j strides[1] + ...`` of a sample. Where that sample lies
in memory in another way than in one row, or is a view itself, each of the strides must be taken apart into steps along
axes: :func:`apart`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from rarefy.engine.nodes import ASTRAY, sample_shapes, whole_number
from rarefy.engine.operators import Call
from rarefy.engine.places import through as through_view
from rarefy.engine.plan import Join, Operator, Places, Plan, Ref, Step, View


class Atom(NamedTuple):
    """``size`` entries of a view along one axis of what it views, ``step`` apart."""

    size: int
    axis: int
    step: int


class Apart(NamedTuple):
    """A view as steps along axes: where its first entry is along each, and the atoms of each of its dimensions.

    The atoms of a dimension are its entries in order: the last one's change fastest.
    """

    start: tuple[int, ...]
    atoms: tuple[tuple[Atom, ...], ...]


def row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of numbers in the order of their axes, the last one fastest."""
    return tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))


def apart(view: View, shape: Sequence[int]) -> Apart | None:
    """The view along the axes of a sample of that shape; None where a stride of it is no step along them."""
    lengths = row_major(shape)
    start = [view.offset // length % size for length, size in zip(lengths, shape, strict=True)]
    reach = [[0, 0] for _ in shape]  # along each axis, downwards and upwards
    dimensions = []
    for whole, least in zip(view.sizes, view.strides, strict=True):
        size, stride, atoms = whole, least, list[Atom]()
        while size > 1:
            if stride == 0:
                atoms.append(Atom(size, 0, 0))
                break
            axis = next((a for a, n in enumerate(lengths) if shape[a] > 1 and stride % n == 0), None)
            if axis is None:
                return None
            step = stride // lengths[axis]
            fits = size
            if abs(step) * (size - 1) >= shape[axis]:  # it goes on along the axis before
                fits, rest = divmod(shape[axis], abs(step))
                if rest or fits < 2 or size % fits:
                    return None
            atoms.append(Atom(fits, axis, step))
            reach[axis][step > 0] += (fits - 1) * step
            size, stride = size // fits, stride * fits
        dimensions.append(tuple(reversed(atoms)))
    inside = all(at + low >= 0 and at + high < size for at, (low, high), size in zip(start, reach, shape, strict=True))
    return Apart(tuple(start), tuple(dimensions)) if inside else None


def one_stride(atoms: Sequence[Atom], strides: Sequence[int]) -> int | None:
    """The stride of a dimension of these atoms along axes of those strides; None where it has not one alone."""
    if not atoms:
        return 0
    steps = [atom.step * strides[atom.axis] for atom in atoms]
    even = all(steps[i] == atoms[i + 1].size * steps[i + 1] for i in range(len(atoms) - 1))
    return steps[-1] if even else None


def composed(outer: View, inner: View) -> View | None:
    """The view of a view as one of what that views; None where it is none."""
    found = apart(outer, inner.sizes)
    if found is None:
        return None
    strides = [one_stride(atoms, inner.strides) for atoms in found.atoms]
    if None in strides:
        return None
    offset = inner.offset + sum(at * stride for at, stride in zip(found.start, inner.strides, strict=True))
    known = tuple(stride for stride in strides if stride is not None)
    return replace(outer, input=inner.input, numbers=inner.numbers, strides=known, offset=offset)


def in_order(view: View) -> bool:
    """Whether a view is all numbers in the order that they have: a reshape."""
    plain = all(
        size == 1 or stride == expected
        for size, stride, expected in zip(view.sizes, view.strides, row_major(view.sizes), strict=True)
    )
    return plain and view.offset == 0 and math.prod(view.sizes) == view.numbers


def through(view: View, x: Tensor) -> tuple[tuple[int, ...], int] | None:
    """Strides, the batch's first, and offset of a view of a tensor that is not contiguous; None where it has none."""
    batch = x.numel() // view.numbers
    if batch == 0 or x.shape[0] % batch:
        return None
    fold = x.shape[0] // batch
    found = apart(view, (fold, *x.shape[1:]))
    if found is None:
        return None
    strides = [one_stride(atoms, x.stride()) for atoms in found.atoms]
    if None in strides:
        return None
    offset = sum(at * stride for at, stride in zip(found.start, x.stride(), strict=True))
    return (fold * x.stride(0), *(stride for stride in strides if stride is not None)), offset


#: Operators whose result is a view of what they read, where that lies in one row.
VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int"),
        *("unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "expand.default", "expand_as.default"),
        *("permute.default", "transpose.int", "t.default", "movedim.int", "movedim.intlist", "swapaxes.default"),
        *("slice.Tensor", "select.int", "narrow.default", "diagonal.default", "unfold.default"),
        *("split.Tensor", "split_with_sizes.default", "split.sizes", "chunk.default", "unbind.int"),
        *("tensor_split.sections", "tensor_split.indices"),
    )
)


def captured(call_of: Callable[[fx.Node], Call], node: fx.Node) -> View | None:
    """What a node is that one of these operators makes, or that is one of its results.

    It is a view of the nearest value before whose dimension 0 is the batch; those between may lie in any order. None
    where the node's own dimension 0 is not the batch, or where a number of it depends on the batch.
    """
    path = list[tuple[Call, int | None]]()  # from the node back
    source: Any = node
    while not path or sample_shapes(source, path[-1][0].batch) == (None, 1, None):
        index = None
        if source.target is operator.getitem:
            source, index = source.args
        if not isinstance(source, fx.Node) or str(source.target) not in VIEWS:
            return None
        path.append((call_of(source), index))
        source = path[-1][0].args["self"]
    call = path[-1][0]
    x = call.value("self")
    shape, fold, inner = sample_shapes(source, call.batch)
    shape_out, fold_out, inner_out = sample_shapes(node, call.batch)
    behind, made = (shape if inner is None else inner), (shape_out if inner_out is None else inner_out)
    if x is None or behind is None or made is None or 0 in (*behind, *made):
        return None
    sizes = made if fold_out == 1 else (fold_out, *made)
    numbers, found = fold * math.prod(behind), set[tuple[tuple[int, ...], int]]()
    # Where the batch is amid other axes on the way, it is known to come through whole: one sample is like all.
    alone = any(ASTRAY in each.node.meta for each, _ in path)
    for batch in [int(call.batch)] if call.batch.isdigit() else [1] if alone else [2, 3]:
        whole = torch.empty((fold * batch, *behind), dtype=torch.float32, device="meta")
        y = _traced(path, whole, batch)
        if y is None or tuple(y.shape) != (fold_out * batch, *made):
            return None
        if y.untyped_storage()._cdata != whole.untyped_storage()._cdata:  # a reshape that copies
            return None
        if batch > 1 and y.stride(0) * fold_out != numbers:
            return None
        strides = y.stride() if fold_out > 1 else y.stride()[1:]
        offset = int(y.storage_offset())
        found.add((tuple(0 if n == 1 else each for n, each in zip(sizes, strides, strict=True)), offset))
    if len(found) != 1:
        return None
    ((strides, offset),) = found
    return View(
        name=node.name,
        output=node.name,
        input=x,
        numbers=numbers,
        sizes=sizes,
        strides=strides,
        offset=offset,
        folded=fold_out > 1,
    )


def _traced(path: Sequence[tuple[Call, int | None]], x: Tensor, batch: int) -> Tensor | None:
    """What the operators of a path make of a tensor without numbers; None where they take what is not known yet."""
    for call, index in reversed(path):
        try:
            given = {name: _number(value, call.batch, batch) for name, value in call.args.items() if name != "self"}
        except LookupError:
            return None
        if str(call.node.target) in ("aten.view.default", "aten._unsafe_view.default"):  # of what copies made whole
            made: Any = x.reshape(given["size"])
        else:
            made = call.node.target(x, **given)  # type: ignore[operator]
        x = made if index is None else made[index]
    return x


def _number(argument: Any, name: str, batch: int) -> Any:
    """An argument for so large a batch, of that name in the graph. Raises LookupError for one that is no number."""
    if isinstance(argument, (list, tuple)):
        return [_number(each, name, batch) for each in argument]
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    if isinstance(value, torch.SymInt):
        found = whole_number(value, name, batch)
        if found is None:
            raise LookupError
        return found
    if isinstance(value, Tensor):
        raise LookupError
    return value


def simplify(plan: Plan) -> Plan:
    """Views of views as views of what these view, and none of all numbers as they are."""
    made: dict[str, View] = {}
    same: dict[str, str] = {}
    steps: list[Step] = []
    for each in plan.steps:
        step = renamed(each, same)
        if isinstance(step, View):
            found = composed(step, made[step.input]) if step.input in made else None
            step = found or step
            if _changes_nothing(plan, step) and step.output not in plan.outputs:
                same[step.output] = step.input
                continue
            made[step.output] = step
        elif isinstance(step, Join):
            step = _before(step, made)
        steps.append(step)
    return replace(plan, steps=tuple(steps))


def of_places(step: Join, places: Places, shape: tuple[int, ...]) -> View:
    """A part of a join as a view by itself."""
    return View(
        name=step.name,
        output=step.output,
        input=places.value,
        numbers=places.numbers,
        sizes=shape,
        strides=places.strides,
        offset=places.offset,
    )


def _before(step: Join, made: Mapping[str, View]) -> Join:
    """A join that reads what the views that it read were made of."""
    parts = list[Places]()
    for places, shape in zip(step.parts, step.shapes, strict=True):
        found = through_view(places, shape, made[places.value]) if places.value in made else None
        parts.append(found or places)
    return replace(step, parts=tuple(parts))


def _changes_nothing(plan: Plan, step: View) -> bool:
    before, after = plan.values[step.input], plan.values[step.output]
    return in_order(step) and (before.sample, before.fold) == (after.sample, after.fold)


def renamed(step: Step, names: Mapping[str, str]) -> Step:
    """The step reading other values in the place of those named."""
    if not any(name in names for name in step.inputs):
        return step
    if isinstance(step, Operator):
        return replace(step, args=_renamed(step.args, names), kwargs=_renamed(dict(step.kwargs), names))
    changed: dict[str, Any] = {
        each.name: _renamed(getattr(step, each.name), names)
        for each in fields(step)
        if each.name not in ("name", "output", "mode", "table", "op", "activation")
    }
    return replace(step, **changed)


def _renamed(argument: Any, names: Mapping[str, str]) -> Any:
    match argument:
        case Ref(name):
            return Ref(names.get(name, name))
        case str():
            return names.get(argument, argument)
        case list() | tuple():
            return type(argument)(_renamed(each, names) for each in argument)
        case Places():
            return replace(argument, value=names.get(argument.value, argument.value))
        case dict():
            return {name: _renamed(each, names) for name, each in argument.items()}
    return argument
