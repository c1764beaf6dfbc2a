"""tanh, sigmoid, silu and gelu on tensors: native kernels on the CPU, plain PyTorch operators elsewhere, the same bits.

(Where a compiler for a GPU fuses sums and products, float32 may differ in its last place.)

Formats: bfloat16, float16, float32, float8_e4m3fn, float8_e5m2. Modes: see :mod:`rarefy.act.spec.reference`. Error of
``mode="exact"``: none beyond correct rounding in formats of at most 16 bits; in float32 tanh is within 6 units of the
last place and 1.3e-7, sigmoid, silu and gelu within 0.51 units.

Under torch.compile the functions are traced as plain operators, which Inductor fuses with what stands around them
(but exact float32 on the CPU, whose fused form is slow, is one operator that runs the kernel).
So they are in ONNX, and in a graph of ``torch.export`` where no gradient is needed, which then needs no rarefy to run:
in a form of their own, :mod:`rarefy.act.kernels.plain`. Otherwise they are one operator in what is exported or traced,
``rarefy::activation``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from rarefy import kernels
from rarefy.act import gradients
from rarefy.act.kernels import aten, native, plain
from rarefy.act.kernels.aten import FORMAT_OF, given_table
from rarefy.act.spec import reference, subnormals
from rarefy.act.spec.quartic import tanh as quartic_tanh
from rarefy.act.spec.table import Table
from rarefy.kernels._memory import address

_THREADED = 1 << 18  # elements from which a kernel uses more than one thread


def tanh(
    x: Tensor,
    mode: str = "exact",
    *,
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | None = None,
) -> Tensor:
    """The hyperbolic tangent of every element, in [-1, 1], odd.

    Args:
        x: a floating-point tensor of any shape and layout.
        mode: "exact", "ktanh" (the paper, or ``table``) or "hard" (HardTanh).
        grad: "y" (1 - y^2, as PyTorch; the default) or "x" (from the input); in mode "hard" only "x".
        out: where to put the result, of the same shape and dtype; ``x`` itself computes in place. No gradient then.
        table: for mode "ktanh": a :class:`Table` of the input's format, or the name of a shipped one.

    Raises TypeError for integers, complex numbers and float64; ValueError for an unknown mode or gradient, for a table
    of another format or function, and for an ``out`` that does not match.

    """
    return _call("tanh", x, mode, grad, out, table)


def sigmoid(
    x: Tensor,
    mode: str = "exact",
    *,
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | None = None,
) -> Tensor:
    """The logistic function 1 / (1 + e^-x) of every element, in [0, 1]; arguments and errors as :func:`tanh`."""
    return _call("sigmoid", x, mode, grad, out, table)


def silu(
    x: Tensor,
    mode: str = "exact",
    *,
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | None = None,
) -> Tensor:
    """SiLU or Swish, x * sigmoid(x); arguments and errors as :func:`tanh`, but ``grad`` is "x" alone."""
    return _call("silu", x, mode, grad, out, table)


def gelu(
    x: Tensor,
    mode: str = "exact",
    *,
    approximate: str = "none",
    grad: str | None = None,
    out: Tensor | None = None,
    table: Table | str | None = None,
) -> Tensor:
    """GELU: x Phi(x) for ``approximate="none"``, the form by tanh for "tanh" (mode "ktanh" always has that form).

    Other arguments and errors as :func:`tanh`, but ``grad`` is "x" alone.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate must be "none" or "tanh", got {approximate!r}')
    return _call("gelu" if approximate == "none" else "gelu_tanh", x, mode, grad, out, table)


def _call(
    function: str, x: Tensor, mode: str, grad: str | None, out: Tensor | None, table: Table | str | None
) -> Tensor:
    if torch.compiler.is_compiling():
        return _traced(function, x, mode, grad, out, table)
    # The short way: plain contiguous data that was computed before.
    if type(x) is Tensor and table is None and grad is None and not (x.requires_grad and torch.is_grad_enabled()):
        known = _known.get((function, mode, x.dtype, x.device.type, kernels.isa()))
        if known is not None and _plain(x) and x.is_contiguous() and not x.is_neg() and not _transformed():
            y = torch.empty_like(x) if out is None else out
            if out is None or (_matches(x, out) and not _overlaps(x, out)):
                n = x.numel()
                threads = 1 if n < _THREADED else torch.get_num_threads()
                known[0](address(x), address(y), n, known[1], threads)
                if out is not None:
                    _changed(out)
                return y
    text = _text(table)
    if has_torch_function((x, out)):  # a proxy of torch.fx, a subclass with operators of its own
        return _overridden(function, x, mode, grad, out, text)
    _check(function, x, mode, text)
    _check_memory(x)
    direction = gradients.resolve(function, mode, grad)
    if out is not None:
        return _into(x, function, mode, direction, text, out)
    return _result(x, function, mode, direction, text)


def _result(x: Tensor, function: str, mode: str, grad: str, table: str) -> Tensor:
    """The result with its gradient, in the form that those who watch operators can take."""
    if torch._C._functorch.peek_interpreter_stack() is not None or _dual():
        return _apply(x, function, mode, grad, table)
    if torch._C._is_tracing() and torch.onnx.is_in_onnx_export():
        return plain.activation(x, function, mode, table)
    if type(x) is Tensor and not x.requires_grad and not _transformed():
        return _forward(x, function, mode, table)
    if type(x).__name__ == "DTensor":
        _register_sharding()
    result: Tensor = torch.ops.rarefy.activation(x, function, mode, grad, table)
    return result


@cache
def _register_sharding() -> None:
    """Tell distributed tensors that the operator works on every element by itself; sums that are pending come first."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    @register_sharding(torch.ops.rarefy.activation.default)
    def _(x: Any, *options: str) -> list[tuple[list[Any], list[Any]]]:
        places = [Replicate(), *(Shard(dim) for dim in range(x.ndim))]
        return [([place], [place, *(None for _ in options)]) for place in places]


def _overridden(function: str, x: Tensor, mode: str, grad: str | None, out: Tensor | None, table: str) -> Tensor:
    """Through ``__torch_function__`` of the arguments, as a function of PyTorch; a table goes as text."""
    given: dict[str, Any] = {"grad": grad, "out": out, "table": table or None}
    given = {key: value for key, value in given.items() if value is not None}
    if function == "gelu_tanh":
        given["approximate"] = "tanh"
    public = {"tanh": tanh, "sigmoid": sigmoid, "silu": silu, "gelu": gelu, "gelu_tanh": gelu}[function]
    result: Tensor = handle_torch_function(public, (x, out), x, mode, **given)
    return result


def _plain(x: Tensor) -> bool:
    """Whether the numbers lie in memory by strides, as tensors mostly do."""
    return (
        x.layout is torch.strided
        and not x.is_nested
        and not x._is_zerotensor()
        and not torch._is_functional_tensor(x)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _check_memory(x: Tensor) -> None:
    """Raise ValueError for a tensor whose memory was freed: PyTorch's own operators would read it."""
    if _direct(x) and not x.is_neg():
        address(x)


def _changed(out: Tensor) -> None:
    """Tell autograd that a kernel wrote to ``out``."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _matches(x: Tensor, out: Tensor) -> bool:
    """Whether a kernel may write the result of contiguous ``x`` to ``out`` as it lies."""
    return (
        type(out) is Tensor
        and _plain(out)
        and out.dtype is x.dtype
        and out.shape == x.shape
        and out.device == x.device
        and out.is_contiguous()
        and not out.is_neg()
        and not (out.requires_grad and torch.is_grad_enabled())
    )


def _overlaps(x: Tensor, out: Tensor) -> bool:
    """Whether two contiguous tensors of one size share memory without being the same."""
    a, b, size = address(x), address(out), x.numel() * x.element_size()
    return a != b and a < b + size and b < a + size


def _text(table: Table | str | None) -> str:
    if table is None:
        return ""
    return table if isinstance(table, str) else table.text


def _check(function: str, x: Tensor, mode: str, table: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function} takes a tensor, got {type(x).__name__}")
    _check_dtype(function, x.dtype, mode, table)
    if x.layout is not torch.strided or x.is_nested:
        kind, way = f"layout {x.layout}", "use x.to_dense()"
        if x.is_nested:
            kind, way = "a nested tensor", "pad it with torch.nested.to_padded_tensor()"
        raise TypeError(f"{function} takes a dense tensor, got {kind}: {way}")


def _check_dtype(function: str, dtype: torch.dtype, mode: str, table: str) -> None:
    if dtype not in FORMAT_OF:
        known = ", ".join(str(each).removeprefix("torch.") for each in FORMAT_OF)
        raise TypeError(f"{function} takes {known}; got {str(dtype).removeprefix('torch.')}: convert it first")
    reference.check(function, mode, FORMAT_OF[dtype], given_table(table))


def _transformed() -> bool:
    """Whether a transform of PyTorch (vmap, functional gradients, fake or tracing modes) watches operators."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or _dual()
    )


def _dual() -> bool:
    """Whether tensors may carry tangents of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def _check_out(x: Tensor, out: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor like x, got {type(out).__name__}")
    if out.layout is not torch.strided or out.is_nested:
        kind = "a nested tensor" if out.is_nested else f"layout {out.layout}"
        raise TypeError(f"out must be a dense tensor, got {kind}: leave it out, or give torch.empty_like of a dense x")
    if out.dtype != x.dtype or out.shape != x.shape or out.device != x.device:
        raise ValueError(
            f"out must have the shape, dtype and device of x ({tuple(x.shape)}, {x.dtype}, {x.device}),"
            f" got {tuple(out.shape)}, {out.dtype}, {out.device}"
        )


def _into(x: Tensor, function: str, mode: str, grad: str, table: str, out: Tensor) -> Tensor:
    _check_out(x, out)
    _check_memory(out)
    tangents = _dual() and any(
        forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]
        for t in (x, out)
    )
    if tangents or (torch.is_grad_enabled() and (x.requires_grad or out.requires_grad)):
        raise RuntimeError("out= does not support gradients; use torch.no_grad() or leave it out")
    if _direct_into(x, function, mode, table, out):
        return out
    return out.copy_(_result(x, function, mode, grad, table))


def in_place(call: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    """``call``, one of the functions, written over ``x``: with a gradient, as PyTorch's functions of ``inplace=True``.

    Raises RuntimeError, PyTorch's own, for a leaf that needs a gradient.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return x.copy_(call(x.clone(), **options))  # the backward needs the input
    return call(x, out=x, **options)


def _direct_into(x: Tensor, function: str, mode: str, table: str, out: Tensor) -> bool:
    """Let the kernel write to ``out`` itself where layouts allow; whether it did."""
    if _transformed() or not _direct(x) or x.is_neg() or not x.is_contiguous() or not _matches(x, out):
        return False
    kernel = None if _overlaps(x, out) else _kernel(x, function, mode, table)
    if kernel is None:
        return False
    if not table:
        _known[function, mode, x.dtype, "cpu", kernels.isa()] = kernel
    kernel[0](address(x), address(out), x.numel(), kernel[1], _threads(x.numel()))
    _changed(out)
    return True


def _direct(x: Tensor) -> bool:
    """Whether a kernel may read ``x``: a plain tensor or a parameter."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and _plain(x)


def _threads(n: int) -> int:
    return torch.get_num_threads() if n >= _THREADED else 1


_programs: dict[tuple[str, str, torch.dtype, str], native.Program | None] = {}
_known: dict[tuple[str, str, torch.dtype, str, str | None], tuple[Any, int]] = {}


def program(function: str, mode: str, dtype: torch.dtype, table: str = "") -> native.Program | None:
    """The native program of a function, made when it is first needed; None for what has no kernel of its own."""
    key = (function, mode, dtype, table)
    if key not in _programs:
        fmt, given = FORMAT_OF[dtype], given_table(table)
        direct = reference.table_for(function, mode, fmt, given)
        if (function, mode) == ("tanh", "hard") and fmt.bits == 16:
            _programs[key] = native.hard(fmt.name, reference.answers(function, mode, fmt))
        elif mode == "exact" and fmt.name == "bf16" and function != "tanh":
            _programs[key] = native.gate(function, reference.answers(function, mode, fmt))
        elif direct is not None:
            _programs[key] = native.program(
                direct, reference.answers(function, mode, fmt, given) if fmt.bits <= 16 else None
            )
        elif fmt.bits <= 16:
            _programs[key] = native.lookup(fmt.name, reference.answers(function, mode, fmt, given))
        elif (function, mode) == ("tanh", "exact"):
            _programs[key] = native.quartic(quartic_tanh())
        elif mode == "exact":
            _programs[key] = native.wide(function)
        else:
            _programs[key] = None
    return _programs[key]


def _kernel(x: Tensor, function: str, mode: str, table: str) -> tuple[Any, int] | None:
    if not _direct(x) or _transformed():
        return None
    chosen = program(function, mode, x.dtype, table)
    return None if chosen is None else chosen.kernel()


def _forward(x: Tensor, function: str, mode: str, table: str) -> Tensor:
    """The result of real data, without a gradient."""
    x = x.detach()
    kernel = _kernel(x, function, mode, table)
    if kernel is not None:
        x = x.resolve_neg()
        y = torch.empty_like(x)
        if x.stride() != y.stride():  # overlapping or with gaps; empty_like keeps every other layout
            x, y = x.contiguous(), y.contiguous()
        kernel[0](address(x), address(y), x.numel(), kernel[1], _threads(x.numel()))
        if not table:
            _known[function, mode, x.dtype, "cpu", kernels.isa()] = kernel
        return y
    with subnormals.kept():
        if x.dtype == torch.float32 and mode == "ktanh" and function != "tanh":
            core = given_table(table)
            if core is None or core.function == "tanh":
                return aten.derived32(x, function, lambda z: _forward(z, "tanh", mode, table))
        return aten.activation(x, function, mode, table)


@torch.library.custom_op("rarefy::activation", mutates_args=())
def activation(x: Tensor, function: str, mode: str, grad: str, table: str) -> Tensor:
    """The operator behind the functions; ``table`` is "", the name of a shipped table, or a table's JSON."""
    _check(function, x, mode, table)
    result = _forward(x, function, mode, table)
    return result.clone() if result is x else result


@activation.register_fake
def _fake(x: Tensor, function: str, mode: str, grad: str, table: str) -> Tensor:
    return torch.empty_like(x)


@torch._decomp.register_decomposition([torch.ops.rarefy.activation.default])
def _decomposed(x: Tensor, function: str, mode: str, grad: str, table: str) -> Tensor:
    """What a tracer that is given PyTorch's table of decompositions makes of the operator."""
    if torch.onnx.is_in_onnx_export():  # a program's decomposition cannot add constants
        raise RuntimeError(
            "this exported program was made with gradients and holds the operator rarefy::activation, which ONNX has"
            " not: give torch.onnx.export the model itself, or export the model after requires_grad_(False)"
        )
    return plain.activation(x, function, mode, table)


# without it fake tensors of symbolic shapes would run the decomposition
torch._decomp.register_decomposition([torch.ops.rarefy.activation.default], type="meta")(_fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.function, ctx.mode, ctx.grad, _ = inputs
    ctx.save_for_backward(output if ctx.grad == "y" else x)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    (saved,) = ctx.saved_tensors
    return gradients.backward(upstream, saved, ctx.function, ctx.mode, ctx.grad), None, None, None, None


activation.register_autograd(_backward, setup_context=_setup)


class _Activation(torch.autograd.Function):
    """The function for torch.compile, which traces through it, and for the transforms of torch.func."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, function: str, mode: str, grad: str, table: str) -> Tensor:
        if torch.compiler.is_compiling():
            return aten.activation(x, function, mode, table)
        return _forward(x, function, mode, table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, upstream[0])

    @staticmethod
    def vmap(
        info: Any, dims: tuple[Any, ...], x: Tensor, function: str, mode: str, grad: str, table: str
    ) -> tuple[Tensor, Any]:
        return _apply(x, function, mode, grad, table), dims[0]


class _ForwardMode(_Activation):
    """The same with forward-mode derivatives, which torch.compile does not trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup(ctx, inputs, output)
        ctx.save_for_forward(output if ctx.grad == "y" else inputs[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (saved,) = ctx.saved_tensors
        return gradients.backward(tangent, saved, ctx.function, ctx.mode, ctx.grad)


def _apply(x: Tensor, function: str, mode: str, grad: str, table: str) -> Tensor:
    kind = _Activation if torch.compiler.is_compiling() else _ForwardMode
    result: Tensor = kind.apply(x, function, mode, grad, table)  # type: ignore[no-untyped-call]
    return result


_kept: ContextVar[bool] = ContextVar("kept", default=False)


@contextlib.contextmanager
def kept_operators() -> Iterator[None]:
    """Within the block ``torch.export`` records our operator and not plain ones: whoever runs the program has it."""
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)


def _traced(
    function: str, x: Tensor, mode: str, grad: str | None, out: Tensor | None, table: Table | str | None
) -> Tensor:
    text = _text(table)
    _validated(function, mode, str(x.dtype), text)
    direction = gradients.resolve(function, mode, grad)
    if out is not None:
        _check_out(x, out)
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    dynamo, exporting = torch.compiler.is_dynamo_compiling(), torch.compiler.is_exporting()
    # the fused form of float32 would cost far more than the kernel
    slow_fused = x.dtype == torch.float32 and mode == "exact" and x.device.type == "cpu"
    result: Tensor
    kept = not dynamo and _kept.get()
    if exporting and not kept and (not needs_gradient or torch.onnx.is_in_onnx_export()):
        result = plain.activation(x, function, mode, text)
    elif exporting or not dynamo or slow_fused:
        result = torch.ops.rarefy.activation(x, function, mode, direction, text)
    elif needs_gradient:
        result = _apply(x, function, mode, direction, text)
    else:
        result = aten.activation(x, function, mode, text)
    return result if out is None else out.copy_(result)


@torch.compiler.assume_constant_result
def _validated(function: str, mode: str, dtype: str, table: str) -> bool:
    _check_dtype(function, getattr(torch, dtype.removeprefix("torch.")), mode, table)
    return True
