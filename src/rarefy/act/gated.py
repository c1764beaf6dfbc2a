"""Gated units, act(gate) * up, in one pass over memory, and their gradients in another: ``rarefy::gated``.

    h = act(gate)    y = h * up    d gate = (dy * up) * act'(gate)    d up = dy * h

Every one is rounded once to the format (h too), products are made in float32, and act' is a number of float32
(:mod:`rarefy.act.kernels.slopes`). So y has the bits of ``rarefy.act.silu(gate) * up``. Formats: bfloat16, float16,
float32. The results are contiguous.

Without a native kernel plain PyTorch operators give the same bits. torch.compile sees one operator on the CPU and
on a GPU, and what it is made of elsewhere; exporters always see what it is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function

from rarefy.act import functional, gradients, operator
from rarefy.act.kernels import aten, gated_gpu, launch
from rarefy.act.kernels import gated as native
from rarefy.act.kernels.slopes import slopes
from rarefy.act.spec import subnormals
from rarefy.act.spec.table import Table

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def silu_and_mul(
    x: Tensor,
    up: Tensor | None = None,
    mode: str = "exact",
    *,
    grad: str | None = None,
    table: Table | str | Path | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return silu(gate) * up, the hidden layer of SwiGLU (arXiv 2002.05202).

    Args:
        x: [..., 2 d], the gate and then ``up`` in the last dimension; or the gate, of any shape, when ``up`` is given.
        up: a tensor of the shape, dtype and device of ``x``, or None.
        mode: that of the activation: "exact" (correctly rounded, then the product rounded), "ktanh" or "hard".
        grad: "x", the derivative of the true function at the gate; None means the same.
        table: for mode "ktanh": a table of the input's format, the name of a shipped one, or a ``.json`` file.
        out: where to put the result, [..., d] or the shape of the gate. No gradient then.

    Raises TypeError for dtypes but bfloat16, float16 and float32, ValueError for a last dimension that is odd, for
    ``up`` and ``out`` that do not match, and for what :func:`rarefy.act.silu` does not take.

    """
    return _call("silu", x, up, mode, grad, table, out)


def gelu_and_mul(
    x: Tensor,
    up: Tensor | None = None,
    mode: str = "exact",
    *,
    grad: str | None = None,
    table: Table | str | Path | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return gelu(gate) * up, the hidden layer of GEGLU (arXiv 2002.05202); as :func:`silu_and_mul`."""
    return _call("gelu", x, up, mode, grad, table, out)


def gelu_tanh_and_mul(
    x: Tensor,
    up: Tensor | None = None,
    mode: str = "exact",
    *,
    grad: str | None = None,
    table: Table | str | Path | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return gelu(gate, approximate="tanh") * up; as :func:`silu_and_mul`."""
    return _call("gelu_tanh", x, up, mode, grad, table, out)


UNITS = {"silu": silu_and_mul, "gelu": gelu_and_mul, "gelu_tanh": gelu_tanh_and_mul}
_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}


def _call(
    function: str,
    x: Tensor,
    up: Tensor | None,
    mode: str,
    grad: str | None,
    table: Table | str | Path | None,
    out: Tensor | None,
) -> Tensor:
    if type(mode) is str and table is None and grad is None and out is None and not torch.compiler.is_compiling():
        ready = native.ready(function, x, up, mode) if type(x) is Tensor and type(up) in (Tensor, NoneType) else None
        if ready is not None:
            if torch.is_grad_enabled() and (x.requires_grad or (up is not None and up.requires_grad)):
                return _Eager.apply(x, up, function, mode, "")  # type: ignore[no-untyped-call, no-any-return]
            return native.forward_at_once(ready, x, up)
    text = aten.text_of(table)
    if torch.compiler.is_compiling():
        return _traced(function, x, up, mode, grad, text, out)
    if has_torch_function((x, up, out)):
        given: dict[str, Any] = {"grad": grad, "table": text or None, "out": out}
        given = {key: value for key, value in given.items() if value is not None}
        result: Tensor = handle_torch_function(UNITS[function], (x, up, out), x, up, mode, **given)
        return result
    _check(function, x, up, mode, grad, text)
    if out is None:
        return _result(x, up, function, mode, text)
    _check_out(function, x, up, out)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, up, out)):
        raise RuntimeError("out= does not support gradients; use torch.no_grad() or leave it out")
    if not launch.watched() and out.is_contiguous() and launch.is_direct(out):
        gate, other = halves(x.detach(), None if up is None else up.detach())
        apart = all(_apart(t, out) or (t.data_ptr() == out.data_ptr() and t.is_contiguous()) for t in (gate, other))
        if apart and _into(gate, other, function, mode, text, out):
            if not out.is_inference():
                torch.autograd.graph.increment_version(out)
            return out
    return out.copy_(_result(x, up, function, mode, text))


def _apart(x: Tensor, out: Tensor) -> bool:
    """Tell whether two tensors share no memory."""
    return x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()


def _check(function: str, x: Tensor, up: Tensor | None, mode: str, grad: str | None, table: str) -> None:
    """Raise TypeError or ValueError for what a gated unit does not take."""
    name = f"{function}_and_mul"
    for argument, tensor in (("the gate", x), ("up", x if up is None else up)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument} of {name} must be a tensor, got {type(tensor).__name__}")
        _check_options(function, tensor.dtype, mode, grad, table)
        operator.check_dense(name, tensor)
    if not torch._C._is_tracing():  # a shape is a tensor there, and a choice by it a warning
        _check_shapes(function, x, up)


def _check_options(function: str, dtype: torch.dtype, mode: str, grad: str | None, table: str) -> None:
    if dtype not in DTYPES:
        given = str(dtype).removeprefix("torch.")
        raise TypeError(f"{function}_and_mul takes bfloat16, float16, float32; got {given}: convert it first")
    operator.check_dtype(function, dtype, mode, table)
    gradients.resolve(function, mode, grad)


def _check_shapes(function: str, x: Tensor, up: Tensor | None) -> None:
    if up is None:
        if x.ndim == 0 or x.shape[-1] % 2:
            raise ValueError(
                f"{function}_and_mul takes the gate and up side by side in a last dimension that is even, got"
                f" {tuple(x.shape)}: give up as a tensor of its own"
            )
    elif up.shape != x.shape or up.dtype != x.dtype or up.device != x.device:
        raise ValueError(
            f"up must have the shape, dtype and device of the gate ({tuple(x.shape)}, {x.dtype}, {x.device}),"
            f" got {tuple(up.shape)}, {up.dtype}, {up.device}"
        )


def _check_out(function: str, x: Tensor, up: Tensor | None, out: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor like the gate, got {type(out).__name__}")
    shape = result_shape(x, up)
    if out.dtype != x.dtype or out.shape != shape or out.device != x.device:
        raise ValueError(
            f"out of {function}_and_mul must be of {tuple(shape)}, {x.dtype}, {x.device},"
            f" got {tuple(out.shape)}, {out.dtype}, {out.device}"
        )


def result_shape(x: Tensor, up: Tensor | None) -> torch.Size:
    """Return the shape of the result."""
    return x.shape if up is not None else torch.Size((*x.shape[:-1], x.shape[-1] // 2))


def halves(x: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gate and up, as views."""
    if up is not None:
        return x, up
    gate, up = x.chunk(2, -1)
    return gate, up


def _result(x: Tensor, up: Tensor | None, function: str, mode: str, table: str) -> Tensor:
    if torch._C._functorch.peek_interpreter_stack() is not None or launch.in_forward_mode():
        result: Tensor = _Gated.apply(x, up, function, mode, table)  # type: ignore[no-untyped-call]
        return result
    if (torch._C._is_tracing() and torch.onnx.is_in_onnx_export()) or type(x).__name__ == "DTensor":
        return _composed(x, up, function, mode, table)
    if all(t is None or type(t) in (Tensor, Parameter) for t in (x, up)) and not launch.watched():
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, up)):
            return _Eager.apply(x, up, function, mode, table)  # type: ignore[no-untyped-call, no-any-return]
        return forward(x, up, function, mode, table)
    result = torch.ops.rarefy.gated(x, up, function, mode, table)
    return result


def _composed(x: Tensor, up: Tensor | None, function: str, mode: str, table: str) -> Tensor:
    """Return the same from two functions that have gradients of their own."""
    gate, up = halves(x, up)
    return _ACTIVATIONS[function](gate, mode, table=table or None) * up


def _traced(
    function: str, x: Tensor, up: Tensor | None, mode: str, grad: str | None, table: str, out: Tensor | None
) -> Tensor:
    _validated(function, mode, grad, str(x.dtype), table)
    _check_shapes(function, x, up)
    if x.device.type in ("cpu", "cuda") and not launch.exporting():
        result: Tensor = torch.ops.rarefy.gated(x, up, function, mode, table)
    else:
        result = _composed(x, up, function, mode, table)
    if out is None:
        return result
    _check_out(function, x, up, out)
    return out.copy_(result)


@torch.compiler.assume_constant_result
def _validated(function: str, mode: str, grad: str | None, dtype: str, table: str) -> bool:
    _check_options(function, getattr(torch, dtype.removeprefix("torch.")), mode, grad, table)
    return True


def forward(x: Tensor, up: Tensor | None, function: str, mode: str, table: str) -> Tensor:
    """Return the result of real data, without a gradient."""
    x, up = x.detach(), None if up is None else up.detach()
    ready = native.ready(function, x, up, mode) if not table else None
    if ready is not None:
        return native.forward_at_once(ready, x, up)
    gate, other = halves(x, up)
    if gate.device.type in ("cpu", "cuda"):
        out = torch.empty(gate.shape, dtype=x.dtype, device=x.device)
        if _into(gate, other, function, mode, table, out):
            return out
    with subnormals.kept():
        return (operator.forward(gate, function, mode, table) * other).contiguous()


def _into(gate: Tensor, up: Tensor, function: str, mode: str, table: str, out: Tensor) -> bool:
    """Compute a unit into contiguous ``out`` by one kernel; False, and nothing done, where there is none."""
    unit = native.unit_of(gate, up, function, mode, table)
    if unit is None:
        return gated_gpu.forward(gate, up, function, mode, table, out)
    native.forward(unit, gate, up, out)
    return True


def backward(upstream: Tensor, x: Tensor, up: Tensor | None, function: str, mode: str, table: str) -> list[Tensor]:
    """Return the gradient of ``x``, or those of the gate and of ``up``, of real data; without a second derivative."""
    upstream, x, up = upstream.detach(), x.detach(), None if up is None else up.detach()
    ready = native.ready(function, x, up, mode) if not table and native.is_common(upstream) else None
    if ready is not None:
        return native.backward_at_once(ready, upstream, x, up)
    gate, other = halves(x, up)
    unit = native.unit_of(gate, other, function, mode, table)
    if unit is not None and launch.is_readable(upstream):
        found = [torch.empty(t.shape, dtype=t.dtype) for t in (x, up) if t is not None]
        native.backward(unit, upstream, gate, other, *halves(found[0], None if up is None else found[1]))
        return found
    if gate.is_cuda:
        found = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, up) if t is not None]
        results = halves(found[0], None if up is None else found[1])
        if gated_gpu.backward(upstream, gate, other, function, mode, table, *results):
            return found
    with subnormals.kept():
        wide = upstream.float()
        of_gate = wide * other.float() * slopes(gate, function, mode)
        of_up = wide * operator.forward(gate, function, mode, table).float()
        if up is None:
            return [torch.cat((of_gate, of_up), -1).to(x.dtype)]
        return [of_gate.to(x.dtype).contiguous(), of_up.to(x.dtype).contiguous()]


def _differentiable(
    upstream: Tensor, x: Tensor, up: Tensor | None, function: str, mode: str, table: str
) -> list[Tensor]:
    """Return what :func:`backward` does, from functions that have derivatives."""
    gate, other = halves(x, up)
    wide = upstream.float()
    of_gate = gradients.backward(wide * other.float(), gate.float(), function, mode, "x")
    of_up = wide * _ACTIVATIONS[function](gate, mode, table=table or None).float()
    if up is None:
        return [torch.cat((of_gate, of_up), -1).to(x.dtype)]
    return [of_gate.to(x.dtype), of_up.to(x.dtype)]


@torch.library.custom_op("rarefy::gated", mutates_args=())
def gated(x: Tensor, up: Tensor | None, function: str, mode: str, table: str) -> Tensor:
    """Compute all gated units, as one operator; ``table`` is "", the name of a shipped table, or a table's JSON."""
    _check(function, x, up, mode, None, table)
    return forward(x, up, function, mode, table)


@gated.register_fake
def _fake(x: Tensor, up: Tensor | None, function: str, mode: str, table: str) -> Tensor:
    return x.new_empty(x.shape if up is not None else (*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("rarefy::gated_backward", mutates_args=())
def gated_backward(
    upstream: Tensor, x: Tensor, up: Tensor | None, function: str, mode: str, table: str
) -> list[Tensor]:
    """Compute the gradient of ``x``, or those of the gate and of ``up``."""
    return backward(upstream, x, up, function, mode, table)


@gated_backward.register_fake
def _(upstream: Tensor, x: Tensor, up: Tensor | None, function: str, mode: str, table: str) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (x, up) if t is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, up, ctx.function, ctx.mode, ctx.table = inputs
    ctx.save_for_backward(x, up)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    x, up = ctx.saved_tensors
    differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    compute = _differentiable if differentiable else torch.ops.rarefy.gated_backward
    found = compute(upstream, x, up, ctx.function, ctx.mode, ctx.table)
    return found[0], found[1] if up is not None else None, None, None, None


gated.register_autograd(_backward, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The unit for plain tensors: in much less time than an operator of its own takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor | None, function: str, mode: str, table: str) -> Tensor:
        _setup(ctx, (x, up, function, mode, table), x)
        return forward(x, up, function, mode, table)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, up = ctx.saved_tensors
        compute = _differentiable if torch.is_grad_enabled() else backward
        found = compute(upstream[0], x, up, ctx.function, ctx.mode, ctx.table)
        return found[0], found[1] if up is not None else None, None, None, None


class _Gated(torch.autograd.Function):
    """The unit for the transforms of torch.func and for forward mode."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, up: Tensor | None, function: str, mode: str, table: str) -> Tensor:
        return forward(x, up, function, mode, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, up = ctx.saved_tensors
        found = _differentiable(upstream[0], x, up, ctx.function, ctx.mode, ctx.table)
        return found[0], found[1] if up is not None else None, None, None, None

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], x: Tensor, up: Tensor | None, function: str, mode: str, table: str
    ) -> tuple[Tensor, Any]:
        def first(t: Tensor, dim: int | None) -> Tensor:
            return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

        result: Tensor = _Gated.apply(  # type: ignore[no-untyped-call]
            first(x, dims[0]), None if up is None else first(up, dims[1]), function, mode, table
        )
        return result, 0

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, up_tangent: Tensor | None, *_: None) -> Tensor:
        x, up = ctx.saved_tensors
        gate, other = halves(x, up)
        if up is None:
            assert x_tangent is not None
            x_tangent, up_tangent = halves(x_tangent, None)
        total = torch.zeros_like(gate, dtype=torch.float32)
        if x_tangent is not None:
            slope = gradients.backward(x_tangent.float(), gate.float(), ctx.function, ctx.mode, "x")
            total = total + slope * other.float()
        if up_tangent is not None:
            total = (
                total + _ACTIVATIONS[ctx.function](gate, ctx.mode, table=ctx.table or None).float() * up_tangent.float()
            )
        return total.to(gate.dtype)
