"""Recurrent layers: how a graph's become one layer in one direction each, and what these become in a plan.

Every LSTM and GRU of a graph, PyTorch's and those of :mod:`rarefy.act`, becomes ``rarefy::lstm`` or ``rarefy::gru``:
the product of the input with its weights, for all steps at once, is an ordinary linear layer before it. Of one step the
product with the state is a linear layer, too, and the gates are steps of the plan; several are a :class:`Recurrence`.
What is not covered stays an operator that PyTorch runs: projections, other dtypes than float32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._C import DispatchKey

import rarefy.act.sequences  # noqa: F401 - registers the operators
from rarefy.engine.functions import whole_table
from rarefy.engine.operators import Call
from rarefy.engine.plan import GRUGates, Linear, LSTMCell, LSTMHidden, Recurrence, Step

#: One layer in one direction over rows of all steps: (rows, weights, states, reverse) to (y, states after the last).
_Layer = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], bool], tuple[Tensor, ...]]


_by_layers: ContextVar[bool] = ContextVar("by_layers", default=False)


# ---- a graph's layers as operators of one layer each


def _lstm_layer(rows: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], reverse: bool) -> tuple[Tensor, ...]:
    w_ih, w_hh, *biases = weights
    products = F.linear(rows, w_ih, biases[0] + biases[1] if biases else None)
    y, h, c, *_ = torch.ops.rarefy.lstm(products, w_hh, None, *states, None, reverse, "exact", "", False)
    return y, h, c


def _gru_layer(rows: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], reverse: bool) -> tuple[Tensor, ...]:
    w_ih, w_hh, *biases = weights
    bias, inner, hidden = None, None, w_hh.shape[1]
    if biases:  # the third gate's bias of the state stays apart, since r multiplies it
        bias, inner = biases[0] + F.pad(biases[1][: 2 * hidden], (0, hidden)), biases[1][2 * hidden :]
    y, h, *_ = torch.ops.rarefy.gru(F.linear(rows, w_ih, bias), w_hh, inner, *states, None, reverse, "exact", "", False)
    return y, h


def _covered(x: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor]) -> bool:
    """Whether all is float32 on the CPU, and the state has the size of the gates: an LSTM with projections has not."""
    plain = all(t.dtype is torch.float32 and t.device.type == "cpu" for t in (x, *weights, *states))
    return plain and all(state.shape[-1] == weights[1].shape[1] for state in states)


def _layers(
    layer: _Layer,
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
    each = 4 if has_biases else 2
    directions = (False, True)[: 1 + bidirectional]
    if x.dim() != 3 or train or len(weights) != each * num_layers * len(directions) or not _covered(x, weights, states):
        return NotImplemented
    x = x.transpose(0, 1) if batch_first else x
    steps, batch, _ = x.shape
    # taken apart first: nothing then stands between the layers
    begin = [[state.select(0, k) for state in states] for k in range(len(weights) // each)]
    rows, last = x.reshape(steps * batch, x.shape[2]), list[tuple[Tensor, ...]]()
    for _ in range(num_layers):
        made = []
        for reverse in directions:
            k = len(last)
            y, *after = layer(rows, weights[each * k : each * (k + 1)], begin[k], reverse)
            made.append(y)
            last.append(tuple(after))
        rows = torch.cat(made, 1) if bidirectional else made[0]
    y = rows.view(steps, batch, rows.shape[1])
    y = y.transpose(0, 1) if batch_first else y
    return (y, *(some[0].unsqueeze(0) if len(some) == 1 else torch.stack(some) for some in zip(*last, strict=True)))


def _lstm(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], *options: Any) -> Any:
    return _layers(_lstm_layer, x, states, weights, *options)


def _gru(x: Tensor, state: Tensor, weights: Sequence[Tensor], *options: Any) -> Any:
    return _layers(_gru_layer, x, [state], weights, *options)


def _lstm_cell(x: Tensor, states: Sequence[Tensor], *weights: Tensor | None) -> Any:
    given = [weight for weight in weights if weight is not None]
    return _lstm_layer(x, given, states, False)[1:] if _covered(x, given, states) else NotImplemented


def _gru_cell(x: Tensor, state: Tensor, *weights: Tensor | None) -> Any:
    given = [weight for weight in weights if weight is not None]
    return _gru_layer(x, given, [state], False)[1] if _covered(x, given, [state]) else NotImplemented


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What PyTorch's recurrent operators are made of, as ``run_decompositions`` takes it."""
    aten = torch.ops.aten
    return {
        aten.lstm.input: _lstm,
        aten.gru.input: _gru,
        aten.lstm_cell.default: _lstm_cell,
        aten.gru_cell.default: _gru_cell,
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
    """The steps of ``rarefy::lstm`` or ``rarefy::gru``; None for another operator, or one that is not covered."""
    target = str(call.node.target)
    if target not in ("rarefy.lstm.default", "rarefy.gru.default"):
        return None
    lstm, args = target == "rarefy.lstm.default", call.args
    products, h, weight = call.value("products"), args["h"], call.constant("weight")
    if products is None or weight is None or call.given("offsets") or args["keep"]:
        return None
    if call.given("projection" if lstm else "bias") and (lstm or call.constant("bias") is None):
        return None
    bias = None if lstm else call.constant("bias")
    how = {"mode": args["mode"], "table": whole_table(args["table"])}
    labels, states = call.layer(), [args[name] for name in ("h", "c")[: 1 + lstm]]
    one = str(args["products"].meta["val"].shape[0]) == str(h.meta["val"].shape[0])
    if not one or any(call.value(name) is None for name in ("h", "c")[: 1 + lstm]):
        step = Recurrence(
            **labels,
            products=products,
            states=tuple(state.name for state in states),
            weight=weight,
            bias=bias,
            reverse=args["reverse"],
            **how,
        )
        return Steps((step,))
    return (_lstm_step if lstm else _gru_step)(call, products, states, weight, bias, how)


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
