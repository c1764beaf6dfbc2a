"""Recurrent layers: how a graph's become one layer in one direction each, and what these become in a plan.

Every LSTM and GRU of a graph, PyTorch's and those of :mod:`rarefy.act`, becomes ``rarefy::recurrence`` (see
:mod:`rarefy.engine.sequence`), a :class:`rarefy.engine.plan.Recurrence`: the product of the input with its weights, for
all steps at once, is an ordinary linear layer before it. A cell, one step without a sequence, stays ``rarefy::lstm`` or
``rarefy::gru``: its product with the state is a linear layer, too, and the gates are steps of the plan. What is not
covered stays an operator that PyTorch runs: projections, other dtypes than float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._C import DispatchKey

import rarefy.engine.sequence  # noqa: F401 - registers the operator
from rarefy.engine.functions import whole_table
from rarefy.engine.operators import Call
from rarefy.engine.plan import GRUGates, Linear, LSTMCell, LSTMHidden, Recurrence, Step

_by_layers: ContextVar[bool] = ContextVar("by_layers", default=False)


# ---- a graph's layers as operators of one layer each


def _over_sequence(
    products: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Sequence[Tensor],
    reverse: bool,
    mode: str = "exact",
    table: str = "",
) -> tuple[Tensor, ...]:
    """y, and the states after the last step, of products with the batch in front."""
    hidden, lstm = weight.shape[1], len(states) == 2
    made = torch.ops.rarefy.recurrence(products, weight, bias, list(states), reverse, lstm, mode, table)
    parts = [made[..., :hidden], made[..., hidden:]] if lstm else [made]
    return parts[0], *(part[:, 0 if reverse else -1] for part in parts)


def _biases(w_hh: Tensor, biases: Sequence[Tensor], lstm: bool) -> tuple[Tensor | None, Tensor | None]:
    """The bias of the products of the input, and of a GRU that of the state's in its third gate, which r multiplies."""
    if not biases or lstm:
        return (biases[0] + biases[1] if biases else None), None
    hidden = w_hh.shape[1]
    return biases[0] + F.pad(biases[1][: 2 * hidden], (0, hidden)), biases[1][2 * hidden :]


def _covered(x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor]) -> bool:
    """Whether all is float32 on the CPU, and the state has the size of the gates: an LSTM with projections has not."""
    plain = all(t.dtype is torch.float32 and t.device.type == "cpu" for t in (x, *weights, *states))
    return plain and all(state.shape[-1] == weights[1].shape[1] for state in states)


def _layers(
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """All layers of ``aten::lstm`` or ``aten::gru``: their arguments, and what they give."""
    each, lstm = 4 if has_biases else 2, len(states) == 2
    directions = (False, True)[: 1 + bidirectional]
    if x.dim() != 3 or train or len(weights) != each * num_layers * len(directions) or not _covered(x, weights, states):
        return NotImplemented
    x = x if batch_first else x.transpose(0, 1)
    # taken apart first: nothing then stands between the layers
    begin = [[state.select(0, k) for state in states] for k in range(len(weights) // each)]
    last = list[tuple[Tensor, ...]]()
    for _ in range(num_layers):
        made = []
        for reverse in directions:
            k = len(last)
            w_ih, w_hh, *biases = weights[each * k : each * (k + 1)]
            outer, inner = _biases(w_hh, biases, lstm)
            y, *after = _over_sequence(F.linear(x, w_ih, outer), w_hh, inner, begin[k], reverse)
            made.append(y)
            last.append(tuple(after))
        x = torch.cat(made, 2) if bidirectional else made[0]
    y = x if batch_first else x.transpose(0, 1)
    return (y, *(some[0].unsqueeze(0) if len(some) == 1 else torch.stack(some) for some in zip(*last, strict=True)))


def _lstm(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *options: Any) -> Any:
    return _layers(x, states, weights, *options)


def _gru(x: Tensor, state: Tensor, weights: Sequence[Tensor], *options: Any) -> Any:
    return _layers(x, [state], weights, *options)


def _lstm_cell(x: Tensor, states: Sequence[Tensor], *weights: Tensor | None) -> Any:
    w_ih, w_hh, *biases = given = [weight for weight in weights if weight is not None]
    if not _covered(x, given, states):
        return NotImplemented
    products = F.linear(x, w_ih, _biases(w_hh, biases, True)[0])
    return torch.ops.rarefy.lstm(products, w_hh, None, *states, None, False, "exact", "", False)[1:3]


def _gru_cell(x: Tensor, state: Tensor, *weights: Tensor | None) -> Any:
    w_ih, w_hh, *biases = given = [weight for weight in weights if weight is not None]
    if not _covered(x, given, [state]):
        return NotImplemented
    outer, inner = _biases(w_hh, biases, False)
    return torch.ops.rarefy.gru(F.linear(x, w_ih, outer), w_hh, inner, state, None, False, "exact", "", False)[1]


def _of_rows(
    products: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Sequence[Tensor],
    reverse: bool,
    mode: str,
    table: str,
) -> Any:
    """Y in rows, one step after another, and the states; one step is left as it is."""
    rows, batch = products.shape[0], states[0].shape[0]
    steps = rows // batch
    if steps == 1 or not _covered(products, [weight, weight], states):
        return NotImplemented
    front = products.view(steps, batch, products.shape[1]).transpose(0, 1)
    y, *after = _over_sequence(front, weight, bias, states, reverse, mode, table)
    return y.transpose(0, 1).reshape(rows, y.shape[2]), *after


def _rarefy_lstm(
    products: Tensor,
    weight: Tensor,
    projection: Tensor | None,
    h: Tensor,
    c: Tensor,
    offsets: Tensor | None,
    *how: Any,
) -> Any:
    *options, keep = how
    if projection is not None or offsets is not None or keep:
        return NotImplemented
    made = _of_rows(products, weight, None, [h, c], *options)
    return made if made is NotImplemented else (*made, products.new_empty(0), products.new_empty(0))


def _rarefy_gru(
    products: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, offsets: Tensor | None, *how: Any
) -> Any:
    *options, keep = how
    if offsets is not None or keep:
        return NotImplemented
    made = _of_rows(products, weight, bias, [h], *options)
    return made if made is NotImplemented else (*made, products.new_empty(0))


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What recurrent operators, PyTorch's and ours, are made of, as ``run_decompositions`` takes it."""
    aten = torch.ops.aten
    return {
        aten.lstm.input: _lstm,
        aten.gru.input: _gru,
        aten.lstm_cell.default: _lstm_cell,
        aten.gru_cell.default: _gru_cell,
        torch.ops.rarefy.lstm.default: _rarefy_lstm,
        torch.ops.rarefy.gru.default: _rarefy_gru,
    }


@functools.cache
def _install() -> None:
    """Have PyTorch's recurrent operators take their shapes from ours in a block of :func:`by_layers`."""
    for operator, ours in ((torch.ops.aten.lstm.input, _lstm), (torch.ops.aten.gru.input, _gru)):
        for key in (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd):
            if key in operator.py_kernels:
                operator.py_kernels[key] = functools.partial(_either, operator.py_kernels[key], ours)
        operator._dispatch_cache.clear()


def _either(theirs: Callable[..., Any], ours: Callable[..., Any], *args: Any) -> Any:
    made = ours(*args) if _by_layers.get() else NotImplemented
    return theirs(*args) if made is NotImplemented else made


@contextlib.contextmanager
def by_layers() -> Iterator[None]:
    """Trace recurrent layers as wholes in the block.

    ``torch.export`` runs them on tensors without numbers, step by step: some milliseconds for each step of a sequence.
    """
    _install()
    token = _by_layers.set(True)
    try:
        yield
    finally:
        _by_layers.reset(token)


def along_batch(graph: fx.Graph) -> bool:
    """Whether a layer of a graph has its sequence where the graph has its batch, and so no known number of steps."""
    layers = [node for node in graph.nodes if str(node.target) == "rarefy.recurrence.default"]
    return any(not isinstance(node.meta["val"].shape[1], int) for node in layers)


def without_cells(graph: fx.Graph) -> None:
    """Have the layers of a graph give c after every step only where something reads it."""
    graph.eliminate_dead_code()
    for node in [*graph.nodes]:
        if str(node.target) != "rarefy.recurrence.default" or not node.args[5]:
            continue
        hidden = node.args[1].meta["val"].shape[1]
        if any(str(user.target) != "aten.slice.Tensor" or user.args[2:] != (0, hidden) for user in node.users):
            continue
        node.args = (*node.args[:5], False, *node.args[6:])
        node.meta["val"] = node.meta["val"][..., :hidden]
        for user in [*node.users]:
            user.replace_all_uses_with(node)
            graph.erase_node(user)


# ---- an operator of one layer as steps


@dataclass(frozen=True)
class Steps:
    """What an operator with several results becomes.

    Attributes:
        steps: in order.
        like: the values that they make, each with one of the same kind.
        results: the value that each of the operator's results is; none where a step gives them all as one.
    """

    steps: tuple[Step, ...]
    like: dict[str, str] = field(default_factory=dict)
    results: tuple[str, ...] = ()


def steps_of(call: Call) -> Steps | None:
    """The steps of a recurrent layer or cell; None for another operator, or one that is not covered."""
    target, args = str(call.node.target), call.args
    if target == "rarefy.recurrence.default":
        return _sequence(call)
    if target not in ("rarefy.lstm.default", "rarefy.gru.default"):
        return None
    lstm = target == "rarefy.lstm.default"
    products, h, weight = call.value("products"), args["h"], call.constant("weight")
    if products is None or weight is None or call.given("offsets") or args["keep"]:
        return None
    if call.given("projection" if lstm else "bias") and (lstm or call.constant("bias") is None):
        return None
    bias = None if lstm else call.constant("bias")
    how = {"mode": args["mode"], "table": whole_table(args["table"])}
    states = [args[name] for name in ("h", "c")[: 1 + lstm]]
    one = str(args["products"].meta["val"].shape[0]) == str(h.meta["val"].shape[0])
    if not one or any(call.value(name) is None for name in ("h", "c")[: 1 + lstm]):
        return None
    return (_lstm_step if lstm else _gru_step)(call, products, states, weight, bias, how)


#: Operators that make tensors of zeros, and those of which there are zeros where they take them.
_ZEROS = frozenset(f"aten.{name}.default" for name in ("zeros", "new_zeros", "zeros_like"))
_FULL = {"aten.full.default": 1, "aten.new_full.default": 2, "aten.full_like.default": 1}
_PARTS = frozenset(f"aten.{name}" for name in ("select.int", "slice.Tensor", "expand.default", "view.default"))


def _is_zero(node: fx.Node, constants: Mapping[str, Tensor]) -> bool:
    """Whether a node's tensor is all zeros, as a layer begins that is given no states."""
    while str(node.target) in _PARTS:
        node = node.args[0]  # type: ignore[assignment]
    if node.name in constants:
        return not bool(constants[node.name].any())
    at = _FULL.get(str(node.target))
    return str(node.target) in _ZEROS or (at is not None and bool(node.args[at] == 0))


def _sequence(call: Call) -> Steps | None:
    """The step of a layer over a sequence: its cells only where something reads them."""
    args = call.args
    products, weight, bias = call.value("products"), call.constant("weight"), call.constant("bias")
    if products is None or weight is None or (call.given("bias") and bias is None):
        return None
    states: list[fx.Node] = args["states"]
    if all(_is_zero(state, call.constants) for state in states):
        states = []
    step = Recurrence(
        **call.layer(),
        products=products,
        states=tuple(state.name for state in states),
        weight=weight,
        bias=bias,
        reverse=args["reverse"],
        cells=args["cells"],
        mode=args["mode"],
        table=whole_table(args["table"]),
    )
    return Steps((step,))


def _value(node: fx.Node, results: Sequence[int]) -> str:
    """What these results of a node, which are the same, are called: as the first node that takes one of them out."""
    taken = [user.name for user in node.users if user.args[1] in results]
    return taken[0] if taken else f"{node.name}.{results[0]}"


def _lstm_step(
    call: Call, products: str, states: Sequence[fx.Node], weight: Tensor, bias: Tensor | None, how: dict[str, str]
) -> Steps:
    h, c = (state.name for state in states)
    name = call.layer()["name"]
    gates, hidden, cell = f"{call.node.name}.gates", _value(call.node, (0, 1)), _value(call.node, (2,))
    steps = (
        Linear(name=name, output=gates, input=h, weight=weight, residual=products),
        LSTMCell(name=name, output=cell, gates=gates, state=c, **how),
        LSTMHidden(name=name, output=hidden, gates=gates, state=cell, **how),
    )
    return Steps(steps, {gates: products, cell: c, hidden: h}, (hidden, hidden, cell))


def _gru_step(
    call: Call, products: str, states: Sequence[fx.Node], weight: Tensor, bias: Tensor | None, how: dict[str, str]
) -> Steps:
    (h,) = (state.name for state in states)
    name, inner, hidden = call.layer()["name"], f"{call.node.name}.inner", _value(call.node, (0, 1))
    padded = None if bias is None else F.pad(bias, (2 * len(bias), 0))
    steps = (
        Linear(name=name, output=inner, input=h, weight=weight, bias=padded),
        GRUGates(name=name, output=hidden, x=products, h=inner, state=h, **how),
    )
    return Steps(steps, {inner: products, hidden: h}, (hidden, hidden))
