"""Nodes of an exported graph: what is known of their tensors, with the batch by its name, and which change nothing."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, fx

#: Marks a node, in its ``meta``, whose tensor has the batch in another axis or behind others in dimension 0.
ASTRAY = "rarefy.astray"
#: Operators that give back what they got, when the model is not training.
IDENTITIES = frozenset(
    f"aten.{name}"
    for name in (
        *("alias.default", "detach.default", "contiguous.default", "lift_fresh_copy.default", "dropout.default"),
        *("feature_dropout.default", "alpha_dropout.default", "clone.default", "_assert_tensor_metadata.default"),
    )
)
#: Operators that keep the order of all numbers.
RESHAPES = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unsqueeze.default"),
        *("squeeze.default", "squeeze.dim", "squeeze.dims"),
    )
)


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a node's tensor; None where it makes none."""
    return getattr(node.meta.get("val"), "dtype", None)


def is_call(node: Any, *targets: str) -> bool:
    """Whether a node calls one of these operators: "aten.add.Tensor"."""
    return isinstance(node, fx.Node) and str(node.target) in targets


def whole_number(size: Any, batch: str, number: int) -> int | None:
    """A size of a graph where the batch, of that name, has that number; None where it depends on something else."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    symbols = expression.free_symbols
    return int(expression.subs(dict.fromkeys(symbols, number))) if {str(each) for each in symbols} <= {batch} else None


def sample_shape(node: Any, batch: str) -> tuple[int, ...] | None:
    """The shape of a node's tensor without the batch; None where dimension 0 is not it or others are not known."""
    value = node.meta.get("val") if isinstance(node, fx.Node) and ASTRAY not in node.meta else None
    if not isinstance(value, Tensor) or value.dim() == 0 or str(value.shape[0]) != batch:
        return None
    rest = tuple(value.shape[1:])
    return rest if all(isinstance(size, int) for size in rest) else None


def sample_shapes(node: Any, batch: str) -> tuple[tuple[int, ...] | None, int, tuple[int, ...] | None]:
    """``shape``, ``fold`` and ``inner`` of a node's tensor: see :class:`rarefy.engine.plan.Value`."""
    shape = sample_shape(node, batch)
    value = node.meta.get("val") if isinstance(node, fx.Node) and ASTRAY not in node.meta else None
    if shape is not None or not isinstance(value, Tensor) or value.dim() < 2:
        return shape, 1, None
    found = re.fullmatch(rf"(\d+)\*{re.escape(batch)}", str(value.shape[0]))
    rest = tuple(value.shape[1:])
    if found is None or not all(isinstance(size, int) for size in rest):
        return None, 1, None
    return None, int(found[1]), rest


def sample_of(node: Any, batch: str) -> tuple[tuple[int, ...] | None, bool]:
    """The shape of one sample of a node's tensor, and whether its first size is part of dimension 0."""
    shape, fold, inner = sample_shapes(node, batch)
    return ((fold, *inner), True) if inner is not None else (shape, False)


def keeps_order(node: fx.Node) -> bool:
    """Whether a node gives all numbers of its first argument, a tensor, in their order, in another shape at most."""
    target, x = str(node.target), node.args[0] if node.args else None
    if target in RESHAPES:
        return isinstance(x, fx.Node)
    if target not in ("aten.select.int", "aten.transpose.int") or not isinstance(x, fx.Node):
        return False
    single = [str(size) == "1" for size in x.meta["val"].shape]
    axes = [int(cast(int, axis)) % len(single) for axis in node.args[1 : 2 + (target == "aten.transpose.int")]]
    if target == "aten.select.int":
        return single[axes[0]]
    order = list(range(len(single)))
    order[axes[0]], order[axes[1]] = axes[1], axes[0]
    moved = [axis for axis in order if not single[axis]]
    return moved == sorted(moved)
