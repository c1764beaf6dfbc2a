"""What PyTorch takes from defaults of the process: dtypes written out in a graph, which may run under another default,
and the CPU in the place of another device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

_ATEN = torch.ops.aten


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within the block new tensors are on the CPU, whatever PyTorch's default device is."""
    if torch.get_default_device().type == "cpu":  # a default that is set makes all of PyTorch's functions slower
        yield
        return
    with torch.device("cpu"):
        yield


def explicit_dtypes(graph: fx.Graph) -> None:
    """Let what has the default dtype, whole numbers and booleans made floating point, have it by its arguments."""
    for node in list(graph.nodes):
        made = node.meta.get("val")
        if not isinstance(node.target, OpOverload) or node.target.namespace != "aten" or not isinstance(made, Tensor):
            continue
        read = [each for each in node.all_input_nodes if isinstance(each.meta.get("val"), Tensor)]
        floats = (each.meta["val"].is_floating_point() or each.meta["val"].is_complex() for each in read)
        if made.dtype is not torch.get_default_dtype() or any(floats):
            continue
        arguments = [argument.name for argument in node.target._schema.arguments]
        if "dtype" in arguments:
            place = arguments.index("dtype")
            if place < len(node.args):
                node.update_arg(place, node.args[place] or made.dtype)
            else:
                node.update_kwarg("dtype", node.kwargs.get("dtype") or made.dtype)
            continue
        choices = read[1:] if node.target.overloadpacket is _ATEN.where else read
        with graph.inserting_before(node):
            if node.target is _ATEN.where.Scalar:
                condition, *numbers = node.args
                node.args = (condition, *(_number(graph, read[0], each, made.dtype) for each in numbers))
                node.target = _ATEN.where.self
            for each in choices:
                node.replace_input_with(each, _converted(graph, each, made.dtype))


def _number(graph: fx.Graph, like: fx.Node, number: Any, dtype: torch.dtype) -> fx.Node:
    """A tensor without axes."""
    node = graph.call_function(_ATEN.full.default, ([], number), {"dtype": dtype})
    node.meta["val"] = like.meta["val"].new_full((), number, dtype=dtype)
    return node


def _converted(graph: fx.Graph, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    node = graph.call_function(_ATEN.to.dtype, (x, dtype))
    node.meta["val"] = x.meta["val"].to(dtype)
    return node
