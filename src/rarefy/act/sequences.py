"""The operators ``rarefy::lstm`` and ``rarefy::gru``: one layer in one direction, over a sequence, with its gradient.

They take the products of the input with its weights, which are ordinary operators, and do what is left: see
:mod:`rarefy.act.cells`. Second derivatives and vmap are refused. While forward-mode derivatives are computed, calls go
to :mod:`rarefy.act.steps` instead.
"""

from __future__ import annotations

import itertools
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rarefy.act import cells, operator, steps
from rarefy.act.cells import Gates
from rarefy.act.kernels import launch

_TWICE = (
    "an LSTM or GRU of rarefy.act has no second derivative: for one use torch.nn's (after rarefy.act.swap: restore() of"
    " its report), or a cell of your own made of rarefy.act.sigmoid and tanh"
)
_VMAP = (
    "an LSTM or GRU of rarefy.act does not run under torch.vmap (nor torch.func.jacrev and the like): call it outside,"
    " with what vmap maps over as its batch, or use torch.nn's (after rarefy.act.swap: restore() of its report)"
)
ONNX = (
    "ONNX has no LSTM or GRU of rarefy.act but, as torch.nn's, in float32 and modes exact and fast, where"
    " torch.onnx.export is given the model itself: use torch.nn's with the same state_dict (after rarefy.act.swap:"
    " restore() of its report)"
)
_FORWARD = (
    "the operators of an LSTM or GRU of rarefy.act have no forward-mode derivative: call the module itself, and its"
    " backward, within the level of forward mode"
)


def _check(
    products: Tensor, count: int, weight: Tensor, h: Tensor, width: int, offsets: Tensor | None, like: Tensor
) -> None:
    """Raise ValueError unless the shapes fit: kernels read what they are told."""
    rows, (batch, size) = products.shape[0], h.shape
    fits = products.shape[1:] == (count * width,) and weight.shape == (count * width, size)
    if not fits or like.shape != (batch, width):
        shapes = ", ".join(str(tuple(t.shape)) for t in (products, weight, h, like))
        raise ValueError(
            f"products, weight, h and c must be [rows, {count} hidden], [{count} hidden, size], [batch, size] and"
            f" [batch, hidden], got {shapes}"
        )
    if weight.dtype != h.dtype or like.dtype != h.dtype or products.dtype not in (h.dtype, torch.float32):
        dtypes = ", ".join(str(t.dtype) for t in (weight, h, like, products))
        raise ValueError(f"weight, h and c must be of one dtype, and products too or in float32, got {dtypes}")
    if offsets is None:
        if rows and (batch == 0 or rows % batch):
            raise ValueError(f"{rows} rows are no whole number of steps of {batch}; give offsets")
        return
    if offsets.dtype != torch.int64 or offsets.device.type != "cpu" or offsets.dim() != 1:
        raise ValueError(f"offsets must be int64 [steps + 1] on the CPU, got {offsets.dtype} {tuple(offsets.shape)}")
    places = offsets.tolist()
    sizes = [b - a for a, b in itertools.pairwise(places)]
    falling = all(a >= b for a, b in zip([batch, *sizes], sizes, strict=False))
    if places[:1] != [0] or places[-1] != rows or not falling or min(sizes, default=0) < 0:
        raise ValueError(f"offsets must go from 0 to {rows} by steps of at most {batch} that do not grow, got {places}")


def _check_tangents(*tensors: Tensor | None) -> None:
    """Raise RuntimeError for a tensor with a tangent, which would be lost: an exported program calls the operators."""
    if launch.in_forward_mode():
        for t in tensors:
            if t is not None and forward_ad.unpack_dual(t).tangent is not None:  # type: ignore[no-untyped-call]
                raise RuntimeError(_FORWARD)


def _eager(*tensors: Tensor | None) -> bool:
    """Tell whether a call may go around the dispatcher, which takes more than a hundred microseconds."""
    plain = all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors)
    return plain and not torch.compiler.is_compiling() and not launch.watched()


def _transformed() -> bool:
    """Tell whether a transform of ``torch.func`` watches: it takes functions of autograd, not custom operators."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


# ---- LSTM


def _lstm(
    products: Tensor,
    weight: Tensor,
    projection: Tensor | None,
    h: Tensor,
    c: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    mode: str,
    table: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run one layer; ``mode`` and ``table`` are those of ``rarefy::activation``, the rest as in ``cells.lstm``."""
    operator.check("tanh", h, mode, table)
    _check_tangents(products, weight, projection, h, c)
    _check(products, 4, weight, h, c.shape[1], offsets, c)
    if projection is not None and projection.shape != (h.shape[1], c.shape[1]):
        raise ValueError(f"projection must be {[h.shape[1], c.shape[1]]}, [size, hidden], got {list(projection.shape)}")
    with torch._C._DisableAutocast():
        return cells.lstm(products, weight, projection, h, c, offsets, reverse, Gates(mode, table), keep)


lstm = torch.library.custom_op("rarefy::lstm", _lstm, mutates_args=())


@lstm.register_fake
def _lstm_fake(
    products: Tensor,
    weight: Tensor,
    projection: Tensor | None,
    h: Tensor,
    c: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    mode: str,
    table: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, hidden = products.shape[0], c.shape[1]
    last, state = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (h, c))
    kept = rows if keep else 0
    return h.new_empty(rows, h.shape[1]), last, state, h.new_empty(kept, 4 * hidden), h.new_empty(kept, 2 * hidden)


def _lstm_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    weight: Tensor,
    projection: Tensor | None,
    h: Tensor,
    c: Tensor,
    y: Tensor,
    gates: Tensor,
    kept: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of products, weight, projection (without rows if there is none), h and c."""
    _check_tangents(dy, dh, dc)
    with torch._C._DisableAutocast():
        d, totals, dh_0, dc_0 = cells.lstm_backward(
            dy, dh, dc, weight, projection, c, gates, kept, offsets, reverse, hard
        )
        before = cells.previous(y, h, offsets, reverse)
        d_weight = cells.weight_gradient(d, before)
        d_projection = weight.new_empty(0, c.shape[1])
        if projection is not None:
            d_projection = cells.weight_gradient(totals, cells.projected(gates, kept))
        return d, d_weight, d_projection, dh_0.to(h.dtype), dc_0.to(h.dtype)


lstm_backward = torch.library.custom_op("rarefy::lstm_backward", _lstm_backward, mutates_args=())


@lstm_backward.register_fake
def _lstm_backward_fake(
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    weight: Tensor,
    projection: Tensor | None,
    h: Tensor,
    c: Tensor,
    y: Tensor,
    gates: Tensor,
    kept: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d = gates.new_empty(gates.shape, dtype=cells.gradient_dtype(gates))
    d_projection = weight.new_empty(0 if projection is None else projection.shape[0], c.shape[1])
    return d, weight.new_empty(weight.shape), d_projection, h.new_empty(h.shape), c.new_empty(c.shape)


def _lstm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    products, weight, projection, h, c, offsets, ctx.reverse, ctx.mode, _, keep = inputs
    y, _, _, gates, kept = output
    if not keep:
        raise RuntimeError("rarefy::lstm needs keep=True where gradients are wanted")
    ctx.mark_non_differentiable(gates, kept)
    ctx.save_for_backward(weight, projection, h, c, y, gates, kept, offsets)
    ctx.dtype = products.dtype
    ctx.set_materialize_grads(False)


def _lstm_gradients(ctx: Any, dy: Any, dh: Any, dc: Any, *_: Any) -> tuple[Tensor | None, ...]:
    weight, projection, h, c, y, gates, kept, offsets = ctx.saved_tensors
    backward: Any = torch.ops.rarefy.lstm_backward
    if _transformed():
        backward = _LSTMBackward.apply
    elif not torch.is_grad_enabled() and _eager(dy, dh, dc, weight):
        backward = _lstm_backward
    d, d_weight, d_projection, dh_0, dc_0 = backward(
        dy, dh, dc, weight, projection, h, c, y, gates, kept, offsets, ctx.reverse, ctx.mode == "hard"
    )
    given = None if projection is None else d_projection
    return d.to(ctx.dtype), d_weight, given, dh_0, dc_0, None, None, None, None, None


lstm.register_autograd(_lstm_gradients, setup_context=_lstm_setup)


# ---- GRU


def _gru(
    products: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    mode: str,
    table: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer; ``mode`` and ``table`` are those of ``rarefy::activation``, the rest as in ``cells.gru``."""
    operator.check("tanh", h, mode, table)
    _check_tangents(products, weight, bias, h)
    _check(products, 3, weight, h, h.shape[1], offsets, h)
    if bias is not None and bias.shape != h.shape[1:]:
        raise ValueError(f"bias must be {[h.shape[1]]}, [hidden], got {list(bias.shape)}")
    with torch._C._DisableAutocast():
        return cells.gru(products, weight, bias, h, offsets, reverse, Gates(mode, table), keep)


gru = torch.library.custom_op("rarefy::gru", _gru, mutates_args=())


@gru.register_fake
def _gru_fake(
    products: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    mode: str,
    table: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, hidden = products.shape[0], h.shape[1]
    last = torch.empty_like(h, memory_format=torch.contiguous_format)
    return h.new_empty(rows, hidden), last, h.new_empty(rows if keep else 0, 4 * hidden)


def _gru_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    weight: Tensor,
    h: Tensor,
    y: Tensor,
    gates: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of products, weight, bias and h."""
    _check_tangents(dy, dh)
    with torch._C._DisableAutocast():
        d, through, dh_0 = cells.gru_backward(dy, dh, weight, h, y, gates, offsets, reverse, hard)
        d_weight = cells.weight_gradient(through, cells.previous(y, h, offsets, reverse))
        d_bias = through[:, 2 * h.shape[1] :].sum(0)
        return d, d_weight, d_bias.to(h.dtype), dh_0.to(h.dtype)


gru_backward = torch.library.custom_op("rarefy::gru_backward", _gru_backward, mutates_args=())


@gru_backward.register_fake
def _gru_backward_fake(
    dy: Tensor | None,
    dh: Tensor | None,
    weight: Tensor,
    h: Tensor,
    y: Tensor,
    gates: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, hidden = y.shape
    d = y.new_empty(rows, 3 * hidden, dtype=cells.gradient_dtype(y))
    return d, weight.new_empty(weight.shape), h.new_empty(hidden), h.new_empty(h.shape)


def _gru_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    products, weight, bias, h, offsets, ctx.reverse, ctx.mode, _, keep = inputs
    y, _, gates = output
    if not keep:
        raise RuntimeError("rarefy::gru needs keep=True where gradients are wanted")
    ctx.mark_non_differentiable(gates)
    ctx.save_for_backward(weight, h, y, gates, offsets)
    ctx.dtype, ctx.biased = products.dtype, bias is not None
    ctx.set_materialize_grads(False)


def _gru_gradients(ctx: Any, dy: Any, dh: Any, *_: Any) -> tuple[Tensor | None, ...]:
    weight, h, y, gates, offsets = ctx.saved_tensors
    backward: Any = torch.ops.rarefy.gru_backward
    if _transformed():
        backward = _GRUBackward.apply
    elif not torch.is_grad_enabled() and _eager(dy, dh, weight):
        backward = _gru_backward
    d, d_weight, d_bias, dh_0 = backward(dy, dh, weight, h, y, gates, offsets, ctx.reverse, ctx.mode == "hard")
    return d.to(ctx.dtype), d_weight, d_bias if ctx.biased else None, dh_0, None, None, None, None, None


gru.register_autograd(_gru_gradients, setup_context=_gru_setup)


# ---- what both refuse


def _no_second(ctx: Any, *upstream: Any) -> NoReturn:
    raise RuntimeError(_TWICE)


def _no_vmap(info: Any, dims: Any, *inputs: Any) -> NoReturn:
    raise NotImplementedError(_VMAP)


@torch._decomp.register_decomposition([torch.ops.rarefy.lstm.default, torch.ops.rarefy.gru.default])
def _undecomposed(*inputs: Any) -> Any:
    """Stay an operator, but in an export to ONNX, whose own error would not say what to do."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(ONNX)
    return NotImplemented


# without them fake tensors of symbolic shapes would ask the decomposition
torch._decomp.register_decomposition([torch.ops.rarefy.lstm.default], type="meta")(_lstm_fake)
torch._decomp.register_decomposition([torch.ops.rarefy.gru.default], type="meta")(_gru_fake)

for _operator in (lstm_backward, gru_backward):
    _operator.register_autograd(_no_second)
for _operator in (lstm, gru, lstm_backward, gru_backward):
    _operator.register_vmap(_no_vmap)


# ---- calls


class _Function(torch.autograd.Function):
    """What the operators are where none is seen, in eager mode, and where none is taken, in ``torch.func``."""

    vmap = staticmethod(_no_vmap)


class _LSTM(_Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _lstm(*inputs)

    setup_context = staticmethod(_lstm_setup)
    backward = staticmethod(_lstm_gradients)


class _GRU(_Function):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _gru(*inputs)

    setup_context = staticmethod(_gru_setup)
    backward = staticmethod(_gru_gradients)


class _Backward(_Function):
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_no_second)


class _LSTMBackward(_Backward):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _lstm_backward(*inputs)


class _GRUBackward(_Backward):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _gru_backward(*inputs)


def _call(kind: str, tensors: tuple[Tensor | None, ...], *options: Any) -> tuple[Tensor, ...]:
    if launch.in_forward_mode():
        plain: Any = steps.lstm if kind == "lstm" else steps.gru
        stepped: tuple[Tensor, ...] = plain(*tensors, *options)
        return stepped
    transformed = _transformed()
    # torch.jit.trace records a second time without gradients, and compares
    wanted = torch.is_grad_enabled() or (not torch.compiler.is_compiling() and torch._C._is_tracing())
    keep = transformed or (wanted and any(t is not None and t.requires_grad for t in tensors))
    way: Any
    if not (transformed or _eager(*tensors)):
        way = torch.ops.rarefy.lstm if kind == "lstm" else torch.ops.rarefy.gru
    elif keep:
        way = _LSTM.apply if kind == "lstm" else _GRU.apply
    else:
        way = _lstm if kind == "lstm" else _gru
    result: tuple[Tensor, ...] = way(*tensors, *options, keep)
    return result


def run_lstm(
    products: Tensor,
    weight: Tensor,
    projection: Tensor | None,
    h: Tensor,
    c: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    mode: str,
    table: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and h and c after the last step, by the operator or as it does; arguments as ``cells.lstm``."""
    y, h, c, *_ = _call("lstm", (products, weight, projection, h, c), offsets, reverse, mode, table)
    return y, h, c


def run_gru(
    products: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    offsets: Tensor | None,
    reverse: bool,
    mode: str,
    table: str,
) -> tuple[Tensor, Tensor]:
    """Return y, and h after the last step; as :func:`run_lstm`."""
    y, h, *_ = _call("gru", (products, weight, bias, h), offsets, reverse, mode, table)
    return y, h
