"""The batch in front: what a model computes with the sequence before the batch becomes the same with the batch first.

PyTorch's own attention, and much that is written with ``batch_first=False``, lays a value out as (sequence, batch,
features), or joins the two in one axis. Programs go through samples one by one. Operators that do not look along the
batch, on such values, become the same operators on these values with the batch in front, with permutations before and
behind; what then lies between two of them is a view of a sample.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from rarefy.engine.nodes import ASTRAY, RESHAPES, whole_number
from rarefy.engine.views import VIEWS

_aten = torch.ops.aten

#: The size of the batch to work out with where it is: it divides no other size.
_SIZE = 1000003


class Place(NamedTuple):
    """Where the batch of a value is: axis ``axis`` has the entries (outer, batch, inner), the last fastest."""

    axis: int
    outer: int = 1
    inner: int = 1

    @property
    def first(self) -> bool:
        """Whether dimension 0 is the batch, and for every sample some entries one after the other."""
        return self.axis == 0 and self.outer == 1

    @property
    def split(self) -> list[int]:
        """The sizes that stand in the place of the axis when the batch is not in it any more."""
        return [size for size in (self.outer, self.inner) if size > 1]


def batch_first(graph: fx.Graph, inputs: Sequence[str]) -> None:
    """Rewrite a graph of any batch size, the batch dimension 0 of its inputs.

    Values that have the batch elsewhere are marked :data:`rarefy.engine.nodes.ASTRAY`.
    """
    rewriting = _Rewriting(graph, inputs)
    if rewriting.gains():
        rewriting.run()


class _Rewriting:
    def __init__(self, graph: fx.Graph, inputs: Sequence[str]) -> None:
        self.graph, self.inputs, self.places = graph, {*inputs}, dict[fx.Node, Place]()
        first = next(node for node in graph.nodes if node.name == inputs[0])
        self.batch: Any = first.meta["val"].shape[0]
        for node in graph.nodes:
            place = self._place(node)
            if place is not None:
                self.places[node] = place

    def gains(self) -> bool:
        """Whether there is an operator to rewrite."""
        return any(self._is_astray(node) and _rows(node) is not None for node in self.graph.nodes)

    def run(self) -> None:
        """Give every value that is astray a twin with the batch in front, and compute it from that."""
        twins = dict[fx.Node, fx.Node]()
        for node in [*self.graph.nodes]:
            if not self._is_astray(node):
                continue
            place = self.places[node]
            with self.graph.inserting_before(node.next):
                twin = self._computed(node, place, twins) or self._front(node, place)
                back = self._back(twin, place, node.meta["val"])
            twins[back] = twin
            self.places[back] = place
            node.replace_all_uses_with(back, delete_user_cb=lambda user, twin=twin: not _made_of(twin, user))
            if not node.users:
                self.graph.erase_node(node)
            else:
                node.meta[ASTRAY] = True

    def _is_astray(self, node: fx.Node) -> bool:
        return node in self.places and not self.places[node].first and isinstance(node.meta["val"], Tensor)

    # ---- where the batch is

    def _place(self, node: fx.Node) -> Place | None:
        if node.op == "placeholder":
            return Place(0) if node.name in self.inputs and self._sizes(node)[:1] == [_SIZE] else None
        given = [(each, self.places[each]) for each in node.all_input_nodes if each in self.places]
        if node.op != "call_function" or not given:
            return None
        x, place = given[0]
        if node.target is operator.getitem or str(node.target) in VIEWS:
            known = self._place_of_view(node, x, place)
            return place if known is None and not isinstance(node.meta["val"], Tensor) else known
        sizes = self._sizes(node)
        if not sizes or not all(at.first for _, at in given):
            return self._place_of_rows(node, sizes)
        rows = {self._sizes(each)[0] for each, _ in given if self._sizes(each)}
        return Place(0, 1, sizes[0] // _SIZE) if sizes[0] == _SIZE or (sizes[0] in rows and _keeps(node)) else None

    def _place_of_view(self, node: fx.Node, x: fx.Node, place: Place) -> Place | None:
        """As that of the first operand, where the view does not cut the batch."""
        sizes, before = self._sizes(node), self._sizes(x)
        found = [axis for axis, size in enumerate(sizes) if size % _SIZE == 0]
        if len(found) != 1:
            return None
        (axis,) = found
        if str(node.target) not in RESHAPES:
            same = not before or before[place.axis] == sizes[axis]  # results of a split have their own sizes
            return place._replace(axis=axis) if same else None
        behind, right = place.inner * math.prod(before[place.axis + 1 :]), math.prod(sizes[axis + 1 :])
        inner, rest = divmod(behind, right)
        outer, more = divmod(sizes[axis], _SIZE * inner) if inner else (0, 1)
        return None if rest or more else Place(axis, outer, inner)

    def _place_of_rows(self, node: fx.Node, sizes: list[int]) -> Place | None:
        """Of what an operator on values that are astray makes, one that is to be rewritten."""
        operands = _rows(node)
        given = [each for each in operands or () if each in self.places]
        if not operands or not given:
            return None
        axis = len(sizes) - len(self._sizes(given[0])) + self.places[given[0]].axis
        place = self.places[given[0]]._replace(axis=axis)
        whole = place.outer * place.inner * _SIZE
        if axis < 0 or axis >= len(sizes) - _last(node) or sizes[axis] != whole:
            return None
        for each in operands:
            at = axis - len(sizes) + len(self._sizes(each))  # the batch's axis in it
            if each in self.places:
                if self.places[each] != place._replace(axis=at):
                    return None
            elif at >= 0 and self._sizes(each)[at] != 1:
                return None
        return place

    def _sizes(self, node: fx.Node) -> list[int]:
        """The sizes of a node's tensor for the batch to work out with; none where one is not known."""
        value = node.meta.get("val")
        found = (
            [whole_number(size, str(self.batch), _SIZE) for size in value.shape] if isinstance(value, Tensor) else []
        )
        return [] if None in found else cast("list[int]", found)

    # ---- what is computed

    def _computed(self, node: fx.Node, place: Place, twins: dict[fx.Node, fx.Node]) -> fx.Node | None:
        """An operator of rows on the twins of what it reads; None for what is no such operator."""
        operands = _rows(node)
        if operands is None:
            return None
        rank = node.meta["val"].dim()

        def moved(each: Any) -> Any:
            if each not in operands:
                return each
            at = place.axis - rank + each.meta["val"].dim()
            if each in twins:
                return twins[each]
            if at < 0:
                return each
            if each in self.places:
                return self._front(each, self.places[each])
            sizes = list(each.meta["val"].shape)
            sizes = [1, *sizes[:at], *(1 for _ in place.split), *sizes[at + 1 :]]  # the batch's axis is one
            return self._call(_aten.reshape.default, each, sizes)

        args, kwargs = fx.map_arg((node.args, node.kwargs), moved)
        made = self.graph.call_function(cast(Any, node.target), args, kwargs)
        made.meta = {**node.meta, "val": self._value(cast(Any, node.target), args, kwargs)}
        return made

    def _front(self, x: fx.Node, place: Place) -> fx.Node:
        """(..., outer batch inner, ...) as (batch, ..., outer, inner, ...)."""
        axis, rank = place.axis, x.meta["val"].dim()
        if place.split:
            sizes = [place.outer, self.batch, place.inner]
            sizes = [size for size in sizes if size is self.batch or size > 1]
            shape = x.meta["val"].shape
            x = self._call(_aten.reshape.default, x, [*shape[:axis], *sizes, *shape[axis + 1 :]])
            axis, rank = axis + (place.outer > 1), rank + len(place.split)
        return self._call(_aten.permute.default, x, [axis, *(each for each in range(rank) if each != axis)])

    def _back(self, x: fx.Node, place: Place, like: Tensor) -> fx.Node:
        """What :meth:`_front` made such a tensor of."""
        axis, rank = place.axis + (place.outer > 1), x.meta["val"].dim()
        order = [*range(1, axis + 1), 0, *range(axis + 1, rank)]
        x = self._marked(self._call(_aten.permute.default, x, order))
        return self._marked(self._call(_aten.reshape.default, x, list(like.shape))) if place.split else x

    def _marked(self, node: fx.Node) -> fx.Node:
        node.meta[ASTRAY] = True
        return node

    def _call(self, target: OpOverload, x: fx.Node, numbers: list[Any]) -> fx.Node:
        """A node that calls an operator with a list of sizes or axes; the one that has the batch is what is left."""
        plain = [each if isinstance(each, int) else -1 for each in numbers]
        node = self.graph.call_function(target, (x, plain))
        node.meta = {"val": target(x.meta["val"], numbers)}
        return node

    def _value(self, target: OpOverload, args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.map_arg((args, kwargs), lambda each: each.meta["val"])
        return target(*args, **kwargs)


def _made_of(twin: fx.Node, user: fx.Node) -> bool:
    """Whether a node is the twin, or one of those that it is a view of."""
    while twin is not user:
        if str(twin.target) not in VIEWS:
            return False
        twin = cast(fx.Node, twin.args[0])
    return True


#: Operators that compute row by row, of so many of the last axes.
_ROWS = {"aten.linear.default": 1, "aten.dropout.default": 0, "aten.hardswish.default": 0, "aten.contiguous.default": 0}
#: Those on values with the batch in front that leave the rows of dimension 0 where they are.
_KEEP = frozenset(
    f"aten.{name}"
    for name in (
        *("bmm.default", "baddbmm.default", "matmul.default", "softmax.int", "_softmax.default"),
        "scaled_dot_product_attention.default",
    )
) | {"rarefy.recurrence.default"}


def _last(node: fx.Node) -> int:
    """How many of the last axes an operator of rows looks along."""
    if str(node.target) in ("aten.layer_norm.default", "aten.rms_norm.default"):
        return len(cast(Sequence[int], node.args[1]))
    return _ROWS.get(str(node.target), 0)


def _rows(node: fx.Node) -> list[fx.Node] | None:
    """What an operator reads that computes row by row, and number by number over rows; None for another."""
    target = node.target
    if not isinstance(target, OpOverload) or not isinstance(node.meta.get("val"), Tensor):
        return None
    if str(target) in (*_ROWS, "aten.layer_norm.default", "aten.rms_norm.default"):
        return [cast(fx.Node, node.args[0])]
    pointwise = torch.Tag.pointwise in target.tags and not target._schema.is_mutable
    return [each for each in node.all_input_nodes if isinstance(each.meta["val"], Tensor)] if pointwise else None


def _keeps(node: fx.Node) -> bool:
    return _rows(node) is not None or str(node.target) in _KEEP
