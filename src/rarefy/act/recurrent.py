"""LSTM and GRU with these activations: drop-ins for those of ``torch.nn``, layers and cells.

Parameters, ``state_dict``, arguments, shapes and errors are PyTorch's. What is computed, in bfloat16, float16 or
float32, the format of the weights::

    LSTM:  a = W_ih x + b_ih + W_hh h + b_hh           (sums in float32)
           i, f, o = sigmoid(a),  g = tanh(a)          (a rounded to the format, the mode's bits)
           c' = f c + i g,   h' = o tanh(c')           (in float32, each rounded to the format once)
    GRU:   r, z = sigmoid(a),  n = tanh(W_in x + b_in + r (W_hn h + b_hn)),   h' = (h - n) z + n

Products take the format's numbers. Those of the input are rounded to the format on a GPU, in formats of 16 bits, and in
bfloat16 on a CPU that multiplies such numbers (AVX512_BF16 or AMX); else they are float32. Gradients are computed in
float32 from what was stored, by the results of the activations (y (1 - y), 1 - y^2; in mode "hard" the slope of the
lines), and rounded once at the end; but those of the gates, which the products with the weights take, are rounded to
bfloat16, and on a GPU to float16 as well. The order of sums in float32 depends on sizes and on the machine. Where the
processor has AMX and Linux lets a process use it, its tiles make the products of bfloat16 with W_hh: to them numbers
below 2^-126 in size are zeros, factors and sums alike. ``torch.func.grad`` and ``vjp`` take them; second derivatives
and vmap are refused, but in forward mode.

On the CPU a layer is one product for all steps and one native call, in bfloat16 and float32; float16, projections, and
other devices go step by step in PyTorch operators, in formats of 16 bits on a GPU by one Triton kernel a step. In
forward mode (``torch.func.jvp``, ``jacfwd`` and ``hessian``, ``torch.autograd.forward_ad``) all do, in operators with
derivatives of every order. ``torch.onnx.export`` records those of ``torch.nn``, in float32 and modes "exact" and
"fast"; others are refused there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from rarefy.act import operator
from rarefy.act.cells import multiplies, offsets_of
from rarefy.act.kernels.aten import table_of
from rarefy.act.sequences import ONNX, run_gru, run_lstm
from rarefy.act.spec import reference
from rarefy.act.spec.table import Table

#: Tensors of a layer, None for those that it has not.
Tensors: TypeAlias = list[Any]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _options(mode: str, table: Table | str | Path | None) -> tuple[str, Table | None]:
    """Return the two, or raise ValueError: a table is one of tanh, from which sigmoid derives."""
    given = table_of(table)
    if mode not in reference.MODES:
        raise ValueError(f"mode must be one of {', '.join(reference.MODES)}, got {mode!r}")
    if given is not None and mode != "ktanh":
        raise ValueError(f'a table goes with mode="ktanh", got mode={mode!r}')
    if given is not None and given.function != "tanh":
        raise ValueError(
            f"table must be one of tanh, from which sigmoid derives; {given.name!r} is of {given.function}"
        )
    return mode, given


def _text(table: Table | None) -> str:
    return "" if table is None else table.text


def _described(mode: str, table: Table | None) -> str:
    parts = [f", mode={mode!r}"] if mode != "exact" else []
    return "".join([*parts, f", table={table.name!r}" if table is not None else ""])


def _not_scripted(module: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"{type(module).__name__} of rarefy.act cannot be scripted: use torch.jit.trace, or torch.nn's with the same"
        " state_dict"
    )


def _check_onnx(module: nn.Module, mode: str) -> None:
    """Raise RuntimeError unless what ONNX has, torch.nn's, gives the same numbers but for float rounding."""
    if mode not in ("exact", "fast") or next(module.parameters()).dtype != torch.float32:
        raise RuntimeError(ONNX)


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the products of the input, of all steps at once: in float32 where the format has none of its own."""
    if multiplies(x):
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return F.linear(x.float(), weight.float(), bias)


def _lstm_layer(
    x: Tensor, weights: Tensors, states: Tensors, offsets: Tensor | None, reverse: bool, how: tuple[str, str]
) -> tuple[Tensor, ...]:
    """Run one layer in one direction over x [rows, input]; return y and the states after the last step.

    ``weights`` are W_ih, W_hh, both biases (or None) and the projection (or None), ``how`` the mode and the table.
    """
    w_ih, w_hh, b_ih, b_hh, projection = weights
    (h, c), (mode, table) = states, how
    bias = None if b_ih is None else b_ih.float() + b_hh.float()
    return run_lstm(_linear(x, w_ih, bias), w_hh, projection, h, c, offsets, reverse, mode, table)


def _gru_layer(
    x: Tensor, weights: Tensors, states: Tensors, offsets: Tensor | None, reverse: bool, how: tuple[str, str]
) -> tuple[Tensor, ...]:
    """As :func:`_lstm_layer`; the third gate's bias of the hidden state stays apart, since r multiplies it."""
    w_ih, w_hh, b_ih, b_hh, _ = weights
    (h,), (mode, table) = states, how
    bias, inner = None, None
    if b_ih is not None:
        hidden = h.shape[1]
        bias, inner = b_ih.float() + F.pad(b_hh[: 2 * hidden].float(), (0, hidden)), b_hh[2 * hidden :]
    return run_gru(_linear(x, w_ih, bias), w_hh, inner, h, offsets, reverse, mode, table)


def _run(
    layer: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    weights: Tensors,
    states: Tensors,
    offsets: Tensor | None,
    reverse: bool,
    how: tuple[str, str],
) -> tuple[Tensor, ...]:
    """Run a layer, in the dtype of autocast where that is on."""
    device = x.device.type
    autocast = _is_autocast(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    if not torch.compiler.is_compiling():  # the operator checks as well, when it runs
        if dtype not in _DTYPES:
            given = str(dtype).removeprefix("torch.")
            raise TypeError(
                f"LSTM and GRU take bfloat16, float16, float32; got {given}: convert module and input first"
            )
        operator.check_dtype("tanh", dtype, *how)
    if not autocast:
        return layer(x, weights, states, offsets, reverse, how)
    with torch.autocast(device, enabled=False):
        cast = [None if t is None else t.to(dtype) for t in weights]
        return layer(x.to(dtype), cast, [t.to(dtype) for t in states], offsets, reverse, how)


class _Layers(nn.RNNBase):
    """What LSTM and GRU share: options, and the walk over layers and directions."""

    activation_mode: str = "exact"
    table: Table | None = None
    _layer: Callable[..., tuple[Tensor, ...]]

    def __prepare_scriptable__(self) -> nn.Module:
        """``torch.jit.script`` asks for this; raises RuntimeError, since a table and its options are no TorchScript."""
        raise _not_scripted(self)

    def extra_repr(self) -> str:
        """Return the options that are not the default."""
        return super().extra_repr() + _described(self.activation_mode, self.table)

    def _weights(self, layer: int, suffix: str) -> Tensors:
        """Return W_ih, W_hh, b_ih, b_hh and W_hr of a layer, None for what it has not."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        there = (True, True, self.bias, self.bias, self.proj_size > 0)
        return [
            getattr(self, f"{name}_l{layer}{suffix}") if has else None for name, has in zip(names, there, strict=True)
        ]

    def _all_layers(self, x: Tensor, states: Tensors, offsets: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return y [rows, directions * size] of the last layer and the last states, of x [rows, input]."""
        for name, state in zip("hc", states, strict=False):
            if state.dtype != x.dtype and not _is_autocast(x.device.type):
                raise ValueError(f"the input is {x.dtype}, {name}_0 of hx is {state.dtype}: use .to({x.dtype})")
        how = (self.activation_mode, _text(self.table))
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            outputs = []
            for reverse in (False, True) if self.bidirectional else (False,):
                before = [state[len(last)] for state in states]
                weights = self._weights(layer, "_reverse" if reverse else "")
                y, *after = _run(type(self)._layer, x, weights, before, offsets, reverse, how)
                outputs.append(y)
                last.append(tuple(after))
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        if len(last) == 1:
            return x, [state.unsqueeze(0) for state in last[0]]
        return x, [torch.stack(some) for some in zip(*last, strict=True)]

    def _sequence(self, x: Any, hx: Any) -> tuple[Any, list[Tensor]]:
        """Do what the forwards of ``nn.LSTM`` and ``nn.GRU`` do around the layers; ``hx`` is None or the states."""
        x, sizes, order, back = x if isinstance(x, PackedSequence) else (x, None, None, None)
        batch_dim, batched = 0 if self.batch_first else 1, True
        if sizes is None:
            if x.dim() not in (2, 3):
                raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {x.dim()}D instead")
            batched = x.dim() == 3
            x = x if batched else x.unsqueeze(batch_dim)
        batch = x.size(batch_dim) if sizes is None else int(sizes[0])
        if hx is None:
            first = self.num_layers * (2 if self.bidirectional else 1), batch
            widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
            states = [torch.zeros(*first, width, dtype=x.dtype, device=x.device) for width in widths]
        else:
            states = list(hx)
            if sizes is None:
                self._check_dimensions(states, batched)
                states = states if batched else [state.unsqueeze(1) for state in states]
            if order is not None:
                states = [state.index_select(1, order) for state in states]
        hidden: Any = tuple(states) if self.mode == "LSTM" else states[0]
        self.check_forward_args(x, hidden, sizes)
        if sizes is not None:
            y, states = self._all_layers(x, states, offsets_of(sizes))
            if back is not None:
                states = [state.index_select(1, back) for state in states]
            return PackedSequence(y, sizes, order, back), states
        x = x.transpose(0, 1) if self.batch_first else x
        steps = x.size(0)
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        y, states = self._all_layers(x.reshape(steps * batch, x.size(2)), states, None)
        y = y.view(steps, batch, y.size(1))
        y = y.transpose(0, 1) if self.batch_first else y
        return (y, states) if batched else (y.squeeze(batch_dim), [state.squeeze(1) for state in states])

    def _check_dimensions(self, states: list[Tensor], batched: bool) -> None:
        """Raise PyTorch's error for states that have a batch where the input has none, and the other way round."""
        kind, dim = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
        if all(state.dim() == dim for state in states):
            return
        found = ", ".join(f"{state.dim()}-D" for state in states)
        what, found = ("hx and cx", f"({found}) tensors") if len(states) > 1 else ("hx", f"{found} tensor")
        raise RuntimeError(f"For {kind} input, {what} should also be {dim}-D but got {found}")


class LSTM(_Layers, nn.LSTM):
    """``torch.nn.LSTM`` with these activations: the same arguments, parameters, inputs, outputs and errors.

    ``mode`` is that of :func:`rarefy.act.tanh` for all gates; ``table``, for mode "ktanh", a table of tanh in the
    format of the weights, its name or its file. Formats: bfloat16, float16, float32; TypeError for others, ValueError
    for a mode or table that is none. :mod:`rarefy.act.recurrent` says what is computed and how it is rounded.
    """

    _layer = staticmethod(_lstm_layer)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "exact",
        table: Table | str | Path | None = None,
    ) -> None:
        chosen = _options(mode, table)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        nn.LSTM.__init__(self, *sizes, device=device, dtype=dtype)
        self.activation_mode, self.table = chosen

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        """Take [steps, batch, input_size], [batch, ...] with ``batch_first``, no batch, or a packed sequence.

        Return the output and (h, c) after the last step, as ``nn.LSTM`` does.
        """
        if torch.onnx.is_in_onnx_export():
            _check_onnx(self, self.activation_mode)
            return nn.LSTM.forward(self, input, hx)
        y, (h, c) = self._sequence(input, hx)
        return y, (h, c)


class GRU(_Layers, nn.GRU):
    """``torch.nn.GRU`` with these activations; arguments and errors as :class:`LSTM`."""

    _layer = staticmethod(_gru_layer)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "exact",
        table: Table | str | Path | None = None,
    ) -> None:
        chosen = _options(mode, table)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        nn.GRU.__init__(self, *sizes, device=device, dtype=dtype)
        self.activation_mode, self.table = chosen

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        """Take what :meth:`LSTM.forward` takes; return the output and h after the last step, as ``nn.GRU`` does."""
        if torch.onnx.is_in_onnx_export():
            _check_onnx(self, self.activation_mode)
            return nn.GRU.forward(self, input, hx)
        y, (h,) = self._sequence(input, None if hx is None else (hx,))
        return y, h


class _Cell(nn.RNNCellBase):
    """What the cells share: one step is a sequence of one."""

    mode: str = "exact"
    table: Table | None = None

    def __prepare_scriptable__(self) -> nn.Module:
        """``torch.jit.script`` asks for this; raises RuntimeError, since a table and its options are no TorchScript."""
        raise _not_scripted(self)

    def extra_repr(self) -> str:
        """Return the options that are not the default."""
        return super().extra_repr() + _described(self.mode, self.table)

    def _step(self, kind: str, x: Tensor, given: Tensors, count: int) -> list[Tensor]:
        """Return the ``count`` states after one step from those given, or from zeros where none are."""
        if x.dim() not in (1, 2):
            raise ValueError(f"{kind}: Expected input to be 1D or 2D, got {x.dim()}D instead")
        for index, state in enumerate(given):
            if state.dim() not in (1, 2):
                name = "hidden" if count == 1 else f"hx[{index}]"
                raise ValueError(f"{kind}: Expected {name} to be 1D or 2D, got {state.dim()}D instead")
        batched = x.dim() == 2
        if not batched:
            x, given = x.unsqueeze(0), [state.unsqueeze(0) for state in given]
        states = given or [x.new_zeros(x.size(0), self.hidden_size)] * count
        self._check(x, states)
        weights = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, None]
        layer = _lstm_layer if count == 2 else _gru_layer
        _, *after = _run(layer, x, weights, states, None, False, (self.mode, _text(self.table)))
        return after if batched else [state.squeeze(0) for state in after]

    def _check(self, x: Tensor, states: Tensors) -> None:
        """Raise what PyTorch's cells raise for sizes that do not fit, and ValueError for dtypes that do not."""
        if x.size(1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {self.input_size}")
        for index, state in enumerate(states):
            if state.size(0) != x.size(0):
                raise RuntimeError(
                    f"Input batch size {x.size(0)} doesn't match hidden{index} batch size {state.size(0)}"
                )
            if state.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{index} has inconsistent hidden_size: got {state.size(1)}, expected {self.hidden_size}"
                )
        for t in (x, *states):
            if t.dtype != self.weight_ih.dtype and not _is_autocast(x.device.type):
                raise ValueError(
                    f"input and hx must be of the weights' dtype {self.weight_ih.dtype}, got {t.dtype}: convert it with"
                    f" .to({self.weight_ih.dtype})"
                )


class LSTMCell(_Cell, nn.LSTMCell):
    """``torch.nn.LSTMCell`` (same parameters, same order of gates) with these activations; as :class:`LSTM`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "exact",
        table: Table | str | Path | None = None,
    ) -> None:
        chosen = _options(mode, table)
        nn.LSTMCell.__init__(self, input_size, hidden_size, bias, device=device, dtype=dtype)
        self.mode, self.table = chosen

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Take one step: input [batch, input_size] and (h, c), each [batch, hidden_size]; return the new (h, c)."""
        if torch.onnx.is_in_onnx_export():
            _check_onnx(self, self.mode)
            return nn.LSTMCell.forward(self, input, hx)
        h, c = self._step("LSTMCell", input, [] if hx is None else list(hx), 2)
        return h, c


class GRUCell(_Cell, nn.GRUCell):
    """``torch.nn.GRUCell`` (same parameters, same order of gates) with these activations; as :class:`LSTM`."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mode: str = "exact",
        table: Table | str | Path | None = None,
    ) -> None:
        chosen = _options(mode, table)
        nn.GRUCell.__init__(self, input_size, hidden_size, bias, device=device, dtype=dtype)
        self.mode, self.table = chosen

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step: input [batch, input_size] and h [batch, hidden_size]; return the new h."""
        if torch.onnx.is_in_onnx_export():
            _check_onnx(self, self.mode)
            return nn.GRUCell.forward(self, input, hx)
        (h,) = self._step("GRUCell", input, [] if hx is None else [hx], 1)
        return h
